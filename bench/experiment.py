"""An experiment, declared before it runs: what is compared, on what work, how often. Its hash is in its record."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown
from ..recipe import read
from ..reports.budgets import Budget
from ..reports.record import ADDED
from .metrics import known

AXES = ("steps", "size", "batch", "guidance_scale", "scheduler", "threads")
"""What may be swept; a size is `HEIGHTxWIDTH`, in pixels."""
_SIZE = re.compile(r"(\d+)x(\d+)")
_CONTINUES = re.compile(r"[a-z_0-9]+=[a-z]+:|[a-z_0-9]+@[a-z]+$")
"""How a piece after a comma goes on with the recipe before it: `openvino:int8,vae_decoder=torch:bf16,text_encoder@cpu`."""

_ADDED = {"calibration", "prove"}
"""Fields of an experiment that came later."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a recipe, a folder, or somebody else's program."""

    name: str
    recipe: str | None = None
    """With placement: `torch:bf16+compile@cpu`; or a .toml file."""
    folder: str | None = None
    """An artifact, an Optimum or Diffusers folder or a hub id, opened as it is."""
    adapter: str | None = None
    """A Python file with a class `Adapter`, or the name of a shipped one: see `bakeoff.bench.adapters`."""
    python: str | None = None
    """The interpreter of the adapter's environment."""
    precision: str | None = None
    """What it runs in, for its quality gate, where neither a recipe nor a manifest says it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Handed to the adapter, or to `bakeoff.load`."""


@dataclass(frozen=True)
class Experiment:
    """What is to be measured. All of it is declared; nothing is decided while it runs."""

    model: str
    arms: tuple[Arm, ...]
    baseline: str
    reference: str = "torch:fp32"
    """The recipe, or the arm by its name, whose pictures the others' are compared with."""
    prompts: str = "default"
    """A prompt set, `default`, or a text file with one prompt a line."""
    timed_prompts: int = 8
    """How many prompts the timed repetitions rotate through."""
    quality_prompts: int = 64
    steps: int = 20
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    batch: int = 1
    scheduler: str | None = None
    """A Diffusers scheduler class, by name; by default the model's own."""
    config: str | None = None
    """Of a model that is a single-file checkpoint: folder or hub id with its tokenizers, scheduler and configs."""
    calibration: str | None = None
    """What `bakeoff calibrate` wrote, for recipes that round activations or weigh weights by them, as in an export."""
    prove: bool = True
    """Prove each export, part by part, and refuse what fails; without, an arm is judged by its pictures alone."""
    threads: int | None = None
    blocks: int = 5
    repetitions: int = 5
    warmups: int = 1
    timeout_s: float = 1800.0
    """Longest silence of a worker before it counts as hung."""
    seed: int = 0
    """Of the order in which the arms of a block run."""
    resident: bool = False
    """Keep the arms alive and idle between blocks: where loading outweighs the timed work."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Metrics that need weights, by name (`lpips`, `clip_score`…): the folder or hub id of their weights."""
    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    """By arm: what it may take. See `bakeoff.reports.budgets.Budget`."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_arms()
        self._check_work()
        for name in self.metrics:
            if name not in known():
                raise UsageError(unknown("metric", name, known()))
        _check_sweep(self.sweep)
        if self.sweep:
            self.points()

    def _check_arms(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names) or not names:
            message = f"got the arms {', '.join(names) or 'none'}, expected at least one, each named once"
            raise UsageError(message)
        taken = sorted(ADDED & set(names))
        if taken:
            message = f"got an arm named {taken[0]!r}, which is the name of one that every experiment adds"
            raise UsageError(message, fix="give it another name")
        for kind, each in (("baseline", self.baseline), *(("arm of a budget", arm) for arm in self.budgets)):
            if each not in names:
                raise UsageError(unknown(kind, each, names))
        for limits in self.budgets.values():
            Budget.read(limits)

    def _check_work(self) -> None:
        for name in ("timed_prompts", "quality_prompts", "steps", "batch", "blocks", "repetitions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                message = f"got {name} = {value!r}, expected a whole number from 1"
                raise UsageError(message)
        if (self.height is None) != (self.width is None):
            message = f"got height {self.height} and width {self.width}, expected both or neither"
            raise UsageError(message)
        most = max(self.timed_prompts, self.quality_prompts)
        if self.batch > most:
            message = (
                f"got a batch of {self.batch} and {most} prompts, expected as many prompts as a batch has at least"
            )
            raise UsageError(message, fix=f"timed_prompts = {self.batch}")

    def as_dict(self) -> dict[str, Any]:
        """Return all fields; those of `_ADDED` only where they aren't their default, so that older experiments keep their hash."""
        same = {each.name for each in fields(self) if each.name in _ADDED and getattr(self, each.name) == each.default}
        return {name: value for name, value in asdict(self).items() if name not in same}

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def points(self) -> dict[str, Experiment]:
        """Return the experiment at each point of its sweep, by the point's name; one with an empty name without."""
        axes = sorted(self.sweep)
        points = {}
        for values in itertools.product(*(self.sweep[axis] for axis in axes)):
            chosen = dict(zip(axes, values, strict=True))
            name = ", ".join(f"{axis} {value}" for axis, value in chosen.items())
            if "size" in chosen:
                chosen["height"], chosen["width"] = _size(chosen.pop("size"))
            points[name] = replace(self, sweep={}, **chosen)
        return points

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def _check_sweep(sweep: dict[str, list[Any]]) -> None:
    for axis, values in sweep.items():
        if axis not in AXES:
            raise UsageError(unknown("axis of a sweep", axis, AXES))
        if not isinstance(values, list) or not values:
            message = f"got {values!r} for the axis {axis}, expected a list of values"
            raise UsageError(message)
    for value in sweep.get("size", []):
        _size(value)


