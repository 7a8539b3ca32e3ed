"""Progress of an export on a terminal."""

from __future__ import annotations

import re
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from typing import TextIO

_REFRESH_S = 0.5
_PART = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_PROOF = "proving"


class Steps:
    """Called with each line that an export says: a bar of its parts and its proof, whose clock goes on while one works.

    Where the stream is no terminal, the lines are printed as they are.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._bar: Any = None
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from tqdm import tqdm

            form = "{desc} |{bar:12}| {n_fmt}/{total_fmt} [{elapsed}]"
            self._bar = tqdm(desc="reading the model", total=1, bar_format=form, file=self._stream, leave=False)
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._bar is not None:
            self._bar.close()

    def __call__(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self._stream)
            return
        part = _PART.fullmatch(line)
        if part:
            self._bar.total = int(part[2]) + 1
            self._move(int(part[1]) - 1, part[3])
        elif line.startswith(_PROOF):
            self._move(self._bar.total - 1, line)
        else:
            self._bar.write(line, file=self._stream)

    def _move(self, done: int, what: str) -> None:
        self._bar.n = done
        self._bar.set_description_str(what)

    def _tick(self) -> None:
        while not self._done.wait(_REFRESH_S):
            self._bar.refresh()
