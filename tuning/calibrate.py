"""`bakeoff calibrate`: run a model on prompts, and keep what its activations take on, for recipes that round them."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

from ..components.component import WRAPPER
from ..errors import UsageError
from ..parity.drawing import given_pictures, open_source
from ..plan import module_keys
from ..progress import Steps
from ..quantize.calibration import Calibration
from ..sources.lora import Lora
from ..sources.source import Source
from ..terminal import print_json
from .options import add_drawing_options, check_output, prompts_of, size_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from torch import nn

    from ..models.prompts import Prompt

FEWEST_PROMPTS = 4
DEFAULT_PROMPTS, DEFAULT_STEPS = 16, 10
_BATCH = 4
_SEED = 1
_PICTURE_TASK = "image-to-image"


def calibrate(
    model: str,
    prompts: Sequence[Prompt],
    *,
    steps: int = DEFAULT_STEPS,
    guidance_scale: float | None = None,
    size: tuple[int, int] | None = None,
    revision: str | None = None,
    config: str | None = None,
    controlnet: str | None = None,
    loras: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Draw each prompt in float32 with torch, watching every matrix and convolution at every step.

    Guided and unguided halves are seen alike. Where the family has image-to-image, the first pictures are drawn on from,
    so that the VAE's encoder is seen, too. A model that inpaints, and a ControlNet, get a made-up picture. Memory: the
    model's, and for each side of a layer 8 KB and 32 bytes a channel.

    Args:
        model: a Diffusers folder, a hub id, a single-file checkpoint, or `shapes`.
        prompts: what to draw.
        steps: denoising steps of each picture.
        guidance_scale: by default the pipeline's own.
        size: height and width in pixels; by default the model's own.
        revision: of a hub model.
        config: of a single-file checkpoint.
        controlnet: folder or hub id of one to draw with, for exports with it.
        loras: `FILE.safetensors` or `FILE.safetensors:SCALE` each, for exports that have them baked in.
        progress: called with a line at each batch.

    Raises:
        UsageError: too few prompts to tell anything.
        InputError: activations that aren't finite.
    """
    if len(prompts) < FEWEST_PROMPTS:
        message = f"got {len(prompts)} prompts to calibrate with, expected at least {FEWEST_PROMPTS}"
        raise UsageError(message, fix=f"give more: {DEFAULT_PROMPTS} are usual")
    source = Source.open(model, revision, "controlnet" if controlnet else None, controlnet or "", config)
    texts = [prompt.text for prompt in prompts]
    made = Calibration(
        {
            "model": source.id,
            "revision": source.revision,
            "modules": module_keys(source),
            "loras": [Lora.open(text, source).fields for text in loras],
            "prompts": [prompt.id for prompt in prompts],
            "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
            "steps": steps,
            "guidance_scale": guidance_scale,
        }
    )
    with open_source(source) as engine:
        engine.visit(partial(watch, made))
        engine.set_loras(*loras)
        given = {"guidance_scale": guidance_scale, **given_pictures(engine, size)}
        for start in range(0, len(texts), _BATCH):
            progress(f"[{start // _BATCH + 1}/{-(-len(texts) // _BATCH)}] drawing {_BATCH} prompts at a time")
            batch = texts[start : start + _BATCH]
            drawn = engine.generate(batch, seeds=_SEED + start, steps=steps, size=size, **given)
            if start == 0 and engine.task == "text-to-image" and _PICTURE_TASK in source.family.pipelines:
                again = {**given, "image": list(drawn.images), "strength": 0.5}
                engine.generate(batch, seeds=_SEED, steps=2, **again)
    return made


def watch(made: Calibration, part: str, module: nn.Module) -> None:
    """Let a calibration see what each matrix and convolution is given and makes."""
    from torch import nn

    def hook(path: str) -> Callable[..., None]:
        return lambda layer, given, result: made.see(
            part, path, given[0], result, 1 if isinstance(layer, nn.Conv2d) else -1
        )

    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(hook(path.removeprefix(WRAPPER)))


def add_calibrate(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="find out what a model's activations take on, for recipes such as onnx:w8a8",
        description="Draw prompts in float32 and keep a histogram of each layer's activations.",
    )
    add_drawing_options(command, "calibration.safetensors", DEFAULT_PROMPTS, DEFAULT_STEPS)
    command.add_argument("--guidance-scale", type=float)
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="to draw with, as exports have it baked in"
    )
    command.add_argument("--controlnet", metavar="DIR", help="folder or hub id of one to draw with, as exports have it")
    command.set_defaults(run=_run)
    return command


def _run(options: argparse.Namespace) -> None:
    check_output(options.output)
    Calibration.check_target(options.output)
    with Steps() as progress:
        made = calibrate(
            options.model,
            prompts_of(options),
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            size=size_of(options),
            revision=options.revision,
            config=options.config,
            controlnet=options.controlnet,
            loras=options.lora,
            progress=progress,
        )
    made.save(options.output)
    layers = {part: len(layers) for part, layers in made.parts.items()}
    if options.json:
        print_json({"file": str(options.output), **made.info, "layers": layers})
        return
    print(f"{options.output}: {', '.join(f'{count} layers of {part}' for part, count in layers.items())}")
