"""The bench's progress on a terminal: a bar of all jobs; elsewhere, lines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from typing import TextIO


class Display:
    """Called with what is being done, how many jobs are done, and of how many. A context manager."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from tqdm import tqdm

            form = "|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}] {desc}"
            self._bar = tqdm(total=1, bar_format=form, file=self._stream, leave=False, dynamic_ncols=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            print(text, file=self._stream, flush=True)
            return
        if " failed: " in text:
            self._bar.write(text, file=self._stream)
        self._bar.total, self._bar.n = total, done
        self._bar.set_description_str(text)
