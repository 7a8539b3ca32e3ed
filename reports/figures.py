"""The report's figures, as SVG that takes the page's colours and as PNG for a README."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from .summary import Row, Summary

_INK = "#123456"
"""A colour that nothing else has: in the SVG it becomes the text's own, light or dark."""
_COLORS = ("#3b7dd8", "#e08e3c", "#3fa66a", "#c2559d", "#8a6fd1", "#c9a227", "#4bb3c2", "#d65f5f")

_ROUNDS = 300
"""Of moving names apart: a count, as a limit of time would give another figure each time."""
_LEAST_DRIFT = 1e-9
"""Drawn where latents are equal: a logarithmic axis has no zero."""


@dataclass(frozen=True)
class Figure:
    """A figure and what it shows, in words for those who can't see it."""

    name: str
    title: str
    alternative: str
    svg: str
    png: bytes


def figures(summary: Summary) -> list[Figure]:
    """Draw every figure that the record has something for."""
    made = [
        _figure("ratios", "Ratio to the baseline", _forest, summary),
        _figure("pareto", "Latency against quality", _pareto, summary),
        _figure("stages", "Where the time goes", _stages, summary),
        _figure("memory", "Memory by phase", _memory, summary),
        _figure("drift", "Latency over repetitions", _drift, summary),
        _figure("trajectory", "Distance from eager fp32 along the steps", _trajectory, summary),
    ]
    return [figure for figure in made if figure]


def _figure(name: str, title: str, draw: Callable[[Any, Summary], str | None], summary: Summary) -> Figure | None:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with mpl.rc_context({**style, "svg.fonttype": "none", "font.size": 10, "svg.hashsalt": name}):
        tall = 1.2 + 0.45 * max(len(summary.rows), 3)
        height = {"drift": 3.6, "trajectory": 3.6, "pareto": max(3.6, tall / 2)}.get(name, tall)
        canvas = Canvas(figsize=(7.2, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        alternative = draw(axes, summary)
        if alternative is None:
            return None
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(png, format="png", dpi=130, facecolor="white")
    text = re.sub(r"^.*?(?=<svg)", "", svg.getvalue(), flags=re.DOTALL).replace(_INK, "currentColor")
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{_escape(alternative)}">',
        text,
        count=1,
    )
    return Figure(
        name, title, alternative, re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL), png.getvalue()
    )


def _escape(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def _label(row: Row) -> str:
    return row.name if row.passes else f"{row.name} ✗"


def _forest(axes: Any, summary: Summary) -> str | None:  # noqa: ANN401 - matplotlib's axes have no types
    rows = [row for row in summary.rows if row.verdict]
    if not rows:
        return None
    for at, row in enumerate(rows):
        assert row.verdict is not None  # noqa: S101 - chosen so
        ratio = row.verdict.ratio
        color = _COLORS[0] if row.passes else _COLORS[7]
        axes.plot([ratio.low, ratio.high], [at, at], color=color, lw=2, solid_capstyle="round")
        axes.plot(ratio.ratio, at, "D", color=color, ms=6)
    for floor in summary.floors.values():
        axes.axvspan(floor.low, floor.high, color="gray", alpha=0.15, lw=0)
    axes.axvline(1, color=_INK, lw=0.8, ls=":")
    axes.set_xscale("log")
    _plain_ticks(
        axes, [bound for row in rows if row.verdict for bound in (row.verdict.ratio.low, row.verdict.ratio.high)]
    )
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"time a batch, as a multiple of {summary.baseline}'s (band: the baseline against itself)")
    told = [f"{row.name} {row.verdict.ratio.ratio:.2f} ({row.verdict.word})" for row in rows if row.verdict]
    return f"Ratios to {summary.baseline} with 95 % intervals: {'; '.join(told)}."


def _plain_ticks(axes: Any, values: list[float]) -> None:  # noqa: ANN401
    from matplotlib.ticker import NullLocator

    low, high = min([*values, 1.0]) * 0.95, max([*values, 1.0]) * 1.05
    places = [
        v for v in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10) if low <= v <= high
    ]
    axes.set_xlim(low, high)
    if high / low > 4:  # noqa: PLR2004 - too many to print side by side
        places = [place for place in places if place in {0.1, 0.2, 0.5, 1, 2, 5, 10}]
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def _pareto(axes: Any, summary: Summary) -> str | None:  # noqa: ANN401
    rows = [row for row in summary.rows if row.median_s and row.figures and "flip" in row.figures]
    if not rows:
        return None
    points = [(row.median_s or 0.0, float(np.mean(row.figures["flip"]))) for row in rows if row.figures]
    biggest = max((row.memory["peak_anon_bytes"] for row in rows if row.memory), default=1)
    front = [
        i
        for i, (x, y) in enumerate(points)
        if rows[i].passes
        and not any(a <= x and b <= y and (a, b) != (x, y) for j, (a, b) in enumerate(points) if rows[j].passes)
    ]
    ordered = sorted(points[i] for i in front)
    axes.step([x for x, _ in ordered], [y for _, y in ordered], where="post", color="gray", lw=1, zorder=0)
    for i, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
        area = 60 + 500 * (row.memory["peak_anon_bytes"] / biggest if row.memory else 0.2)
        axes.scatter(
            x,
            y,
            s=area,
            color=_COLORS[i % len(_COLORS)],
            alpha=0.75,
            marker="o" if row.passes else "X",
            edgecolors="none",
        )
    axes.set_xlabel("median seconds a batch")
    axes.set_ylabel("mean FLIP to eager fp32")
    axes.margins(0.15)
    _name_points(axes, points, [_label(row) for row in rows])
    told = [f"{row.name} {x:.3g} s, FLIP {y:.4f}" for row, (x, y) in zip(rows, points, strict=True)]
    return f"Latency against distance from eager fp32, memory as size: {'; '.join(told)}."


