"""stable-diffusion.cpp (package `stable-diffusion-cpp-python`): Stable Diffusion 1.x on its own C++ tensors. Runs in its environment.

`options`: `folder`, a Diffusers folder (text encoder's names as the Hub has them, `text_model.…`); `threads`; `precision`
(`f32` by default; `f16`, `q8_0` and so on are made while it loads); all else goes to its `StableDiffusion`, such as
`diffusion_flash_attn` or `vae_conv_direct`. Its convolutions are f16 whatever the precision, and one picture is made at a time.

What it takes to do the work that Diffusers does, and what is refused because it wouldn't be that:

- Latents can't be handed in. It draws them from a seed, with rng `cpu` by torch's algorithm (Mersenne Twister from the
  seed's low 32 bits, then Box-Muller). The arm looks for the seed that draws the given latents, and on its first picture
  sees what the program started from in its preview; either that isn't theirs and the arm fails, or pictures are comparable.
- Sampler `euler` is `EulerDiscreteScheduler` with the same sigmas, which are computed here from the scheduler's config and
  handed in: its own `discrete` is the spacing `linspace`, `simple` is `trailing` but for rounding. The spacing `leading`
  scales the first noise otherwise, and other schedulers are other samplers.
- `cfg_scale` means the same above 1. An absent negative prompt is an empty one. Padding is with EOS to 77 tokens, the text
  encoder's last layer is taken (its `clip_skip` 1), both as in Diffusers. The VAE's scaling is SD 1.x's, hard-coded.
- Brackets, `BREAK` and `<lora:…>` have a meaning in its prompts. More than 75 tokens become a second context, where Diffusers
  would cut; nothing here counts them.
"""

from __future__ import annotations

import ctypes
import json
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_SD1: dict[str, dict[str, Any]] = {
    "unet/config.json": {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280], "in_channels": 4},
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.18215},
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
    },
}
"""What it has hard-coded, by the file of a Diffusers folder that may say otherwise."""
_UNSAID = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
"""What Diffusers takes where a config says nothing, when that isn't the above."""
_PLAIN = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_MEANT_OTHERWISE = re.compile(r"[()\[\]\\]|\bBREAK\b|<lora:")
_TRAINED_STEPS = 1000
_GUIDANCE = 7.5
"""Diffusers' default."""


class Adapter:
    def __init__(self, options: dict[str, Any]) -> None:
        import stable_diffusion_cpp

        self.library = stable_diffusion_cpp
        given = {**options}
        folder = Path(given.pop("folder"))
        configs = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in _SD1}
        for name, expected in _SD1.items():
            _demand(name, {**_UNSAID, **configs[name]}, expected)
        self.scheduler = configs["scheduler/scheduler_config.json"]
        self.size = 8 * configs["unet/config.json"].get("sample_size", 64)
        self.precision = given.pop("precision", "f32")
        self.threads = given.pop("threads")
        self.more = given
        self.model = stable_diffusion_cpp.StableDiffusion(
            model_path=str(folder),
            wtype=self.precision,
            n_threads=self.threads,
            rng_type="cpu",
            sampler_rng_type="cpu",
            prediction=_PREDICTIONS[self.scheduler.get("prediction_type", "epsilon")],
            vae_decode_only=True,
            verbose=True,  # it says why something failed nowhere else
            **given,
        )
        if not self.model.model:
            self.model._model.model = None  # noqa: SLF001 - or it frees the null pointer, and the process dies before it can say why
            message = f"stable-diffusion.cpp can't load {folder}: its log says why"
            raise ValueError(message)
        self.marks: list[float] = []
        # One for the whole process: the library keeps the address of the last callback that it was given, and its
        # `generate_image(progress_callback=…)` gives one that Python then frees.
        self.callback = stable_diffusion_cpp.sd_progress_callback(lambda *_: self.marks.append(time.perf_counter()))
        stable_diffusion_cpp.sd_set_progress_callback(self.callback, None)
        self.noise_seen = False

    def generate(self, prompts: list[str], latents: np.ndarray, work: dict[str, Any]) -> np.ndarray:
        return np.stack([self._picture(prompt, latents[row], work) for row, prompt in enumerate(prompts)])

    def stages(self, prompts: list[str], latents: np.ndarray, work: dict[str, Any]) -> dict[str, float]:
        """Seconds up to the first step, of the steps, and after the last."""
        seconds = np.zeros(3)
        for row, prompt in enumerate(prompts):
            started = time.perf_counter()
            self._picture(prompt, latents[row], work)
            seconds += np.diff([started, self.marks[0], self.marks[-1], time.perf_counter()])
        return {"text_encoder": seconds[0].item(), "unet": seconds[1].item(), "vae_decoder": seconds[2].item()}

    def _picture(self, prompt: str, latents: np.ndarray, work: dict[str, Any]) -> np.ndarray:
        negative = work["negative_prompt"] or ""
        for text in (prompt, negative):
            if _MEANT_OTHERWISE.search(text):
                message = f"stable-diffusion.cpp would read more into {text!r} than Diffusers does"
                raise ValueError(message)
        height, width = work["height"] or self.size, work["width"] or self.size
        scale = _GUIDANCE if work["guidance_scale"] is None else work["guidance_scale"]
        self.marks.clear()
        watch = None if self.noise_seen else _Start(self.library)
        picture = self.model.generate_image(
            prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            cfg_scale=max(scale, 1.0),  # Diffusers doesn't guide up to 1
            sample_method="euler",
            sigmas=", ".join(map(repr, sigmas(self.scheduler, work["scheduler"], work["steps"]))),
            sample_steps=work["steps"],
            seed=drawn_from(latents, work["seeds"]),
        )[0]
        if watch:
            watch.check(latents)
            self.noise_seen = True
        pixels = np.asarray(picture)[..., :3]
        if pixels.shape != (height, width, 3):
            message = f"got {pixels.shape[0]}×{pixels.shape[1]} (height×width), asked for {height}×{width}"
            raise ValueError(message)
        return pixels

    def configuration(self) -> dict[str, Any]:
        return {
            "pipeline": {
                "threads": self.threads,
                "precision": self.precision,
                "convolutions": "f16",
                "latents": "its own from the seeds, seen to equal the given" if self.noise_seen else "not drawn yet",
                "library": version("stable-diffusion-cpp-python"),
                "built_for": " ".join(self.library.sd_get_system_info().decode().split()),
                **self.more,
            }
        }


