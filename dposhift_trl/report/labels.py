"""Where the names of curves and dots go, so that they do not overlap."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes

from .drawing import COLORS


class NamedLine(Protocol):
    """A curve with a name."""

    label: str
    color: str

    @property
    def end(self) -> float | None:
        """Its last finite value."""
        ...


class NamedDot(Protocol):
    """A dot with a name, and perhaps an interval of its `y`."""

    label: str
    x: float
    y: float
    color: str
    low: float | None
    high: float | None


def label_ends(axes: Axes, lines: Sequence[NamedLine]) -> None:
    """Names right of the axes at the height of each line's end, moved apart if they would overlap."""
    gap = 0.075
    ends = []
    axes.get_ylim()  # computes the limits, which the transforms below need
    for line in lines:
        assert line.end is not None
        height = axes.transAxes.inverted().transform(axes.transData.transform((0, line.end)))[1]
        ends.append((float(height), line))
    ends.sort(key=lambda end: end[0])
    heights = spread([height for height, _ in ends], gap)
    for height, (_, line) in zip(heights, ends, strict=True):
        axes.text(
            1.015,
            height,
            shortened(line.label),
            transform=axes.transAxes,
            color=COLORS[line.color][0],
            va="center",
            fontsize=9,
            weight="bold",
        )


def shortened(label: str, length: int = 26) -> str:
    """A label, without its middle if it is too long for a figure."""
    return label if len(label) <= length else f"{label[: length // 2]}…{label[1 + length // 2 - length :]}"


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights, moved as little as needed to be `gap` apart and, if there is room, within [0, 1]."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.0))
    ceiling = 1.0
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def label_dots(axes: Axes, dots: Sequence[NamedDot], edge: Sequence[NamedDot]) -> None:
    """Each name on the side of its dot with the fewest dots, names, intervals and segments of the front."""
    axes.get_xlim(), axes.get_ylim()  # computes the limits, which the transforms below need
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(to_axes.transform((dot.x, dot.y))) for dot in dots]
    taken: list[tuple[float, float]] = list(places)
    strokes = [(*a, *b) for a, b in pairwise([(dot.x, dot.y) for dot in edge])]
    strokes += [(dot.x, dot.low, dot.x, dot.high) for dot in dots if dot.low is not None and dot.high is not None]
    for x0, y0, x1, y1 in strokes:
        xs, ys = np.linspace(x0, x1, 30), np.linspace(y0, y1, 30)
        taken += [tuple(place) for place in to_axes.transform(np.column_stack([xs, ys]))]
    for dot, (x, y) in zip(dots, places, strict=True):
        half, best = 0.011 * len(shortened(dot.label)), None
        for dx, dy, align in (
            (0.03, 0, "left"),
            (-0.03, 0, "right"),
            (0.02, 0.06, "left"),
            (0.02, -0.06, "left"),
            (-0.02, 0.06, "right"),
            (-0.02, -0.06, "right"),
        ):
            middle = x + dx + half * (1 if align == "left" else -1)
            outside = 5 * (middle - half < 0 or middle + half > 1)
            crowd = sum(
                abs(a - middle) < half + 0.01 and abs(b - (y + dy)) < 0.04 for a, b in taken if (a, b) != (x, y)
            )
            if best is None or crowd + outside < best[0]:
                best = (crowd + outside, dx, dy, align, middle)
        assert best is not None
        _, dx, dy, align, middle = best
        taken += [(middle - half, y + dy), (middle, y + dy), (middle + half, y + dy)]
        axes.text(
            x + dx,
            y + dy,
            shortened(dot.label),
            transform=axes.transAxes,
            ha=align,
            va="center",
            fontsize=9,
            color=COLORS[dot.color][0],
        )
