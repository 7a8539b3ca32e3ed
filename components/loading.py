"""Open modules without a byte of theirs entering memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from . import low_bit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import nn


def load_diffusers(model_class: Any, folder: Path, dtype: torch.dtype, *, unused: Sequence[str] = ()) -> nn.Module:  # noqa: ANN401 - a Diffusers class
    """Open a module whose weights stay mapped where the files have `dtype`.

    It is constructed on the meta device: what its constructor computes (SD 3's position table takes 1.4 GB on the way)
    comes from the checkpoint anyway. Buffers that don't, and that a component's own forward has no use for, are named
    in `unused` and left out.

    Raises:
        SourceError: the checkpoint lacks a tensor.
        UnavailableError: its weights are codes of bitsandbytes or torchao, which isn't installed.
    """
    import torch

    if low_bit.method(folder):
        return _complete(low_bit.load_diffusers(model_class, folder), folder, unused)
    with torch.device("meta"):
        module: nn.Module = model_class.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    return _complete(module, folder, unused)


def _complete(module: nn.Module, folder: Path, unused: Sequence[str]) -> nn.Module:
    """Drop what is unused, and refuse a module that lacks anything else."""
    for name in unused:
        owner, _, buffer = name.rpartition(".")
        setattr(module.get_submodule(owner), buffer, None)
    missing = [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]
    missing += [name for name, tensor in module.named_buffers() if tensor.is_meta and name not in missing]
    _refuse_missing(folder, missing)
    return module.eval()


def load_transformers(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401 - a Transformers class
    """Open a module whose weights stay mapped where the files have `dtype`, without a progress bar of its own.

    Raises:
        SourceError: the checkpoint lacks a tensor, which Transformers would fill with new values.
        UnavailableError: its weights are codes of bitsandbytes or torchao, which isn't installed.
    """
    from transformers.utils import logging

    library = low_bit.method(folder)
    if library and library != low_bit.OWN:
        low_bit.require(library)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if library == low_bit.OWN:
            return low_bit.load_transformers(model_class, folder).eval()
        module, found = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    _refuse_missing(folder, sorted(found["missing_keys"]))
    opened: nn.Module = module.eval()
    low_bit.keep_codes(opened)
    return opened


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    if missing:
        message = f"{folder} lacks {', '.join(missing[:5])}{'…' if len(missing) > 5 else ''}"  # noqa: PLR2004 - enough to see
        raise SourceError(message, fix="download or copy the model again")
