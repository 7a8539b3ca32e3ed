"""Low-bit weights as torchao stores them, which Diffusers and Transformers open by themselves.

The layout is what `torchao.prototype.safetensors` makes of its tensors (`layer._weight_qdata`, `layer._weight_scale`… and
what they are in the file's header): written here without torchao, which rounds in its own way.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

from ..quantize.fp8 import LEAST_RANGE
from ..weights import Streamed
from .codes import Layout
from .exporter import SCALES
from .packing import Packing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..quantize.format import Format
    from ..weights import Checkpoint, Entry

_VERSION = 2
"""Of torchao's configurations."""
_CODES = "_weight_qdata"
_PLAIN = json.dumps({"_type": "Tensor"})


class TorchAO(Layout):
    """Of int4 (`IntxUnpackedToInt8Tensor`: each code takes a byte) and w8a8-dynamic (`Int8Tensor`)."""

    library: ClassVar[str] = "torchao"

    @property
    def label(self) -> str:
        return self.format.name if self.format.bits == 8 else f"{self.format.name} in bytes"  # noqa: PLR2004

    def encode(self, entry: Entry) -> list[Streamed]:
        packing = Packing(self.format, entry, importance=self.mixture.importance(entry.name))
        layer = entry.name.removesuffix(".weight")
        shape = [entry.shape[0], self.format.groups(entry.shape)]
        codes, groups = math.prod(entry.shape), math.prod(shape)
        return [
            Streamed(f"{layer}._weight_qdata", "I8", entry.shape, codes, packing.codes(lambda rows: rows)),
            Streamed(f"{layer}._weight_scale", "F32", shape, 4 * groups, packing.scales()),
            Streamed(f"{layer}._weight_zero_point", "I8", shape, groups, [bytes(groups)]),
        ]

    def stored_bytes(self, entry: Entry) -> dict[str, int]:
        groups = entry.shape[0] * self.format.groups(entry.shape)
        return {self.label: math.prod(entry.shape), SCALES: 5 * groups}

    def settings(self, skipped: list[str]) -> dict[str, Any]:  # noqa: ARG002 - known by their names
        """Return what Diffusers and Transformers read as `TorchAoConfig`.

        Layers without codes aren't listed: Diffusers would take each path for a part of any other.
        """
        made = _int4(self.format) if self.format.bits < 8 else _w8a8_dynamic()  # noqa: PLR2004 - a byte
        return {"quant_method": "torchao", "quant_type": {"default": made}, "modules_to_not_convert": None}

    def stored_name(self, name: str) -> str | None:
        before, found, _ = name.partition("._weight_")
        return f"{before}.{_CODES}" if found and not name.endswith(_CODES) else None

    def metadata(self, checkpoint: Checkpoint, coded: Mapping[str, str]) -> dict[str, str]:
        """Say what each tensor is, also under the module's name for a weight: that is where Transformers looks."""
        found = dict.fromkeys(checkpoint.entries, _PLAIN)
        for name, own in coded.items():
            found[name] = found[own] = json.dumps(self._tensor(checkpoint.entries[name].shape))
        return {**found, "tensor_names": json.dumps(list(found))}

    def _tensor(self, shape: Sequence[int]) -> dict[str, Any]:
        width = self.format.group or shape[1]
        data: dict[str, Any] = {"block_size": [1, width], "dtype": _dtype("bfloat16")}
        if self.format.bits < 8:  # noqa: PLR2004 - a byte
            data |= {"target_dtype": _dtype("int4"), "activation_quantization": None}
            return _tensor("IntxUnpackedToInt8Tensor", data)
        activations = {"granularity": _value("PerRow", {"dim": -1}), "mapping_type": _SYMMETRIC, "reduce_range": False}
        data |= {"act_quant_kwargs": _value("QuantizeTensorToInt8Kwargs", activations), "reduce_range": False}
        return _tensor("Int8Tensor", data)


