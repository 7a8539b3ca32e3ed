"""A few real pictures of a model, drawn small in few steps: what its parts are given on the way, and what comes of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..components.component import PROOF_SIZES
from ..errors import BakeoffError, ResourceError
from ..footprint import usable_bytes
from ..models.prompts import default_prompts, prompt_set
from ..recipe import Placement
from ..runtimes.engine import Engine
from ..runtimes.opening import of_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..components.component import Component, Port, Sizes
    from ..sources.source import Source

    Tensors = dict[str, Tensor]

STEPS = 3
FURTHER = 3
"""How many times as many pictures `sit_again` draws as `sit` does."""
_PICTURE_TASK = "image-to-image"


@dataclass(frozen=True)
class Shot:
    """What is drawn at once."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    height: int
    width: int

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Shot:
        """Read what `dataclasses.asdict` made of one."""
        return cls(**{**data, "prompts": tuple(data["prompts"]), "seeds": tuple(data["seeds"])})


@dataclass(frozen=True)
class Drawn:
    """What came of a shot."""

    latents: NDArray[np.float32]
    """(steps, B, …), after each step."""
    pictures: NDArray[np.uint8]
    """(B, H, W, 3)."""


@dataclass(frozen=True)
class Case:
    """What a part is given once."""

    inputs: Tensors
    call: int | None = None
    """Which call of the part in its drawing it was, from 0; None: made up."""


@dataclass(frozen=True)
class Session:
    """The pictures of a model in eager float32, and what its parts were given; or why there are none."""

    shots: tuple[Shot, ...] = ()
    drawn: tuple[Drawn, ...] = ()
    cases: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    """Part -> its cases, for those that were reached."""
    obstacle: str | None = None


def open_source(source: Source, precision: str = "fp32", threads: int | None = None, **placed: Any) -> Engine:  # noqa: ANN401 - fields of Placement
    """Open a model as it is, in eager torch on the CPU, by default with as many threads as torch has been given."""
    import torch

    placement = Placement(device="cpu", threads=threads or torch.get_num_threads(), **placed)
    return Engine(of_source(source, precision), placement)


def open_whole(source: Source, precision: str = "fp32") -> Engine:
    """Open a model as `open_source` does, all parts at once: for those who change modules between drawings.

    Raises:
        ResourceError: they don't fit into memory together.
    """
    engine = open_source(source, precision, offload="none", vae_tiling="off")
    if engine.all_bytes > usable_bytes():
        needed, free = engine.all_bytes / 1e9, usable_bytes() / 1e9
        message = f"all parts in {precision} take about {needed:.1f} GB of memory, {free:.1f} GB are free"
        raise ResourceError(message, fix="a machine with more memory, or close what uses it")
    return engine


def sit(source: Source, model: str) -> Session:
    """Draw with a model in eager float32, and keep what parts were given at three shapes and three steps at least.

    Args:
        source: the model.
        model: what it was asked for as, which decides on the prompts.
    """
    with open_source(source) as engine:
        if engine.largest_bytes > usable_bytes():
            needed, free = engine.largest_bytes / 1e9, usable_bytes() / 1e9
            return Session(obstacle=f"drawing in float32 takes about {needed:.1f} GB of memory, {free:.1f} GB are free")
        shots = _shots(engine, source, model)
        seen: dict[str, list[list[Tensors]]] = defaultdict(list)
        try:
            drawn = tuple(_watched(engine, shot, seen) for shot in shots)
        except BakeoffError as error:
            return Session(obstacle=f"eager float32 can't draw: {error.message}")
    parts = {part.name: part for part in source.parts}
    cases = {
        name: _cases(parts[name].component, source.config(parts[name].module), calls)
        for name, calls in seen.items()
        if len(calls) == len(shots)
    }
    return Session(shots, drawn, cases)


