"""Figures as inline SVG, with a title and a description for readers who cannot see them.

Coordinates are pixels of a figure of WIDTH, which fits a phone; a wide screen shows several side by side. Colours are CSS
variables, so that figures follow the page into dark mode.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from deploy.artifact.summary import points_text
from deploy.bench.report.labels import digits

WIDTH = 360
_LEFT, _RIGHT = 10, 14
_BINS = 48
_FAR = 4
"""An axis whose ends are this many times apart is logarithmic."""
_ENOUGH = 3
"""Ticks on an axis."""
PALE = 0.3
"""The opacity of what is uncertain."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One candidate in a figure. label: its name. colour: the number of its colour, 0 for the baseline.

    certain: whether what is drawn of it was measured undisturbed; if not, it is pale.
    """

    label: str
    colour: int
    certain: bool = True


@dataclass(frozen=True, kw_only=True)
class Bar(Series):
    """A bar with its interval and the text beside it."""

    value: float
    low: float
    high: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Roofed(Series):
    """A bar below a roof of its own, and the text beside it."""

    value: float
    roof: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Spread(Series):
    """All samples of one candidate, with the percentiles to mark."""

    samples_ms: Sequence[float]
    p50: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Line(Series):
    """Points to join by a line. doubtful: those of them that are not certain."""

    points: Sequence[tuple[float, float]]
    doubtful: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Dot(Series):
    """A point; `front`: no other point beats it."""

    x: float
    y: float
    front: bool


def speedups(name: str, bars: Sequence[Bar]) -> str:
    """Bars from 0 to the speed-up, with the interval as a whisker and a line at 1; none for what is uncertain."""
    top, step = 20, 40
    height = top + step * len(bars) + 6
    most = max([1.0, *(bar.high for bar in bars if bar.certain)]) * 1.05
    scale = (WIDTH - _LEFT - _RIGHT) / most
    one = _LEFT + scale
    parts = [_line(one, top - 6, one, height - 4, "grid"), _text(one, 11, "1", "tick middle")]
    for index, bar in enumerate(bars):
        y = top + index * step
        parts.append(_text(_LEFT, y + 11, f"{bar.label}", "label"))
        parts.append(_text(WIDTH - _RIGHT, y + 11, bar.note, "value end"))
        if not bar.certain:
            continue
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
    """Histograms of latencies on one axis, with p50 and p99 marked."""
    top, step = 6, 50
    height = top + step * len(rows) + 38
    low = min(min(row.samples_ms) for row in rows) * 0.95
    high = max(float(np.percentile(row.samples_ms, 99.9)) for row in rows) * 1.05
    axis = _Axis(low, high, _LEFT, WIDTH - _RIGHT)
    parts = []
    bottom = height - 34
    for value in axis.ticks():
        parts += [
            _line(axis(value), top, axis(value), bottom, "grid"),
            _text(axis(value), bottom + 14, f"{value:g}", "tick middle"),
        ]
    parts.append(_text(WIDTH - _RIGHT, bottom + 28, "ms", "tick end"))
    for index, row in enumerate(rows):
        base = top + (index + 1) * step - 8
        edges = axis.edges(_BINS)
        counts, _ = np.histogram(row.samples_ms, edges)
        tallest = max(1, counts.max())
        steps = []
        for at, count in enumerate(counts):
            y = base - 22 * count / tallest
            steps += [f"{axis(edges[at]):.1f},{y:.1f}", f"{axis(edges[at + 1]):.1f},{y:.1f}"]
        points = f"{_LEFT},{base} {' '.join(steps)} {WIDTH - _RIGHT},{base}"
        parts.append(f'<polygon points="{points}" fill="var(--c{row.colour})" fill-opacity="{0.75 if row.certain else PALE}"/>')
        parts.append(_text(_LEFT, base - 28, row.label, "label"))
        parts.append(_text(WIDTH - _RIGHT, base - 28, _percentiles(row), "value end"))
        parts += [_line(axis(value), base - 24, axis(value), base, "mark") for value in (row.p50, min(row.p99, high))]
    description = "; ".join(f"{row.label}: {_percentiles(row)}" for row in rows)
    return _figure(name, f"Distribution of latencies: {description}.", height, parts)


def _percentiles(row: Spread) -> str:
    return f"p50 {digits(row.p50)}, p99 {digits(row.p99)} ms" if row.certain else "uncertain"


def throughputs(name: str, lines: Sequence[Line]) -> str:
    """Images a second against the batch size; what is uncertain is hollow."""
    height, top, bottom, left = 260, 10, 228, 54
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    across = _Axis(xs[0] * 0.9, xs[-1] * 1.1, left, WIDTH - _RIGHT)
    up = _Axis(min(ys) * 0.9, max(ys) * 1.1, bottom, top)
    parts = []
    for value in up.ticks():
        parts += [
            _line(left, up(value), WIDTH - _RIGHT, up(value), "grid"),
            _text(left - 6, up(value) + 4, f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:g}M", "tick end"),
        ]
    parts += [_text(across(x), bottom + 16, f"{x:g}", "tick middle") for x in xs]
    parts.append(_text(WIDTH - _RIGHT, bottom + 30, "batch size", "tick end"))
    for line in lines:
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="var(--c{line.colour})" stroke-width="2"/>')
        for x, y in line.points:
            fill = "var(--card)" if (x, y) in line.doubtful else f"var(--c{line.colour})"
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{fill}" stroke="var(--c{line.colour})" stroke-width="1.5"/>'
            )
    description = "; ".join(
        f"{line.label}: "
        + ", ".join(f"{y:,.0f} at batch {x:g}{' (uncertain)' * ((x, y) in line.doubtful)}" for x, y in line.points)
        for line in lines
    )
    return _figure(name, f"Images a second: {description}.", height, parts)


def roofs(name: str, bars: Sequence[Roofed]) -> str:
    """Bars of the operations a second that are reached, each with a mark at its roof."""
    step = 40
    scale = (WIDTH - _LEFT - _RIGHT) / (max(max(bar.roof, bar.value) for bar in bars) * 1.05)
    parts = []
    for index, bar in enumerate(bars):
        y = index * step
        line = _LEFT + bar.roof * scale
        parts += [_text(_LEFT, y + 11, bar.label, "label"), _text(WIDTH - _RIGHT, y + 11, bar.note, "value end")]
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 17}" width="{bar.value * scale:.1f}" height="12" rx="2" fill="var(--c{bar.colour})"'
            f' fill-opacity="{1 if bar.certain else PALE}"/>'
        )
        parts.append(_line(line, y + 15, line, y + 31, "mark"))
    description = "; ".join(f"{bar.label} {bar.note}" for bar in bars)
    return _figure(name, f"Billions of operations a second, and the roof of each: {description}.", step * len(bars), parts)


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
    """A score against latency, with the name of its axis; a line joins those of the front. What is uncertain is hollow."""
    height, top, bottom, left = 260, 14, 228, 46
    across = _Axis(min(dot.x for dot in dots) * 0.8, max(dot.x for dot in dots) * 1.25, left, WIDTH - _RIGHT)
    low, high = min(dot.y for dot in dots), max(dot.y for dot in dots)
    margin = max(0.25 if unit else abs(high) * 0.01, (high - low) * 0.15) or 0.01
    up = _Axis(low - margin, high + margin, bottom, top, even=True)
    parts = []
    for value in up.ticks():
        parts += [
            _line(left, up(value), WIDTH - _RIGHT, up(value), "grid"),
            _text(left - 6, up(value) + 4, f"{value:g}", "tick end"),
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
        if not dot.certain:
            ring = f' fill-opacity="0" stroke="var(--c{dot.colour})" stroke-width="1.5"'
        parts.append(f'<circle cx="{across(dot.x):.1f}" cy="{up(dot.y):.1f}" r="6" fill="var(--c{dot.colour})"{ring}/>')
    description = "; ".join(
        f"{dot.label}: {points_text(dot.y, unit)} at {digits(dot.x)} ms"
        f"{', on the front' if dot.front else ''}{'' if dot.certain else ', uncertain'}"
        for dot in dots
    )
    return _figure(name, f"{name}: {description}.", height, parts)


class _Axis:
    """An axis from `low` to `high` over the pixels `start` to `end`: logarithmic if that is far, and even if not or if asked for."""

    def __init__(self, low: float, high: float, start: float, end: float, *, even: bool = False) -> None:
        high = max(high, low * 1.01)
        self._log = not even and high > _FAR * low
        self._low, self._high = self._scaled(low), self._scaled(high)
        self._start, self._end = start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def edges(self, count: int) -> np.ndarray:
        """The ends of `count` parts of equal width."""
        edges = np.linspace(self._low, self._high, count + 1)
        return 10**edges if self._log else edges

    def ticks(self) -> list[float]:
        """Round values at even distances: 1, 2 or 5 times a power of ten apart; on a logarithmic axis powers of ten.

        Where these are few, 3, 30 and so on stand between them, very nearly in the middle of a decade; on less than a decade,
        every value is twice the one before.
        """
        if not self._log:
            power = 10.0 ** math.floor(math.log10((self._high - self._low) / 2))
            step = next(power * factor for factor in (1, 2, 5, 10) if (self._high - self._low) / (power * factor) <= 5)
            first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
            return [_round(step * count) for count in range(first, last + 1)]
        exponents = range(math.floor(self._low) - 1, math.ceil(self._high) + 1)
        ones, threes = (
            [float(f"{factor}e{at}") for at in exponents if self._low <= at + math.log10(factor) <= self._high]
            for factor in (1, 3)
        )
        if len(ones) + len(threes) < _ENOUGH:
            power = 10.0 ** math.floor(self._low)
            start = power * math.ceil(10**self._low / power - 1e-9)
            count = int((self._high - math.log10(start)) / math.log10(2) + 1e-9)
            return [_round(start * 2**doubled) for doubled in range(count + 1)]
        return ones if len(ones) > _ENOUGH else sorted(ones + threes)


def _round(value: float) -> float:
    """Without the last digits, which are those of the arithmetic."""
    return float(f"{value:.9g}")


def _figure(name: str, description: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(name)}">'
        f"<title>{escape(name)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'
