"""`python -m bakeoff.models.training OUTPUT`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from . import __doc__ as description
from .architecture import new_pipeline
from .data import draw
from .denoiser import train_denoiser
from .recipe import Recipe
from .text_encoder import train_text_encoder
from .tokenizer import stored_tokenizer
from .vae import train_vae


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bakeoff.models.training", description=description)
    parser.add_argument("output", type=Path, help="folder for the finished Diffusers pipeline")
    parser.add_argument("--state", type=Path, default=Path("build/shapes-training"), help="folder for resuming")
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, metavar=str(field.default))
    arguments = parser.parse_args()
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    arguments.state.mkdir(parents=True, exist_ok=True)
    train(recipe, arguments.state, arguments.output)


def train(recipe: Recipe, state: Path, output: Path) -> None:
    """Run all stages, resuming from `state`, and write a fp16 Diffusers pipeline to `output`."""
    _claim(state, recipe)
    tokenizer = stored_tokenizer(state / "tokenizer", recipe.seed)
    torch.manual_seed(recipe.seed)
    pipeline = new_pipeline(tokenizer)
    data = draw(recipe)
    stages = {
        "vae": train_vae(pipeline.vae, data, recipe, state),
        "text_encoder": train_text_encoder(pipeline, data, recipe, state),
        "denoiser": train_denoiser(pipeline, data, recipe, state),
    }
    pipeline.to(torch.float16).save_pretrained(output)
    pipeline.tokenizer.backend_tokenizer.model.save(str(output / "tokenizer"))
    _use_common_keys(output / "text_encoder" / "model.safetensors")
    _open_as_float32(output / "text_encoder" / "config.json")
    record = {"recipe": asdict(recipe), "stages": {name: asdict(stage) for name, stage in stages.items()}}
    (output / "training.json").write_text(json.dumps(record) + "\n")


def _claim(state: Path, recipe: Recipe) -> None:
    """Bind the state folder to one recipe, so that two trainings never mix."""
    file = state / "recipe.json"
    wanted = json.dumps(asdict(recipe))
    if file.exists() and file.read_text() != wanted:
        message = f"{state} holds a training of another recipe: got {wanted}, expected {file.read_text()}; use another --state"
        raise SystemExit(message)
    file.write_text(wanted)


def _use_common_keys(file: Path) -> None:
    """Name the text encoder's tensors as published checkpoints do, so that older Transformers read them, too."""
    from safetensors.torch import load_file, save_file

    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _open_as_float32(config: Path) -> None:
    """Let Transformers open the text encoder in float32, as Diffusers does the other parts, whatever the file holds."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
