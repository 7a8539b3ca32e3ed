"""The loop that every stage runs: AdamW, one cycle of the learning rate, averaged weights, a state to resume from."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

_SAVE_EVERY_S = 120
_CURVE_EVERY = 50
_SMOOTHING = 0.95
_WARM_UP = 0.05
"""Share of the steps in which the rate climbs."""


@dataclass
class Stage:
    """How far a stage has come: its next step, the seconds spent, and its curve of [step, smoothed loss]."""

    step: int
    seconds: float
    curve: list[list[float]]


def optimize(
    name: str,
    modules: torch.nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    steps: int,
    rate: float,
    ema: float,
    state: Path,
) -> Stage:
    """Minimize `loss_at(step)` over `steps`, from where `state` left it; leaves the averaged weights in `modules`."""
    file = state / f"{name}.pt"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    averaged = {key: value.detach().clone() for key, value in modules.state_dict().items()}
    stage = _resume(file, modules, optimizer, averaged) if file.exists() else Stage(0, 0.0, [])
    modules.train()
    ticked = saved = time.monotonic()
    smooth = stage.curve[-1][1] if stage.curve else None
    progress = tqdm(range(stage.step, steps), desc=name, initial=stage.step, total=steps, mininterval=10)
    for step in progress:
        loss = _take_step(modules, optimizer, loss_at, step, rate * _one_cycle(step / steps))
        _average(averaged, modules, 1 - min(ema, (step + 1) / (step + 10)))
        smooth = loss if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * loss
        now = time.monotonic()
        stage = Stage(step + 1, stage.seconds + now - ticked, stage.curve)
        ticked = now
        if stage.step % _CURVE_EVERY == 0:
            stage.curve.append([stage.step, round(smooth, 5)])
            progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if now - saved > _SAVE_EVERY_S or stage.step == steps:
            saved = now
            _save(file, modules, optimizer, averaged, stage)
    modules.load_state_dict(averaged)
    modules.eval()
    return stage


def _take_step(
    modules: torch.nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    step: int,
    rate: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_at(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _average(averaged: dict[str, Tensor], modules: torch.nn.ModuleDict, weight: float) -> None:
    current = modules.state_dict()
    torch._foreach_lerp_(list(averaged.values()), [current[key] for key in averaged], weight)


def _one_cycle(progress: float) -> float:
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))) + 1e-3


def _resume(
    file: Path, modules: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer, averaged: dict[str, Tensor]
) -> Stage:
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    modules.load_state_dict(saved["modules"])
    optimizer.load_state_dict(saved["optimizer"])
    averaged.update(saved["averaged"])
    return Stage(saved["step"], saved["seconds"], saved["curve"])


def _save(
    file: Path,
    modules: torch.nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, Tensor],
    stage: Stage,
) -> None:
    partial = file.with_suffix(".partial")
    state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
    torch.save(state | {"step": stage.step, "seconds": stage.seconds, "curve": stage.curve}, partial)
    partial.replace(file)
