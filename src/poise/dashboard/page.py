"""The shell of a page: one file that needs no network, readable on a phone, in light and in dark.

plotly.js is written into the page once. A content-security policy forbids every request, so a page made from
somebody's journal can neither load nor send anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from poise.dashboard.text import escape

Figure = dict[str, Any]

_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

# Hues after Okabe and Ito's colour-blind-safe set, made darker or lighter for contrast with the ground.
_STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f5f6f8; --ink: #1b1f24; --soft: #57606a; --rule: #d5d9df;
  --loss: #7db4de; --smooth: #00568c; --eval: #006b4d; --grad: #7a4a96; --lr: #8a5a00; --speed: #006b6b;
  --warn: #b35c00; --bad: #c02d00; --note: #57606a; --faint: #8b949e; --fault: #a0468a;
  --run0: #57606a; --run1: #c44600; --run2: #0063a3; --run3: #007a58; --run4: #a0468a; --run5: #8a6a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --panel: #1d2126; --ink: #e8eaed; --soft: #a3abb5; --rule: #353b43;
    --loss: #4f86b0; --smooth: #6cc0f5; --eval: #3fcf9f; --grad: #c79be0; --lr: #e6b450; --speed: #4fc7c7;
    --warn: #f0a040; --bad: #ff7a4d; --note: #a3abb5; --faint: #8b949e; --fault: #e08cc8;
    --run0: #a3abb5; --run1: #ff8a5c; --run2: #62b5f0; --run3: #3fcf9f; --run4: #e08cc8; --run5: #e6c84a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 4px; }
p { margin: 0 0 10px; max-width: 46em; overflow-wrap: anywhere; }
.verdict { font-size: 1.15rem; }
.soft { color: var(--soft); font-size: 0.92rem; }
.warning { border-left: 4px solid var(--warn); background: var(--panel); padding: 10px 14px;
  border-radius: 4px; max-width: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px;
  margin: 20px 0 0; }
.figures div { background: var(--panel); border-radius: 8px; padding: 10px 14px; }
.figures dt { color: var(--soft); font-size: 0.82rem; }
.figures dd { margin: 0; font-size: 1.18rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.plot { width: 100%; margin: 0; }
.box { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; margin: 10px 0; }
table { border-collapse: collapse; width: 100%; min-width: 620px; font-size: 0.92rem; }
th, td { text-align: left; vertical-align: top; padding: 8px 12px; border-top: 1px solid var(--rule); }
thead th { border-top: 0; background: var(--panel); font-weight: 600; white-space: nowrap; }
td.tight { font-variant-numeric: tabular-nums; }
td.wide { min-width: 260px; }
.tag { display: inline-block; border: 1px solid var(--fault); color: var(--fault); border-radius: 4px;
  padding: 0 6px; font-size: 0.82rem; }
pre { background: var(--panel); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 10px 0;
  font: 0.86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
a { color: var(--smooth); }
@media (max-width: 520px) {
  main { padding: 18px 12px 40px; }
  .figures { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  .figures div { padding: 8px 10px; }
}
"""

