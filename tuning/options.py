"""What `bakeoff calibrate` and `bakeoff sensitivity` are both told: which model, and what to draw with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..models.prompts import default_prompts, read_prompts

if TYPE_CHECKING:
    import argparse

    from ..models.prompts import Prompt


def add_drawing_options(command: argparse.ArgumentParser, file: str, prompts: int, steps: int) -> None:
    """Let a command be told its model, prompts and steps, of which there are so many by default, and the file to write."""
    command.add_argument("model", help="a Diffusers folder, a hub id, a .safetensors checkpoint, or: shapes")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=file)
    command.add_argument("--prompts", help="a prompt set, or a .txt file with one a line")
    command.add_argument("--count", type=int, default=prompts, help=f"how many of them ({prompts})")
    command.add_argument("--steps", type=int, default=steps, help=f"of each picture ({steps})")
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    command.add_argument("--revision", help="of a hub model")
    command.add_argument("--config", metavar="DIR", help="of a .safetensors checkpoint, as for export")


def prompts_of(options: argparse.Namespace) -> tuple[Prompt, ...]:
    """Return the prompts that a command line asks for; by default those that are the model's usual ones."""
    return read_prompts(options.prompts or default_prompts(options.model), options.count)


def size_of(options: argparse.Namespace) -> tuple[int, int] | None:
    """Return the height and width that a command line asks for.

    Raises:
        UsageError: it names one of them alone.
    """
    if (options.height is None) != (options.width is None):
        message = "got one of --height and --width, expected both or neither"
        raise UsageError(message)
    return None if options.height is None else (options.height, options.width)


def check_output(file: Path) -> None:
    """Refuse to work for a file that can't be written.

    Raises:
        UsageError: with what to type instead.
    """
    if not file.name or file.is_dir():
        message = f"got -o {file}, which is a folder, expected a file"
        raise UsageError(message, fix=f"-o {file / 'FILE'}")
    if not file.parent.is_dir():
        message = f"got -o {file}, but there is no folder {file.parent}"
        raise UsageError(message, fix=f"mkdir -p {file.parent}")
    if not os.access(file.parent, os.W_OK):
        message = f"got -o {file}, but {file.parent} can't be written to"
        raise UsageError(message, fix="give a file in another folder")
