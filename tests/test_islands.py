"""Layers of a torch part that stay in float32 among layers of two bytes."""

import torch
from safetensors.torch import save_file

from bakeoff.runtimes.islands import keep_wide


def test_wide_layers_lie_where_the_others_do(tmp_path):
    """A part is moved to its device before its wide layers are read."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    stored = {
        name: each.to(torch.float32 if name.startswith("0") else torch.bfloat16)
        for name, each in module.state_dict().items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    moved = module.to("meta", torch.bfloat16)
    assert keep_wide(moved, tmp_path, torch.bfloat16) == ["0"]
    assert [(each.device.type, each.dtype) for each in (moved[0].weight, moved[1].weight)] == [
        ("meta", torch.float32),
        ("meta", torch.bfloat16),
    ]
