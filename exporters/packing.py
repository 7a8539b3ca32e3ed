"""A weight on its way into a file as codes and scales of a low-bit format, a few MB at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..quantize.format import by_columns
from ..weights import as_bytes, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from ..quantize.format import Format
    from ..weights import Entry


def storage(precision: str) -> str:
    """Return the torch dtype of the weights that aren't codes."""
    return {"fp32": "float32", "fp16": "float16"}.get(precision, "bfloat16")


class Packing:
    """Codes are made as they are written; the scales that came with them are written behind."""

    def __init__(
        self,
        weight_format: Format,
        entry: Entry,
        columns: Sequence[float] | None = None,
        importance: Tensor | None = None,
    ) -> None:
        """Prepare.

        Args:
            weight_format: makes the codes.
            entry: the weight (N, K, …).
            columns: K factors that its inputs' weights are multiplied by first.
            importance: mean squares (K,) of its inputs, where they are known.
        """
        self._importance = importance
        self._format = weight_format
        self._entry = entry
        self._columns = columns
        self._scales: list[Tensor] = []

    def codes(self, encode: Callable[[Tensor], Tensor]) -> Iterator[memoryview]:
        """Yield the bytes of codes (N, K) int8, after `encode` has laid them out as the backend wants them."""
        for rows in read_rows(self._entry):
            codes, scales = self._format.pack(by_columns(rows.float(), self._columns).flatten(1), self._importance)
            self._scales.append(scales)
            yield as_bytes(encode(codes).contiguous())

    def scales(self, repeats: int = 1, times: int = 1, over: Sequence[float] = ()) -> Iterator[memoryview]:
        """Yield the bytes of the scales (N, K / group) float32 once all codes are made.

        Args:
            repeats: how often each stands in a row.
            times: what they are multiplied by.
            over: N numbers that those of each row are divided by.
        """
        import torch

        first = 0
        for scales in self._scales:
            divisors = torch.tensor(over[first : first + len(scales)] or [1.0])[:, None]
            first += len(scales)
            yield as_bytes((scales * times / divisors).repeat_interleave(repeats, 1).contiguous())


def nibbles(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Put two codes (…, 2 n) from 0 to 15 into each byte (…, n) uint8; the first one low, or high."""
    import torch

    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return (first << 4) | second if high_first else first | (second << 4)
