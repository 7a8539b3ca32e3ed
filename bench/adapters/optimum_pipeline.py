"""Optimum's pipelines: `ORTStableDiffusionPipeline`, `OVStableDiffusionPipeline` and their kin. Runs in its environment.

`options`: `folder`; `class`, by default by what the folder holds; `precision` for OpenVINO (`f32` by default, where
Optimum Intel would let OpenVINO choose); `threads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Adapter:
    def __init__(self, options: dict[str, Any]) -> None:
        folder = Path(options["folder"])
        openvino = (folder / "unet" / "openvino_model.xml").exists()
        name = options.get("class", "OVDiffusionPipeline" if openvino else "ORTDiffusionPipeline")
        threads = options["threads"]
        if name.startswith("OV"):
            import optimum.intel as library

            config = {
                "INFERENCE_PRECISION_HINT": options.get("precision", "f32"),
                "INFERENCE_NUM_THREADS": str(threads),
            }
            self.pipeline = getattr(library, name).from_pretrained(folder, ov_config=config)
        else:
            import onnxruntime
            import optimum.onnxruntime as library

            session = onnxruntime.SessionOptions()
            session.intra_op_num_threads = threads
            self.pipeline = getattr(library, name).from_pretrained(folder, session_options=session)
            config = {"threads": threads}
        self.config = {"class": name, **config}
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(self, prompts: list[str], latents: np.ndarray, work: dict[str, Any]) -> np.ndarray:
        import torch

        self._use(work["scheduler"])
        scale = work["guidance_scale"]
        images = self.pipeline(
            prompts,
            negative_prompt=work["negative_prompt"] and [work["negative_prompt"]] * len(prompts),
            latents=torch.from_numpy(latents),
            num_inference_steps=work["steps"],
            height=work["height"],
            width=work["width"],
            output_type="np",
            **({} if scale is None else {"guidance_scale": scale}),
        ).images
        return (np.asarray(images) * 255).round().astype(np.uint8)

    def _use(self, scheduler: str | None) -> None:
        if scheduler and type(self.pipeline.scheduler).__name__ != scheduler:
            import diffusers

            self.pipeline.scheduler = getattr(diffusers, scheduler).from_config(self.pipeline.scheduler.config)

    def configuration(self) -> dict[str, Any]:
        return {"pipeline": self.config}