# Draws the figures with the colours of the theme in use, again when the theme changes, and keeps the step
# axes of all pictures together, so that zooming into a spike shows every signal at that moment.
_SCRIPT: Final = """
"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  function painted(value, key) {
    if (Array.isArray(value)) {
      return key === "x" || key === "y" || key === "text" ? value : value.map((v) => painted(v, ""));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
    }
    return typeof value === "string" && /^\\$[a-z0-9]+$/.test(value) ? css(value.slice(1)) || value : value;
  }
  const axis = () => ({ gridcolor: css("rule"), linecolor: css("rule"), tickcolor: css("rule"),
    tickfont: { color: css("soft") } });
  function layout(figure) {
    const out = painted(figure.layout, "");
    out.paper_bgcolor = out.plot_bgcolor = "rgba(0,0,0,0)";
    out.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("ink") };
    out.hoverlabel = { bgcolor: css("panel"), bordercolor: css("rule"), align: "left",
      font: { family: out.font.family, color: css("ink"), size: 13 } };
    out.xaxis = Object.assign(axis(), out.xaxis);
    out.yaxis = Object.assign(axis(), out.yaxis);
    out.autosize = true;
    out.dragmode = touch ? false : "zoom";
    return out;
  }
  // A finger must be able to scroll the page where a picture fills the screen; a mouse drags to zoom.
  const touch = matchMedia("(pointer: coarse)").matches;
  const options = { responsive: true, displaylogo: false, displayModeBar: false, showTips: false };
  const plots = [...document.querySelectorAll(".plot")];
  let moving = false;
  function follow(from) {
    return (change) => {
      if (moving) return;
      const range = change["xaxis.range[0]"] !== undefined
        ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : change["xaxis.range"];
      if (!range && !change["xaxis.autorange"]) return;
      moving = true;
      const same = range ? { "xaxis.range": range.slice() } : { "xaxis.autorange": true };
      Promise.all(plots.filter((p) => p !== from).map((p) => Plotly.relayout(p, same)))
        .finally(() => { moving = false; });
    };
  }
  function draw() {
    plots.forEach((plot, i) => {
      const first = !plot.data;
      Plotly.react(plot, painted(figures[i].data, ""), layout(figures[i]), options);
      if (first) plot.on("plotly_relayout", follow(plot));
    });
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
"""


class Page:
    """Collects a page from top to bottom; every text given to it is plain and is escaped here."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._body: list[str] = [f"<h1>{escape(title)}</h1>"]
        self._figures: list[Figure] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str, style: str = "") -> None:
        """Add a paragraph; ``style`` is ``verdict``, ``soft``, ``warning`` or empty."""
        self._body.append(f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>")

    def key_figures(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Add a grid of named values."""
        cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
        self._body.append(f'<dl class="figures">{cells}</dl>')

    def figure(self, figure: Figure, label: str) -> None:
        """Add a picture; ``label`` describes it to a screen reader."""
        height = int(figure["layout"]["height"])
        self._figures.append(figure)
        self._body.append(
            f'<div class="plot" role="img" aria-label="{escape(label)}" style="min-height:{height}px"></div>'
        )

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], wide: Sequence[str] = (), tag: str = ""
    ) -> None:
        """Add a table that scrolls inside its own box.

        Args:
            head: column names.
            rows: cells.
            wide: names of the columns whose text may wrap.
            tag: name of a column whose cells are shown as a tag where they are not empty.
        """
        top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        lines = []
        for row in rows:
            cells = []
            for name, cell in zip(head, row, strict=True):
                text = f'<span class="tag">{escape(cell)}</span>' if cell and name == tag else escape(cell)
                cells.append(f'<td class="{"wide" if name in wide else "tight"}">{text}</td>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        self._body.append(
            f'<div class="box" tabindex="0"><table><thead><tr>{top}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    def code(self, text: str) -> None:
        """Add preformatted text that scrolls inside its own box."""
        self._body.append(f'<pre tabindex="0">{escape(text)}</pre>')

    def html(self) -> str:
        """Return the whole page."""
        scripts = ""
        if self._figures:
            scripts = (
                "<noscript><p>The pictures on this page need JavaScript.</p></noscript>\n"
                f"<script>{_plotly()}</script>\n"
                f'<script type="application/json" id="figures">{_json(self._figures)}</script>\n'
                f"<script>{_SCRIPT}</script>\n"
            )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(self._body)
            + f"\n</main>\n{scripts}</body>\n</html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page aside and rename it, so that nobody ever reads half a page.

        Raises:
            OSError: the folder cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(self.html(), encoding="utf-8", errors="replace")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path


def _json(figures: Sequence[Figure]) -> str:
    """Return JSON that is safe inside a script element: ``</script>`` cannot occur in it."""
    text = json.dumps(figures, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # late: only a page needs it

    return str(get_plotlyjs())
