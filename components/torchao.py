"""Codes that torchao computes with, taken out of safetensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor


def joined(files: Sequence[Path], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put codes and scales together.

    Args:
        files: safetensors whose headers say which tensors are one weight's.
        tensors: all that they hold, by name.

    Returns:
        Those that are no codes, and torchao's tensors under the names of weights.
    """
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    said: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as stream:
            said |= stream.metadata() or {}
    coded = [name for name, text in said.items() if "." in name and json.loads(text)["_type"] != "Tensor"]
    weights, plain = unflatten_tensor_state_dict(tensors, {**said, "tensor_names": json.dumps(coded)})
    return {**plain, **weights}
