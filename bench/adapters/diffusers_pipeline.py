"""Diffusers itself, without bakeoff: `DiffusionPipeline.from_pretrained`, by default in the bench's own environment.

`options`: `folder`; `dtype` (`float32` by default), `device` (`cpu`), `compile` (its repeated blocks), `threads`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Adapter:
    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self.config = {
            "device": options.get("device", "cpu"),
            "precision": options.get("dtype", "float32"),
            "compile": options.get("compile", False),
        }
        self.pipeline = diffusers.DiffusionPipeline.from_pretrained(
            options["folder"],
            dtype=getattr(torch, self.config["precision"]),
            use_safetensors=True,
            local_files_only=True,
        ).to(self.config["device"])
        self.pipeline.set_progress_bar_config(disable=True)
        if self.config["compile"]:
            (getattr(self.pipeline, "unet", None) or self.pipeline.transformer).compile_repeated_blocks()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def generate(self, prompts: list[str], latents: np.ndarray, work: dict[str, Any]) -> np.ndarray:
        return self._make(prompts, latents, work)

    def trajectory(self, prompts: list[str], latents: np.ndarray, work: dict[str, Any]) -> list[np.ndarray]:
        steps: list[np.ndarray] = []

        def keep(_: Any, __: int, ___: Any, told: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - Diffusers' own
            steps.append(told["latents"].float().cpu().numpy())
            return {}

        self._make(prompts, latents, work, keep)
        return steps

    def device_memory(self) -> dict[str, int]:
        return {"allocator_peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}

    def gpu(self) -> str | None:
        if not torch.cuda.is_initialized() or torch.version.hip:
            return None
        return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"

    def configuration(self) -> dict[str, Any]:
        return {"pipeline": {"class": type(self.pipeline).__name__, "threads": torch.get_num_threads(), **self.config}}

    def _make(
        self, prompts: list[str], latents: np.ndarray, work: dict[str, Any], callback: Callable[..., Any] | None = None
    ) -> np.ndarray:
        self._use(work["scheduler"])
        guided = inspect.signature(self.pipeline.__call__).parameters.get("true_cfg_scale")
        if work["negative_prompt"] and guided is not None and guided.default <= 1:
            message = f"{type(self.pipeline).__name__} has its guidance built in: leave out the negative prompt"
            raise ValueError(message)
        dtype = getattr(torch, self.config["precision"])
        given = {
            "negative_prompt": work["negative_prompt"] and [work["negative_prompt"]] * len(prompts),
            "guidance_scale": work["guidance_scale"],
            "height": work["height"],
            "width": work["width"],
        }
        images = self.pipeline(
            [*prompts],  # Z-Image's pipeline writes its template into the list that it is given
            latents=torch.from_numpy(latents).to(self.pipeline.device, dtype),
            num_inference_steps=work["steps"],
            callback_on_step_end=callback,
            output_type="np",
            **{name: value for name, value in given.items() if value is not None},
        ).images
        return (np.asarray(images) * 255).round().astype(np.uint8)

    def _use(self, name: str | None) -> None:
        """Use a scheduler class by its name; by default the model's own."""
        if name and type(self.pipeline.scheduler).__name__ != name:
            self.pipeline.scheduler = getattr(diffusers, name).from_config(self.pipeline.scheduler.config)
