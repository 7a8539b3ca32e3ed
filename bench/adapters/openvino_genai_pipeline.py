"""OpenVINO GenAI's `Text2ImagePipeline`, one prompt at a time. Runs in its own environment, Diffusers isn't needed there.

`options`: `folder` (with its tokenizer converted: `tokenizer/openvino_tokenizer.xml`), `device` (`CPU`), `precision`
(`f32`), `threads`. Give the experiment a height and a width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai


class _Given(openvino_genai.Generator):  # type: ignore[misc]  # GenAI has no types
    """Gives the latents where noise is asked for."""

    def __init__(self, latents: np.ndarray) -> None:
        super().__init__()
        self.latents = latents

    def randn_tensor(self, shape: list[int]) -> openvino.Tensor:
        return openvino.Tensor(self.latents.reshape(shape))

    def next(self) -> float:
        return 0.0


class Adapter:
    def __init__(self, options: dict[str, Any]) -> None:
        self.config = {
            "INFERENCE_PRECISION_HINT": options.get("precision", "f32"),
            "INFERENCE_NUM_THREADS": options["threads"],
        }
        device = options.get("device", "CPU")
        self.pipeline = openvino_genai.Text2ImagePipeline(options["folder"], device, **self.config)

    def generate(self, prompts: list[str], latents: np.ndarray, work: dict[str, Any]) -> np.ndarray:
        if work["scheduler"]:
            message = f"got the scheduler {work['scheduler']}, which GenAI takes from scheduler_config.json alone"
            raise ValueError(message)
        given = {"num_inference_steps": work["steps"], "height": work["height"], "width": work["width"]}
        for name in ("guidance_scale", "negative_prompt"):
            if work[name] is not None:
                given[name] = work[name]
        pictures = [
            np.array(self.pipeline.generate(prompt, generator=_Given(latents[row : row + 1].copy()), **given).data)
            for row, prompt in enumerate(prompts)
        ]
        return np.concatenate(pictures)

    def configuration(self) -> dict[str, Any]:
        return {"pipeline": {"threads": self.config["INFERENCE_NUM_THREADS"], **self.config}}
