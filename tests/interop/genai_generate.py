"""Runs in OpenVINO GenAI's own environment: `python genai_generate.py FOLDER LATENTS.npy OUT.npy STEPS GUIDANCE PROMPT`."""

import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from openvino_tokenizers import convert_tokenizer
from transformers import CLIPTokenizer


class Given(openvino_genai.Generator):
    """Gives the latents instead of noise."""

    def __init__(self, latents):
        super().__init__()
        self.latents = latents

    def randn_tensor(self, shape):
        return openvino.Tensor(self.latents.reshape(shape))

    def next(self):
        return 0.0


def main():
    folder, latents, out, steps, guidance, prompt = sys.argv[1:]
    tokenizer = Path(folder) / "tokenizer"
    source = CLIPTokenizer.from_pretrained(tokenizer)
    converted = convert_tokenizer(
        source, with_detokenizer=False, skip_special_tokens=True, max_length=32, use_max_padding=True
    )
    openvino.save_model(converted, tokenizer / "openvino_tokenizer.xml")
    pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
    tensor = pipeline.generate(
        prompt,
        width=64,
        height=64,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        generator=Given(np.load(latents)),
    )
    np.save(out, np.array(tensor.data))


main()
