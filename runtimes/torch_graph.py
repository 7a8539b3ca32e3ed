"""What a torch part does as it runs: its layers, the functions between them, and the tensors that join these."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..components.component import WRAPPER
from .runtime import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, of those that have parameters and no modules of their own."""
    modules = module.named_modules()
    return {path: layer for path, layer in modules if path and not [*layer.children()] and [*layer.parameters()]}


class Recording:
    """One run of a module: a layer is one operation, named by its path; so is each torch function outside of layers.

    Names are the same in each run on tensors of the same shapes: `PATH` is what a layer makes, `PATH#2` what it makes the
    second time, `MODULE:function:12` what a function gives that a module calls as operation 12.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str], wanted: Collection[str] = ()) -> None:
        """Prepare to record.

        Args:
            module: that will run.
            names: path of a layer -> its name in the checkpoint.
            wanted: names of tensors to keep a copy of, on the CPU.
        """
        from torch.utils.weak import WeakIdKeyDictionary

        self.operations: list[Operation] = []
        self.kept: dict[str, Tensor] = {}
        self._module, self._layers, self._layer_names = module, layers_of(module), names
        self._wanted = frozenset(wanted)
        self._names: Any = WeakIdKeyDictionary()
        self._within: list[str] = []
        """Paths of the modules that are running, outermost first."""
        self._inputs: tuple[str, ...] = ()
        self._times: Counter[str] = Counter()
        self._taken: list[tuple[str, ...]] = []
        """Of each layer that is running, the tensors that it was given; what functions do then is the layer's own."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> None:
        """Run the module on tensors by name, in its order; `outputs` are the names of what it returns."""
        self._inputs = tuple(inputs)
        for name, tensor in inputs.items():
            self._names[tensor] = name
        with self._hooks(), self._functions():
            results = self._module(*inputs.values())
        for name, tensor in zip(outputs, results, strict=True):
            self._add(name, "Output", self._known((tensor,)), {name: tensor}, None)

    def _add(
        self, name: str, kind: str, inputs: tuple[str, ...], outputs: Mapping[str, Tensor], layer: str | None
    ) -> None:
        self.operations.append(Operation(name, kind, inputs, tuple(outputs), layer))
        for each, tensor in outputs.items():
            self._names[tensor] = each
            if each in self._wanted:
                self.kept[each] = tensor.detach().to("cpu", copy=True)

    def _known(self, values: object) -> tuple[str, ...]:
        """Return the names of the tensors among arguments; parameters and other constants have none."""
        return tuple(self._names[tensor] for tensor in _tensors(values) if tensor in self._names)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for path, module in self._module.named_modules():
            enter = module.register_forward_pre_hook(self._enter(path), prepend=True, with_kwargs=True)
            handles += [enter, module.register_forward_hook(self._leave(path))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401 - a module's own
            self._within.append(path)
            if path in self._layers:
                self._taken.append(self._known((args, kwargs)))
                self._taken[-1] = self._taken[-1] or self._sized(path, _tensors((args, kwargs)))

        return hook

    def _sized(self, path: str, given: list[Tensor]) -> tuple[str, ...]:
        """Name what a layer is given that no input's values are in: positions, which are made of a size."""
        name = f"{path}/input"
        if not given:
            return ()
        self._add(name, "Constant", self._inputs, {name: given[0]}, None)
        return (name,)

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, made: Any) -> None:  # noqa: ANN401 - a module's own
            self._within.pop()
            if path in self._layers:
                self._made(path, type(module).__name__, self._taken[-1], made, self._layer_names.get(path))
                self._taken.pop()

        return hook

    def _made(self, path: str, kind: str, taken: tuple[str, ...], made: object, layer: str | None) -> None:
        self._times[path] += 1
        name = f"{path}#{self._times[path]}" if self._times[path] > 1 else path
        tensors = _tensors(made)
        outputs = {name if not index else f"{name}.{index}": tensor for index, tensor in enumerate(tensors)}
        self._add(name, kind, taken, outputs, layer)

    def _functions(self) -> Any:  # noqa: ANN401 - a context manager of torch's
        from torch.overrides import TorchFunctionMode

        recording = self

        class Watching(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
                given = recording._known((args, kwargs))
                made = func(*args, **(kwargs or {}))
                if given and not recording._taken and _tensors(made):
                    recording._called(func.__name__, given, made)
                return made

        return Watching()

    def _called(self, function: str, given: tuple[str, ...], made: object) -> None:
        within = f"{self._within[-1]}.".removeprefix(WRAPPER).removesuffix(".") if self._within else ""
        name = f"{within}:{function}:{len(self.operations)}"
        kind = "".join(word.capitalize() for word in function.strip("_").split("_"))
        self._made(name, kind, given, made, within or None)


def _tensors(values: object) -> list[Tensor]:
    """Return the tensors in arguments or results, which may be nested."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
