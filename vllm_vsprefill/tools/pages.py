# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Pictures of ``vsprefill inspect``, and a page that holds all of them and needs nothing else. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vllm_vsprefill.tools.inspection import HeadReport, LayerReport


def picture(file: Path, report: LayerReport, rows: int) -> Path:
    """Heat maps of a layer: a column of two for each KV head, attention above, what was computed of it below."""
    heads = report.heads
    figure = Figure(figsize=(2.7 * len(heads) + 1.1, 5.6), layout="constrained")
    grid = figure.subplots(2, len(heads), squeeze=False, sharex=True, sharey=True)
    extent = (0, rows, rows, 0)
    drawn: list[Any] = []
    for number, (head, (above, below)) in enumerate(zip(heads, grid.T, strict=True)):
        top = above.imshow(
            head.attention.clamp(min=1e-7).numpy(),
            extent=extent,
            norm=LogNorm(1e-5, 1),
            cmap="magma",
            interpolation="none",
        )
        bottom = below.imshow(head.kept.numpy(), extent=extent, vmin=0, vmax=1, cmap="Greens", interpolation="none")
        drawn = [top, bottom]
        above.set_title(
            f"KV head {number}\nrecall {head.recall:.1%}, density {head.density:.1%}\nerror {head.error:.1%}",
            fontsize=8,
        )
        for axes in (above, below):
            axes.tick_params(labelsize=7)
            axes.locator_params(nbins=4)
        below.set_xlabel("key", fontsize=8)
    for axes, drawing, label in zip(grid, drawn, ("attention mass of a row", "share computed"), strict=True):
        axes[0].set_ylabel("query", fontsize=8)
        bar = figure.colorbar(drawing, ax=list(axes), shrink=0.9, pad=0.01)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=100)
    return file


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { border: 1px solid #ddd; padding: .15rem .6rem; text-align: right; }
th { background: #f4f4f4; } .scroll { max-height: 26rem; overflow: auto; display: inline-block; }
.facts td, .facts th { text-align: left; overflow-wrap: anywhere; }
.scroll th { position: sticky; top: 0; }
img { max-width: 100%; } .note { color: #8a4b00; } .figure { overflow-x: auto; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; border: 1px solid #ddd;
  padding: .8rem; max-height: 34rem; overflow: auto; }
select { font: inherit; }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const spans = document.querySelectorAll("#text span"), choice = document.getElementById("choice");
function paint() {
  const heads = data.shares || data.columns, chosen = choice.value === "all" ? heads : [heads[+choice.value]];
  const share = new Float64Array(spans.length);
  for (const head of chosen)
    if (data.shares) head.forEach((part, at) => { share[at] += part / chosen.length; });
    else for (const at of head) share[at] += 1 / chosen.length;
  spans.forEach((span, at) => { span.style.background = share[at] ? `rgba(0, 150, 70, ${0.12 + 0.6 * share[at]})` : "";
    span.title = `token ${at}: ${Math.round(100 * share[at])} %`; });
}
choice.addEventListener("change", paint); paint();
"""


_COLUMNS = "Columns in the text", "Tokens that every row attends to, beside window, sinks and diagonals"
_TILES = (
    "Listed keys in the text",
    "Tokens by the share of the tiles behind them whose lists hold them, beside window and sinks",
)


def _chosen(head: HeadReport) -> str:
    """Cells of a row: how much was chosen."""
    if head.tile_keys is not None:
        return f"<td>{head.tile_keys:,.0f}</td>"
    return f"<td>{len(head.columns):,}</td><td>{len(head.diagonals):,}</td>"


def _amount(head: HeadReport) -> str:
    return f"{len(head.columns):,} columns" if head.tile_keys is None else f"{head.tile_keys:,.0f} keys a tile"


def _rate(value: float) -> str:
    return f"{value:.1%}"


def page(
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    reports: Sequence[LayerReport],
    pictures: Sequence[Path],
    tokens: Sequence[str],
) -> str:
    """The page.

    Args:
        facts: names and values, shown at the top.
        notes: what one must know to read the rest rightly.
        reports: layers.
        pictures: a PNG file for each.
        tokens: text of every token.
    """
    heads = [(report, number, head) for report in reports for number, head in enumerate(report.heads)]
    rows = "".join(
        f"<tr><td>{report.index}</td><td>{number}</td>"
        f'<td style="background: rgba(200, 60, 0, {min(1.0, 2 * (1 - head.recall)):.2f})">{_rate(head.recall)}</td>'
        f"<td>{_rate(head.density)}</td><td>{_rate(head.error)}</td>{_chosen(head)}"
        f"<td>{'dense' if report.handed_back else 'sparse'}</td></tr>"
        for report, number, head in heads
    )
    options = "".join(
        f'<option value="{at}">layer {report.index}, KV head {number} ({_amount(head)})</option>'
        for at, (report, number, head) in enumerate(heads)
    )
    images = "".join(
        f"<h2>Layer {report.index}{' (a server would run it dense)' if report.handed_back else ''}</h2>"
        f'<div class="figure"><img alt="attention of layer {report.index} and what was computed of it" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></div>'
        for report, file in zip(reports, pictures, strict=True)
    )
    by_tile = any(head.shares is not None for _, _, head in heads)
    data = json.dumps(
        {"shares": [[round(x, 2) for x in head.shares.tolist()] for _, _, head in heads if head.shares is not None]}
        if by_tile
        else {"columns": [head.columns.tolist() for _, _, head in heads]}
    )
    title, told = _TILES if by_tile else _COLUMNS
    amounts = "<th>keys of a tile</th>" if by_tile else "<th>columns</th><th>diagonals</th>"
    listed = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>What VSPREFILL keeps</title>'
        f"<style>{_STYLE}</style></head><body><h1>What VSPREFILL keeps</h1><table class='facts'>{listed}</table>"
        + "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
        + "<h2>Layers and KV heads</h2><p>Recall: share of the attention mass that was computed, the mean over rows. "
        "Density: pairs computed, of the causal ones. Error: of the output, relative.</p>"
        '<div class="scroll"><table><tr><th>layer</th><th>KV head</th><th>recall</th><th>density</th><th>error</th>'
        f"{amounts}<th>served</th></tr>{rows}</table></div>"
        f"<h2>{title}</h2><p>{told}: "
        f'<select id="choice"><option value="all">share of all layers and KV heads</option>{options}</select></p>'
        f'<div id="text">{"".join(f"<span>{html.escape(token)}</span>" for token in tokens)}</div>'
        f'{images}<script id="data" type="application/json">{data}</script><script>{_SCRIPT}</script></body></html>'
    )