class Float8(TorchAO):
    """Of fp8 (`Float8Tensor`): weights in E4M3 with a scale a row, activations rounded likewise as they come."""

    def obstacle(self, entry: Entry) -> str | None:
        reason = super().obstacle(entry)
        if reason is None and any(size % _TILE for size in entry.shape[:2]):
            return f"a GPU multiplies 8-bit floats of widths that are multiples of {_TILE}"
        return reason

    def encode(self, entry: Entry) -> list[Streamed]:
        packing = Packing(self.format, entry)
        layer, codes = entry.name.removesuffix(".weight"), math.prod(entry.shape)
        rows = entry.shape[0]
        return [
            Streamed(f"{layer}._weight_qdata", "F8_E4M3", entry.shape, codes, packing.codes(lambda rows: rows)),
            Streamed(f"{layer}._weight_scale", "F32", [rows, 1], 4 * rows, packing.scales()),
        ]

    def stored_bytes(self, entry: Entry) -> dict[str, int]:
        return {self.label: math.prod(entry.shape), SCALES: 4 * entry.shape[0]}

    def settings(self, skipped: list[str]) -> dict[str, Any]:  # noqa: ARG002 - as TorchAO's
        return {"quant_method": "torchao", "quant_type": {"default": _float8()}, "modules_to_not_convert": None}

    def _tensor(self, shape: Sequence[int]) -> dict[str, Any]:
        kernel = _value("KernelPreference", "AUTO")
        product = _value("Float8MMConfig", _PRODUCT)
        activations = {
            "float8_dtype": _dtype("float8_e4m3fn"),
            "granularity": _value("PerRow", {"dim": -1}),
            "mm_config": product,
            "hp_value_lb": LEAST_RANGE,
            "hp_value_ub": None,
            "kernel_preference": kernel,
        }
        data = {
            "block_size": [1, shape[1]],
            "mm_config": product,
            "act_quant_kwargs": _value("QuantizeTensorToFloat8Kwargs", activations),
            "kernel_preference": kernel,
            "dtype": _dtype("bfloat16"),
        }
        return {**_value("Float8Tensor", data), "_tensor_data_names": ["qdata", "scale"]}


_TILE = 16
_PRODUCT = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}
"""torchao's own default: sums in the tensor cores' own width."""


def _float8() -> dict[str, Any]:
    rows = _versioned("PerRow", {"dim": -1})
    return _versioned(
        "Float8DynamicActivationFloat8WeightConfig",
        {
            "activation_dtype": _dtype("float8_e4m3fn"),
            "weight_dtype": _dtype("float8_e4m3fn"),
            "granularity": [rows, rows],
            "packing_format": _value("Float8PackingFormat", "PLAIN"),
            "mm_config": _versioned("Float8MMConfig", _PRODUCT),
            "activation_value_lb": LEAST_RANGE,
            "activation_value_ub": None,
            "kernel_preference": _value("KernelPreference", "AUTO"),
            "set_inductor_config": True,
            "alg_id": 0,
        },
        _VERSION,
    )


def _tensor(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {**_value(kind, data), "_tensor_data_names": ["qdata", "scale", "zero_point"]}


def _value(kind: str, data: object) -> dict[str, Any]:
    return {"_type": kind, "_data": data}


def _dtype(name: str) -> dict[str, Any]:
    return _value("torch.dtype", name)


_SYMMETRIC = _value("MappingType", "SYMMETRIC")


def _versioned(kind: str, data: object, version: int = 1) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _int4(weight_format: Format) -> dict[str, Any]:
    return _versioned(
        "IntxWeightOnlyConfig",
        {
            "weight_dtype": _dtype("int4"),
            "granularity": _versioned("PerGroup", {"group_size": weight_format.group}),
            "mapping_type": _SYMMETRIC,
            "scale_dtype": _dtype("float32"),
            "intx_packing_format": _value("IntxPackingFormat", "UNPACKED_TO_INT8"),
            "intx_choose_qparams_algorithm": _value("IntxChooseQParamsAlgorithm", "AFFINE"),
        },
        _VERSION,
    )


def _w8a8_dynamic() -> dict[str, Any]:
    return _versioned(
        "Int8DynamicActivationInt8WeightConfig",
        {
            "act_mapping_type": _SYMMETRIC,
            "weight_only_decode": False,
            "granularity": _versioned("PerRow", {"dim": -1}),
            "set_inductor_config": True,
            "reduce_range": False,
        },
        _VERSION,
    )
