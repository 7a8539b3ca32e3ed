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


class Whole(torch.nn.Module):
    """Of layers and a table of its own, given a timestep as it is, as Sana's transformer."""

    def __init__(self):
        super().__init__()
        self.table, self.seen = torch.nn.Parameter(torch.ones(4)), []
        self.block = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(4, 4)})
        self.proj_out = torch.nn.Linear(4, 4)

    def forward(self, given, timestep):
        self.seen.append(timestep)
        return self.proj_out(self.block["proj_out"](given * self.table))


def test_one_of_several_layers_of_a_name_is_meant_and_timesteps_stay_exact(tmp_path):
    module = Whole()
    wide = {"proj_out.weight", "proj_out.bias"}
    dtypes = {name: torch.float32 if name in wide else torch.bfloat16 for name in module.state_dict()}
    save_file(
        {name: each.to(dtypes[name]) for name, each in module.state_dict().items()}, tmp_path / "model.safetensors"
    )
    own = module.block["proj_out"].weight.detach().bfloat16()
    module.to(torch.bfloat16)
    assert keep_wide(module, tmp_path, torch.bfloat16) == ["proj_out"]
    assert torch.equal(module.block["proj_out"].weight, own)
    with torch.no_grad():
        module(torch.ones(2, 4, dtype=torch.bfloat16), torch.tensor(901.7))
    assert module.seen == [torch.tensor(901.7)]
