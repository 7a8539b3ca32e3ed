"""What is float32 in torch computes in float32: not in TF32, which keeps 10 bits of 23, nor in bfloat16."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

IEEE = "ieee"


def _flags() -> dict[str, Any]:
    """Return what chooses how float32 is multiplied; torch's own choice is TF32 for cuDNN's convolutions."""
    from torch import backends

    owners: Any = backends
    return {
        "cudnn.conv": owners.cudnn.conv,
        "cudnn.rnn": owners.cudnn.rnn,
        "cuda.matmul": owners.cuda.matmul,
        "mkldnn.conv": owners.mkldnn.conv,
        "mkldnn.matmul": owners.mkldnn.matmul,
    }


@contextlib.contextmanager
def plain() -> Iterator[dict[str, str]]:
    """Multiply float32 as IEEE 754 has it, then as before: the flags are the process's, and others may have set them.

    Yields:
        What torch says that it does, by flag.
    """
    flags = _flags()
    before = {name: flag.fp32_precision for name, flag in flags.items()}
    try:
        for flag in flags.values():
            flag.fp32_precision = IEEE
        yield {name: flag.fp32_precision for name, flag in flags.items()}
    finally:
        for name, flag in flags.items():
            flag.fp32_precision = before[name]


def read_back() -> str | dict[str, str]:
    """Return how float32 is multiplied in `plain`: one word, or by flag where torch didn't do as it was told."""
    with plain() as told:
        return IEEE if set(told.values()) == {IEEE} else told
