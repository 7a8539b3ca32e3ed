"""How a program is made an arm: a file with a class `Adapter`, run by `bench/worker.py` in the program's environment.

`Adapter(options)` opens it. `generate(prompts, latents, work)` returns pictures (B, H, W, 3) uint8: `latents` are
(B, …) float32, unit normal; `work` has `steps`, `height`, `width`, `guidance_scale`, `negative_prompt`, `scheduler`, `seeds`. Optional:
`configuration()` says what was read back, a dictionary a part; `stages(prompts, latents, work)` returns seconds by part;
`trajectory(prompts, latents, work)` the latents after each step, (steps, B, …); `device_memory()` the peak of an allocator.
"""
