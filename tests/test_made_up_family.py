"""A family of one's own is one file: here one that doesn't exist, with a denoiser and a pipeline of its own."""

import ast
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bakeoff import plugins
from bakeoff.bake import export
from bakeoff.models.tiny import build
from bakeoff.recipe import parse
from bakeoff.runtimes.engine import load

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red circle", "two small green squares; 一只猫"]
SIZE = (64, 96)

FILE = '''
"""Dots: pictures by a denoiser of two convolutions, which takes the mean of what the prompt says."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from bakeoff.components.component import Component, Port
from bakeoff.components.family import Family, Part
from bakeoff.components.latents import VAE, latent_shape
from bakeoff.components.loading import load_diffusers
from bakeoff.components.modules import autoencoder_kl, clip_text
from bakeoff.components.standin import StandIn, full_config


class DotsDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels=4, width=32, text_width=64):
        super().__init__()
        self.take = nn.Conv2d(channels, width, 3, padding=1)
        self.text = nn.Linear(text_width, width)
        self.time = nn.Linear(1, width)
        self.give = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noisy, step, text):
        added = self.text(text).mean(dim=1) + self.time(step[:, None] / 1000)
        return self.give(torch.tanh(self.take(noisy) + added[:, :, None, None]))


class DotsPipeline(DiffusionPipeline):
    def __init__(self, tokenizer, text_encoder, denoiser, vae, scheduler):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, denoiser=denoiser, vae=vae, scheduler=scheduler
        )

    def encode(self, texts):
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids)[0]

    @torch.no_grad()
    def __call__(
        self, prompt, negative_prompt="", latents=None, num_inference_steps=10, guidance_scale=2.0, output_type="pil"
    ):
        unwanted = [negative_prompt] * len(prompt) if isinstance(negative_prompt, str) else negative_prompt
        text, plain = self.encode(prompt), self.encode(unwanted)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            step = timestep.float().expand(len(prompt))
            noise = self.denoiser(latents, step, text)
            if guidance_scale > 1:
                base = self.denoiser(latents, step, plain)
                noise = base + guidance_scale * (noise - base)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(pictures, output_type=output_type))


class Dots(Component):
    """`noisy (batch, C, height, width), step (batch,), text (batch, sequence, D) -> noise`."""

    name = "dots"

    def inputs(self, config):
        return (
            Port("noisy", "float32", ("batch", config["channels"], "height", "width")),
            Port("step", "float32", ("batch",), exact=True),
            Port("text", "float32", ("batch", "sequence", config["text_width"])),
        )

    def outputs(self, config):
        return (Port("noise", "float32", ("batch", config["channels"], "height", "width")),)

    def load(self, folder, dtype):
        return load_diffusers(DotsDenoiser, folder, dtype)

    def flat(self, module):
        return Flat(module)

    def example(self, config, sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        return tensors | {"step": torch.full((sizes.batch,), (981.0, 501.0, 21.0)[seed % 3])}

    def stand_in(self, runners, config):
        return DenoiserStandIn(next(iter(runners.values())), full_config(DotsDenoiser, config))


class Flat(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, noisy, step, text):
        return (self.module(noisy, step, text),)


class DenoiserStandIn(StandIn):
    def __call__(self, noisy, step, text):
        return self._run(noisy=noisy, step=step, text=text)["noise"]


DOTS = Family(
    name="dots",
    library="dots",
    pipelines={"text-to-image": "DotsPipeline"},
    parts=(
        Part("text_encoder", "text_encoder", clip_text.ClipText()),
        Part("denoiser", "denoiser", Dots()),
        *VAE,
    ),
    latent_shape=latent_shape,
    size_multiple=lambda configs: autoencoder_kl.scale_factor(configs["vae"]),
    default_size=lambda configs: (64, 64),
    row_guidance=True,
    unguided_at_most=1.0,
    tiny={
        "scheduler": ("diffusers", "DDIMScheduler", {"clip_sample": False}),
        "text_encoder": ("transformers", "CLIPTextModel", clip_text.TINY),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "denoiser": ("dots", "DotsDenoiser", {}),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY),
    },
)
'''


@pytest.fixture
def dots(tmp_path, monkeypatch):
    """Install the one file as pip would: beside it what says that it registers a family."""
    folder = tmp_path / "site-packages"
    (folder / "dots-1.0.dist-info").mkdir(parents=True)
    (folder / "dots.py").write_text(FILE)
    (folder / "dots-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: dots\nVersion: 1.0\n")
    (folder / "dots-1.0.dist-info" / "entry_points.txt").write_text("[bakeoff.families]\ndots = dots:DOTS\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    plugins._points.cache_clear()
    yield importlib.import_module("dots")
    del sys.modules["dots"]
    plugins._points.cache_clear()


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_a_made_up_family_is_one_file(dots, tmp_path, backend):
    model = build("dots", tmp_path / "model")
    artifact = export(str(model), tmp_path / "artifact", parse(f"{backend}:fp32")[0], prove=backend != "torch")
    assert list(artifact.manifest.parts) == ["text_encoder", "denoiser", "vae_encoder", "vae_decoder"]

    pipeline = dots.DotsPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, SIZE[0] // 8, SIZE[1] // 8, generator=torch.Generator().manual_seed(1))
    settings = {"guidance_scale": 3.0, "latents": latents}
    expected = pipeline(list(PROMPTS), num_inference_steps=3, output_type="np", **settings).images

    with load(artifact.folder) as engine:
        assert isinstance(engine.pipeline, dots.DotsPipeline)
        got = engine.generate(PROMPTS, steps=3, size=SIZE, **settings).images
        other = engine.generate(PROMPTS, steps=3, size=SIZE, negative_prompts="blue", **settings).images
    error = np.mean((got / 255 - expected) ** 2)
    assert expected.std() > 0.01
    assert -10 * np.log10(error) > 45
    assert not np.array_equal(got, other)


def without_texts(path):
    """Return a file's code without comments and docstrings, which may give a family as an example."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


def test_nothing_outside_components_knows_a_family():
    """`models/training` makes the embedded model, which is a Stable Diffusion; adapters run other programs' pipelines."""
    families = plugins.families()
    named = {family.name for family in families} | {
        pipeline
        for family in families
        for variant in (None, *family.variants)
        for pipeline in family.variant(variant).pipelines.values()
    }
    words = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, sorted(named)))})(?![\w-])")
    free = {"components", "tests", "docs", "build", "training", "adapters"}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if free & set(parts) or any(part.startswith(".") for part in parts):
            continue
        assert not words.findall(without_texts(path)), f"{path} names {words.findall(without_texts(path))}"
