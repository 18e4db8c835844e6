"""Charts as inline SVG: colours come from the page's style sheet, so that they follow its light and its dark form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.report.html import Html, tag

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 34
"""Margins of the plotted area, which hold the numbers of the axes."""
SYMBOLS = ("circle", "triangle", "square", "diamond")


@dataclass(frozen=True)
class Series:
    """A line: its points, its colour as a class of the style sheet, and whether it is dashed."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values, drawn from `first` to `last` pixels."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them, a step of 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "epoch",
    reference: tuple[str, float] | None = None,
    top: float | None = None,
) -> Html:
    """Lines over a common axis.

    Args:
        reference: label and value of a horizontal line that tells what a value means.
        top: no value can be above it, 100 for percents.
    """
    xs, ys = ([point[i] for line in series for point in line.points] for i in (0, 1))
    if not xs:
        return tag("figure", tag("figcaption", title), tag("p", "no figures", class_="note"))
    ys += [reference[1]] if reference else []
    low, high = _range(ys, top)
    x = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y, x_label)]
    if reference:
        label, value = reference
        parts += [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="reference"),
            tag("text", label, x=WIDTH - RIGHT, y=y(value) + 15, class_="end soft"),
        ]
    for line in series:
        path = " ".join(f"{x(a)},{y(b)}" for a, b in line.points)
        parts.append(tag("polyline", points=path, class_=f"line {line.colour}{' dashed' if line.dashed else ''}"))
        if len(line.points) <= 40:
            told = [(a, b, f"{line.label}, {x_label} {a:g}: {b:.4g}{unit}") for a, b in line.points]
            parts += [tag("circle", tag("title", t), cx=x(a), cy=y(b), r=3.2, class_=line.colour) for a, b, t in told]
    return _figure(f"{title}{', ' + unit.strip() if unit else ''}", parts)


def density_chart(title: Html, edges: tuple[float, float], series: Sequence[Series], x_label: str) -> Html:
    """Filled outlines of densities that are given at equal steps from one edge to the other."""
    high = max(value for line in series for _, value in line.points)
    x, y = Axis(*edges, LEFT - 30, WIDTH - RIGHT), Axis(0, high * 1.05, HEIGHT - BOTTOM, TOP)
    parts = list(_grid(x, y, x_label, with_y=False))
    for line in series:
        middle = " ".join(f"{x(a)},{y(b)}" for a, b in line.points)
        first, last = x(line.points[0][0]), x(line.points[-1][0])
        shape = f"{first},{y(0)} {middle} {last},{y(0)}"
        parts.append(tag("polygon", tag("title", line.label), points=shape, class_=f"area {line.colour}"))
    return _figure(title, parts, label=f"densities: {', '.join(line.label for line in series)}")


def scatter_chart(
    title: str, points: Sequence[tuple[float, float]], groups: Sequence[int], marks: Sequence[int], names: Sequence[str]
) -> Html:
    """Points with a hue for each group and a symbol for each mark; each group's number stands at its middle point."""
    xs, ys = ([point[i] for point in points] for i in (0, 1))
    side = HEIGHT * 1.55
    x = Axis(min(xs) - 1e-9, max(xs) + 1e-9, 14, WIDTH - 14)
    y = Axis(min(ys) - 1e-9, max(ys) + 1e-9, side - 14, 14)
    order = {group: i for i, group in enumerate(sorted(set(groups)))}
    symbols = {mark: SYMBOLS[i % len(SYMBOLS)] for i, mark in enumerate(sorted(set(marks)))}
    parts = []
    for (a, b), group, mark, name in zip(points, groups, marks, names, strict=True):
        fill = f"hsl({order[group] * 137.5 % 360:.0f} 62% 55%)"  # the golden angle: neighbours differ
        parts.append(_symbol(symbols[mark], x(a), y(b), name, fill))
    for group in order:
        members = [point for point, g in zip(points, groups, strict=True) if g == group]
        middle = min(members, key=lambda a: sum(math.dist(a, b) for b in members))
        parts.append(tag("text", group, x=x(middle[0]), y=y(middle[1]) + 4, class_="middle halo"))
    return _figure(title, parts, height=side)


def _symbol(kind: str, x: float, y: float, name: str, fill: str) -> Html:
    title, r = tag("title", name), 4.0
    if kind == "circle":
        return tag("circle", title, cx=x, cy=y, r=r, fill=fill, class_="dot")
    corners = {
        "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)),
    }[kind]
    shape = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners)
    return tag("polygon", title, points=shape, fill=fill, class_="dot")


def _range(values: Sequence[float], top: float | None) -> tuple[float, float]:
    """A little more than the values span, but not past what they can reach."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return max(0.0, low - room) if low >= 0 else low - room, high + room if top is None else min(top, high + room)


def _grid(x: Axis, y: Axis, x_label: str, with_y: bool = True) -> list[Html]:
    """The lines and the numbers of both axes; epochs are whole."""
    parts = []
    for value in ticks(y.low, y.high) if with_y else ():
        parts.append(tag("line", x1=x.first, x2=x.last, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:g}", x=LEFT - 8, y=y(value) + 4, class_="end soft"))
    base = y.first
    parts.append(tag("line", x1=x.first, x2=x.last, y1=base, y2=base, class_="axis"))
    for value in [1.0] * (x_label == "rank") + ticks(x.low, x.high, 6):
        if x_label in ("epoch", "rank") and value != int(value):
            continue
        parts.append(tag("text", f"{value:g}", x=x(value), y=base + 16, class_="middle soft"))
    parts.append(tag("text", x_label, x=x.last, y=base + 31, class_="end soft"))
    return parts


def _figure(title: str | Html, parts: Sequence[Html], height: float = HEIGHT, label: str = "") -> Html:
    drawing = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label or title)
    return tag("figure", tag("figcaption", title), drawing)
