"""A model open in eager float32, whose layers can be rounded to see what that does to its pictures."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ..components.component import WRAPPER
from ..errors import ParityError
from ..naming import layer_names
from ..parity.drawing import given_pictures
from ..quantize.calibration import METHODS
from ..quantize.inputs import with_inputs
from ..quantize.mixture import rounded_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from ..quantize.calibration import Calibration
    from ..quantize.mixture import Mixture
    from ..runtimes.engine import Engine
    from ..sources.source import Source

SEED = 1
LAST = "vae_decoder"
"""The part whose output is the picture."""


class Studio:
    """A model open in eager float32, whose layers can be swapped for rounded ones."""

    def __init__(
        self,
        engine: Engine,
        source: Source,
        texts: Sequence[str],
        options: Mapping[str, Any],
        usual: str = METHODS[0],
    ) -> None:
        """Draw without rounding.

        Args:
            engine: of the source.
            source: the model.
            texts: what to draw.
            options: of `Engine.generate`.
            usual: how steps of activations are chosen, for formats that need no other way; see `Calibration.grids_of`.
        """
        self._engine, self._source, self._texts = engine, source, texts
        self._options = {**options, **given_pictures(engine, options.get("size"))}
        self._usual = usual
        self._pictures: list[Any] = []
        self.modules: dict[str, nn.Module] = {}
        self.macs: dict[tuple[str, str], int] = defaultdict(int)
        self._counters: list[Any] = []
        engine.visit(self._meet)
        self.reference = self._draw()
        for counter in self._counters:
            counter.remove()

    def _meet(self, part: str, module: nn.Module) -> None:
        from torch import nn

        self.modules[part] = module
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                self._counters.append(layer.register_forward_hook(partial(self._count, (part, path))))
        if part == LAST:
            module.register_forward_hook(lambda *made: self._pictures.append(made[-1][0]))

    def _count(self, key: tuple[str, str], layer: Any, _: object, made: Any) -> None:  # noqa: ANN401 - a layer and its output
        self.macs[key] += layer.weight.numel() * made.numel() // layer.weight.shape[0] // len(self._texts)

    def _draw(self) -> NDArray[np.float64]:
        """Return pictures (B, 3, H, W), pixels from 0 to 1."""
        import torch

        self._pictures.clear()
        self._engine.generate(self._texts, seeds=SEED, **self._options)
        found: NDArray[np.float64] = (torch.cat(self._pictures).double() / 2 + 0.5).clamp(0, 1).numpy()
        return found

    def layers(self, part: str) -> dict[str, str]:
        """Return path of a layer with weights -> its name in the checkpoint."""
        paths = [path for path, layer in self.modules[part].named_modules() if hasattr(layer, "weight")]
        own = {path.removeprefix(WRAPPER): path for path in paths}
        module = self._source.family.part(part).module
        return {own[path]: name for path, name in layer_names(own, self._source.checkpoint(module)).items()}

    def error(self, parts: Mapping[str, tuple[Mapping[str, str], Mixture]], calibration: Calibration | None) -> float:
        """Return the mean squared error of pictures, of pixels from 0 to 1; infinite where they aren't finite.

        Args:
            parts: part -> path of each layer that is rounded, with its name in the checkpoint, and what they are rounded to.
            calibration: of their activations, where precisions take one.
        """
        try:
            with contextlib.ExitStack() as stack:
                for part, (names, mixture) in parts.items():
                    checkpoint = self._source.checkpoint(self._source.family.part(part).module)
                    known = with_inputs(mixture, calibration, part, checkpoint)
                    grids = calibration.grids_of(part, mixture, checkpoint, usual=self._usual) if calibration else {}
                    stack.enter_context(rounded_layers(self.modules[part], names, known, grids))
                return distance(self._draw(), self.reference)
        except ParityError:
            return math.inf

    def in_bfloat16(self) -> float:
        """Return the error of pictures, as `error` does, whose weights are bfloat16 from here on; float32 is computed with them."""
        import torch

        with torch.no_grad():
            for module in self.modules.values():
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor.copy_(tensor.bfloat16())
        return self.error({}, None)


def distance(pictures: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Return the mean squared difference of pictures, of pixels from 0 to 1; infinite where they aren't finite."""
    import numpy as np

    found = float(np.square(pictures - reference).mean())
    return found if math.isfinite(found) else math.inf


def psnr_of(error: float) -> float:
    """Return the PSNR of pictures in dB, from what `distance` says of them."""
    return -10 * math.log10(error) if error else math.inf
