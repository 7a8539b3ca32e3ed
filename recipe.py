"""What to bake: backend and precision of each part, in short form or TOML; and where to run it."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, UsageError, unknown
from .placement import LOAD_OPTIONS, OFFLOADS, SWITCHES, Placement, option_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "LOAD_OPTIONS", "OFFLOADS", "PRECISIONS", "SWITCHES", "PartRecipe", "Placement", "Recipe", "from_dict", "from_toml",
    "option_value", "parse", "read", "read_text", "to_dict", "to_toml",
]  # fmt: skip

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4", "nf4", "w8a8", "w8a8-dynamic", "fp8")
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_PLACED = re.compile(r"([a-z0-9_]+)@([a-z0-9_]+)")
"""A part that differs in its device alone: `vae_decoder@cpu`."""


@dataclass(frozen=True)
class PartRecipe:
    """How one part is baked."""

    backend: str
    precision: str
    options: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer, as the checkpoint's keys name it, or a pattern with `*` -> precision, where it isn't the part's. Of patterns
    that fit the same layer the last counts."""

    def __str__(self) -> str:
        options = "".join(f"+{key}={value}" if value else f"+{key}" for key, value in sorted(self.options.items()))
        count = len(self.layers)
        others = f" but for {count} layer{'s' if count > 1 else ''}" if count else ""
        return f"{self.backend}:{self.precision}{options}{others}"

    def as_dict(self) -> dict[str, Any]:
        layers = {"layers": dict(sorted(self.layers.items()))} if self.layers else {}
        return {"backend": self.backend, "precision": self.precision, **dict(sorted(self.options.items())), **layers}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> PartRecipe:
        """Read what `as_dict` gave.

        Raises:
            RecipeError: a key is missing or isn't what it should be.
        """
        options = dict(data)
        layers = options.pop("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(each, str) for each in layers.values()):
            message = f"got layers = {layers!r}, expected a precision for each: conv_in = 'bf16'"
            raise RecipeError(message)
        backend, precision = options.pop("backend", None), options.pop("precision", None)
        if not isinstance(backend, str) or not isinstance(precision, str):
            message = (
                f"got {dict(data)}, expected backend and precision, such as backend = 'onnx' and precision = 'fp32'"
            )
            raise RecipeError(message)
        for each in (precision, *layers.values()):
            _check_precision(each)
        for key, value in options.items():
            if not isinstance(value, str):
                message = f"got {key} = {value!r} in a recipe, expected text"
                raise RecipeError(message)
        return cls(backend, precision, options, layers)

    def for_layers(self, part: str, known: Iterable[str]) -> PartRecipe:
        """Return the recipe with patterns replaced by the layers that they fit, and what changes nothing left out.

        Raises:
            RecipeError: one fits no layer.
        """
        names = sorted(known)
        found: dict[str, str] = {}
        for pattern, precision in self.layers.items():
            fitting = fnmatch.filter(names, pattern)
            if not fitting:
                raise RecipeError(unknown(f"layer of {part}", pattern, names))
            found |= dict.fromkeys(fitting, precision)
        return replace(self, layers={name: each for name, each in found.items() if each != self.precision})


@dataclass(frozen=True)
class Recipe:
    """A recipe for a whole pipeline: one for all parts, and those that differ.

    Short form: `backend:precision[+option…][@device]`, `part=` before those that differ, separated by commas:
    `openvino:bf16,vae_decoder=torch:fp32`.
    """

    default: PartRecipe
    parts: Mapping[str, PartRecipe] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join([str(self.default), *(f"{part}={recipe}" for part, recipe in sorted(self.parts.items()))])

    def resolve(self, parts: Iterable[str]) -> dict[str, PartRecipe]:
        """Return the recipe of each of these parts.

        Raises:
            RecipeError: the recipe names a part that isn't among them.
        """
        names = list(parts)
        for part in self.parts:
            if part not in names:
                raise RecipeError(unknown("part", part, names))
        return {part: self.parts.get(part, self.default) for part in names}

    def with_option(self, backend: str, key: str, value: str) -> Recipe:
        """Return the recipe with an option added wherever a part uses `backend`."""

        def added(part: PartRecipe) -> PartRecipe:
            return replace(part, options={**part.options, key: value}) if part.backend == backend else part

        return Recipe(added(self.default), {name: added(part) for name, part in self.parts.items()})


def read(argument: str) -> tuple[Recipe, Placement]:
    """Read a recipe as the command line takes it: in one line, or the name of a `.toml` file.

    Raises:
        UsageError: there is no such file, or it isn't text.
        RecipeError: it means nothing.
    """
    if not argument.endswith(".toml"):
        return parse(argument)
    return from_toml(read_text(Path(argument), "recipe")), Placement()


def read_text(file: Path, kind: str) -> str:
    """Read a file that the user names; `kind` says what it should hold.

    Raises:
        UsageError: there is no such file, or it isn't text.
    """
    if not file.is_file():
        message = f"no {kind} file {file}"
        raise UsageError(message)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"{file} is not UTF-8 text: {error}"
        raise UsageError(message) from error


def parse(text: str) -> tuple[Recipe, Placement]:
    """Parse a recipe's short form and the placement it may carry.

    Raises:
        RecipeError: with what was got, what was expected and the nearest known word.
    """
    default: PartRecipe | None = None
    parts: dict[str, PartRecipe] = {}
    placed: dict[str, dict[str, Any]] = {}
    for piece in text.split(","):
        alone = _PLACED.fullmatch(piece.strip())
        part, equals, rest = (alone[1], "=", "") if alone else _split_part(piece.strip())
        known = placed if alone else parts
        if part in known or (not part and default is not None):
            message = f"recipe {text!r} says twice what {part or 'every part'} is to be"
            raise RecipeError(message)
        if alone:
            placed[part] = {"device": alone[2]}
            continue
        recipe, placed[part] = _parse_part(rest)
        if equals:
            parts[part] = recipe
        else:
            default = recipe
    if default is None:
        message = (
            f"recipe {text!r} has no recipe for the other parts: expected backend:precision[,part=backend:precision…]"
        )
        raise RecipeError(message, fix=f"bakeoff export MODEL -o DIR --recipe torch:fp32,{text}")
    return Recipe(default, parts), _placement(text, placed)


def _placement(text: str, placed: Mapping[str, dict[str, Any]]) -> Placement:
    """Return where all parts go; they may differ in their device alone.

    Raises:
        RecipeError: parts differ in another option of placement.
    """
    common = placed[""]
    devices = {}
    for part, own in placed.items():
        differing = sorted(name for name, value in own.items() if name != "device" and common.get(name) != value)
        if differing:
            message = (
                f"recipe {text!r} gives {differing[0]} to {part} alone; of placement parts differ in @device alone"
            )
            raise RecipeError(
                message, fix=f"say +{differing[0]} of all parts: only those that have it are changed by it"
            )
        if part and "device" in own:
            devices[part] = own["device"]
    return Placement(**common, devices=devices)


def _split_part(piece: str) -> tuple[str, str, str]:
    match = re.match(r"([a-z0-9_]+)=(?=[A-Za-z0-9_.-]+:)", piece)
    return (match[1], "=", piece[match.end() :]) if match else ("", "", piece)


def _parse_part(text: str) -> tuple[PartRecipe, dict[str, Any]]:
    """Return how a part is baked, and what the text says of placement."""
    body, _, device = text.partition("@")
    head, *options = body.split("+")
    backend, colon, precision = head.partition(":")
    if not colon or not _WORD.fullmatch(backend) or not precision:
        message = f"got recipe {text!r}, expected backend:precision[+option…][@device], such as openvino:bf16"
        raise RecipeError(message)
    _check_precision(precision)
    placement: dict[str, Any] = {"device": device} if device else {}
    baked: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key in LOAD_OPTIONS:
            placement[key] = option_value(key, value)
        else:
            baked[key] = value
    return PartRecipe(backend, precision, baked), placement


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise RecipeError(unknown("precision", precision, PRECISIONS))


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """Read the long form: backend, precision and options on top, the parts that differ under `parts`.

    Raises:
        RecipeError: a key is missing or isn't what it should be.
    """
    fields = dict(data)
    if "layers" in fields:
        message = "got layers for all parts, expected them under a part's table: [parts.unet.layers]"
        raise RecipeError(message)
    parts = fields.pop("parts", {})
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        message = f"got parts = {parts!r}, expected a table for each part: [parts.vae_decoder]"
        raise RecipeError(message)
    default = PartRecipe.read(fields)
    base = {"backend": default.backend, "precision": default.precision}
    return Recipe(default, {name: PartRecipe.read({**base, **part}) for name, part in parts.items()})


def to_dict(recipe: Recipe) -> dict[str, Any]:
    long: dict[str, Any] = recipe.default.as_dict()
    if recipe.parts:
        long["parts"] = {name: part.as_dict() for name, part in sorted(recipe.parts.items())}
    return long


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as `from_toml` reads it."""
    lines = _toml_fields(recipe.default)
    for name, part in sorted(recipe.parts.items()):
        lines += ["", f"[parts.{name}]", *_toml_fields(part)]
        if part.layers:
            lines += [
                "",
                f"[parts.{name}.layers]",
                *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in part.layers.items()),
            ]
    return "\n".join(lines) + "\n"


def _toml_fields(part: PartRecipe) -> list[str]:
    fields = {"backend": part.backend, "precision": part.precision, **part.options}
    return [f"{key} = {json.dumps(value)}" for key, value in fields.items()]


def from_toml(text: str) -> Recipe:
    """Read a recipe from TOML.

    Raises:
        RecipeError: it isn't TOML, or not a recipe.
    """
    try:
        return from_dict(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        message = f"the recipe is not TOML: {error}"
        raise RecipeError(message) from error
