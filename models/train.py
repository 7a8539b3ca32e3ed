"""Train the embedded model `shapes` from nothing but the scene generator: `python -m bakeoff.models.train`.

Tokenizer, then VAE, then text encoder and UNet together. Seeded; batches depend on the step number alone,
and the state is saved every few minutes, so an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from .scenes import random_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from torch import Tensor
    from transformers import CLIPTokenizer

SAVE_EVERY_S = 120
_CURVE_EVERY = 50
_FOREGROUND = 0.2
"""Least difference from the corner's colour, summed over channels of [-1, 1], of a shape's pixel."""
_VAE_EMA = 0.98


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the machine's arithmetic."""

    seed: int = 0
    scenes: int = 12_000
    vae_steps: int = 900
    vae_batch: int = 8
    vae_peak_rate: float = 1e-3
    denoiser_steps: int = 1_500
    denoiser_batch: int = 32
    denoiser_peak_rate: float = 1e-3
    empty_captions: float = 0.1
    ema: float = 0.998


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the finished Diffusers pipeline")
    parser.add_argument("--state", type=Path, default=Path("build/shapes-training"), help="folder for resuming")
    parser.add_argument("--vae-steps", type=int, default=Recipe.vae_steps)
    parser.add_argument("--denoiser-steps", type=int, default=Recipe.denoiser_steps)
    arguments = parser.parse_args()
    recipe = Recipe(vae_steps=arguments.vae_steps, denoiser_steps=arguments.denoiser_steps)
    arguments.state.mkdir(parents=True, exist_ok=True)
    train(recipe, arguments.state, arguments.output)


def train(recipe: Recipe, state: Path, output: Path) -> None:
    """Run all stages, resuming from `state`, and write a fp16 Diffusers pipeline to `output`."""
    _claim(state, recipe)
    tokenizer = _stored_tokenizer(recipe, state / "tokenizer")
    torch.manual_seed(recipe.seed)
    pipeline = new_pipeline(tokenizer)
    captions, pictures = draw_scenes(recipe)
    seconds = {
        "vae": _train_vae(pipeline.vae, pictures, recipe, state),
        "denoiser": _train_denoiser(pipeline, captions, pictures, recipe, state),
    }
    pipeline.to(torch.float16).save_pretrained(output)
    pipeline.tokenizer.backend_tokenizer.model.save(str(output / "tokenizer"))
    _use_common_keys(output / "text_encoder" / "model.safetensors")
    (output / "training.json").write_text(json.dumps({"recipe": asdict(recipe), "seconds": seconds}, indent=2) + "\n")


def _use_common_keys(file: Path) -> None:
    """Name the text encoder's tensors as published checkpoints do, so that older Transformers read them, too."""
    from safetensors.torch import load_file, save_file

    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _claim(state: Path, recipe: Recipe) -> None:
    """Bind the state folder to one recipe, so that two trainings never mix."""
    file = state / "recipe.json"
    wanted = json.dumps(asdict(recipe))
    if file.exists() and file.read_text() != wanted:
        message = f"{state} holds a training of another recipe: got {wanted}, expected {file.read_text()}; use another --state"
        raise SystemExit(message)
    file.write_text(wanted)


def _stored_tokenizer(recipe: Recipe, folder: Path) -> CLIPTokenizer:
    """Train the tokenizer once: its ids differ between trainings, so resuming must read them back."""
    from transformers import CLIPTokenizer

    if not folder.exists():
        train_tokenizer(recipe).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def new_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Build the untrained pipeline. Linear layers are multiples of 64 in and 32 out, as low-bit kernels want."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=128,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    _quieten(vae)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _quieten(vae: AutoencoderKL) -> None:
    """Start with little posterior noise, or the decoder learns to ignore the latents."""
    assert vae.quant_conv is not None  # noqa: S101 - the configuration above has one
    with torch.no_grad():
        vae.quant_conv.weight[vae.config.latent_channels :] *= 0.1
        assert vae.quant_conv.bias is not None  # noqa: S101
        vae.quant_conv.bias[vae.config.latent_channels :] = -6


