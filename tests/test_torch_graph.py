"""A torch module as it runs: layers, the functions between them, and the tensors that join these."""

import pytest
import torch
from torch import nn

from bakeoff.parity.anatomy import Anatomy
from bakeoff.runtimes.torch_graph import Recording, layers_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.places = nn.Embedding(3, 4)

    def forward(self, x):
        x = x + self.places(torch.arange(x.shape[0]))
        x = x + self.second(torch.relu(self.first(x)))
        x += self.second(x)
        return x, x.chunk(2, -1)[1]


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Block()

    def forward(self, x):
        return self.module(x)


@pytest.fixture
def recorded():
    torch.manual_seed(0)
    module = Wrapper()
    names = {path: path.removeprefix("module.") for path in layers_of(module)}
    given = {"x": torch.randn(3, 4)}

    def record(*wanted):
        recording = Recording(module, names, wanted)
        with torch.no_grad():
            recording.run(given, ["whole", "half"])
        return recording

    return record, module, given


def test_a_layer_is_one_operation_and_so_is_each_function_outside_of_layers(recorded):
    record, _, _ = recorded
    operations = record().operations
    assert [operation.kind for operation in operations] == [
        *("Constant", "Embedding", "Add", "Linear", "Relu", "Linear", "Add", "Linear", "Add", "Chunk"),
        *("Output", "Output"),
    ]
    assert [each.layer for each in operations if each.kind == "Linear"] == ["first", "second", "second"]
    assert [each.name for each in operations if each.kind == "Linear"][1:] == ["module.second", "module.second#2"]
    assert [operation.name for operation in record().operations] == [operation.name for operation in operations]


def test_operations_are_joined_by_their_tensors(recorded):
    record, _, _ = recorded
    anatomy = Anatomy(record().operations, ["x"])
    between, begins = anatomy.between("module.second", {"module.first", "module.places"})
    assert [operation.kind for operation in between] == ["Relu", "Linear"]
    assert begins == {"module.first"}
    between, begins = anatomy.between("whole", {"module.first", "module.second#2"})
    assert [operation.kind for operation in between][-2:] == ["Add", "Output"]
    assert anatomy.given("places") == ["module.places/input"]
    assert anatomy.operations("places"), "what no input's values reach is still looked at"


def test_tensors_are_kept_as_they_were(recorded):
    record, module, given = recorded
    add = next(operation.outputs[0] for operation in record().operations if operation.kind == "Add")
    kept = record("module.first", add, "module.places/input", "whole").kept
    with torch.no_grad():
        placed = given["x"] + module.module.places.weight
        assert torch.equal(kept[add], placed)
        assert torch.equal(kept["module.first"], module.module.first(placed))
        assert torch.equal(kept["whole"], module(given["x"])[0]), "though an earlier tensor was changed in place"
    assert kept["module.places/input"].tolist() == [0, 1, 2]


def test_nothing_is_left_on_the_module(recorded):
    record, module, _ = recorded
    record()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
