"""Convolutions of an ONNX graph whose weights are bytes: of integers with wide outputs, or widened as they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hollow import SOLID_BYTES
from .onnx_editing import FLOAT, OWN, make_node

if TYPE_CHECKING:
    import onnx_ir

    from ..quantize.grid import Grid
    from .onnx_editing import Editor


class Convolutions:
    """All of one weight."""

    def __init__(self, edit: Editor, weight: onnx_ir.Value, codes: onnx_ir.Value, scales: onnx_ir.Value) -> None:
        """Prepare.

        Args:
            edit: the graph.
            weight: (O, I, H, W) float32, which they take so far.
            codes: bytes in its shape.
            scales: float32 (O,).
        """
        self._edit, self._weight, self._codes, self._scales = edit, weight, codes, scales

    def with_wide_outputs(self, before: Grid) -> None:
        """Put ConvInteger in their place, and scale what it makes.

        Weights are of unsigned bytes around 128: for signed ones ONNX Runtime has no kernel but a slow one on x86.

        Args:
            before: what their input is rounded to; steps that channels have of their own are in the weights.
        """
        scales = self._scales
        if not before.by_channel:
            both = make_node("Mul", [scales, self._edit.numbers(before.steps)], name=f"{self._weight.name}.scale")
            self._edit.begin_with(both)
            scales = both.outputs[0]
        zeros = [self._edit.codes_of(before.zeros), self._edit.codes_of((0,))]
        for node in [user for user, _ in self._weight.uses()]:
            taken = node.inputs[0]
            assert taken is not None  # noqa: S101 - a convolution has an input
            inputs = [self._edit.rounded(taken, before, node), self._codes, *zeros]
            product = make_node("ConvInteger", inputs, like=node)
            product.attributes.update(node.attributes)
            wide = make_node("Cast", product.outputs, {"to": FLOAT}, name=f"{node.name}.float32")
            new = [product, wide, *self._rowwise("Mul", wide, scales, f"{node.name}.scaled")]
            if len(node.inputs) > 2 and node.inputs[2] is not None:  # noqa: PLR2004 - its third is the bias
                new += self._rowwise("Add", new[-1], node.inputs[2], f"{node.name}.bias")
            self._edit.replace(node, new)

    def widened(self, before: Grid | None, after: Grid | None) -> None:
        """Widen codes as they run; between roundings of what goes in and out ONNX Runtime makes QLinearConv of it.

        Activations are of unsigned bytes: of signed ones ONNX Runtime would make these, with one zero point for all channels.
        QLinearConv takes one step for all of its input, and one for its output. So where channels have steps of their own,
        those of the input are in the weights, and those of the output in the weights' scales and in the bias.

        Each channel of the weight has a zero point of its own: where ONNX Runtime makes weights unsigned, for CPUs without
        VNNI, it would put one number where it then asks for as many as there are scales.

        Args:
            before: what their input is rounded to, if it is.
            after: what their output is rounded to, if it is.
        """
        import numpy as np

        assert self._scales.shape is not None  # noqa: S101 - an initializer has one
        zeros = np.zeros(self._scales.shape.numpy(), dtype=np.int8)
        inputs = [self._codes, self._scales, self._edit.array(zeros, f"{OWN}{self._weight.name}.zeros")]
        wide = make_node("DequantizeLinear", inputs, {"axis": 0}, name=f"{self._weight.name}.float32")
        users = [user for user, _ in self._weight.uses()]
        self._weight.replace_all_uses_with(wide.outputs[0])
        self._edit.begin_with(wide)
        for user in users:
            if before:
                self._take_rounded(user, before)
            if after:
                self._give_rounded(user, after)

    def _rowwise(self, kind: str, node: onnx_ir.Node, numbers: onnx_ir.Value, name: str) -> list[onnx_ir.Node]:
        """Return an operation of a convolution's output with a number for each of its channels."""
        import numpy as np

        spread = make_node("Unsqueeze", [numbers, self._edit.array(np.array([1, 2]))], name=f"{name}.spread")
        return [spread, make_node(kind, [node.outputs[0], spread.outputs[0]], name=name)]

    def _take_rounded(self, node: onnx_ir.Node, grid: Grid) -> None:
        """Round what a convolution takes first; the steps of channels are left to its weights."""
        taken = node.inputs[0]
        assert taken is not None  # noqa: S101 - a convolution has an input
        step = self._edit.numbers((1.0,) if grid.by_channel else grid.steps)
        zero = self._edit.codes_of(grid.zeros)
        values = self._edit.rounded(taken, grid, node)
        wide = make_node("DequantizeLinear", [values, step, zero], name=f"{node.name}.given")
        self._edit.graph.insert_before(node, wide)
        node.replace_input_with(0, wide.outputs[0])

    def _give_rounded(self, node: onnx_ir.Node, grid: Grid) -> None:
        """Round what a convolution gives; with steps for channels its weights make it of steps, and its bias begins at nought's code."""
        given = node.outputs[0]
        steps, zero = self._edit.numbers(grid.steps), self._edit.codes_of((0,) if grid.by_channel else grid.zeros)
        if grid.by_channel:
            self._give_bias(node, grid)
        step = self._edit.numbers((1.0,)) if grid.by_channel else steps
        rounded = make_node("QuantizeLinear", [given, step, zero], name=f"{node.name}.rounded")
        zeros = self._edit.codes_of((0,) * len(grid.steps)) if grid.by_channel else zero
        behind = [rounded.outputs[0], steps, zeros]
        new = [rounded, make_node("DequantizeLinear", behind, {"axis": 1}, name=f"{node.name}.made")]
        if grid.by_channel:
            new.append(make_node("Add", [new[-1].outputs[0], self._noughts(grid)], name=f"{node.name}.around"))
        made = new[-1].outputs[0]
        made.shape, made.type = given.shape, given.type
        if given.is_graph_output():
            made.name, given.name = given.name, f"{node.name}.steps"
        given.replace_all_uses_with(made, replace_graph_outputs=True)
        rounded.replace_input_with(0, given)
        self._edit.graph.insert_after(node, new)

    def _noughts(self, grid: Grid) -> onnx_ir.Value:
        """Return what is added to codes times steps, so that nought's code is nought.

        Not zero points: what has them for each channel ONNX Runtime fuses with what comes behind, and then refuses to run.
        """
        import numpy as np

        noughts = -np.asarray(grid.zeros, dtype=np.float32) * np.asarray(grid.steps, dtype=np.float32)
        return self._edit.array(noughts.reshape(1, -1, 1, 1))

    def _give_bias(self, node: onnx_ir.Node, grid: Grid) -> None:
        """Let a convolution's bias be in its output's codes."""
        import numpy as np

        bias: Any = np.asarray(grid.zeros, dtype=np.float32)
        if len(node.inputs) > 2 and node.inputs[2] is not None:  # noqa: PLR2004 - its third is the bias
            old = node.inputs[2].const_value
            assert old is not None and old.nbytes < SOLID_BYTES  # noqa: S101, PT018 - larger ones are hollow
            bias = bias + old.numpy().astype(np.float32) / np.asarray(grid.steps, dtype=np.float32)
        made = self._edit.array(bias, f"{node.name}.bias")
        node.resize_inputs(3)
        node.replace_input_with(2, made)
