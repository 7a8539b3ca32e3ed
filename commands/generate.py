"""`bakeoff generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UsageError
from ..pictures import check_output, save
from ..placement import ATTENTIONS
from ..recipe import LOAD_OPTIONS, OFFLOADS, SWITCHES, option_value
from ..terminal import print_json, say
from .inspect import proof_in_words
from .source_options import add_lora

if TYPE_CHECKING:
    import argparse


def add_generate(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser("generate", help="make pictures with an artifact")
    command.add_argument("folder", type=Path, help="an artifact, or an Optimum or Diffusers folder")
    command.add_argument("prompts", nargs="+", metavar="prompt")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="several: PNG-0, PNG-1…")
    command.add_argument("--negative-prompt")
    command.add_argument("--seed", type=int, help="of the first prompt; the next ones follow")
    command.add_argument("--guidance-scale", type=float)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    command.add_argument("--max-batch", type=int, default=8)
    command.add_argument("--image", type=Path, help="a picture to start from: image-to-image")
    command.add_argument("--mask", type=Path, help="of the picture's size; what is white is painted anew: inpainting")
    command.add_argument("--control-image", type=Path, help="what the artifact's ControlNet follows")
    command.add_argument("--control-scale", type=float, default=1.0, help="how strongly (1)")
    add_lora(command, "add to the weights as they are loaded")
    command.add_argument("--strength", type=float, help="over 0 to 1: how much of the picture is noised away")
    _add_device_options(command)
    _add_memory_options(command)
    command.set_defaults(run=_generate)
    return command


def _add_device_options(command: argparse.ArgumentParser) -> None:
    device = command.add_argument_group("device", "where parts run, and how")
    device.add_argument("--device", default="auto")
    device.add_argument(
        "--devices", default="", metavar="PART@DEVICE,…", help="parts that run elsewhere: vae_decoder@cpu"
    )
    device.add_argument("--threads", type=int)
    device.add_argument(
        "--compile", nargs="?", const=True, default=False, metavar="HOW",
        help="torch: torch.compile; full, or regional: repeated blocks alone",
    )  # fmt: skip
    device.add_argument("--cuda-graphs", action="store_true", help="record launches on a GPU, and replay them")
    device.add_argument(
        "--attention", choices=ATTENTIONS, help="the attention kernel: of torch, or of ONNX Runtime (flash, math)"
    )
    device.add_argument("--channels-last", choices=SWITCHES, default="auto", help="torch: the layout of convolutions")
    device.add_argument("--static", action="store_true", help="OpenVINO: compile for the shapes that parts get")
    device.add_argument("--provider", help="ONNX Runtime: an execution provider, by name")
    device.add_argument("--provider-options", metavar="NAME=VALUE;…", help="ONNX Runtime: of that provider")


def _add_memory_options(command: argparse.ArgumentParser) -> None:
    memory = command.add_argument_group("memory", "what is decided by the memory that is there unless it is said here")
    memory.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="auto",
        help="none: parts stay open; parts: those that are done are closed before others are opened; mapped: and weights "
        "stay in their files, where the runtime can; blocks: torch on a GPU, weights come a block at a time",
    )
    memory.add_argument("--vae-tiling", choices=SWITCHES, default="auto", help="decode in tiles (lossy: seams)")
    memory.add_argument("--vae-slicing", choices=SWITCHES, default="auto", help="decode a picture at a time")
    memory.add_argument("--attention-slicing", metavar="N", help="torch: N heads at a time, or auto")
    memory.add_argument(
        "--token-merging", metavar="SHARE", help="torch: merge tokens in UNets, to 0.75 of them (lossy)"
    )


def _placement(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `load` that were given; text as in recipes."""
    given = {name: getattr(options, name) for name in ("device", "devices", *LOAD_OPTIONS)}
    return {
        name: option_value(name, value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }


def _generate(options: argparse.Namespace) -> None:
    check_output(options.output)
    if (options.height is None) != (options.width is None):
        message = "got one of --height and --width, expected both or none"
        raise UsageError(message)
    from ..runtimes.engine import load

    with load(options.folder, **_placement(options), loras=options.lora) as engine:
        if not engine.proved:
            say(f"note: {options.folder} is {proof_in_words(engine.proof)}")
        result = engine.generate(
            options.prompts,
            negative_prompts=options.negative_prompt,
            seeds=options.seed,
            guidance_scale=options.guidance_scale,
            steps=options.steps,
            size=None if options.height is None else (options.height, options.width),
            image=_picture(options.image),
            mask=_picture(options.mask),
            strength=options.strength,
            control_image=_picture(options.control_image),
            control_scale=options.control_scale,
            max_batch=options.max_batch,
            stages=options.json,
            progress=sys.stderr.isatty(),
        )
        configuration = engine.configuration
    files = save(result.images, options.output)
    for part, found in configuration.items():
        if found.get("fallback"):
            say(f"note: {part}: {found['fallback']}")
    for note in result.notes:
        say(f"note: {note}")
    if options.json:
        print_json(
            {
                "files": [str(file) for file in files],
                "seeds": result.seeds,
                "seconds": dict(result.seconds),
                "proved": engine.proved,
                "configuration": configuration,
                "notes": result.notes,
            }
        )
        return
    for file, seed in zip(files, result.seeds, strict=True):
        print(f"{file} (seed {seed})")


def _picture(file: Path | None) -> Any:  # noqa: ANN401 - a PIL image, imported late
    if file is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except (OSError, UnidentifiedImageError) as error:
        message = f"{file} can't be read as a picture: {error}"
        raise InputError(message, fix="give a PNG or JPEG file") from error
