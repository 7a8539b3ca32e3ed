"""Progress of a TensorRT build on a terminal: a bar for each phase, nested ones below."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import threading
    from typing import TextIO


class Bars:
    """A bar for each phase that is under way; nothing where the stream is no terminal."""

    def __init__(self, part: str, stream: TextIO = sys.stderr) -> None:
        self._part, self._stream = part, stream
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for phase in list(self._bars):
            self.finish(phase)

    def start(self, phase: str, steps: int) -> None:
        from tqdm import tqdm

        self.finish(phase)
        self._bars[phase] = tqdm(
            desc=f"{self._part}: {phase}",
            total=steps,
            position=len(self._bars) + 1,
            leave=False,
            file=self._stream,
            disable=not self._stream.isatty(),
        )

    def step(self, phase: str, done: int) -> None:
        bar = self._bars.get(phase)
        if bar is not None:
            bar.update(done + 1 - bar.n)

    def finish(self, phase: str) -> None:
        bar = self._bars.pop(phase, None)
        if bar is not None:
            bar.close()


def monitor(trt: Any, bars: Bars, stop: threading.Event) -> Any:  # noqa: ANN401 - tensorrt is untyped
    """Return a progress monitor that moves bars, and stops the build once the event is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:  # noqa: ARG002 - its signature
            bars.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bars.step(phase_name, step)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            bars.finish(phase_name)

    return Monitor()
