"""Eager float32 from within: what each layer of a part is given and makes, and what attention attends to."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..components.component import WRAPPER
from ..naming import layer_names
from ..runtimes.torch_graph import layers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch import Tensor, nn

    from ..components.family import Part
    from ..sources.source import Source

Tensors = dict[str, "Tensor"]


@dataclass(frozen=True)
class Seen:
    """What one layer was given, and what it made of it."""

    given: Tensor
    made: Tensor


@dataclass(frozen=True)
class Attended:
    """One attention: its scores, scaled and masked, `(…, queries, keys)`."""

    scores: Tensor

    @property
    def shares(self) -> Tensor:
        return self.scores.softmax(-1)


class Eager:
    """A part's module as its library builds it, in float32.

    A layer is a module with parameters and without modules of its own that runs once; it goes by its name in the
    checkpoint.
    """

    def __init__(self, part: Part, source: Source) -> None:
        import torch

        config = source.config(part.module)
        self._ports = part.component.inputs(config)
        self._flat = part.component.flat(part.component.load(source.path(part.module), torch.float32)).eval()
        leaves = {path.removeprefix(WRAPPER): module for path, module in layers_of(self._flat).items()}
        names = layer_names(leaves, source.checkpoint(part.module))
        self.layers: dict[str, nn.Module] = {names[path]: module for path, module in leaves.items() if path in names}

    def order(self, inputs: Tensors) -> list[str]:
        """Return the layers that run once, in the order in which they do."""
        ran: list[str] = []
        with self._watched(self.layers, lambda name, *_: ran.append(name)):
            self.run(inputs)
        return [name for name in ran if ran.count(name) == 1]

    def see(self, inputs: Tensors, names: Collection[str]) -> dict[str, Seen]:
        """Run once and keep what these layers were given and made."""
        seen: dict[str, Seen] = {}

        def keep(name: str, given: Tensor, made: Tensor) -> None:
            seen[name] = Seen(given.detach().clone(), made.detach().clone())

        with self._watched(names, keep):
            self.run(inputs)
        return seen

    def peaks(self, inputs: Tensors) -> dict[str, float]:
        """Return each layer that runs -> the largest magnitude that it takes or makes."""
        found: dict[str, float] = {}

        def keep(name: str, given: Tensor, made: Tensor) -> None:
            values = [each for each in (given, made) if each.is_floating_point()]  # not the numbers of tokens
            found[name] = max(found.get(name, 0.0), *(float(each.abs().max()) for each in values))

        with self._watched(self.layers, keep):
            self.run(inputs)
        return found

    def attended(self, inputs: Tensors, before: str) -> list[Attended]:
        """Return the attentions that ran between the layer `before` and the one that ran before it."""
        import torch
        from torch.overrides import TorchFunctionMode

        whole = torch.nn.functional.scaled_dot_product_attention
        since: list[Attended] = []
        found: list[Attended] = []

        class Watching(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
                if func is whole:
                    since.append(Attended(_scores(*args, **(kwargs or {}))))
                return func(*args, **(kwargs or {}))

        def passed(name: str, *_: object) -> None:
            found.extend(since if name == before else [])
            since.clear()

        with self._watched(self.layers, passed), Watching():
            self.run(inputs)
        return found

    def run(self, inputs: Tensors) -> tuple[Tensor, ...]:
        import torch

        with torch.no_grad():
            results: tuple[Tensor, ...] = self._flat(*(inputs[port.name] for port in self._ports))
        return results

    @contextlib.contextmanager
    def _watched(self, names: Collection[str], watcher: Callable[[str, Tensor, Tensor], object]) -> Iterator[None]:
        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def watch(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
                watcher(name, given[0], made)

            return watch

        handles = [self.layers[name].register_forward_hook(hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001 - torch's own signature
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,  # noqa: FBT001, FBT002
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    """Return what scaled_dot_product_attention takes the softmax of; arguments as it has them."""
    import torch

    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores
