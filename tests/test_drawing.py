"""What is drawn for a proof, and what parts were given on the way."""

import json

import pytest
import torch

from bakeoff.components.component import PROOF_SIZES, solve_sizes
from bakeoff.models.prompts import default_prompts, read_prompts
from bakeoff.models.tiny import build
from bakeoff.parity import drawing
from bakeoff.sources.source import Source
from bakeoff.tuning.calibrate import DEFAULT_PROMPTS


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sit(folder, **options):
    source = Source.open(str(folder), **options)
    return source, drawing.sit(source, str(folder))


def test_parts_are_recorded_at_three_shapes_and_steps(shapes):
    source, session = sit(shapes)
    assert session.obstacle is None
    assert [len(shot.prompts) for shot in session.shots] == [sizes.batch for sizes in PROOF_SIZES]
    taken = {prompt.text for prompt in read_prompts(default_prompts(str(shapes)), DEFAULT_PROMPTS)}
    assert taken.isdisjoint(text for shot in session.shots for text in shot.prompts), "a calibration's"
    assert all(shot.guidance_scale > source.family.unguided_at_most for shot in session.shots)
    for drawn, shot in zip(session.drawn, session.shots, strict=True):
        assert drawn.pictures.shape == (len(shot.prompts), shot.height, shot.width, 3)
        assert drawn.latents.shape[:2] == (shot.steps, len(shot.prompts))
    for part in source.parts:
        sizes = [
            solve_sizes(part.name, part.component.inputs(source.config(part.module)), case.inputs)
            for case in session.cases[part.name]
        ]
        assert len({str(each) for each in sizes}) >= 3, part.name
        assert {each["batch"] for each in sizes} >= {1, 3}, part.name
    unet = session.cases["unet"]
    assert [case.call for case in unet] == [0, 1, 2, 2, 0]
    times = [float(case.inputs["timestep"]) for case in unet[:3]]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3
    assert unet[-1].inputs["encoder_hidden_states"].shape[1] == PROOF_SIZES[-1].sequence
    text, plain = (case.inputs["input_ids"] for case in session.cases["text_encoder"][:2])
    assert text.unique().numel() > plain.unique().numel(), "a prompt, and the empty one that guides"


def test_both_halves_of_guidance_occur(shapes):
    _, session = sit(shapes)
    unguided, guided = session.cases["unet"][0].inputs["encoder_hidden_states"]
    assert not torch.equal(unguided, guided)


def test_a_model_for_inpainting_alone_draws_from_a_picture(tmp_path):
    folder = build("stable-diffusion", tmp_path / "model", changes={"unet": {"in_channels": 9}})
    source, session = sit(folder)
    assert session.obstacle is None
    assert set(session.cases) == {part.name for part in source.parts}
    assert session.cases["unet"][0].inputs["sample"].shape[1] == 9


def test_a_controlnet_and_its_unet_are_reached(tiny):
    module = tiny("stable-diffusion", "controlnet") / "controlnet"
    source, session = sit(tiny("stable-diffusion"), variant="controlnet", module=str(module))
    assert session.obstacle is None
    assert {"controlnet", "unet"} <= set(session.cases) == {part.name for part in source.parts}


def test_what_no_drawing_comes_to_has_no_cases(tiny):
    source, session = sit(tiny("pixart-sigma"))
    assert {part.name for part in source.parts} - set(session.cases) == {"vae_encoder"}


def test_nothing_is_drawn_where_it_would_not_fit(shapes, monkeypatch):
    monkeypatch.setattr(drawing, "usable_bytes", lambda: 1_000_000)
    _, session = sit(shapes)
    assert "GB" in session.obstacle
    assert not session.drawn
    assert not session.cases


def test_a_shot_comes_back_from_json():
    shot = drawing.Shot(("a",), (3,), 4, 7.5, 32, 64)
    assert drawing.Shot.read(json.loads(json.dumps(shot.__dict__))) == shot
