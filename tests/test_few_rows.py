"""Integer products of few rows: what is added changes nothing, and compiled blocks stay alike."""

import pytest
import torch
from torch import nn

from bakeoff.runtimes import few_rows

quantization = pytest.importorskip("torchao.quantization")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, given):
        return given + self.narrow(nn.functional.silu(self.wide(given)))


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    made = nn.Sequential(Block(), Block(), nn.Linear(64, 8)).to(torch.bfloat16).eval()
    for block in made[:2]:
        quantization.quantize_(block, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return made


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 1, 64), (2, 40, 64)])
def test_rows_that_are_added_change_nothing(blocks, shape):
    given = torch.randn(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        before = blocks(given)
        assert few_rows.fill_up(blocks) == 4
        assert torch.equal(blocks(given), before)


def test_products_of_integers_get_more_rows_than_they_were_given(blocks, monkeypatch):
    rows = []
    own = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: rows.append(len(left)) or own(left, right))
    for _ in range(2):
        with torch.no_grad():
            blocks(torch.randn(1, 64, dtype=torch.bfloat16))
        few_rows.fill_up(blocks)
    assert rows == [1] * 4 + [few_rows.LEAST_ROWS] * 4


def test_blocks_that_are_alike_are_compiled_once(blocks):
    few_rows.fill_up(blocks)
    torch.compiler.reset()
    given, graphs = torch.randn(1, 64, dtype=torch.bfloat16), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        before = blocks(given)
        for block in blocks[:2]:
            block.compile(backend=counting)
        assert torch.equal(blocks(given), before)
    assert len(graphs) == 1


def test_integers_are_multiplied_without_a_look_at_them(blocks, monkeypatch):
    from torchao.kernel import intmm

    few_rows.fill_up(blocks)

    def look(_):
        message = "it waits for the GPU"
        raise AssertionError(message)

    monkeypatch.setattr(torch.Tensor, "__repr__", look)
    monkeypatch.setattr(few_rows, "fits", lambda *_: True)  # as on a GPU
    left = torch.randint(-8, 8, (32, 64), dtype=torch.int8)  # a CPU's product saturates, without VNNI
    right = torch.randint(-8, 8, (16, 64), dtype=torch.int8).t()
    assert torch.equal(intmm.safe_int_mm(left, right), left.int() @ right.int())


def test_what_torch_does_not_multiply_is_left_to_torchao(blocks):
    from torchao.kernel import intmm

    few_rows.fill_up(blocks)
    for shape in ((16, 64, 16), (32, 60, 16), (32, 64, 15), (32, 64, 16)):  # the last one as it is on no GPU
        left = torch.randint(-128, 128, shape[:2], dtype=torch.int8)
        right = torch.randint(-128, 128, shape[1:], dtype=torch.int8)
        assert not few_rows.fits(left, right)
        assert torch.equal(intmm.safe_int_mm(left, right), left.int() @ right.int())
