"""Quantize an ONNX model with one call of ONNX Runtime's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def quantize_here(source: str, output: str, kind: str, inputs: str) -> None:
    """Write `model.onnx` into `output`: `ort-dynamic`, or `ort-static` calibrated with `inputs`."""
    import onnx

    whole, target = Path(source) / "unshaped.onnx", Path(output) / "model.onnx"  # beside its weights
    model = onnx.load(Path(source) / "model.onnx", load_external_data=False)
    known = list(model.graph.value_info)
    del model.graph.value_info[:]  # theirs go stale when Gemm is replaced, and then they are refused
    onnx.save(model, whole)
    try:
        _quantize(whole, target, kind, inputs)
    finally:
        whole.unlink()
    _tell_shapes(target, known)


def _quantize(whole: Path, target: Path, kind: str, inputs: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    if kind == "ort-dynamic":
        quantize_dynamic(whole, target, weight_type=QuantType.QUInt8, use_external_data_format=True)
    else:

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._rows = iter(_rows(inputs))

            def get_next(self) -> dict[str, Any] | None:
                return next(self._rows, None)

        quantize_static(whole, target, Reader(), use_external_data_format=True, per_channel=True)


def _tell_shapes(file: Path, known: list[Any]) -> None:
    """Write shapes of what is laid out anew into a model again: the runtime finds attention by them."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    laid = {node.output[0] for node in model.graph.node if node.op_type == "Transpose"}
    model.graph.value_info.extend(each for each in known if each.name in laid)
    onnx.save(model, file)


def _rows(file: str) -> list[dict[str, Any]]:
    import numpy as np

    found = np.load(file)
    count = len({name.partition(".")[0] for name in found})
    return [{n.partition(".")[2]: v for n, v in found.items() if n.startswith(f"{row}.")} for row in range(count)]
