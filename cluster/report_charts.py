"""Line charts as inline SVG: pure functions from points to markup, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

HEIGHT = 270  # units of the view box, at least; the page scales it
COLOURS = 8  # of the page's style sheet; further series take them again, with other markers
LEFT, RIGHT, TOP, BOTTOM = 52, 114, 14, 40
LOG_RATIO = 8  # a positive quantity that spans more than this is drawn on a log scale
LABEL_GAP = 13
MOST_MARKERS = 16
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring")


@dataclass(frozen=True)
class Point:
    """One evaluation: mean over seeds with their lowest and highest value; x in images seen."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    name: str
    style: int  # colour and marker, the same for a method on the whole page
    points: Sequence[Point]


def line_chart(series: Sequence[Series], *, title: str, y_label: str, x_label: str = "images seen",
               width: int = 480, alarms: Sequence[tuple[float, float]] = ()) -> Markup:
    """An SVG with axes, bands, lines, markers and a name at the end of each line; empty where nothing is finite.

    A series of one point has an upright line in the place of the band.

    ``alarms`` are stretches of x that are shaded.
    """
    drawn = [Series(s.name, s.style, [p for p in s.points if math.isfinite(p.y)]) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return Markup("")
    height = max(HEIGHT, TOP + BOTTOM + LABEL_GAP * len(drawn))
    points = [p for s in drawn for p in s.points]
    low, high = min(p.low for p in points), max(p.high for p in points)
    log = low > 0 and high / low > LOG_RATIO
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    last, right = max(p.x for p in points) or 1, width - RIGHT
    x_ticks = [tick for tick in linear_ticks(0, last, count=width // 80) if tick <= last * 1.001]
    to_x = _axis(0, last, LEFT, right, log=False)
    to_y = _axis(min(low, ticks[0]), max(high, ticks[-1]), height - BOTTOM, TOP, log=log)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts += [f'<rect class="alarm" x="{to_x(begin):.1f}" y="{TOP}" width="{max(to_x(end) - to_x(begin), 2):.1f}" '
              f'height="{height - BOTTOM - TOP}"><title>alarm</title></rect>' for begin, end in alarms if end <= last]
    parts += [f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{to_y(t):.1f}" y2="{to_y(t):.1f}"/>'
              f'<text x="{LEFT - 6}" y="{to_y(t) + 4:.1f}" text-anchor="end">{_tick(t)}</text>' for t in ticks]
    parts += [f'<text x="{to_x(t):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{_tick(t)}</text>'
              for t in x_ticks]
    parts.append(f'<text class="axis" x="{(LEFT + right) / 2}" y="{height - 6}" text-anchor="middle">'
                 f"{escape(x_label)}</text>")
    scale = f"{y_label}, log scale" if log else y_label
    parts.append(f'<text class="axis" transform="translate(11 {(TOP + height - BOTTOM) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{escape(scale)}</text>')
    label_y = spread([to_y(s.points[-1].y) for s in drawn], LABEL_GAP, TOP, height - BOTTOM)
    for one, name_y in zip(drawn, label_y, strict=True):
        parts.append(_draw(one, to_x, to_y, name_y))
    return Markup("".join(parts) + "</svg>")


def _draw(series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float], name_y: float) -> str:
    points = series.points
    line = " ".join(f"{to_x(p.x):.1f},{to_y(p.y):.1f}" for p in points)
    upper = [f"{to_x(p.x):.1f},{to_y(p.high):.1f}" for p in points]
    lower = [f"{to_x(p.x):.1f},{to_y(p.low):.1f}" for p in reversed(points)]
    marked = points if len(points) <= MOST_MARKERS else points[-1:]
    marks = "".join(marker(series.style, to_x(p.x), to_y(p.y)) for p in marked)
    end_x, end_y = to_x(points[-1].x), to_y(points[-1].y)
    band = f'<polygon class="band" points="{" ".join(upper + lower)}"/>' if any(p.high > p.low for p in points) else ""
    if len(points) == 1 and band:  # a band has no width there
        band = f'<line x1="{end_x:.1f}" x2="{end_x:.1f}" y1="{to_y(points[0].low):.1f}" y2="{to_y(points[0].high):.1f}"/>'
    return (f'<g class="series s{series.style % COLOURS}">{band}<polyline points="{line}"/>{marks}'
            f'<path class="leader" d="M{end_x + 4:.1f} {end_y:.1f}L{end_x + 11:.1f} {name_y:.1f}"/>'
            f'<text class="name" x="{end_x + 13:.1f}" y="{name_y + 4:.1f}">{escape(series.name)}</text></g>')


def marker(style: int, x: float, y: float) -> str:
    """The symbol of a style around (x, y)."""
    kind = MARKERS[style % len(MARKERS)]
    if kind in ("circle", "ring"):
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    offsets = {"square": "M-3-3H3V3H-3Z", "triangle": "M0-4L3.8 3H-3.8Z", "diamond": "M0-4.2L4.2 0L0 4.2L-4.2 0Z",
               "cross": "M-3-3L3 3M3-3L-3 3"}
    return f'<path class="{kind}" transform="translate({x:.1f} {y:.1f})" d="{offsets[kind]}"/>'


def key(style: int) -> Markup:
    """The legend's swatch: a piece of line with its marker."""
    return Markup(f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true"><g class="series s{int(style) % COLOURS}">'
                  f'<polyline points="1,6 25,6"/>{marker(style, 13, 6)}</g></svg>')


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions moved as little as needed for neighbours to be ``gap`` apart, order kept, within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 12) for k in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few; they cover [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    between = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [k * 10.0**e for e in range(first, last + 1) for k in between]
    start = max(i for i, t in enumerate(ticks) if t <= low * 1.0001)
    end = min((i for i, t in enumerate(ticks) if t >= high * 0.9999), default=len(ticks) - 1)
    return ticks[start:end + 1]


def _axis(low: float, high: float, start: float, end: float, *, log: bool) -> Callable[[float], float]:
    scale: Callable[[float], float] = math.log10 if log else float
    span = (scale(high) - scale(low)) or 1.0
    return lambda value: start + (scale(value) - scale(low)) / span * (end - start)


def _tick(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k".replace("-", "−")
    return f"{value:g}".replace("-", "−")
