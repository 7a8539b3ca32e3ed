"""Runs in Optimum's own environment: `python optimum_generate.py CLASS FOLDER LATENTS.npy OUT.npy STEPS GUIDANCE PROMPT…`."""

import sys

import numpy as np
import torch


def main():
    class_name, folder, latents, out, steps, guidance, *prompts = sys.argv[1:]
    if class_name.startswith("ORT"):
        import optimum.onnxruntime as library
    else:
        import optimum.intel as library
    pipeline = getattr(library, class_name).from_pretrained(folder)
    if class_name.startswith("OV"):
        pipeline.clear_requests()
        pipeline.ov_config.update({"INFERENCE_PRECISION_HINT": "f32"})
    images = pipeline(
        prompts,
        latents=torch.from_numpy(np.load(latents)),
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        output_type="np",
    ).images
    np.save(out, (images * 255).round().astype(np.uint8))


main()
