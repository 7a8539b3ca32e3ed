"""Weights that are there as one variant alone are taken, whole or in shards."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from bakeoff.bake import export
from bakeoff.errors import SourceError
from bakeoff.models.tiny import build
from bakeoff.recipe import parse
from bakeoff.sources.source import Source
from bakeoff.sources.variants import plainly_named


@pytest.fixture
def folder(tmp_path):
    return build("stable-diffusion", tmp_path / "model")


def as_variant(folder, size):
    """Save the UNet anew, in fp16 and by Diffusers' names for it."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").half()
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size=size)
    return unet.state_dict()


@pytest.mark.parametrize("size", ["1GB", "300KB"], ids=["whole", "shards"])
def test_the_only_variant_is_taken(folder, tmp_path, size):
    expected = as_variant(folder, size)
    artifact = export(str(folder), tmp_path / "artifact", parse("torch:fp32")[0], prove=False)
    (file,) = (artifact.folder / "unet").glob("*.safetensors")
    assert file.name == "diffusion_pytorch_model.safetensors"
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in load_file(file).items())
    source = Source.open(str(folder))
    assert (len(source.checkpoint("unet").files) > 1) == (size != "1GB")
    assert UNet2DConditionModel.from_pretrained(source.path("unet")).conv_in.weight.shape == (32, 4, 3, 3)


def test_a_plain_name_comes_first_and_two_variants_are_refused(folder):
    unet = folder / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, unet / "diffusion_pytorch_model.fp16.safetensors")
    assert plainly_named(unet) == unet
    plain.rename(unet / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(SourceError, match="has diffusion_pytorch_model.bf16.safetensors, .*fp16"):
        Source.open(str(folder)).checkpoint("unet")


def test_a_folder_that_was_changed_is_linked_anew(folder):
    as_variant(folder, "300KB")
    many = len(Source.open(str(folder)).checkpoint("unet").files)
    as_variant_again = UNet2DConditionModel.from_pretrained(Source.open(str(folder)).path("unet"))
    shutil.rmtree(folder / "unet")
    as_variant_again.save_pretrained(folder / "unet", variant="fp16")
    assert many > 1
    assert len(Source.open(str(folder)).checkpoint("unet").files) == 1