class _Start:
    """Looks at what the first step starts from: a preview, whose colours are sums of the latents' channels."""

    def __init__(self, library: Any) -> None:  # noqa: ANN401 - a module without types
        self.library = library
        self.previews: list[np.ndarray] = []
        self.callback = library.sd_preview_callback(self._keep)
        noisy = {"denoised": False, "noisy": True}
        library.sd_set_preview_callback(self.callback, library.Preview.PREVIEW_PROJ, 1, *noisy.values(), None)

    def _keep(self, _step: int, _count: int, frames: Any, _noisy: bool, _data: Any) -> None:  # noqa: ANN401, FBT001 - C's
        if not self.previews:
            frame = frames[0]
            size = frame.width * frame.height * 3
            read = np.frombuffer(ctypes.string_at(frame.data, size), np.uint8)
            self.previews.append(read.reshape(frame.height * frame.width, 3).astype(np.float64))

    def check(self, latents: np.ndarray) -> None:
        """Refuse a start that isn't these latents: the colours must be a linear function of them, but for rounding."""
        self.library.sd_set_preview_callback(None, self.library.Preview.PREVIEW_NONE, 1, False, False, None)  # noqa: FBT003
        channels = latents.reshape(len(latents), -1).T
        inputs = np.column_stack([channels, np.ones(len(channels))])
        for colour in self.previews[0].T:
            whole = (colour > 0) & (colour < 255)  # noqa: PLR2004 - the rest is clipped
            fit = np.linalg.lstsq(inputs[whole], colour[whole], rcond=None)[0]
            off = np.abs(inputs[whole] @ fit - colour[whole]).max()
            if off > 2:  # noqa: PLR2004 - levels of 256; other noise is off by a hundred
                message = (
                    f"stable-diffusion.cpp began with other latents than the given: its preview is {off:.0f} levels off"
                )
                raise ValueError(message)


def drawn_from(latents: np.ndarray, seeds: list[int]) -> int:
    """Return the seed that draws these latents, as the program will draw them.

    Raises:
        ValueError: none does, so that the program can't be given them.
    """
    given = latents.reshape(-1)
    for seed in seeds:
        if all(np.abs(normal(seed, count) - given[:count]).max() < 1e-5 for count in (16, given.size)):  # noqa: PLR2004
            return seed
    message = "the latents are none that a seed of the work draws, and stable-diffusion.cpp takes no others"
    raise ValueError(message)


def normal(seed: int, count: int) -> np.ndarray:
    """Return torch's `randn` of a CPU generator, but for rounding; `count` is a multiple of 16, as latents' sizes are."""
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    whole = np.frombuffer(twister.bytes(4 * count), "<u4") & 0xFFFFFF
    uniform = (whole.astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def sigmas(config: dict[str, Any], scheduler: str | None, steps: int) -> list[float]:
    """Return the noise levels of Diffusers' `EulerDiscreteScheduler`, and a last 0.

    Raises:
        ValueError: the scheduler is another, or set to what the program can't do.
    """
    name, spacing = scheduler or config["_class_name"], config.get("timestep_spacing", "linspace")
    _demand("the scheduler", {**config, "_class_name": name}, {"_class_name": "EulerDiscreteScheduler", **_PLAIN})
    if spacing == "linspace":
        timesteps = np.linspace(0, _TRAINED_STEPS - 1, steps)[::-1]
    elif spacing == "trailing":
        timesteps = np.round(np.arange(_TRAINED_STEPS, 0, -_TRAINED_STEPS / steps)) - 1
    else:
        message = f"stable-diffusion.cpp can't begin as timestep_spacing {spacing!r} does; linspace and trailing it can"
        raise ValueError(message)
    scheduled = _SD1["scheduler/scheduler_config.json"]
    betas = np.linspace(scheduled["beta_start"] ** 0.5, scheduled["beta_end"] ** 0.5, _TRAINED_STEPS) ** 2
    kept = np.cumprod(1 - betas)
    levels = np.interp(timesteps, np.arange(_TRAINED_STEPS), ((1 - kept) / kept) ** 0.5)
    return [*levels.tolist(), 0.0]


def _demand(what: str, config: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            message = f"{what} has {name} = {config[name]!r}; stable-diffusion.cpp can only do {value!r}"
            raise ValueError(message)