def train_tokenizer(recipe: Recipe) -> CLIPTokenizer:
    """Train CLIP's byte-pair encoding on the captions. Ids differ between trainings, so they are stored."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=sorted(letters),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    rng = random.Random(recipe.seed)
    tokenizer.train_from_iterator((random_scene(rng).caption for _ in range(5_000)), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = learnt["vocab"]
    for letter in sorted(letters):
        vocab.setdefault(f"{letter}</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)


def draw_scenes(recipe: Recipe) -> tuple[list[str], Tensor]:
    """Return captions and pictures (N, 64, 64, 3) uint8."""
    rng = random.Random(recipe.seed)
    scenes = [random_scene(rng) for _ in range(recipe.scenes)]
    pictures = np.stack([np.asarray(scene.render(rng)) for scene in tqdm(scenes, desc="scenes", mininterval=10)])
    return [scene.caption for scene in scenes], torch.from_numpy(pictures)


def _train_vae(vae: AutoencoderKL, pictures: Tensor, recipe: Recipe, state: Path) -> float:
    vae = vae.to(memory_format=torch.channels_last)

    def loss_of(pixels: Tensor, noise: Tensor) -> Tensor:
        posterior = vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * noise
        decoded = vae.decode(latents, return_dict=False)[0].float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return _picture_distance(decoded, pixels) + 1e-5 * divergence

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(pictures), (recipe.vae_batch,), generator=generator)
        noise = torch.randn(recipe.vae_batch, 4, 16, 16, generator=generator)
        return loss_of(_pixels(pictures[chosen]), noise)

    modules = torch.nn.ModuleDict({"vae": vae})
    return _optimize("vae", modules, loss_at, recipe.vae_steps, recipe.vae_peak_rate, _VAE_EMA, state)


def _picture_distance(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 on values and on differences between neighbours, which keeps edges sharp.

    The shapes count five times: they are a tenth of the picture, and all of its meaning.
    """
    foreground = (pixels - pixels[:, :, :1, :1]).abs().sum(dim=1, keepdim=True) > _FOREGROUND
    error = (decoded - pixels) * (1 + 4 * foreground)
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    return error.abs().mean() + edges


def _train_denoiser(
    pipeline: StableDiffusionPipeline, captions: list[str], pictures: Tensor, recipe: Recipe, state: Path
) -> float:
    latents = _encode_all(pipeline.vae, pictures, state)
    pipeline.vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    latents = latents * pipeline.vae.config.scaling_factor
    tokens = _tokenize(pipeline.tokenizer, captions)
    empty = _tokenize(pipeline.tokenizer, [""])
    text_encoder, unet = pipeline.text_encoder, pipeline.unet.to(memory_format=torch.channels_last)
    alphas = pipeline.scheduler.alphas_cumprod

    def loss_of(clean: Tensor, ids: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        predicted = unet(noisy, timesteps, text_encoder(ids)[0], return_dict=False)[0]
        return functional.mse_loss(predicted.float(), velocity)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + 500_000 + step)
        chosen = torch.randint(len(latents), (recipe.denoiser_batch,), generator=generator)
        dropped = torch.rand(len(chosen), 1, generator=generator) < recipe.empty_captions
        timesteps = torch.randint(1000, (len(chosen),), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        return loss_of(latents[chosen], torch.where(dropped, empty, tokens[chosen]), timesteps, noise)

    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    return _optimize("denoiser", modules, loss_at, recipe.denoiser_steps, recipe.denoiser_peak_rate, recipe.ema, state)


def _encode_all(vae: AutoencoderKL, pictures: Tensor, state: Path) -> Tensor:
    """Return the means of the latents of all pictures: (N, 4, 16, 16) float32."""
    from safetensors.torch import load_file, save_file

    file = state / "latents.safetensors"
    if not file.exists():
        batches = tqdm(pictures.split(96), desc="latents", mininterval=10)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            means = [vae.encode(_pixels(batch)).latent_dist.mean.float() for batch in batches]
        save_file({"latents": torch.cat(means).contiguous()}, file)
    return load_file(file)["latents"]


def _optimize(
    name: str,
    modules: torch.nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    steps: int,
    peak_rate: float,
    ema: float,
    state: Path,
) -> float:
    """AdamW with one cycle of the learning rate; leaves the averaged weights in `modules`. Returns seconds spent."""
    file = state / f"{name}.pt"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    averaged = {key: value.detach().clone() for key, value in modules.state_dict().items()}
    first, seconds, curve = 0, 0.0, []
    if file.exists():
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        averaged, first, seconds, curve = saved["averaged"], saved["step"], saved["seconds"], saved["curve"]
    modules.train()
    started = last_saved = time.monotonic()
    smooth = None
    progress = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * _one_cycle(step / steps)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            weights = modules.state_dict()
            torch._foreach_lerp_(
                list(averaged.values()), [weights[key] for key in averaged], 1 - min(ema, (step + 1) / (step + 10))
            )
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % _CURVE_EVERY == 0:
            curve.append([step + 1, round(smooth, 5)])
            progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        now = time.monotonic()
        if now - last_saved > SAVE_EVERY_S or step == steps - 1:
            last_saved = now
            _save_state(
                file,
                {
                    "modules": modules.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                    "step": step + 1,
                    "seconds": seconds + now - started,
                    "curve": curve,
                },
            )
    modules.load_state_dict(averaged)
    modules.eval()
    return round(seconds + time.monotonic() - started, 1)


def _one_cycle(progress: float, warmup: float = 0.05) -> float:
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) + 1e-3


def _save_state(file: Path, state: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _pixels(pictures: Tensor) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


if __name__ == "__main__":
    main()
