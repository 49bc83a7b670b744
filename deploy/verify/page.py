"""The page of `deploy verify`: the errors along the depth of the network."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from deploy.errors import OutputError
from deploy.verify.error import Error
from deploy.verify.measure import Layer
from deploy.verify.text import text
from deploy.verify.verify import Verification

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 320, 56, 28
_LEAST = 1e-9

_STYLE = """
:root{--text:#1c2330;--soft:#5b6577;--grid:#dde2ea;--back:#fff;--local:#c2410c;--cum:#1d4ed8;--floor:#94a3b8;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--text:#e6e9ef;--soft:#9aa5b8;--grid:#2c3444;--back:#11151d;--local:#fb923c;--cum:#7aa2ff;--floor:#64748b;--bad:#f87171}}
body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1000px;margin:0 auto;padding:1rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
svg{width:100%;min-width:640px;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px}
td,th{padding:.2rem .6rem .2rem 0;text-align:right;border-bottom:1px solid var(--grid)}
td:first-child,th:first-child{text-align:left;min-width:11rem;overflow-wrap:anywhere}.bad{color:var(--bad);font-weight:600}
.key span{margin-right:1.2rem;white-space:nowrap}
"""


def page(found: Verification, path: Path) -> None:
    """Write the page. Raises OutputError where `path` cannot be written."""
    title = f"{found.b} against {found.shown_a}"
    parts = [
        f"<h1>{escape(title)}</h1><pre>{escape(text(found))}</pre>",
        "<h2>Errors along the depth</h2><p>The root mean square of each layer's error over that of its values, on a logarithmic scale: as B"
        " runs, by the layer itself on A's tensors, and the floor that rounding at random in B's formats sets for the layer.</p>",
        _key(),
        _figure(found.layers, found.culprits),
        "<h2>Every layer</h2>",
        _table(found),
    ]
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(title)}: deploy verify</title>'
        f"<style>{_STYLE}</style></head><body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )
    try:
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _key() -> str:
    names = (("cum", "as B runs"), ("local", "by itself"), ("floor", "floor"), ("bad", "culprit"))
    return (
        "<p class=key>" + "".join(f'<span style="color:var(--{colour})">&#9632; {name}</span>' for colour, name in names) + "</p>"
    )


def _figure(layers: Sequence[Layer], culprits: Sequence[Layer]) -> str:
    shown = [value for layer in layers for value in (layer.local.error, layer.cumulative.error, layer.local.floor) if value > 0]
    finite = [value for value in shown if math.isfinite(value)] or [1.0]
    low = math.floor(math.log10(max(_LEAST, min(finite))))
    high = max(low + 1, math.ceil(math.log10(max(finite))))

    def y(value: float) -> float:
        clipped = min(max(math.log10(value) if 0 < value < math.inf else (high if value else low), low), high)
        return 8 + (high - clipped) / (high - low) * (_HEIGHT - _BOTTOM - 8)

    def x(index: int) -> float:
        return _LEFT + (index + 0.5) * (_WIDTH - _LEFT - 8) / max(1, len(layers))

    parts = []
    every = max(1, (high - low) // 6)
    for power in range(low, high + 1, every):
        at = y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - 8}" y2="{at:.1f}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    lines: list[tuple[str, Callable[[Layer], Error], bool]] = [
        ("floor", lambda layer: layer.local, True),
        ("cum", lambda layer: layer.cumulative, False),
        ("local", lambda layer: layer.local, False),
    ]
    for colour, pick, floor in lines:
        points = " ".join(
            f"{x(index):.1f},{y(pick(layer).floor if floor else pick(layer).error):.1f}" for index, layer in enumerate(layers)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="var(--{colour})" stroke-width="1.6"/>')
    for index, layer in enumerate(layers):
        if layer in culprits:
            parts.append(
                f'<circle cx="{x(index):.1f}" cy="{y(layer.local.error):.1f}" r="5" fill="var(--bad)"><title>{escape(layer.node)}</title></circle>'
            )
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">first layer</text>')
    parts.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">last layer</text>')
    return f'<div class=wide><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Errors along the depth">{"".join(parts)}</svg></div>'


def _table(found: Verification) -> str:
    rows = []
    for layer in found.layers:
        bad = " class=bad" if layer in found.culprits else ""
        cells = (layer.local.error, layer.local.floor, layer.local.times, layer.cumulative.error, layer.cumulative.times)
        numbers = "".join(f"<td>{value:.2g}</td>" for value in cells)
        rows.append(f"<tr{bad}><td>{escape(layer.node)}</td><td>{escape(layer.operator)}</td>{numbers}</tr>")
    head = "<th>layer</th><th>operator</th><th>by itself</th><th>floor</th><th>times</th><th>as B runs</th><th>times</th>"
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
