import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bakeoff.errors import InputError
from bakeoff.models.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Item, Scene, random_scene
from bakeoff.models.scorer import ATTRIBUTES, parse_caption, read, score, scorer_hash

COUNT = 300
VALUES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES)}


def as_rendered(pictures, _):
    return pictures


def blurred_and_noisy(pictures, _):
    from scipy import ndimage

    noise = np.random.default_rng(0).normal(0, 8, pictures.shape)
    return (ndimage.gaussian_filter(pictures.astype(float), (0, 0.7, 0.7, 0)) + noise).clip(0, 255).astype(np.uint8)


def through_the_vae(pictures, shapes):
    import torch
    from diffusers import AutoencoderKL

    from bakeoff.models.training.data import pixels

    vae = AutoencoderKL.from_pretrained(shapes / "vae").eval()
    with torch.no_grad():
        batches = torch.from_numpy(pictures).split(50)
        decoded = torch.cat([vae.decode(vae.encode(pixels(batch)).latent_dist.mean)[0] for batch in batches])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(
    scope="module", params=[as_rendered, pytest.param(blurred_and_noisy, marks=pytest.mark.slow), through_the_vae]
)
def judged(request, shapes):
    rng = random.Random(99)
    scenes = [random_scene(rng) for _ in range(COUNT)]
    return scenes, request.param(np.stack([np.asarray(scene.render(rng)) for scene in scenes]), shapes)


@pytest.fixture(scope="module", autouse=True)
def _each_picture_is_read_once():
    """What is read of a picture doesn't depend on the prompt, and takes nearly all of the time."""
    readings = {}

    def remembered(picture):
        key = picture.tobytes()
        if key not in readings:
            readings[key] = read(picture)
        return readings[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bakeoff.models.scorer.read", remembered)
        yield


def test_true_prompts_are_accepted(judged):
    assert np.mean([score(scene, picture).right for scene, picture in zip(*judged, strict=True)]) >= 0.99


@pytest.mark.parametrize("attribute", ["background", "relation", "shape", "color", "size"])
def test_prompts_that_differ_in_one_attribute_are_rejected(judged, attribute):
    rng = random.Random(1)
    verdicts = [
        score(changed(scene, attribute, rng), picture)
        for scene, picture in zip(*judged, strict=True)
        if scene.relation or attribute != "relation"
    ]
    assert np.mean([verdict.right for verdict in verdicts]) <= 0.02
    assert np.mean([getattr(verdict, attribute) for verdict in verdicts]) <= 0.02


def changed(scene, attribute, rng):
    def other(values, than):
        return rng.choice([value for value in values if value != than])

    if attribute == "background":
        return replace(scene, background=other(BACKGROUNDS, scene.background))
    if attribute == "relation":
        return replace(scene, relation=other(RELATIONS, scene.relation))
    items = list(scene.items)
    number = rng.randrange(len(items))
    value = other(VALUES[attribute], getattr(items[number], attribute))
    items[number] = replace(items[number], **{attribute: value})
    return replace(scene, items=tuple(items))


def test_a_shape_too_many_is_counted():
    rng = random.Random(0)
    scene = Scene("gray", (Item("small", "red", "star"), Item("large", "blue", "ring")), "left of")
    verdict = score(Scene("gray", scene.items[:1]), np.asarray(scene.render(rng)))
    assert not verdict.count
    assert not verdict.right


def test_blobs_and_empty_pictures_show_nothing():
    empty = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert read(empty).found == ()
    blob = empty.copy()
    blob[20:24, 5:60] = COLORS["red"]
    assert [(found.color, found.shape) for found in read(blob).found] == [("red", None)]
    verdict = score("a small red star on a gray background", empty)
    assert {name for name in ATTRIBUTES if getattr(verdict, name)} == {"background", "relation"}


def test_captions_are_read_back():
    rng = random.Random(2)
    for _ in range(100):
        scene = random_scene(rng)
        assert parse_caption(scene.caption) == scene


@pytest.mark.parametrize("caption", ["a cat", "a red circle", "a large red circle near a small blue star", ""])
def test_other_prompts_are_refused(caption):
    with pytest.raises(InputError, match="caption"):
        parse_caption(caption)


def test_other_pictures_are_refused():
    with pytest.raises(InputError, match="64, 64, 3"):
        read(np.zeros((3, 64, 64), dtype=np.uint8))


def test_figures_were_taken_with_this_scorer():
    record = json.loads((Path(__file__).parent.parent / "docs" / "benchmarks" / "shapes_accuracy.json").read_text())
    assert record["scorer"] == scorer_hash()
