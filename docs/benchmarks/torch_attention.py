"""Measure attention slicing and token merging in torch: `python torch_attention.py RECORD.json`.

One step of an SD 1.5-size UNet with random weights, float32, one row of 48×48 latents, in one process. All arms stay
open; each block runs every arm once, in another order. Per arm: the ratio of its seconds to the plain arm's with its
95 % interval over blocks, the most anonymous memory that its runs added (sampled every 10 ms), and the PSNR of its
prediction to the plain arm's, in dB over the prediction's own range. `attention` does the same for one self-attention
of 4,096 and 8,192 tokens by itself, where nothing else hides what slicing does to memory.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from bakeoff.components.component import Sizes
from bakeoff.components.modules.unet_2d_condition import UNet2DCondition
from bakeoff.hardware import describe
from bakeoff.memory import Watch, rss_bytes
from bakeoff.models import fullsize
from bakeoff.recipe import Placement
from bakeoff.runtimes.attention import SlicedAttention
from bakeoff.runtimes.runtime import PartFiles
from bakeoff.runtimes.torch import TorchRuntime
from bakeoff.verdict import paired_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

PLAIN = "plain"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "attention_slicing=1": {"attention_slicing": 1},
    "token_merging=0.25": {"token_merging": 0.25},
    "token_merging=0.5": {"token_merging": 0.5},
}
SIZES = Sizes(batch=1, height=48, width=48, sequence=77)
HEADS, WIDTH = 8, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--work", type=Path, help="folder for 3.4 GB of weights; a temporary one by default")
    parser.add_argument("--unet", type=Path, help="folder of such a UNet, instead of one made on the spot")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        record = {
            "machine": describe(),
            "command": "make bench-attention",
            "threads": options.threads,
            "blocks": options.blocks,
            "attention": _attention(options.blocks, options.threads),
        }
        options.record.write_text(json.dumps(record, indent=1) + "\n")
        folder = options.unet or Path(work)
        if not options.unet:
            fullsize.write_module(*fullsize.config("sd-1.5", "unet"), folder)
        record["unet"] = _unet(folder, options.blocks, options.threads)
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: record[name] for name in ("unet", "attention")}, indent=1))


def _unet(folder: Path, blocks: int, threads: int) -> dict[str, Any]:
    made = UNet2DCondition()
    config = json.loads((folder / "config.json").read_text())
    files = PartFiles(
        name=made.name,
        folder=folder,
        precision="fp32",
        inputs=made.inputs(config),
        outputs=made.outputs(config),
        build=lambda dtype: made.flat(made.load(folder, getattr(torch, dtype))).eval(),
    )
    inputs = made.example(config, SIZES, 1)
    arms = {name: TorchRuntime(files, Placement("cpu", threads, **placed)) for name, placed in ARMS.items()}
    return _compare({name: lambda arm=arm: arm.run(inputs)["out_sample"] for name, arm in arms.items()}, blocks)


def _attention(blocks: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    rows = {}
    for tokens, masked in ((4096, False), (4096, True)):
        given = [torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3)]
        mask = torch.zeros(1, 1, tokens, tokens, requires_grad=True) if masked else None
        arms = {
            name: _attend(given, mask, heads) for name, heads in ((PLAIN, None), ("slices of 1", 1), ("auto", "auto"))
        }
        rows[f"{tokens} tokens{', unfused' if masked else ''}"] = _compare(arms, blocks)
    return rows


def _attend(given: list[Tensor], mask: Tensor | None, heads: int | str | None) -> Callable[[], Tensor]:
    """Return a call of attention. A mask that wants a gradient keeps torch from its fused kernel, as on some devices."""

    def whole() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask).detach()

    def sliced() -> Tensor:
        with SlicedAttention(heads or 1):
            return whole()

    return whole if heads is None else sliced


def _compare(arms: Mapping[str, Callable[[], Tensor]], blocks: int) -> dict[str, Any]:
    """Run the arms in turn; return ratio, memory and distance of each to the plain one."""
    first = {name: run() for name, run in tqdm(arms.items(), desc="warm-up")}
    seconds: dict[str, list[list[float]]] = {name: [] for name in arms}
    added = dict.fromkeys(arms, 0)
    order = random.Random(0)  # noqa: S311 - a seeded order, no secrets
    for _ in tqdm(range(blocks)):
        for name in order.sample(list(arms), len(arms)):
            before = rss_bytes("RssAnon")
            started = time.perf_counter()
            with Watch() as watch:
                arms[name]()
            seconds[name].append([time.perf_counter() - started])
            added[name] = max(added[name], watch.peak.anon_bytes - before)
    return {
        name: {
            "median_s": round(float(np.median(seconds[name])), 3),
            "ratio": None if name == PLAIN else _interval(paired_ratio(seconds[PLAIN], seconds[name])),
            "added_bytes": added[name],
            "psnr_db": _psnr(first[name], first[PLAIN]),
        }
        for name in arms
    }


def _interval(found: Any) -> dict[str, float]:  # noqa: ANN401 - a verdict's ratio
    return {"middle": round(found.ratio, 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def _psnr(got: Tensor, expected: Tensor) -> float | None:
    """Return the PSNR in dB; None where they are bitwise equal."""
    error = float((got.float() - expected.float()).square().mean())
    span = float(expected.max() - expected.min())
    return None if torch.equal(got, expected) else round(10 * float(np.log10(span**2 / error)), 1)


if __name__ == "__main__":
    main()
