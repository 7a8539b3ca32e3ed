"""Checkpoints in which the weights of layers are codes, in the layout of the library that runs them."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

from ..components.byte_layers import takes
from ..naming import layer_names
from ..weights import TORCH_DTYPES, streamed, write_streamed
from .exporter import SCALES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from ..quantize.format import Format
    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint, Entry, Streamed

_WIDE = "bfloat16"
"""dtype of what has no codes."""


_TABLES = re.compile(r"(^|\.)(shared|embed_\w+|\w*embeddings?|relative_attention_bias)\.weight$")
"""Tables that rows are looked up in, as Transformers names them; its and Diffusers' Linear layers have other names."""


class Layout(ABC):
    """How a library stores the codes of a format, and what Diffusers and Transformers read to open them with it."""

    library: ClassVar[str]
    convolutions: ClassVar[bool] = False
    """Whether it has codes for convolutions, too."""

    def __init__(self, mixture: Mixture, activations: Mapping[str, Grids] | None = None) -> None:
        self.mixture = mixture
        self._activations = activations or {}
        self.format: Format = mixture.formats[mixture.precision]

    @property
    def label(self) -> str:
        """What the bytes of codes count as."""
        return self.format.name

    @abstractmethod
    def encode(self, entry: Entry) -> list[Streamed]:
        """Return a weight as the tensors that are stored for it."""

    @abstractmethod
    def settings(self, skipped: list[str]) -> dict[str, Any]:
        """Return `quantization_config`; Linear layers of the paths `skipped` have no codes."""

    @abstractmethod
    def stored_name(self, name: str) -> str | None:
        """Return the name of the weight that a written tensor belongs to, if it is one beside codes."""

    def weight_bytes(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Sum a written checkpoint's bytes by what they count as."""
        totals: dict[str, int] = defaultdict(int)
        coded = {self.stored_name(name) for name in checkpoint.entries} - {None}
        for name, entry in checkpoint.entries.items():
            beside = SCALES if self.stored_name(name) else TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())
            totals[self.label if name in coded else beside] += entry.length
        return dict(totals)

    def obstacle(self, entry: Entry) -> str | None:
        """Say why a weight has no codes; None if it can have them."""
        return self.mixture.obstacle(entry.name, entry.shape)

    def stored_bytes(self, entry: Entry) -> dict[str, int]:
        """Return what bytes count as -> how many are stored for a weight."""
        codes, scales = self.format.stored_bytes(entry.shape)
        return {self.label: codes, SCALES: scales}

    def metadata(
        self,
        checkpoint: Checkpoint,  # noqa: ARG002 - for libraries that need more than the tensors
        coded: Mapping[str, str],  # noqa: ARG002
    ) -> dict[str, str]:
        """Return what the file's header says.

        Args:
            checkpoint: that was read.
            coded: name of a weight in it that became codes -> its name in the module.
        """
        return {}

    def predict(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Return what bytes count as -> how many will be written, from headers alone."""
        totals: dict[str, int] = defaultdict(int)
        for entry in checkpoint.entries.values():
            left = not self._is_layer(entry) or self.obstacle(entry)
            stored = {_WIDE: entry.bytes_in(_WIDE)} if left else self.stored_bytes(entry)
            for label, size in stored.items():
                totals[label] += size
        return dict(totals)

    def _is_layer(self, entry: Entry) -> bool:
        """Say whether a tensor is a layer's that can hold codes, by its name and shape: there is no module yet to ask."""
        dims = (2, 4) if self.convolutions else (2,)
        return entry.name.endswith(".weight") and len(entry.shape) in dims and not _TABLES.search(entry.name)

    def write(self, checkpoint: Checkpoint, module: nn.Module, folder: Path) -> dict[str, str]:
        """Write a module's checkpoint with codes for its layers, and say so in its `config.json`.

        Args:
            checkpoint: of the module.
            module: as its library builds it; its weights aren't read.
            folder: has the `config.json`.

        Returns:
            Matrix or convolution that is left as it is -> why.
        """
        layers = self._layers(module, checkpoint)
        kept: dict[str, str] = {}
        tensors: list[Streamed] = []
        for entry in checkpoint.entries.values():
            obstacle = self.obstacle(entry)
            if obstacle is None and entry.name not in layers:
                kinds = "Linear layers and convolutions that pad with zeros" if self.convolutions else "Linear layers"
                obstacle = f"{self.library} has codes for {kinds} alone"
            if obstacle is None:
                tensors += self.encode(entry)
                continue
            tensors.append(streamed(entry, _WIDE))
            if len(entry.shape) > 1:
                kept[entry.name] = obstacle
        coded = {name: f"{path}.weight" for name, path in layers.items() if name not in kept}
        write_streamed(tensors, folder / checkpoint.single_file, self.metadata(checkpoint, coded))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = self.settings(sorted(path for name, path in layers.items() if name in kept))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return kept

    def _layers(self, module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
        """Return the weight's name in the checkpoint -> path in the module, of each layer that can hold codes."""
        from torch import nn

        able = takes if self.convolutions else lambda layer: type(layer) is nn.Linear
        paths = [path for path, layer in module.named_modules() if able(layer)]
        return {f"{name}.weight": path for path, name in layer_names(paths, checkpoint).items()}
