"""One self-contained HTML page: opens offline, reads on a phone and in print, light and dark."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from typing import TYPE_CHECKING

from .figures import figures
from .tables import conditions, notes, table

if TYPE_CHECKING:
    from .pairs import Pair
    from .summary import Row, Summary

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2530;--soft:#5b6775;--paper:#fff;--card:#f5f7f9;--line:#dde3e8;--good:#227a47;--bad:#b3362b}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa7b4;--paper:#12171d;--card:#1a2129;--line:#2c3640;--good:#63c68d;--bad:#ef8276}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
.soft{color:var(--soft);margin:0 0 1rem}.verdict{list-style:none;margin:0;padding:0}.verdict li{background:var(--card);border-left:4px solid var(--soft);border-radius:4px;padding:.6rem .9rem;margin:.4rem 0}
.verdict .faster{border-color:var(--good)}.verdict .slower,.verdict .failed{border-color:var(--bad)}
figure{margin:0 0 1rem}figure svg{width:100%;height:auto;color:var(--ink)}figcaption{font-weight:600;margin:.4rem 0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem 2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;white-space:nowrap}th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}tr.failed td{color:var(--bad)}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}.pairs img{width:100%;image-rendering:pixelated;border-radius:4px}.pairs p{margin:.2rem 0;font-size:.8rem;color:var(--soft)}
details{margin:1rem 0;border-top:1px solid var(--line);padding-top:.6rem}summary{cursor:pointer;font-weight:600}pre{overflow-x:auto;font-size:.78rem;background:var(--card);padding:.8rem;border-radius:4px}
@media print{details{display:none}main{max-width:none}.verdict li{break-inside:avoid}figure{break-inside:avoid}}
"""


def page(summary: Summary, pairs: list[Pair]) -> str:
    """Render a summary; `pairs` are the pictures farthest from their reference."""
    e = summary.record["experiment"]
    title = f"{e['model']}: {len(summary.rows)} arms against {summary.baseline}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>bakeoff: {escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1><p class=soft>{escape(conditions(summary))}</p>",
            _verdict(summary),
            _figures(summary),
            "<h2>All figures</h2>",
            _table(summary),
            _remarks(summary),
            _pairs(pairs),
            _folded(summary),
            "</main></body></html>",
        ]
    )


def _verdict(summary: Summary) -> str:
    rows = [row for row in summary.rows if row.arm != summary.baseline] or summary.rows
    items = [
        f'<li class="{_class(row)}">{escape(text)}</li>' for row, text in zip(rows, summary.headline(), strict=True)
    ]
    return f"<ul class=verdict>{''.join(items)}</ul>"


def _class(row: Row) -> str:
    if not row.passes:
        return "failed"
    return row.verdict.word.split(" ")[0] if row.verdict else ""


def _figures(summary: Summary) -> str:
    drawn = [
        f"<figure><figcaption>{escape(figure.title)}</figcaption>{figure.svg}</figure>" for figure in figures(summary)
    ]
    return f'<h2>Figures</h2><div class="grid">{"".join(drawn)}</div>' if drawn else ""


def _table(summary: Summary) -> str:
    rows = list(zip(summary.rows, table(summary), strict=True))
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in rows[0][1])
    body = "".join(
        f"<tr{'' if row.passes else ' class=failed'}>{''.join(f'<td>{escape(value)}</td>' for value in values.values())}</tr>"
        for row, values in rows
    )
    return f'<div class="scroll" tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _remarks(summary: Summary) -> str:
    found = [f"{row.name}: {note}" for row in summary.rows for note in notes(row)]
    found += [
        f"{row.name}: {row.outlying} repetitions lie far from the median; they are kept"
        for row in summary.rows
        if row.outlying
    ]
    found += [f"noise: {line}" for line in summary.noise()]
    if summary.unmeasured():
        found.append(f"not measured, no weights named: {', '.join(summary.unmeasured())}")
    return (
        f"<h2>Beside the figures</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in found)}</ul>" if found else ""
    )


def _pairs(pairs: list[Pair]) -> str:
    if not pairs:
        return ""
    drawn = []
    for pair in pairs:
        stream = io.BytesIO()
        pair.picture.save(stream, "PNG")
        data = base64.b64encode(stream.getvalue()).decode()
        words = f"{pair.arm}, “{pair.prompt}”: {pair.psnr_db:.1f} dB"
        drawn.append(
            f'<div><img alt="{escape(words)}: eager fp32, the arm, and their difference" src="data:image/png;base64,{data}"><p>{escape(words)}</p></div>'
        )
    return f'<h2>The pictures farthest from eager fp32</h2><p class=soft>Left eager fp32, middle the arm, right their difference (times 8).</p><div class="pairs">{"".join(drawn)}</div>'


def _folded(summary: Summary) -> str:
    record = summary.record
    failures = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(entry['failure']['stderr'] or entry['failure']['reason'])}</pre>"
        for about in record["arms"].values()
        for name, entry in about["entries"].items()
        if "failure" in entry
    )
    command = " ".join(record.get("command", []))
    told = {name: record[name] for name in ("experiment", "machine", "hash", "latents") if name in record}
    configurations = {
        name: run["configuration"] for block in record["blocks"][:1] for name, run in block["runs"].items()
    }
    blocks = [
        f"<details><summary>{title}</summary><pre>{escape(json.dumps(data, indent=1))}</pre></details>"
        for title, data in (("Experiment and machine", told), ("What each arm ran with", configurations))
    ]
    passed = [f"{row.name}, {gate.name}: {gate.detail}" for row in summary.rows for gate in row.gates if gate.holds]
    if passed:
        items = "".join(f"<li>{escape(text)}</li>" for text in passed)
        blocks.insert(0, f"<details><summary>Gates that hold</summary><ul>{items}</ul></details>")
    if command:
        blocks.insert(0, f"<details><summary>Command</summary><pre>{escape(command)}</pre></details>")
    return "".join(blocks) + (f"<details open><summary>Failures</summary>{failures}</details>" if failures else "")
