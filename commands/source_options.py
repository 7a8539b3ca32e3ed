"""Options that say which model is baked, and into what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipe import read

if TYPE_CHECKING:
    import argparse

    from ..plan import Plan
    from ..recipe import Placement, Recipe


def add_source(command: argparse.ArgumentParser) -> None:
    """Add what says which model is baked into what."""
    command.add_argument("model", help="a Diffusers folder, a hub id, a .safetensors checkpoint, or: shapes")
    _add_recipe(command)
    command.add_argument(
        "--weights",
        default="auto",
        help="auto (default): share unchanged weights with the source where the file system can; link: insist on it; "
        "copy: never, so that any tool may open the folder",
    )
    add_lora(command)
    command.add_argument(
        "--controlnet", metavar="DIR", help="a ControlNet's folder or hub id, to bake beside the pipeline"
    )
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what bakeoff calibrate wrote, for recipes such as onnx:w8a8"
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recipe",
        required=True,
        help="backend:precision, parts that differ after commas (openvino:bf16,vae_decoder=torch:fp32), or a .toml file",
    )
    command.add_argument("--revision", help="revision of a hub model")
    add_config(command)
    command.add_argument(
        "--timestep",
        choices=("ecosystem", "f32"),
        default="ecosystem",
        help="f32: a float timestep port in OpenVINO UNets, for schedulers with fractional timesteps",
    )


def add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        metavar="DIR",
        help="of a .safetensors checkpoint: Diffusers folder or hub id with its tokenizers, scheduler and configs",
    )


def add_lora(command: argparse.ArgumentParser, purpose: str = "bake in") -> None:
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help=f"a LoRA in safetensors to {purpose}, such as style.safetensors:0.8; may be given several times",
    )


def recipe_of(options: argparse.Namespace) -> tuple[Recipe, Placement]:
    recipe, placement = read(options.recipe)
    if options.timestep == "f32":
        recipe = recipe.with_option("openvino", "timestep", "f32")
    return recipe, placement


def source_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_source`'s options say beside the model and the recipe, as `plan` and `export` take it."""
    return {
        "revision": options.revision,
        "config": options.config,
        "weights": options.weights,
        "loras": options.lora,
        "controlnet": options.controlnet,
        "calibration": options.calibration,
    }


def plan_of(options: argparse.Namespace) -> Plan:
    """Plan the export that `add_source`'s options describe."""
    from ..plan import plan

    return plan(options.model, recipe_of(options)[0], **source_fields(options))
