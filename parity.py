"""Prove an artifact: each part computes what its source computes, within what the noise floor justifies.

Floors, measured for the part on this machine: F0, eager fp32 against itself with another thread count and split
batches; F1, eager bf16 against eager fp32, with weights rounded where the recipe says so. Errors are relative
root mean squares, `|got - expected| / |expected|`, and as SQNR, `-20 log10` of that, in dB.
"""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .artifact import ACTIVATIONS, Artifact, staged
from .budget import Budget, Gate, decibels, granted, tolerance, upper_bound
from .components.component import PROOF_SIZES, WRAPPER
from .errors import ParityError, SourceError, UnavailableError
from .memory import available_bytes, in_child
from .recipe import Placement
from .source import Source
from .weights import layer_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .artifact import PartEntry
    from .components.component import Component
    from .components.family import Part
    from .quantize.mixture import Mixture
    from .runtimes.runtime import Runtime
    from .weights import Checkpoint

Tensors = dict[str, "Tensor"]

PROVED, FAILING, UNPROVED = "proved", "failing", "unproved"
"""What a proof comes to. A failing artifact was let pass; it stays failing until it is exported again."""


@dataclass(frozen=True)
class Measured:
    """One case of one part: its sizes, error and the two other views of it."""

    sizes: dict[str, int]
    error: float
    sqnr_db: float
    cosine: float
    worst: float
    """Largest absolute difference over the largest absolute value expected."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the relative root-mean-square error; infinite if `got` isn't finite or has another shape."""
    import torch

    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def measure(got: Tensors, expected: Tensors, sizes: dict[str, int]) -> Measured:
    """Compare a part's outputs with eager's, over all outputs that both have: the worst counts."""
    names = sorted(set(got) & set(expected))
    errors = {name: relative_error(got[name], expected[name]) for name in names}
    error = max(errors.values(), default=math.inf)
    if math.isinf(error):
        return Measured(sizes, math.inf, -math.inf, 0.0, math.inf)
    cosine = min(_cosine(got[name], expected[name]) for name in names)
    worst = max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30)) for n in names)
    return Measured(sizes, error, -20 * math.log10(max(error, 1e-15)), cosine, worst)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))


