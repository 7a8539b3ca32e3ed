import json

import pytest
import torch

from bakeoff.models.scenes import Item, Scene
from bakeoff.models.training import loop
from bakeoff.models.training.__main__ import train
from bakeoff.models.training.recipe import Recipe
from bakeoff.models.training.text_encoder import _labels

TINY = Recipe(
    scenes=16, crowds=8, vae_steps=2, vae_batch=4, text_steps=2, text_batch=4, denoiser_steps=2, denoiser_batch=2
)


def minimize(state, loss_at, steps=6):
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    stage = loop.optimize("layer", modules, lambda step: loss_at(modules["layer"], step), steps, 1e-2, 0.9, state)
    return modules.state_dict(), stage


def loss_of(layer, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (layer(x) - x).square().mean()


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, _ = minimize(tmp_path / "whole", loss_of)

    def interrupted(layer, step):
        if step == 4:
            raise KeyboardInterrupt
        return loss_of(layer, step)

    with pytest.raises(KeyboardInterrupt):
        minimize(tmp_path / "broken", interrupted)
    resumed, stage = minimize(tmp_path / "broken", loss_of)
    assert stage.step == 6
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(("relation", "opposite"), [("left of", "right of"), ("above", "below")])
def test_a_scene_has_the_same_labels_from_either_side(relation, opposite):
    small, large = Item("small", "red", "star"), Item("large", "blue", "ring")
    told = _labels(Scene("gray", (small, large), relation))
    assert told == _labels(Scene("gray", (large, small), opposite))
    assert told != _labels(Scene("gray", (large, small), relation))
    assert [labels[0] for labels in told] == [1, 1]


@pytest.mark.slow
def test_a_training_writes_a_pipeline_that_diffusers_opens(tmp_path):
    from diffusers import StableDiffusionPipeline

    (tmp_path / "state").mkdir()
    train(TINY, tmp_path / "state", tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a large red ring on a gray background", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert [stage["step"] for stage in record["stages"].values()] == [2, 2, 2]
    with pytest.raises(SystemExit, match="another recipe"):
        train(Recipe(seed=1), tmp_path / "state", tmp_path / "other")
