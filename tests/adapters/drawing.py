"""An arm of the standard library and NumPy alone: paints a plane from each prompt's latents, and misbehaves when told to."""

import os
import time

import numpy as np


class Adapter:
    def __init__(self, options):
        self.options = options
        self.calls = 0
        self.known = {}
        self.held = np.ones(options.get("allocates", 0), np.uint8)
        if options.get("at_load") == "raise":
            message = "no such device"
            raise RuntimeError(message)

    def generate(self, prompts, latents, work):
        self.calls += 1
        if self.calls == self.options.get("at_call"):
            self._misbehave()
        time.sleep(0 if self.options.get("caches") and prompts[0] in self.known else self.options.get("sleep", 0.002))
        self.known[prompts[0]] = True
        planes = np.abs(latents[:, :3, :2, :2]).repeat(32, axis=2).repeat(32, axis=3)  # few blobs: quick to score
        return (np.clip(planes, 0, 2) * 127).astype(np.uint8).transpose(0, 2, 3, 1)

    def trajectory(self, prompts, latents, work):
        drifts = self.options.get("drifts", 0)
        return [latents * (1 + drifts * step) for step in range(1, work["steps"] + 1)]

    def _misbehave(self):
        kind = self.options["kind"]
        if kind == "raise":
            message = "out of memory: tried to allocate 9 GB"
            raise MemoryError(message)
        if kind == "crash":
            os.kill(os.getpid(), 11)
        if kind == "kill":
            os.kill(os.getpid(), 9)
        time.sleep(60)

    def configuration(self):
        return {"all": {"threads": self.options["threads"] + self.options.get("more_threads", 0), "device": "cpu"}}
