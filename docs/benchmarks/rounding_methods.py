"""What each way of rounding keeps of a part: `python rounding_methods.py [PART]`, in eager float32, on `shapes`.

Prompts are drawn with torch while every layer's activations are counted, over all timesteps and over groups of them. Then
the part's inputs of other prompts are run through it as it is, and with weights and activations rounded in each way. Printed:
SQNR of its output over all steps, in dB, root mean square of the steps' relative errors. No kernels of any backend are in it.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import TYPE_CHECKING, Any

from bakeoff import plugins
from bakeoff.components.component import WRAPPER
from bakeoff.models.prompts import read_prompts
from bakeoff.parity.proof import names_in
from bakeoff.quantize.calibration import METHODS, Calibration
from bakeoff.quantize.inputs import with_inputs
from bakeoff.runtimes.engine import load
from bakeoff.sources.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from bakeoff.quantize.grid import Grids

CALIBRATED, TESTED, BATCH = 16, 4, 4
STEPS, GROUPS = 8, 4
"""Of each picture, and how many groups of timesteps have grids of their own."""


class Watch:
    """Counts a part's activations, or keeps what it is given."""

    def __init__(self, part: str) -> None:
        self._part = part
        self.whole, self.groups = Calibration(), [Calibration() for _ in range(GROUPS)]
        self.given: list[tuple[Any, ...]] = []
        self.counts, self._runs = True, 0
        self.steps = STEPS
        """Runs of the part for a picture."""

    def visit(self, part: str, module: nn.Module) -> None:
        from torch import nn

        if part != self._part:
            return
        module.register_forward_pre_hook(lambda _, given: self._take(given))
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_hook(
                    self._hook(path.removeprefix(WRAPPER), 1 if isinstance(layer, nn.Conv2d) else -1)
                )

    def _take(self, given: tuple[Any, ...]) -> None:
        self._runs += 1
        if not self.counts:
            self.given.append(tuple(each.clone() for each in given))

    def _hook(self, path: str, axis: int) -> Callable[..., None]:
        def count(_: object, given: Sequence[Tensor], made: Tensor) -> None:
            if self.counts:
                group = (self._runs - 1) % self.steps * GROUPS // self.steps
                for calibration in (self.whole, self.groups[group]):
                    calibration.see(self._part, path, given[0], made, axis)

        return count


class Bench:
    """A part, what it was given, and what eager float32 makes of it."""

    def __init__(self, part: str) -> None:
        import torch

        self.part, self.watch, source = part, Watch(part), Source.open("shapes")
        self.watch.steps = STEPS if part == "unet" else 1
        texts = [prompt.text for prompt in read_prompts("shapes-64", CALIBRATED + TESTED)]
        with load(source.folder, device="cpu") as engine:
            engine.visit(self.watch.visit)
            for start in range(0, CALIBRATED, BATCH):
                engine.generate(texts[start : start + BATCH], seeds=1 + start, steps=STEPS)
            self.watch.counts = False
            engine.generate(texts[CALIBRATED:], seeds=77, steps=STEPS)
        found = source.family.part(part)
        self.wide = found.component.flat(found.component.load(source.path(found.module), torch.float32))
        self.checkpoint = source.checkpoint(found.module)
        self.names = names_in(self.wide, self.checkpoint)
        self.own = {path.removeprefix(WRAPPER): name for path, name in self.names.items()}
        self.expected = run(self.wide, self.watch.given)

    def grids(self, calibration: Calibration, method: str, *, outputs: bool) -> dict[str, Grids]:
        entries = self.checkpoint.entries
        shapes = {path: entries[f"{self.own[path]}.weight"].shape for path in calibration.parts[self.part]}
        made = calibration.grids(self.part, shapes, method)
        return {self.own[path]: both if outputs else (both[0], None) for path, both in made.items()}

    def rounded(self, precision: str, activations: dict[str, Grids], *, known: bool = False) -> nn.Module:
        mixture = plugins.mixture(precision)
        if known:
            mixture = with_inputs(mixture, self.watch.whole, self.part, self.checkpoint)
        return mixture.round_module(copy.deepcopy(self.wide), self.names, activations)

    def tell(self, name: str, made: nn.Module) -> None:
        self.tell_errors(name, distances(run(made, self.watch.given), self.expected))

    def tell_errors(self, name: str, errors: Sequence[float]) -> None:
        mean = math.sqrt(sum(error**2 for error in errors) / len(errors))
        print(f"{self.part:12} {name:56} {-20 * math.log10(mean):6.2f} dB", flush=True)

    def tell_timesteps(self, name: str, method: str, *, outputs: bool) -> None:
        """Round activations on grids of each group of timesteps."""
        errors: list[float] = []
        for step, given in enumerate(self.watch.given):
            calibration = self.watch.groups[step * GROUPS // self.watch.steps]
            made = self.rounded("w8a8", self.grids(calibration, method, outputs=outputs))
            errors += distances(run(made, [given]), self.expected[step : step + 1])
        self.tell_errors(name, errors)


def main(part: str = "unet") -> None:
    bench = Bench(part)
    for precision in ("int8", "int4", "nf4"):
        try:
            bench.tell(precision, bench.rounded(precision, {}))
            bench.tell(f"{precision}, for calibrated inputs", bench.rounded(precision, {}, known=True))
        except ValueError:
            print(f"{part:12} {precision}: changes nothing")
    for outputs in (True, False):
        behind = "" if outputs else ", convolutions' outputs wide"
        for method in METHODS:
            grids = bench.grids(bench.watch.whole, method, outputs=outputs)
            bench.tell(f"w8a8, {method}{behind}", bench.rounded("w8a8", grids))
        for method in METHODS[:2] if bench.watch.steps > 1 else ():
            bench.tell_timesteps(f"w8a8, {method}{behind}, {GROUPS} groups of timesteps", method, outputs=outputs)


def run(module: nn.Module, given: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Return the first output for each input."""
    import torch

    with torch.no_grad():
        return [module(*each)[0] for each in given]


def distances(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each step."""
    pairs = zip(got, expected, strict=True)
    return [float((one - other).double().norm() / other.double().norm()) for one, other in pairs]


if __name__ == "__main__":
    main(*sys.argv[1:])
