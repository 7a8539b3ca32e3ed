"""What a part is proved against: recorded inputs, what eager float32 gives for them, and the floors of that.

Floors, measured for the part on this machine: F0, eager fp32 against itself with another thread count and split
batches; F1, eager bf16 (or fp16) against eager fp32, with weights rounded where the recipe says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..artifact import ACTIVATIONS, INPUTS
from ..components.component import PROOF_SIZES, WRAPPER
from ..errors import ParityError, SourceError
from ..naming import layer_names
from ..quantize.grid import grids_from_json
from ..quantize.inputs import read_inputs
from ..weights import save_tensors
from .budget import tolerance
from .distance import measure, row_errors
from .drawing import Case, sit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from ..artifact import Artifact, PartEntry
    from ..components.component import Component
    from ..components.family import Part
    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..runtimes.runtime import Runtime
    from ..sources.source import Source
    from ..weights import Checkpoint
    from .drawing import Session

Tensors = dict[str, "Tensor"]


@dataclass(frozen=True)
class Floor:
    """How far eager computation is from eager float32 without anything being wrong."""

    error: float = 0.0
    """Of the worst case."""
    rows: tuple[float, ...] = ()
    """Of each row of each case: rows of small outputs have larger ones."""

    def and_of(self, got: Tensors, expected: Tensors) -> Floor:
        """Return the floor with one more case."""
        worst = max(self.error, measure(got, expected, {}).error)
        return Floor(worst, (*self.rows, *row_errors(got, expected)))

    def to_json(self) -> str:
        return json.dumps({"error": self.error, "rows": self.rows})

    @classmethod
    def read(cls, text: str) -> Floor:
        """Read what `to_json` gave, or the one number that older artifacts have."""
        data = json.loads(text)
        return cls(data["error"], tuple(data["rows"])) if isinstance(data, dict) else cls(float(data))


def family_part(artifact: Artifact, name: str) -> Part:
    """Return what the family of an artifact says of a part."""
    family = next(family for family in plugins.families() if family.name == artifact.manifest.family)
    return family.variant(artifact.manifest.variant).part(name)


def mixture_of(entry: PartEntry) -> Mixture:
    """Return the precisions that a part was baked with; what its backend left as floats is among them."""
    mixture = plugins.mixture(entry.precision, entry.layers)
    return replace(mixture, kept=frozenset(entry.kept))


def as_baked(entry: PartEntry, folder: Path) -> Mixture:
    """Return the precisions of a part with what its layers were given, where its folder keeps that."""
    return replace(mixture_of(entry), known=read_inputs(folder / INPUTS))


def record(part: Part, entry: PartEntry, source: Source, folder: Path, given: Sequence[Case] = ()) -> None:
    """Write inputs, eager fp32 outputs and the floors of one part.

    Args:
        part: of the family.
        entry: how it was baked.
        source: the model.
        folder: the artifact's `proof`.
        given: what it was given in real drawings; made up at three shapes and three timesteps where there is nothing.

    Raises:
        SourceError: eager float32 itself gives NaN or infinity.
        ParityError: so does eager in the recipe's precision.
    """
    import torch

    config, mixture = source.config(part.module), as_baked(entry, folder.parent / part.name)
    flat = part.component.flat(part.component.load(source.path(part.module), torch.float32))
    cases = [_as_taken(case, entry) for case in given or _made_up(part.component, config)]
    tensors: Tensors = {}
    f0 = Floor()
    for index, case in enumerate(cases):
        expected = eager(part.component, flat, config, case.inputs)
        _check_finite(expected, f"{part.name} in case {index}, {_origin_of(case)},")
        f0 = f0.and_of(_split(part.component, flat, config, case.inputs), expected)
        tensors |= {f"{index}.in.{name}": value for name, value in case.inputs.items()}
        tensors |= {f"{index}.out.{name}": value.contiguous() for name, value in expected.items()}
    floors = {"f0": f0}
    if dtypes := _floor_dtypes(mixture):
        low = _rounded_floors(part, flat, source, mixture, folder.parent / part.name, tensors, dtypes)
        floors["f1"] = _first_finite(low, part.name, mixture.precision)
    folder.mkdir(exist_ok=True)
    file = folder / f"{part.name}.safetensors"
    file.unlink(missing_ok=True)  # it may be a link that shares its bytes
    calls = json.dumps([case.call for case in cases])
    save_tensors(tensors, file, {"calls": calls, **{name: floor.to_json() for name, floor in floors.items()}})


def _floor_dtypes(mixture: Mixture) -> list[str]:
    """Return the torch dtypes that F1 may be measured in, best first: the widest tolerance's; none where all is in float32."""
    kinds = {mixture.precision, *mixture.layers.values()}
    if kinds == {"fp32"}:
        return []
    narrowest = mixture.precision == "fp16" or kinds == {"fp32", "fp16"}
    return ["float16", "bfloat16"] if narrowest and "bf16" not in kinds else ["bfloat16"]