def _name_points(axes: Any, points: list[tuple[float, float]], names: list[str]) -> None:  # noqa: ANN401
    """Write names where they cover neither each other nor the points, with a line to the point of each."""
    from adjustText import adjust_text

    axes.figure.canvas.draw()  # which lays the axes out
    texts = [axes.text(x, y, name, fontsize=9) for (x, y), name in zip(points, names, strict=True)]
    lines = {"arrowstyle": "-", "color": _INK, "lw": 0.5, "shrinkA": 0}
    adjust_text(texts, *zip(*points, strict=True), ax=axes, arrowprops=lines, iter_lim=_ROUNDS)


def _stages(axes: Any, summary: Summary) -> str | None:  # noqa: ANN401
    rows = [row for row in summary.rows if row.stages]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.stages or {}))
    left = np.zeros(len(rows))
    for i, name in enumerate(names):
        widths = np.array([(row.stages or {}).get(name, 0.0) for row in rows])
        axes.barh(range(len(rows)), widths, left=left, color=_COLORS[i % len(_COLORS)], label=name)
        left += widths
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("seconds a batch")
    axes.legend(frameon=False, fontsize=8, ncols=min(len(names), 5), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    told = [f"{row.name}: " + ", ".join(f"{k} {v:.3g} s" for k, v in (row.stages or {}).items()) for row in rows]
    return f"Seconds by part. {'; '.join(told)}."


def _memory(axes: Any, summary: Summary) -> str | None:  # noqa: ANN401
    rows = [row for row in summary.rows if row.memory]
    if not rows:
        return None
    phases = ("load", "first", "steady")
    for i, phase in enumerate(phases):
        values = [row.memory["peak_bytes"][phase] / 1e6 for row in rows if row.memory]
        axes.barh(np.arange(len(rows)) + (i - 1) * 0.26, values, height=0.24, color=_COLORS[i], label=phase)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("peak resident memory (VmHWM), MB")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    told = [f"{row.name} {max(row.memory['peak_bytes'].values()) / 1e6:.0f} MB" for row in rows if row.memory]
    return f"Peak resident memory while loading, at the first picture and after: {'; '.join(told)}."


def _drift(axes: Any, summary: Summary) -> str | None:  # noqa: ANN401
    rows = [row for row in summary.rows if row.blocks]
    if not rows:
        return None
    for i, row in enumerate(rows):
        axes.plot(
            range(1, len(row.samples) + 1),
            row.samples,
            ".-",
            lw=0.8,
            ms=4,
            color=_COLORS[i % len(_COLORS)],
            label=row.name,
        )
    for edge in np.cumsum([len(block) for block in rows[0].blocks])[:-1]:
        axes.axvline(edge + 0.5, color="gray", lw=0.5, alpha=0.5)
    axes.set_xlabel("repetition; lines between blocks")
    axes.set_ylabel("seconds a batch")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return f"Seconds of every repetition of {', '.join(row.name for row in rows)}, in the order they ran."


def _trajectory(axes: Any, summary: Summary) -> str | None:  # noqa: ANN401
    traced = [(row, row.figures["trajectory"]) for row in summary.rows if row.figures and row.figures.get("trajectory")]
    traced = [(row, values) for row, values in traced if any(values)]
    if not traced:
        return None
    for i, (row, values) in enumerate(traced):
        color = _COLORS[i % len(_COLORS)]
        shown = [max(value, _LEAST_DRIFT) for value in values]
        axes.semilogy(range(1, len(values) + 1), shown, ".-", lw=1, ms=4, color=color, label=_label(row))
    axes.set_xlabel("step")
    axes.set_ylabel("relative RMS distance of latents")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    told = [f"{row.name} {values[0]:.1e} after the first step, {values[-1]:.1e} at the end" for row, values in traced]
    return f"Distance of the latents from eager fp32's: {'; '.join(told)}."