def sit_again(source: Source, model: str) -> Session:
    """Draw further pictures in eager float32, of the same shapes, of which no part's inputs are kept."""
    with open_source(source) as engine:
        shots = _shots(engine, source, model, 1 + FURTHER)[len(PROOF_SIZES) :]
        return Session(shots, tuple(draw(engine, shot) for shot in shots))


def _shots(engine: Engine, source: Source, model: str, rounds: int = 1) -> tuple[Shot, ...]:
    """Return three a round, of the batches and shapes of `PROOF_SIZES`, each with its own prompts: the last ones of the set.

    A calibration takes the first ones: proved by these, steps of activations would be judged by what they were fitted to.
    """
    configs = {module: source.config(module) for module in source.modules}
    multiple, largest = engine.family.size_multiple(configs), engine.family.largest_size(configs)
    each = _pixels_of_a_latent(source)
    texts = reversed(prompt_set(default_prompts(model)))
    given = given_pictures(engine, (multiple, multiple))
    scale = engine.default_guidance(given["image"], given["mask"])
    shots: list[Shot] = []
    for sizes in PROOF_SIZES * rounds:
        first = sum(len(shot.prompts) for shot in shots)
        wanted = (-(-side * each // multiple) * multiple for side in (sizes.height, sizes.width))
        height, width = (min(pixels, largest or pixels) for pixels in wanted)
        prompts = tuple(next(texts).text for _ in range(sizes.batch))
        seeds = tuple(range(first, first + sizes.batch))
        shots.append(Shot(prompts, seeds, max(STEPS, engine.family.fewest_steps), scale, height, width))
    return tuple(shots)


def _pixels_of_a_latent(source: Source) -> int:
    """Return how many pixels of a side the VAE makes of a latent; 8, the usual, where there is none."""
    decoder = next((part for part in source.parts if part.name == "vae_decoder"), None)
    if decoder is None:
        return 8
    (port,) = decoder.component.outputs(source.config(decoder.module))
    times, _, _ = str(port.dims[2]).rpartition("*")
    return int(times or 1)


def draw(engine: Engine, shot: Shot, max_batch: int = 8) -> Drawn:
    """Draw a shot; where the model needs a picture to start from, or to follow, it gets a made-up one.

    Raises:
        ParityError: the pictures have NaN or infinite pixels.
        InputError: the model can't draw this.
    """
    import numpy as np
    import torch

    batches: list[list[Tensor]] = []

    def keep(step: int, _: float, latents: Tensor) -> None:
        if step == 0:
            batches.append([])
        batches[-1].append(latents.detach().float().cpu().clone())

    result = engine.generate(
        shot.prompts,
        seeds=shot.seeds,
        guidance_scale=shot.guidance_scale,
        steps=shot.steps,
        size=(shot.height, shot.width),
        **given_pictures(engine, (shot.height, shot.width)),
        callback=keep,
        max_batch=max_batch,
    )
    latents = [torch.stack(steps) for steps in batches]
    found = torch.cat(latents, 1).numpy() if latents else np.zeros((0, len(shot.prompts)), np.float32)
    return Drawn(found, result.images)


def _watched(engine: Engine, shot: Shot, seen: dict[str, list[list[Tensors]]]) -> Drawn:
    """Draw a shot and, where the family can, on from its pictures: that is what reaches the VAE's encoder."""
    calls = _Calls()
    engine.watch(calls)
    drawn = draw(engine, shot)
    reached = dict(calls.found)
    if engine.task == "text-to-image" and _PICTURE_TASK in engine.family.pipelines:
        engine.watch(again := _Calls())
        engine.generate(
            shot.prompts,
            seeds=shot.seeds,
            steps=max(2, engine.family.fewest_steps),
            image=list(drawn.pictures),
            strength=0.5,
            control_image=given_pictures(engine, (shot.height, shot.width))["control_image"],
        )
        reached |= {name: given for name, given in again.found.items() if name not in reached}
    engine.watch(None)
    for name, given in reached.items():
        seen[name].append(given)
    return drawn


class _Calls:
    """Keeps what parts are given, call by call."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensors]] = defaultdict(list)

    def __call__(self, part: str, inputs: Mapping[str, Tensor]) -> None:
        self.found[part].append({name: tensor.detach().cpu().clone() for name, tensor in inputs.items()})


def given_pictures(engine: Engine, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return made-up pictures that `Engine.generate` needs to draw a prompt: to inpaint, to follow; None where it needs none.

    Args:
        engine: of the model.
        size: height and width in pixels; by default the model's own.
    """
    import numpy as np

    height, width = size or engine.default_size
    controlled = any(part.module == "controlnet" for part in engine.family.parts)
    given: dict[str, Any] = {"image": None, "mask": None}
    given["control_image"] = made_up_picture(height, width) if controlled else None
    if engine.task == "inpainting":
        given["image"], given["mask"] = made_up_picture(height, width), np.zeros((height, width), np.uint8)
        given["mask"][height // 4 : -height // 4, width // 4 : -width // 4] = 255
    return given


def made_up_picture(height: int, width: int) -> NDArray[np.uint8]:
    """Return a disc before two slopes of colour, (H, W, 3)."""
    import numpy as np

    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1  # noqa: PLR2004 - a radius of about a third
    channels = np.stack([x, y, np.where(disc, 1.0, 0.25)], -1)
    return (channels * 255).round().astype(np.uint8)


def _cases(component: Component, config: Mapping[str, Any], calls: Sequence[Sequence[Tensors]]) -> tuple[Case, ...]:
    """Choose a part's cases: of the first shot the first call, the middle and the last; of the others one each.

    Rows are thinned to the batches of `PROOF_SIZES`, the first and the last kept, which are the unguided and the guided
    half. Of the last shot texts are cut, so that another length occurs where pipelines pad all texts to one.
    """
    found = []
    for index, given in enumerate(calls):
        last = len(given) - 1
        chosen = ({0, last // 2, last}, {last}, {0})[index]
        sizes = PROOF_SIZES[index]
        length = component.limit(config, sizes).sequence if sizes is PROOF_SIZES[-1] else None
        for call in sorted(chosen):
            whole = _joined(component.inputs(config), given, call, sizes.batch)
            found.append(Case(_thinned(component, config, whole, sizes, length), call))
    return tuple(found)


def _joined(ports: Sequence[Port], given: Sequence[Tensors], call: int, batch: int) -> Tensors:
    """Return what a call was given; with other calls' rows where a pipeline gives a part one picture at a time."""
    import torch

    if any(port.dims[:1] != ("batch",) for port in ports) or len(given[call][ports[0].name]) >= batch:
        return given[call]
    shapes = {port.name: given[call][port.name].shape for port in ports}
    alike = [each for each in given if all(each[name].shape == shape for name, shape in shapes.items())]
    return {name: torch.cat([each[name] for each in alike]) for name in shapes}


def _thinned(
    component: Component, config: Mapping[str, Any], given: Tensors, sizes: Sizes, length: int | None
) -> Tensors:
    """Keep some rows and, to a length, some tokens: the first ones and the last, which ends a text."""
    import torch

    ports = component.inputs(config)
    kept = {}
    for port in ports:
        tensor = given[port.name].to(getattr(torch, port.dtype))
        for axis, dim in enumerate(port.dims):
            there = tensor.shape[axis]
            if dim == "batch" and axis == 0 and there > sizes.batch:
                step = max(sizes.batch - 1, 1)
                rows = sorted(there - 1 - index * (there - 1) // step for index in range(sizes.batch))
                tensor = tensor[rows]
            if dim == "sequence" and length and there > length:
                tensor = tensor.index_select(axis, torch.tensor([*range(length - 1), there - 1]))
        kept[port.name] = tensor.contiguous()
    return kept