def prove(
    artifact: Artifact,
    source: Source | None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Prove an artifact in a child process; return what goes into the manifest, the proof's memory and time beside it.

    With a source, eager outputs are recorded into `proof/` first; without, those already there are used. Parts of
    the null backend compute nothing and aren't proved.

    Args:
        artifact: of any recipe.
        source: what it was made from.
        gate: what it has to pass; by default what the noise floors justify.

    Raises:
        ParityError: a part is farther from eager than it is granted, or can't run at one of three shapes.
        UsageError: a budget is looser than the floors justify, without a reason.
    """
    gate = gate or Gate()
    reason = obstacle(artifact, source)
    if reason:
        return {"status": UNPROVED, "reason": reason}
    started = time.perf_counter()
    arguments = {
        "folder": str(artifact.folder),
        "source": str(source.folder) if source else None,
        "elsewhere": {module: str(path) for module, path in source.elsewhere.items()} if source else {},
        "budgets": {name: asdict(budget) for name, budget in gate.budgets.items()},
    }
    parts, peak = in_child("bakeoff.parity:prove_here", arguments)
    problems = [part["problem"] for part in parts.values() if part["problem"]]
    if problems and not gate.allow_failing:
        fix = "bakeoff verify DIR --explain --source MODEL on an export with --allow-failing says where and why"
        raise ParityError("; ".join(problems), fix=fix)
    return {
        "status": FAILING if problems else PROVED,
        **({"reason": "; ".join(problems)} if problems else {}),
        "parts": parts,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_anon_bytes": peak.anon_bytes,
        "peak_rss_bytes": peak.rss_bytes,
    }


def prove_in_place(artifact: Artifact, source: Source | None, gate: Gate | None = None) -> Artifact:
    """Prove an artifact again: a twin made of links takes its place once it is proved, else nothing changes on disk.

    What it was granted before holds again, unless the gate says otherwise. One that was let pass stays marked.

    Raises:
        ParityError: as `prove`.
        UnavailableError: it can't be proved here; the reason is in the message.
    """
    gate = gate or Gate()
    reason = obstacle(artifact, source)
    if reason:
        message = f"{artifact.folder} couldn't be proved: {reason}"
        raise UnavailableError(message, fix="give the model with --source, on a machine with the memory for it")
    known = {
        name: Budget(**part["budget"])
        for name, part in artifact.manifest.proof.get("parts", {}).items()
        if part.get("budget")
    }
    was_failing = artifact.manifest.proof["status"] == FAILING
    with staged(artifact.folder, replace_existing=True) as folder:
        twin = artifact.twin(folder)
        proof = prove(twin, source, Gate({**known, **gate.budgets}, gate.allow_failing or was_failing))
        if was_failing and proof["status"] == PROVED:
            proof |= {"status": FAILING, "reason": artifact.manifest.proof["reason"]}
        twin.with_proof(proof)
    return Artifact.open(artifact.folder)


def obstacle(artifact: Artifact, source: Source | None) -> str | None:
    """Say why an artifact can't be proved here, if it can't."""
    if all(part.backend == "null" for part in artifact.manifest.parts.values()):
        return "the null backend computes nothing"
    if source is None and not (artifact.folder / "proof").is_dir():
        return "nothing recorded to prove it against, and no source"
    needed, free = _needed_bytes(artifact, source), available_bytes()
    if needed > free:
        return f"running it takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return None


def source_of(artifact: Artifact, model: str, config: str | None = None) -> Source:
    """Open the model that an artifact was made from.

    Raises:
        SourceError: it is another model, or LoRAs were added to it.
    """
    source = Source.open(model, config=config)
    for name, entry in artifact.manifest.parts.items():
        if "loras" in entry.key_fields:
            message = f"{artifact.folder} has LoRAs baked into its {name}, which {source.folder} doesn't have"
            raise SourceError(message, fix="leave out --source: what eager fp32 gave is in the artifact")
        if source.hashes(_family_part(artifact, name).module) != entry.key_fields["source"]:
            message = f"{source.folder} is not what {artifact.folder} was made from: its {name} has other bytes"
            raise SourceError(message, fix=f"give the model it was made from, {artifact.manifest.source['id']}")
    return source


def _needed_bytes(artifact: Artifact, source: Source | None) -> int:
    """Estimate the proof's memory: the interpreter, and for the largest part its packed weights and a margin."""
    weights = max(sum(part.weight_bytes.values()) for part in artifact.manifest.parts.values())
    return int(0.7e9 + (2.0 if source else 1.3) * weights)


def prove_here(
    folder: str, source: str | None, elsewhere: Mapping[str, str], budgets: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Prove all parts in this process; runs in the child of `prove`."""
    artifact = Artifact.open(Path(folder))
    origin = None
    if source:
        found = {module: Path(path) for module, path in elsewhere.items()}
        origin = replace(Source.open(source), elsewhere=found)
    results = {}
    for name, entry in artifact.manifest.parts.items():
        if entry.backend == "null":
            continue
        part = _family_part(artifact, name)
        if origin is not None:
            _record(part, _mixture(entry), origin, artifact.folder / "proof")
        budget = Budget(**budgets[name]) if name in budgets else None
        results[name] = _prove_part(artifact, part, entry.precision, budget)
        gc.collect()
    return results


def _family_part(artifact: Artifact, name: str) -> Part:
    family = next(family for family in plugins.families() if family.name == artifact.manifest.family)
    return family.variant(artifact.manifest.variant).part(name)


def _mixture(entry: PartEntry) -> Mixture:
    return plugins.mixture(entry.precision, entry.key_fields["recipe"].get("layers"))


def _record(part: Part, mixture: Mixture, source: Source, folder: Path) -> None:
    """Write inputs, eager fp32 outputs and the floors of one part at three shapes and three timesteps."""
    import torch
    from safetensors.torch import save_file

    config = source.config(part.module)
    flat = part.component.flat(part.component.load(source.path(part.module), torch.float32))
    tensors: Tensors = {}
    f0 = 0.0
    for index, sizes in enumerate(PROOF_SIZES):
        inputs = part.component.example(config, part.component.limit(config, sizes), seed=index)
        expected = _eager(part.component, flat, config, inputs)
        f0 = max(f0, measure(_split(part.component, flat, config, inputs), expected, {}).error)
        tensors |= {f"{index}.in.{name}": value for name, value in inputs.items()}
        tensors |= {f"{index}.out.{name}": value.contiguous() for name, value in expected.items()}
    floors = {"f0": f0}
    if mixture.precision != "fp32":
        _round(flat, mixture, source.checkpoint(part.module), folder.parent / part.name)
        dtypes = [torch.float16, torch.bfloat16] if mixture.precision == "fp16" else [torch.bfloat16]
        floors["f1"] = next(filter(math.isfinite, (_rounded_floor(part, flat, config, tensors, d) for d in dtypes)))
    folder.mkdir(exist_ok=True)
    file = folder / f"{part.name}.safetensors"
    file.unlink(missing_ok=True)  # it may be a link that shares its bytes
    save_file(tensors, file, metadata={k: repr(v) for k, v in floors.items()})


def _rounded_floor(
    part: Part,
    flat: Any,  # noqa: ANN401 - a torch module
    config: Mapping[str, Any],
    tensors: Tensors,
    dtype: Any,  # noqa: ANN401 - torch's
) -> float:
    """Return how far eager in a narrower dtype is from eager fp32; infinite where it overflows."""
    low = flat.to(dtype)
    cases = [_case(tensors, index) for index in range(len(PROOF_SIZES))]
    return max(measure(_eager(part.component, low, config, given, dtype), wide, {}).error for given, wide in cases)


def _round(flat: Any, mixture: Mixture, checkpoint: Checkpoint, folder: Path) -> None:  # noqa: ANN401 - a torch module
    """Let a module compute with the weights, and the calibrated activations, that the artifact has."""
    file = folder / ACTIVATIONS
    scales = {name: tuple(both) for name, both in json.loads(file.read_text()).items()} if file.is_file() else {}
    paths = {path.removeprefix(WRAPPER): path for path, _ in flat.named_modules()}
    names = {paths[own]: name for own, name in layer_names(paths, checkpoint).items()}
    mixture.round_module(flat, names, scales)


def _eager(component: Component, flat: Any, config: Mapping[str, Any], inputs: Tensors, dtype: Any = None) -> Tensors:  # noqa: ANN401 - modules and dtypes of torch, imported late
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
            _eager(component, flat, config, {k: v[row : row + 1] if k in batched else v for k, v in inputs.items()})
            for row in range(rows)
        ]
    finally:
        torch.set_num_threads(threads)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _case(tensors: Tensors, index: int) -> tuple[Tensors, Tensors]:
    def pick(kind: str) -> Tensors:
        prefix = f"{index}.{kind}."
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return pick("in"), pick("out")


def _prove_part(artifact: Artifact, part: Part, precision: str, budget: Budget | None) -> dict[str, Any]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    from .runtimes.opening import open_part

    file = artifact.folder / "proof" / f"{part.name}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        floors = {name: float(value) for name, value in stream.metadata().items()}
    allowed = granted(part.name, tolerance(precision, floors["f0"], floors.get("f1")), budget)
    entry, placement = artifact.manifest.parts[part.name], Placement(device="cpu")
    cases, rows, problem = [], [], None
    try:
        with open_part(artifact.folder / part.name, part, entry, placement) as runtime:
            for index in range(len(PROOF_SIZES)):
                inputs, expected = _case(tensors, index)
                got = _run_case(runtime, part.name, inputs)
                cases.append(measure(got, expected, _axes(inputs)))
                rows += _row_errors(got, expected)
        problem = _problem(part.name, cases, upper_bound(rows), allowed)
    except ParityError as error:
        problem = error.message
    return {
        "tolerance": allowed,
        **({"budget": asdict(budget)} if budget else {}),
        **floors,
        "upper": upper_bound(rows) if rows else math.inf,
        "problem": problem,
        "cases": [asdict(case) for case in cases],
    }


def _run_case(runtime: Runtime, name: str, inputs: Tensors) -> Tensors:
    fed = {port.name: _to_port(inputs[port.name], port) for port in runtime.inputs}
    try:
        return runtime.run(fed)
    except Exception as error:
        message = f"{name} can't run at the shapes {_shapes(inputs)}: is one baked into its graph? {error}"
        raise ParityError(message) from error


def _row_errors(got: Tensors, expected: Tensors) -> list[float]:
    """Return each row's relative error, of all outputs that both have: the worst counts."""
    names = sorted(set(got) & set(expected))
    count = min(len(expected[name]) for name in names)
    return [max(relative_error(got[name][row], expected[name][row]) for name in names) for row in range(count)]


def _problem(part: str, cases: list[Measured], upper: float, allowed: float) -> str | None:
    """Say what is beyond the tolerance: a case, or the upper end of the interval of all rows' errors."""
    worst = max(cases, key=lambda case: case.error)
    if not worst.error <= allowed:
        return (
            f"{part} differs from eager fp32 by {worst.error:.2e}, {worst.sqnr_db:.1f} dB (granted {allowed:.2e}, "
            f"{decibels(allowed):.1f} dB) at {worst.sizes}"
        )
    if upper > allowed:
        return f"{part} differs from eager fp32 by up to {upper:.2e} with 95 % confidence (granted {allowed:.2e})"
    return None


def _shapes(inputs: Tensors) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in inputs.items()}


def _to_port(tensor: Tensor, port: Any) -> Tensor:  # noqa: ANN401
    import torch

    return tensor.to(getattr(torch, port.dtype)).reshape((1,) * port.rank) if tensor.ndim == 0 else tensor


def _axes(inputs: Tensors) -> dict[str, int]:
    """Return the size of each axis of each input, as `name.axis`."""
    return {f"{name}.{axis}": size for name, tensor in inputs.items() for axis, size in enumerate(tensor.shape)}


@dataclass(frozen=True)
class Recorded:
    """What a part is proved against: its cases, and what they may differ by."""

    cases: tuple[tuple[Tensors, Tensors], ...]
    """Inputs, and what eager float32 gave."""
    tolerance: float


def recorded(artifact: Artifact, name: str, source: Source) -> Recorded:
    """Read the cases of one part that were recorded with the artifact; record them elsewhere where they weren't."""
    from tempfile import TemporaryDirectory

    file = artifact.folder / "proof" / f"{name}.safetensors"
    precision = artifact.manifest.parts[name].precision
    if file.is_file():
        return _read_recorded(file, precision)
    with TemporaryDirectory() as folder:
        _record(_family_part(artifact, name), precision, source, Path(folder))
        return _read_recorded(Path(folder) / file.name, precision)


def _read_recorded(file: Path, precision: str) -> Recorded:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        floors = {key: float(value) for key, value in stream.metadata().items()}
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    cases = tuple(_case(tensors, index) for index in range(len(PROOF_SIZES)))
    return Recorded(cases, tolerance(precision, floors["f0"], floors.get("f1")))
