"""Low-bit weights as bitsandbytes stores them, which Diffusers and Transformers open by themselves.

Its layout isn't written down: it is what `state_dict()` of its `Linear8bitLt` and `Linear4bit` gives.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, ClassVar

from ..weights import Streamed, as_bytes
from .codes import Layout
from .packing import Packing, nibbles

if TYPE_CHECKING:
    from torch import Tensor

    from ..quantize.format import Format
    from ..weights import Entry

_KEPT = re.compile(r"\.DenseReluDense\.wo\.weight$")
"""T5's layers that Transformers keeps in floats whatever a configuration says (`_keep_in_fp32_modules`): float16 overflows there."""
_ROW_MAJOR = 0
_INT8_STEPS = 127


class Bitsandbytes(Layout):
    """Of int8 and nf4."""

    library: ClassVar[str] = "bitsandbytes"

    def obstacle(self, entry: Entry) -> str | None:
        reason = super().obstacle(entry)
        return "Transformers keeps it in floats" if reason is None and _KEPT.search(entry.name) else reason

    def encode(self, entry: Entry) -> list[Streamed]:
        return _int8(entry, self.format) if self.format.name == "int8" else _nf4(entry, self.format)

    def settings(self, skipped: list[str]) -> dict[str, Any]:
        """Return what Diffusers and Transformers read as `BitsAndBytesConfig`."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": self.format.name == "int8",
            "load_in_4bit": self.format.name == "nf4",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_skip_modules": skipped,
        }

    def stored_name(self, name: str) -> str | None:
        for ending in (".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.quant_state."):
            before, found, _ = name.partition(ending)
            if found:
                return f"{before}.weight"
        return None


def _int8(entry: Entry, weight_format: Format) -> list[Streamed]:
    packing = Packing(weight_format, entry)
    layer = entry.name.removesuffix(".weight")
    scales = packing.scales(times=_INT8_STEPS)
    return [
        Streamed(entry.name, "I8", entry.shape, math.prod(entry.shape), packing.codes(lambda codes: codes)),
        Streamed(f"{layer}.SCB", "F32", [entry.shape[0]], 4 * entry.shape[0], scales),
        Streamed(f"{layer}.weight_format", "U8", [], 1, [bytes([_ROW_MAJOR])]),
    ]


def _nf4(entry: Entry, weight_format: Format) -> list[Streamed]:
    packing = Packing(weight_format, entry)
    codes, scales = weight_format.stored_bytes(entry.shape)
    state = {"quant_type": "nf4", "blocksize": weight_format.group, "dtype": "bfloat16", "shape": list(entry.shape)}
    text = json.dumps(state).encode()
    levels = _levels(weight_format)
    return [
        Streamed(entry.name, "U8", [codes, 1], codes, packing.codes(lambda rows: nibbles(rows, high_first=True))),
        Streamed(f"{entry.name}.absmax", "F32", [scales // 4], scales, packing.scales()),
        Streamed(f"{entry.name}.quant_map", "F32", [len(levels)], 4 * len(levels), [as_bytes(levels)]),
        Streamed(f"{entry.name}.quant_state.bitsandbytes__nf4", "U8", [len(text)], len(text), [text]),
    ]


def _levels(weight_format: Format) -> Tensor:
    """Return what the codes 0 to 15 stand for, in a group whose largest magnitude is 1."""
    import torch

    assert weight_format.group is not None  # noqa: S101 - a format of 4 bits has groups
    codes = torch.arange(weight_format.group, dtype=torch.int8).remainder(16)[None]
    return weight_format.unpack(codes, torch.ones(1, 1))[0, :16].contiguous()