def _size(text: Any) -> tuple[int, int]:  # noqa: ANN401 - whatever the user wrote
    found = _SIZE.fullmatch(str(text))
    if not found:
        message = f"got the size {text!r}, expected HEIGHTxWIDTH in pixels"
        raise UsageError(message, fix="--sweep size=512x512,768x512")
    return int(found[1]), int(found[2])


def parse_arms(text: str) -> tuple[Arm, ...]:
    """Read arms as the command line takes them: recipes and folders after commas.

    Raises:
        UsageError: one is neither.
    """
    pieces: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if pieces and _CONTINUES.match(piece):
            pieces[-1] += f",{piece}"
        elif piece:
            pieces.append(piece)
    return tuple(_arm(piece) for piece in pieces)


def _arm(text: str) -> Arm:
    if Path(text).is_dir() or (_HUB_ID.fullmatch(text) and not text.endswith(".toml")):
        return Arm(text, folder=text)
    read(text)  # refuses what is no recipe, before anything runs
    return Arm(text, recipe=text)


def from_toml(text: str) -> Experiment:
    """Read an experiment file: the fields of `Experiment`, `[[arms]]` with those of `Arm`, and `[sweep]`.

    Raises:
        UsageError: it isn't TOML, or has a field that there isn't.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = f"the experiment is not TOML: {error}"
        raise UsageError(message) from error
    return from_dict(data)


def from_dict(data: dict[str, Any]) -> Experiment:
    """Inverse of `Experiment.as_dict`; an arm may be a text, as on the command line.

    Raises:
        UsageError: a field that there isn't, or one that is missing.
    """
    _refuse_unknown("experiment", data, Experiment)
    given = data.get("arms", [])
    if isinstance(given, str):
        arms: tuple[Arm, ...] = parse_arms(given)
    else:
        arms = tuple(
            arm for item in given for arm in (parse_arms(item) if isinstance(item, str) else (_read_arm(item),))
        )
    if not arms or "model" not in data:
        message = "the experiment says no model or no arms"
        raise UsageError(message, fix='model = "shapes"\narms = ["torch:fp32", "onnx:fp32"]')
    return Experiment(**{**data, "arms": arms, "baseline": data.get("baseline", arms[0].name)})


def _read_arm(data: dict[str, Any]) -> Arm:
    _refuse_unknown("arm", data, Arm)
    if "name" not in data:
        data = {"name": data.get("recipe") or data.get("folder") or data.get("adapter"), **data}
    if data.get("recipe"):
        read(data["recipe"])
    return Arm(**data)


def _refuse_unknown(kind: str, data: dict[str, Any], made: type) -> None:
    known = [item.name for item in fields(made)]
    for name in data:
        if name not in known:
            raise UsageError(unknown(f"field of an {kind}", name, known))
