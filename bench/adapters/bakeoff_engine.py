"""An artifact, or a folder that `bakeoff.load` opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bakeoff
from bakeoff import nvidia

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Adapter:
    """`options`: `folder`, and the arguments of `bakeoff.load`."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        given = {**options}
        self.engine = bakeoff.load(given.pop("folder"), **given)
        if torch.cuda.is_available():  # what opening took is no picture's
            torch.cuda.reset_peak_memory_stats()

    def generate(self, prompts: list[str], latents: NDArray[np.float32], work: dict[str, Any]) -> NDArray[np.uint8]:
        return self._make(prompts, latents, work).images

    def stages(self, prompts: list[str], latents: NDArray[np.float32], work: dict[str, Any]) -> dict[str, float]:
        seconds = dict(self._make(prompts, latents, work, stages=True).seconds)
        total = seconds.pop("total")
        return {**seconds, "host": total - sum(seconds.values())}

    def trajectory(self, prompts: list[str], latents: NDArray[np.float32], work: dict[str, Any]) -> list[Any]:
        steps: list[Any] = []
        self._make(prompts, latents, work, callback=lambda *told: steps.append(told[2].float().cpu().numpy()))
        return steps

    def device_memory(self) -> dict[str, int]:
        import torch

        return {"allocator_peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}

    def gpu(self) -> str | None:
        return nvidia.in_use()

    def _make(self, prompts: list[str], latents: NDArray[np.float32], work: dict[str, Any], **options: Any) -> Any:  # noqa: ANN401 - a Result
        import torch

        self._use(work["scheduler"])
        return self.engine.generate(
            prompts,
            latents=torch.from_numpy(latents),
            seeds=[0] * len(prompts),
            negative_prompts=work["negative_prompt"],
            steps=work["steps"],
            guidance_scale=work["guidance_scale"],
            size=None if work["height"] is None else (work["height"], work["width"]),
            max_batch=len(prompts),
            **options,
        )

    def _use(self, scheduler: str | None) -> None:
        pipeline = self.engine.pipeline
        if scheduler and type(pipeline.scheduler).__name__ != scheduler:
            import diffusers

            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)

    def configuration(self) -> dict[str, Any]:
        return self.engine.configuration
