"""CLIP (Radford and others, 2021): pictures and prompts as vectors of one space."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ...components.loading import load_transformers
from ...errors import SourceError
from .metric import batches
from .weights import require

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...pictures import Pictures


class Clip:
    """A folder in transformers' format: CLIPModel, image processor and tokenizer, in fp32.

    Pictures are resized by PIL whether or not torchvision is installed, so that figures don't depend on that.

    Raises:
        UsageError: a file is missing.
        SourceError: the model lacks a tensor, or its config doesn't fit its weights.
    """

    def __init__(self, folder: Path) -> None:
        require(folder, "config.json", "*.safetensors", "preprocessor_config.json|processor_config.json")
        self._folder = folder
        self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        try:
            self._model: Any = load_transformers(CLIPModel, folder, torch.float32)
        except (OSError, RuntimeError, ValueError) as error:
            message = f"{folder} can't be opened as a CLIPModel: {error}"
            raise SourceError(message, fix="download or copy it again") from error

    @property
    def side(self) -> int:
        """Height and width, in pixels, of the pictures that the model sees."""
        side: int = self._model.config.vision_config.image_size
        return side

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - transformers ships no types
        # Without these files transformers would make up a tokenizer of two tokens.
        require(self._folder, "tokenizer.json|vocab.json")
        return CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)

    def cosines(self, pictures: Pictures, prompts: list[str]) -> list[float]:
        """Return the cosine of each picture, (N, H, W, 3) uint8, with its prompt; long prompts are cut."""
        pairs = self.pictures(pictures) * self._prompts(prompts)
        cosines: list[float] = pairs.sum(dim=1).tolist()
        return cosines

    @torch.inference_mode()
    def pictures(self, pictures: Pictures, **processing: Any) -> Tensor:  # noqa: ANN401 - as the image processor takes them
        """Return vectors of length 1, (N, D); `processing` replaces settings of the folder's image processor."""
        found = []
        for batch in batches(len(pictures)):
            images = list(pictures[batch])
            inputs = self._processor(images, return_tensors="pt", input_data_format="channels_last", **processing)
            found.append(self._model.get_image_features(inputs["pixel_values"]).pooler_output)
        return torch.nn.functional.normalize(torch.cat(found))

    @torch.inference_mode()
    def _prompts(self, prompts: list[str]) -> Tensor:
        found = []
        longest = self._model.config.text_config.max_position_embeddings
        for batch in batches(len(prompts)):
            inputs = self._tokenizer(
                prompts[batch], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            found.append(self._model.get_text_features(**inputs).pooler_output)
        return torch.nn.functional.normalize(torch.cat(found))
