"""An arm without the engine and without Diffusers' pipeline: the same runtimes and scheduler in a loop written by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bakeoff.recipe import Placement
from bakeoff.runtimes.opening import open_part, read_folder
from bakeoff.source import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = ("text_encoder", "unet", "vae_decoder")


class Adapter:
    """`options`: `folder`, of a Stable Diffusion pipeline, and `threads`. Always guided, by the folder's own scheduler."""

    def __init__(self, options: dict[str, Any]) -> None:
        baked = read_folder(Path(options["folder"]))
        placement = Placement(threads=options["threads"])
        self.runtimes = {
            name: open_part(baked.folders[name], baked.family.part(name), baked.parts[name], placement)
            for name in PARTS
        }
        self.timestep = next(port for port in self.runtimes["unet"].inputs if port.name == "timestep")
        self.scaling = baked.config(baked.family.part("vae_decoder"))["scaling_factor"]
        self.tokenizer = _host_object(baked.folder, "tokenizer")
        self.scheduler = _host_object(baked.folder, "scheduler")

    @torch.no_grad()
    def generate(self, prompts: list[str], latents: NDArray[np.float32], work: dict[str, Any]) -> NDArray[np.uint8]:
        unwanted = [work["negative_prompt"] or ""] * len(prompts)
        texts = torch.cat([self._encode(unwanted), self._encode(prompts)])
        made = self._denoise(torch.from_numpy(latents), texts, work["steps"], work["guidance_scale"])
        pictures = self.runtimes["vae_decoder"].run({"latent_sample": made / self.scaling})["sample"]
        shares = (pictures * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (shares * 255).round().astype(np.uint8)

    def _encode(self, texts: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.runtimes["text_encoder"].run({"input_ids": ids.input_ids})["last_hidden_state"]

    def _denoise(self, latents: torch.Tensor, texts: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            inputs = {
                "sample": self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep),
                "timestep": timestep.to(getattr(torch, self.timestep.dtype)).reshape((1,) * self.timestep.rank),
                "encoder_hidden_states": texts,
            }
            without, with_text = self.runtimes["unet"].run(inputs)["out_sample"].chunk(2)
            predicted = without + guidance * (with_text - without)
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents

    def configuration(self) -> dict[str, Any]:
        return {name: dict(runtime.configuration) for name, runtime in self.runtimes.items()}


def _host_object(folder: Path, name: str) -> Any:  # noqa: ANN401 - a scheduler or a tokenizer
    library, class_name = read_json(folder / "model_index.json")[name]
    return getattr(importlib.import_module(library), class_name).from_pretrained(folder / name, local_files_only=True)