def _check_finite(expected: Tensors, what: str) -> None:
    """Refuse to prove anything against NaN.

    Raises:
        SourceError: naming the part, the case and the outputs.
    """
    broken = [name for name, tensor in expected.items() if not bool(tensor.isfinite().all())]
    if broken:
        message = (
            f"eager float32 gives NaN or infinity for {what} as {', '.join(broken)}: there is nothing to prove it by"
        )
        raise SourceError(message, fix="look for NaN in the model's weights; --no-prove exports it as it is")


def _origin_of(case: Case) -> str:
    return "of made-up inputs" if case.call is None else f"call {case.call} of its drawing"


def _first_finite(floors: Iterable[Floor], part: str, precision: str) -> Floor:
    """Return the first floor that is one.

    Raises:
        ParityError: there is none.
    """
    found = next((floor for floor in floors if math.isfinite(floor.error)), None)
    if found is None:
        message = f"eager torch gives NaN or infinity for {part} as well, once it is rounded to {precision} as the recipe says"
        raise ParityError(message, fix=f"give it a wider precision, such as --recipe …,{part}=BACKEND:fp32")
    return found


def _made_up(component: Component, config: Mapping[str, Any]) -> list[Case]:
    limited = (component.limit(config, sizes) for sizes in PROOF_SIZES)
    return [Case(component.example(config, sizes, seed=index)) for index, sizes in enumerate(limited)]


