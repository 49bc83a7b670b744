"""The page of `deploy tune`: the front, every mix that was built, and every unit that was weighed."""

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import tuning_text
from deploy.artifact.tuning import TunedPoint, TunedUnit, Tuning
from deploy.errors import OutputError
from deploy.tune.text import STOPPED, head, rows

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 320, 48, 34, 12
_COLOURS = {"inside": 3, "undecided": 5, "outside": 2, None: 0}
_LEAST = 1e-12
_STYLE = '@media(max-width:900px){td,td[data-name="speed-up"]{white-space:normal}}'
"""In cells of a phone, intervals take two lines."""
_KINDS = {
    "kl": "the divergence (Kullback-Leibler, in nats) of the probabilities from those in floating point",
    "relative": "the squared error of the outputs over their squares",
}


def page(made: Artifact, path: Path) -> None:
    """Write the page, one file that needs no network. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(made), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def render(made: Artifact) -> str:
    """The HTML of the page of an artifact that `tune` made."""
    tuning = made.manifest.tuning
    assert tuning is not None
    name = made.manifest.name
    said = tuning_text(tuning)
    codes = tuning.codes.upper()
    notes = [STOPPED[tuning.stopped]] if tuning.stopped else []
    style = resources.files("deploy.bench.report").joinpath("style.css").read_text(encoding="utf-8")  # one style for all reports
    parts = [
        f"<header><h1>{escape(name)}</h1><p class=verdict>{escape(said)}.</p>"
        f"<p>{escape(tuning.because[0].upper() + tuning.because[1:])}.</p></header>",
        *(f"<p class=note>{escape(note[0].upper() + note[1:])}.</p>" for note in notes),
        f"<h2>Mixes</h2><p>Speed-up over floating point, measured in the same rounds, with its 95 % interval, and the damage on"
        f" {tuning.rows} rows of the calibration data: {_KINDS[tuning.kind]}. Rings: what the cost model predicted.</p>",
        _figure(tuning),
        _legend(),
        _table(head(tuning), rows(tuning)),
        f"<h2>Units</h2><p>Layers that are {codes} or floating point together. In floating point, and in {codes}: the time of its layers by the profiler of the"
        f" backend, where the network in floating point takes 100 %. Gain: what {codes} takes away, moved to the times of mixes, without the crossings"
        f" between {codes} and floating point, each of which costs {_percent(tuning.crossing[0])} and {_percent(tuning.crossing[1])} for a thousand numbers.</p>",
        _table(
            ("unit", "in the result", "multiply-adds", "in floating point", f"in {codes}", "gain", "damage"),
            [_unit(each, codes) for each in tuning.units],
        ),
        _conditions(made, tuning),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(name)}: deploy tune</title>'
        f"<style>{style}{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _figure(tuning: Tuning) -> str:
    points = [point for point in tuning.points if point.speedup is not None]
    if not points:
        return ""
    damages = [max(point.damage or 0.0, _LEAST) for point in points]
    left, right = math.floor(math.log10(min(damages))), math.ceil(math.log10(max(damages)) + 1e-9)
    right = max(right, left + 1)
    ends = [value for point in points for value in (*_interval(point), _predicted(point))]
    bottom, top = min(0.9, *ends), max(1.1, *ends)

    def x(damage: float) -> float:
        return _LEFT + (math.log10(max(damage, _LEAST)) - left) / (right - left) * (_WIDTH - _LEFT - 90)

    def y(speed: float) -> float:
        return _TOP + (top - speed) / (top - bottom) * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for power in range(left, right + 1):
        parts.append(f'<text class="tick middle" x="{x(10.0**power):.1f}" y="{_HEIGHT - 14}">1e{power}</text>')
    step = next((step for step in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if (top - bottom) / step <= 6), 100)
    for index in range(math.ceil(bottom / step), math.floor(top / step) + 1):
        at = y(index * step)
        parts.append(f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - 90}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{at + 3:.1f}">{index * step:.3g}</text>')
    parts += [_mark(point, x(point.damage or 0.0), y, result=point.name == tuning.result) for point in points]
    parts.append(f'<text class="tick middle" x="{(_LEFT + _WIDTH - 90) / 2}" y="{_HEIGHT}">damage</text>')
    label = "Speed-up over floating point against damage, by mix"
    return f'<figure style="max-width:none"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'


def _mark(point: TunedPoint, x: float, y: Callable[[float], float], *, result: bool) -> str:
    assert point.speedup is not None
    low, high = _interval(point)
    colour = f"var(--c{_COLOURS[point.verdict]})"
    return (
        f'<line class=whisker x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y(_predicted(point)):.1f}" r="7" fill="none" stroke="{colour}"/>'
        f'<circle cx="{x:.1f}" cy="{y(point.speedup):.1f}" r="4.5" fill="{colour}"><title>{escape(point.name)}</title></circle>'
        f'<text x="{x + 10:.1f}" y="{y(point.speedup) + 4:.1f}"{" font-weight=bold" if result else ""}>{escape(point.name)}</text>'
    )


def _interval(point: TunedPoint) -> tuple[float, float]:
    """What is drawn: nothing but the value where it is uncertain."""
    assert point.speedup is not None
    if not point.certain or point.low is None or point.high is None:
        return point.speedup, point.speedup
    return point.low, point.high


def _predicted(point: TunedPoint) -> float:
    """The predicted speed-up; at most ten times the measured one is drawn."""
    assert point.speedup is not None
    return 1 / max(point.predicted, 0.1 / point.speedup)


def _legend() -> str:
    names = {"inside": "inside the limit", "undecided": "undecided", "outside": "outside", None: "not tested"}
    entries = "".join(f'<li><i style="background:var(--c{_COLOURS[verdict]})"></i>{name}</li>' for verdict, name in names.items())
    return f"<ul class=legend>{entries}</ul>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(line[0])}</th>"
        + "".join(f'<td data-name="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(head[1:], line[1:], strict=True))
        + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _unit(unit: TunedUnit, codes: str) -> tuple[str, ...]:
    return (
        unit.name,
        codes if unit.int8 else "floating point",
        f"{unit.macs:.1%}",
        "" if unit.floating_time is None else f"{unit.floating_time:.1%}",
        "" if unit.int8_time is None else f"{unit.int8_time:.1%}",
        _percent(unit.gain),
        "not measured" if unit.damage is None else f"{unit.damage:.2g}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _conditions(made: Artifact, tuning: Tuning) -> str:
    manifest = made.manifest
    entries = {
        "backend": f"{tuning.backend}, batch {tuning.batch}" + f", {tuning.threads} threads" * (tuning.gpu is None),
        "machine": tuning.gpu or tuning.cpu,
        "limit": f"{tuning.limit:g} {tuning.unit} of {tuning.metric}",
        "made": manifest.created,
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f"<h2>Conditions</h2><dl>{listed}</dl>"
