"""Tiny random pipelines of every family, made in a second: for tests, and for bug reports that anyone can run again.

What a family's is made of stands in its own file. Weights come from a seed and a module's config alone, so that two
families with the same text encoder or VAE have the same bytes, and an artifact of one can lend it to the other's.
Tokenizers know bytes (CLIP, Gemma, Qwen) or characters (T5): their vocabularies need no training, and never differ.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import string
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..artifact import staged
from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ..components.family import Family

_CLIP_LENGTH = 77
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    family: str,
    folder: Path,
    *,
    variant: str | None = None,
    seed: int = 0,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a tiny Diffusers folder of a family, with random float32 weights; return the folder.

    Args:
        family: its name, such as `flux`.
        folder: a new folder, which is there once it is whole.
        variant: such as `controlnet`, which the folder has in it then.
        seed: of the weights.
        changes: module -> fields of its config that shall differ, such as `{"unet": {"in_channels": 9}}`.

    Raises:
        UsageError: there is no such family.
        ArtifactError: the folder is there already.
    """
    chosen = family_of(family).variant(variant)
    with staged(folder, replace_existing=False) as partial:
        for name, (library, class_name, config) in chosen.tiny.items():
            _write(library, class_name, {**config, **(changes or {}).get(name, {})}, partial / name, seed)
        _write_index(chosen, partial)
    return folder


def family_of(name: str) -> Family:
    """Return a family by its name.

    Raises:
        UsageError: there is none of that name.
    """
    found = {each.name: each for each in plugins.families()}
    if name not in found:
        raise UsageError(unknown("family", name, found))
    return found[name]


def write_host(family: str, folder: Path) -> None:
    """Write what a tiny pipeline has beside its modules, into its folder: index, scheduler and tokenizers."""
    import torch

    chosen = family_of(family)
    for name, (library, class_name, config) in chosen.tiny.items():
        if not issubclass(getattr(importlib.import_module(library), class_name), torch.nn.Module):
            _write(library, class_name, config, folder / name, seed=0)
    _write_index(chosen, folder)


def _write_index(family: Family, folder: Path) -> None:
    index: dict[str, Any] = {
        "_class_name": family.pipelines["text-to-image"],
        "_diffusers_version": importlib.metadata.version("diffusers"),
    }
    index |= {name: [library, class_name] for name, (library, class_name, _) in family.tiny.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(library: str, class_name: str, config: Mapping[str, Any], folder: Path, seed: int) -> None:
    import torch

    found: Any = getattr(importlib.import_module(library), class_name)
    if class_name in _TOKENIZERS:
        made = _TOKENIZERS[class_name](found)
    elif issubclass(found, torch.nn.Module):
        torch.manual_seed(seed)
        made = found(found.config_class(**config)) if library == "transformers" else found(**config)
        _fill_zeros(made, seed)
    else:
        made = found(**config)
    made.save_pretrained(folder)


def _fill_zeros(module: Any, seed: int) -> None:  # noqa: ANN401 - a module of either library
    """Draw what starts as zeros, such as gates and pad tokens: zeros would hide what is computed from them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.detach().any():
            parameter.data.normal_(0, 0.1, generator=generator)


def _bytes() -> list[str]:
    """Return the printable stand-ins of the 256 bytes (https://github.com/openai/gpt-2, `bytes_to_unicode`)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _clip(found: Any) -> Any:  # noqa: ANN401 - a tokenizer's class, and one of it
    alphabet = _bytes()
    words = [*alphabet, *(f"{character}</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return found(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=_CLIP_LENGTH)


def _t5(found: Any) -> Any:  # noqa: ANN401 - a tokenizer's class, and one of it
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = ["<pad>", "</s>", "<unk>", "▁", *characters]
    return found(vocab=[(piece, 0.0 if i < 3 else -1.0) for i, piece in enumerate(pieces)], extra_ids=0)  # noqa: PLR2004 - specials first


def _qwen(found: Any) -> Any:  # noqa: ANN401 - a tokenizer's class, and one of it
    words = [*_bytes(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = found(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = _QWEN_TEMPLATE
    return tokenizer


def _gemma(found: Any) -> Any:  # noqa: ANN401 - a tokenizer's class, and one of it
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    return found(vocab={word: i for i, word in enumerate(words)}, merges=[])


_TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "CLIPTokenizer": _clip,
    "GemmaTokenizer": _gemma,
    "Qwen2Tokenizer": _qwen,
    "T5Tokenizer": _t5,
}
