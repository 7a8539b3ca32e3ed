import json

import pytest

from bakeoff.components.family import Part
from bakeoff.sources.source import Source

HALVES = {"vae_encoder": ("encoder", "quant_conv"), "vae_decoder": ("decoder", "post_quant_conv")}


def modules_with_weights(part: Part) -> set[str]:
    """Names, as in the checkpoint, of the modules of a part that have a matrix or a kernel."""
    entries = Source.open("shapes").checkpoint(part.module).entries.values()
    names = {entry.name.rpartition(".")[0] for entry in entries if len(entry.shape) > 1}
    return {name for name in names if part.name not in HALVES or name.partition(".")[0] in HALVES[part.name]}


@pytest.mark.parametrize("recipe", ["onnx:fp32", "openvino:fp32"])
def test_every_module_with_a_weight_is_found_under_its_name_in_the_checkpoint(baked, recipe):
    for part in Source.open("shapes").family.parts:
        layers = json.loads((baked(recipe) / part.name / "layers.json").read_text())
        assert modules_with_weights(part) <= set(layers), part.name
        assert all(layers.values())
        assert not any(name == "" or name.startswith("_") for name in layers)
