"""CLIP's byte-pair encoding, trained on the captions."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from ..scenes import random_scene

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import CLIPTokenizer

LONGEST_PROMPT = 32
"""Tokens, with the first and the last: twice what a scene's caption takes."""
_VOCABULARY = 1024
_CAPTIONS = 5_000


def stored_tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """Train the tokenizer once: its ids differ between trainings, so resuming must read them back."""
    from transformers import CLIPTokenizer

    if not folder.exists():
        _train(seed).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids (B, 32) int64, padded with the end token."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _train(seed: int) -> CLIPTokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=sorted(letters),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    rng = random.Random(seed)
    tokenizer.train_from_iterator((random_scene(rng).caption for _ in range(_CAPTIONS)), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = learnt["vocab"]
    for letter in sorted(letters):
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LONGEST_PROMPT)
