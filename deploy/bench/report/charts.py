"""Figures as inline SVG, with a title and a description for readers who cannot see them.

Coordinates are pixels of a figure of WIDTH, which fits a phone; a wide screen shows several side by side. Colours are CSS
variables, so that figures follow the page into dark mode.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from deploy.bench.report.labels import digits

WIDTH = 360
_LEFT, _RIGHT = 10, 14
_BINS = 48


@dataclass(frozen=True, kw_only=True)
class Series:
    """One candidate in a figure. label: its name. colour: the number of its colour, 0 for the baseline."""

    label: str
    colour: int


@dataclass(frozen=True, kw_only=True)
class Bar(Series):
    """A bar with its interval and the text beside it."""

    value: float
    low: float
    high: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Spread(Series):
    """All samples of one candidate, with the percentiles to mark."""

    samples_ms: Sequence[float]
    p50: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Line(Series):
    """Points to join by a line."""

    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Dot(Series):
    """A point; `front`: no other point beats it in both directions."""

    x: float
    y: float
    front: bool


def speedups(name: str, bars: Sequence[Bar]) -> str:
    """Bars from 0 to the speed-up, with the interval as a whisker and a line at 1."""
    top, step = 20, 40
    height = top + step * len(bars) + 6
    most = max(1.0, *(bar.high for bar in bars)) * 1.05
    scale = (WIDTH - _LEFT - _RIGHT) / most
    one = _LEFT + scale
    parts = [_line(one, top - 6, one, height - 4, "grid"), _text(one, 11, "1", "tick middle")]
    for index, bar in enumerate(bars):
        y = top + index * step
        parts.append(_text(_LEFT, y + 11, f"{bar.label}", "label"))
        parts.append(_text(WIDTH - _RIGHT, y + 11, bar.note, "value end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 17}" width="{bar.value * scale:.1f}" height="12" rx="2" fill="var(--c{bar.colour})"/>'
        )
        if bar.high > bar.low:
            low, high = _LEFT + bar.low * scale, _LEFT + bar.high * scale
            parts.append(_line(low, y + 23, high, y + 23, "whisker"))
            parts += [_line(x, y + 19, x, y + 27, "whisker") for x in (low, high)]
    description = "; ".join(f"{bar.label} {bar.note}" for bar in bars)
    return _figure(name, f"Speed-up over the baseline with its 95 % interval: {description}.", height, parts)


def spreads(name: str, rows: Sequence[Spread]) -> str:
    """Histograms of latencies on one logarithmic axis, with p50 and p99 marked."""
    top, step = 6, 50
    height = top + step * len(rows) + 24
    low = min(min(row.samples_ms) for row in rows) * 0.95
    high = max(float(np.percentile(row.samples_ms, 99.9)) for row in rows) * 1.05
    axis = _Log(low, high, _LEFT, WIDTH - _RIGHT)
    parts = []
    bottom = height - 20
    for value in axis.ticks():
        parts += [
            _line(axis(value), top, axis(value), bottom, "grid"),
            _text(axis(value), height - 6, f"{value:g}", "tick middle"),
        ]
    parts.append(_text(WIDTH - 2, height - 6, "ms", "tick end"))
    for index, row in enumerate(rows):
        base = top + (index + 1) * step - 8
        edges = np.linspace(math.log(low), math.log(high), _BINS + 1)
        counts, _ = np.histogram(np.log(row.samples_ms), edges)
        tallest = max(1, counts.max())
        steps = []
        for at, count in enumerate(counts):
            y = base - 22 * count / tallest
            steps += [f"{axis(math.exp(edges[at])):.1f},{y:.1f}", f"{axis(math.exp(edges[at + 1])):.1f},{y:.1f}"]
        points = f"{_LEFT},{base} {' '.join(steps)} {WIDTH - _RIGHT},{base}"
        parts.append(f'<polygon points="{points}" fill="var(--c{row.colour})" fill-opacity="0.75"/>')
        parts.append(_text(_LEFT, base - 28, row.label, "label"))
        parts.append(_text(WIDTH - _RIGHT, base - 28, f"p50 {digits(row.p50)}, p99 {digits(row.p99)} ms", "value end"))
        parts += [_line(axis(value), base - 24, axis(value), base, "mark") for value in (row.p50, min(row.p99, high))]
    description = "; ".join(f"{row.label}: p50 {digits(row.p50)} ms, p99 {digits(row.p99)} ms" for row in rows)
    return _figure(name, f"Distribution of latencies on a logarithmic axis: {description}.", height, parts)


def throughputs(name: str, lines: Sequence[Line]) -> str:
    """Images a second against the batch size, both on logarithmic axes."""
    height, top, bottom, left = 260, 10, 228, 46
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    across = _Log(xs[0] * 0.9, xs[-1] * 1.1, left, WIDTH - _RIGHT)
    up = _Log(min(ys) * 0.9, max(ys) * 1.1, bottom, top)
    parts = []
    for value in up.ticks():
        parts += [
            _line(left, up(value), WIDTH - _RIGHT, up(value), "grid"),
            _text(left - 6, up(value) + 4, f"{value:,.0f}", "tick end"),
        ]
    parts += [_text(across(x), bottom + 16, f"{x:g}", "tick middle") for x in xs]
    parts.append(_text(WIDTH - _RIGHT, bottom + 30, "batch size", "tick end"))
    for line in lines:
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="var(--c{line.colour})" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="var(--c{line.colour})"/>' for x, y in line.points]
    description = "; ".join(f"{line.label}: " + ", ".join(f"{y:,.0f} at batch {x:g}" for x, y in line.points) for line in lines)
    return _figure(name, f"Images a second: {description}.", height, parts)


def roofs(name: str, bars: Sequence[Bar], roof: float) -> str:
    """Bars of the operations a second that are reached, and the roof as a line."""
    top, step = 20, 40
    height = top + step * len(bars) + 6
    scale = (WIDTH - _LEFT - _RIGHT) / (max(roof, *(bar.value for bar in bars)) * 1.05)
    line = _LEFT + roof * scale
    parts = [_text(line, 11, f"{roof:,.0f}", "tick middle")]
    for index, bar in enumerate(bars):
        y = top + index * step
        parts.append(_line(line, y + 15, line, y + 31, "mark"))
        parts += [_text(_LEFT, y + 11, bar.label, "label"), _text(WIDTH - _RIGHT, y + 11, bar.note, "value end")]
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 17}" width="{bar.value * scale:.1f}" height="12" rx="2" fill="var(--c{bar.colour})"/>'
        )
    description = "; ".join(f"{bar.label} {bar.note}" for bar in bars)
    return _figure(name, f"Billions of operations a second, under a roof of {roof:,.0f}: {description}.", height, parts)


def durations(name: str, bars: Sequence[Bar]) -> str:
    """Bars from 0 to a time."""
    step = 34
    scale = (WIDTH - _LEFT - _RIGHT) / max(bar.value for bar in bars)
    parts = []
    for index, bar in enumerate(bars):
        y = index * step
        parts += [_text(_LEFT, y + 11, bar.label, "label"), _text(WIDTH - _RIGHT, y + 11, bar.note, "value end")]
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 16}" width="{bar.value * scale:.1f}" height="9" rx="2" fill="var(--c{bar.colour})"/>'
        )
    description = "; ".join(f"{bar.label} {bar.note}" for bar in bars)
    return _figure(name, f"Time by layer, the longest first: {description}.", step * len(bars), parts)


def pareto(name: str, dots: Sequence[Dot], axis: str, unit: str) -> str:
    """A score against latency, with the name of its axis; a line joins the points that no other beats in both."""
    height, top, bottom, left = 260, 14, 228, 46
    across = _Log(min(dot.x for dot in dots) * 0.8, max(dot.x for dot in dots) * 1.25, left, WIDTH - _RIGHT)
    low, high = min(dot.y for dot in dots), max(dot.y for dot in dots)
    margin = max(0.25, (high - low) * 0.15)
    low, high = low - margin, high + margin

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = []
    for value in np.linspace(low + margin / 2, high - margin / 2, 4):
        parts += [
            _line(left, up(value), WIDTH - _RIGHT, up(value), "grid"),
            _text(left - 6, up(value) + 4, f"{value:.1f}", "tick end"),
        ]
    for value in across.ticks():
        parts += [
            _line(across(value), top, across(value), bottom, "grid"),
            _text(across(value), bottom + 16, f"{value:g}", "tick middle"),
        ]
    parts.append(_text(WIDTH - _RIGHT, bottom + 30, "p50 in ms", "tick end"))
    parts.append(_text(left, 10, axis, "tick"))
    front = sorted((dot.x, dot.y) for dot in dots if dot.front)
    points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in front)
    parts.append(f'<polyline points="{points}" class="front"/>')
    for dot in dots:
        ring = ' stroke="var(--ink)" stroke-width="1.5"' if dot.front else ' fill-opacity="0.6"'
        parts.append(f'<circle cx="{across(dot.x):.1f}" cy="{up(dot.y):.1f}" r="6" fill="var(--c{dot.colour})"{ring}/>')
    description = "; ".join(
        f"{dot.label}: {dot.y:.2f} {unit} at {digits(dot.x)} ms{', on the front' if dot.front else ''}" for dot in dots
    )
    return _figure(name, f"{name}: {description}.", height, parts)


class _Log:
    """A logarithmic axis from `low` to `high` over the pixels `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._high = math.log(low), math.log(max(high, low * 1.01))
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values on the axis: 1, 2 and 5 times powers of ten; only the powers if that is too many, even steps if too few."""
        exponents = range(math.floor(self._low / math.log(10)), math.ceil(self._high / math.log(10)) + 1)
        for factors in ((1, 2, 5), (1,)):
            ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
            ticks = [value for value in ticks if self._low <= math.log(value) <= self._high]
            if len(ticks) <= 7:
                break
        if len(ticks) >= 3:
            return ticks
        low, high = math.exp(self._low), math.exp(self._high)
        power = 10.0 ** math.floor(math.log10((high - low) / 2))
        step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5)
        return [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(name: str, description: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(name)}">'
        f"<title>{escape(name)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'
