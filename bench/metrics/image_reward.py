"""ImageReward (Xu and others, 2023: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation")."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel, CLIPImageProcessorPil

from .metric import Metric, batches
from .weights import fill, require, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ...pictures import Pictures

_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of rewards over the authors' data: what they are standardised with."""
_TOKENS = 35
"""What prompts are cut or padded to."""
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")
"""Of BLIP's training, and a buffer that older versions of transformers saved."""
_RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
)
"""The authors' names -> transformers', by patterns that are tried in turn."""


class ImageReward(Metric):
    """How people would like a picture for its prompt, in standard deviations from the mean: mostly -2 to 2.

    Weights: THUDM/ImageReward's `ImageReward.pt`, as it is or as safetensors, under its own names; the tokenizer of
    bert-base-uncased; and a `config.json` of transformers' BlipConfig. Its text model must have 12 heads and its vision
    model an epsilon of 1e-6, which the weights can't tell:

        {"model_type": "blip", "text_config": {"num_attention_heads": 12},
         "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                           "num_attention_heads": 16, "image_size": 224, "layer_norm_eps": 1e-6}}
    """

    name = "image_reward"

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        require(self.folder, "config.json", "tokenizer.json|vocab.txt")
        config = BlipConfig.from_pretrained(self.folder, local_files_only=True)
        side = config.vision_config.image_size
        self._tokenizer = BertTokenizer.from_pretrained(self.folder, local_files_only=True)
        # CLIP's processing is what the authors used; BLIP's own squeezes pictures to a square.
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self._network = _Network(config)
        fill(self._network, _renamed(tensors(self.folder)), self.folder)

    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:  # noqa: ARG002 - no reference counts
        return [value for batch in batches(len(got)) for value in self._rewards(got[batch], prompts[batch])]

    @torch.inference_mode()
    def _rewards(self, pictures: Pictures, prompts: list[str]) -> list[float]:
        pixels = self._processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        )
        rewards = self._network(pixels, tokens["input_ids"], tokens["attention_mask"])
        standardised: list[float] = ((rewards - _MEAN) / _DEVIATION).tolist()
        return standardised


class _Network(nn.Module):
    """BLIP's two encoders, the text's with cross attention to the picture, and what makes a reward of its first token."""

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - a BlipConfig
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.mlp = nn.ModuleDict({"layers": _perceptron(config.text_config.hidden_size)})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return rewards (N,), not standardised, of pixels (N, 3, H, W) and tokens (N, T)."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        rewards: Tensor = self.mlp["layers"](read[:, 0])
        return rewards.squeeze(1)


def _perceptron(width: int) -> nn.Sequential:
    """Return the authors' layers: dropouts, which do nothing here but give the others their names, and no non-linearity."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(),
        nn.Linear(1024, 128),
        nn.Dropout(),
        nn.Linear(128, 64),
        nn.Dropout(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def _renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in found.items():
        if _UNUSED.match(name):
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901 - renamed in steps
        renamed[name] = tensor
    return renamed