def _as_taken(case: Case, entry: PartEntry) -> Case:
    """Round what the part's file takes as whole numbers, such as a timestep: eager gets the same."""
    whole = {port["name"] for port in entry.inputs if not port["dtype"].startswith(("float", "bfloat"))}
    rounded = {
        name: value.round() if name in whole and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    return Case(rounded, case.call)


def _rounded_floors(
    part: Part,
    flat: Any,  # noqa: ANN401 - a torch module
    source: Source,
    mixture: Mixture,
    baked: Path,
    tensors: Tensors,
    dtypes: Sequence[str],
) -> Iterator[Floor]:
    """Yield F1 in each dtype; the module is in it afterwards, so that another takes the source's weights anew."""
    import torch

    config = source.config(part.module)
    for number, dtype in enumerate(dtypes):
        if number:
            flat = part.component.flat(part.component.load(source.path(part.module), torch.float32))
        _round(flat, mixture, source.checkpoint(part.module), baked)
        yield _rounded_floor(part, flat, config, tensors, getattr(torch, dtype))


def _rounded_floor(
    part: Part,
    flat: Any,  # noqa: ANN401 - a torch module
    config: Mapping[str, Any],
    tensors: Tensors,
    dtype: Any,  # noqa: ANN401 - torch's
) -> Floor:
    """Return how far eager in a narrower dtype is from eager fp32; infinite where it overflows."""
    low, floor = flat.to(dtype), Floor()
    for given, wide in _cases(tensors):
        floor = floor.and_of(eager(part.component, low, config, given, dtype), wide)
    return floor


def _round(flat: Any, mixture: Mixture, checkpoint: Checkpoint, folder: Path) -> None:  # noqa: ANN401 - a torch module
    """Let a module compute with the weights, and the calibrated activations, that the artifact has."""
    own = {path: f"{path}.".removeprefix(WRAPPER).removesuffix(".") for path, _ in flat.named_modules()}
    mixture.round_module(flat, own | names_in(flat, checkpoint), scales_of(folder))


def names_in(flat: Any, checkpoint: Checkpoint) -> dict[str, str]:  # noqa: ANN401 - a torch module
    """Return path in a flat module -> the layer's name in the checkpoint."""
    paths = {path.removeprefix(WRAPPER): path for path, _ in flat.named_modules()}
    return {paths[own]: name for own, name in layer_names(paths, checkpoint).items()}


def scales_of(folder: Path) -> dict[str, Grids]:
    """Return layer -> what its input and output are rounded to, that a baked part's folder keeps."""
    file = folder / ACTIVATIONS
    if not file.is_file():
        return {}
    return {name: grids_from_json(both) for name, both in json.loads(file.read_text()).items()}


def eager(component: Component, flat: Any, config: Mapping[str, Any], inputs: Tensors, dtype: Any = None) -> Tensors:  # noqa: ANN401 - modules and dtypes of torch, imported late
    import torch

    cast = []
    for port in component.inputs(config):
        tensor = inputs[port.name]
        cast.append(tensor.to(dtype) if dtype and tensor.is_floating_point() and not port.exact else tensor)
    with torch.no_grad():
        results = flat(*cast)
    return {port.name: result.float() for port, result in zip(component.outputs(config), results, strict=True)}


def _split(component: Component, flat: Any, config: Mapping[str, Any], inputs: Tensors) -> Tensors:  # noqa: ANN401
    """Run eager row by row on one thread: the same numbers in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batched = {port.name for port in component.inputs(config) if port.dims[:1] == ("batch",)}
    rows = max(len(inputs[name]) for name in batched)
    try:
        parts = [
            eager(component, flat, config, {k: v[row : row + 1] if k in batched else v for k, v in inputs.items()})
            for row in range(rows)
        ]
    finally:
        torch.set_num_threads(threads)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _cases(tensors: Tensors) -> tuple[tuple[Tensors, Tensors], ...]:
    """Return inputs and outputs of each case, from tensors named `0.in.sample`."""
    return tuple(_case(tensors, index) for index in range(len({name.partition(".")[0] for name in tensors})))


def _case(tensors: Tensors, index: int) -> tuple[Tensors, Tensors]:
    def pick(kind: str) -> Tensors:
        prefix = f"{index}.{kind}."
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return pick("in"), pick("out")


def fed(runtime: Runtime, inputs: Tensors) -> Tensors:
    """Give recorded inputs the dtype and rank that a part's file has."""
    return {port.name: _to_port(inputs[port.name], port) for port in runtime.inputs}


def _to_port(tensor: Tensor, port: Any) -> Tensor:  # noqa: ANN401
    import torch

    return tensor.to(getattr(torch, port.dtype)).reshape((1,) * port.rank) if tensor.ndim == 0 else tensor


def run_case(runtime: Runtime, name: str, inputs: Tensors) -> Tensors:
    """Give a part recorded inputs.

    Raises:
        ParityError: it can't run at their shapes.
    """
    try:
        return runtime.run(fed(runtime, inputs))
    except Exception as error:
        shapes = {key: list(tensor.shape) for key, tensor in inputs.items()}
        message = f"{name} can't run at the shapes {shapes}: is one baked into its graph? {error}"
        raise ParityError(message) from error


def axes_of(inputs: Tensors) -> dict[str, int]:
    """Return the size of each axis of each input, as `name.axis`."""
    return {f"{name}.{axis}": size for name, tensor in inputs.items() for axis, size in enumerate(tensor.shape)}


@dataclass(frozen=True)
class Recorded:
    """What a part is proved against: its cases, and what they may differ by."""

    cases: tuple[tuple[Tensors, Tensors], ...]
    """Inputs, and what eager float32 gave."""
    floors: Mapping[str, Floor]
    """F0, and F1 where it was measured."""
    tolerance: float
    """Relative error that the part may have."""
    calls: tuple[int | None, ...]
    """Which call of the part in its drawing each case was, from 0; None: made up."""

    @property
    def inputs(self) -> str:
        """Where the inputs are from: `recorded` in real drawings, or `made up`."""
        return "made up" if None in self.calls else "recorded"


def recorded(artifact: Artifact, name: str, source: Source | None = None, session: Session | None = None) -> Recorded:
    """Read the cases of one part that were recorded with the artifact; record them elsewhere where they weren't.

    What the part is granted is what its manifest says, else what the floors justify.

    Args:
        artifact: of any recipe.
        name: of the part.
        source: the model, where something has to be recorded.
        session: what was drawn with it, if it was.
    """
    from tempfile import TemporaryDirectory

    file = artifact.folder / "proof" / f"{name}.safetensors"
    entry = artifact.manifest.parts[name]
    known = artifact.manifest.proof.get("parts", {}).get(name, {})
    if file.is_file() or source is None:
        return _read_recorded(file, known.get("tolerance"))
    with TemporaryDirectory() as folder:
        part = family_part(artifact, name)
        session = session or sit(source, artifact.manifest.source["id"])
        record(part, entry, source, Path(folder), session.cases.get(name, ()))
        return _read_recorded(Path(folder) / file.name, known.get("tolerance"))


def _read_recorded(file: Path, known: float | None) -> Recorded:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        about = stream.metadata()
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    cases = _cases(tensors)
    calls = tuple(json.loads(about.pop("calls", "[]"))) or (None,) * len(cases)
    floors = {key: Floor.read(value) for key, value in about.items()}
    return Recorded(cases, floors, known or justified(floors), calls)


def justified(floors: Mapping[str, Floor]) -> float:
    """Return the relative error that a part's floors justify."""
    return tolerance(floors["f0"].error, floors["f1"].error if "f1" in floors else None)


def row_tolerances(floors: Mapping[str, Floor]) -> list[float]:
    """Return what each row's own floors justify; nothing of artifacts that don't have them.

    A row that rounding leaves as it is, for it is all noughts, has none of its own: the part's holds for it.
    """
    own = floors["f0"].rows
    narrow = floors["f1"].rows if "f1" in floors else (None,) * len(own)
    return [justified(floors) if f1 == 0 else tolerance(f0, f1) for f0, f1 in zip(own, narrow, strict=True)]
