"""The figures of the report: curves, histograms, densities, scatter plots and trade-offs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import gaussian_kde

from .drawing import COLORS, STYLE, Drawing, add_legend, draw, frame, new_axes
from .labels import label_dots, label_ends


SERIES = ("purple", "accent", "slate", "brown", "red", "muted")  # of runs; blue and orange are for answers
DASHES = ("-", "--", ":", "-.")
MOST_VECTOR_DOTS = 500
RASTER_DOT = "#3585c6"  # a raster has no CSS variables; this blue is visible on a light and on a dark page


@dataclass
class Line:
    """
    One curve.

    Args:
        label (`str`), color (`str`):
            Name and color of the curve.
        steps (`Sequence[float]`), values (`Sequence[float]`):
            Its points.
        low (`Sequence[float]`, *optional*), high (`Sequence[float]`, *optional*):
            Ends of the interval of each point.
        faint (`bool`, *optional*, defaults to `False`):
            Whether to draw it thin, as the curve of training next to that of evaluation.
        dash (`str`, *optional*, defaults to `"-"`):
            Line style of matplotlib.
    """

    label: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False
    dash: str = "-"

    @property
    def end(self) -> float | None:
        """The last finite value."""
        finite = [value for value in self.values if np.isfinite(value)]
        return finite[-1] if finite else None


@dataclass
class Dot:
    """
    One run in a trade-off.

    Args:
        label (`str`):
            Name of the run.
        x (`float`), y (`float`):
            Its coordinates.
        color (`str`, *optional*):
            Color of the dot.
        low (`float`, *optional*), high (`float`, *optional*):
            Ends of the interval of `y`.
        reference (`bool`, *optional*, defaults to `False`):
            Whether this is the DPO run.
        front (`bool`):
            Whether no other run is at least as good in both directions and better in one.
    """

    label: str
    x: float
    y: float
    color: str = SERIES[0]
    low: float | None = None
    high: float | None = None
    reference: bool = False
    front: bool = field(default=False, init=False)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is finite and no other one is at least as large in both coordinates and larger in one."""
    return [
        bool(np.isfinite([x, y]).all()) and not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        for x, y in points
    ]


def curves(
    name: str,
    title: str,
    ylabel: str,
    lines: Iterable[Line],
    level: tuple[float, str] | None = None,
    percent: bool = False,
) -> Drawing | None:
    """Curves against optimizer step, labeled at their ends, or `None` if no line has a finite value."""
    lines = [line for line in lines if line.end is not None]
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title, "Optimizer step", ylabel)
        for line in lines:
            color = COLORS[line.color][0]
            axes.plot(
                line.steps,
                line.values,
                color=color,
                alpha=0.45 if line.faint else 1,
                linewidth=1.2 if line.faint else 2,
                linestyle=line.dash,
                marker=None if line.faint and len(line.steps) > 1 else "o",
            )
            if len(line.low):
                axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        if level:
            axes.axhline(level[0], color=COLORS["muted"][0], linewidth=1, linestyle=":")
            axes.annotate(
                level[1],
                (0.99, level[0]),
                (0, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color=COLORS["muted"][0],
                fontsize=8.5,
            )
        if np.ptp([value for line in lines for value in line.values if np.isfinite(value)]) == 0:
            ends = [_first(lines[0].values), *([level[0]] if level else [])]
            axes.set_ylim(min(ends) - 0.1, max(ends) + 0.1)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if percent:
            _in_percent(axes)
        label_ends(axes, [line for line in lines if not line.faint] or lines)
        changes = "; ".join(
            f"{line.label} from {_first(line.values):.3g} to {line.end:.3g}" for line in lines if not line.faint
        )
        return draw(name, title, f"Line chart against optimizer step, {ylabel}. {changes}.", figure)


def histogram(name: str, title: str, xlabel: str, color: str, before: np.ndarray, after: np.ndarray) -> Drawing | None:
    """Histograms of log-probability with the reference and with the final model, as in the paper."""
    before, after = before[np.isfinite(before)], after[np.isfinite(after)]
    if not len(before) or not len(after):
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title, xlabel, "Pairs")
        both = np.concatenate([before, after])
        bins = np.histogram_bin_edges(both, bins=40 if _spreads(both) else 1).tolist()
        axes.hist(before, bins, color=COLORS["muted"][0], alpha=0.4, label=f"Reference, mean {before.mean():.1f}")
        axes.hist(
            after,
            bins,
            color=COLORS[color][0],
            histtype="step",
            linewidth=2,
            label=f"Policy, mean {after.mean():.1f}",
        )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        add_legend(figure)
        alt = (
            f"Histogram of {len(after)} pairs. Mean {before.mean():.2f} with the reference, {after.mean():.2f} with "
            "the policy."
        )
        return draw(name, title, alt, figure)


def density(name: str, title: str, xlabel: str, margins: np.ndarray) -> Drawing | None:
    """Kernel density of the margin, or one stroke per pair if there are too few pairs or all values are equal."""
    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return None
    with matplotlib.rc_context(STYLE):
        smooth = len(margins) >= 5 and _spreads(margins)
        figure, axes = new_axes(title, xlabel, "Density (1 / nat)" if smooth else "One stroke per pair")
        if smooth:
            pad = 0.08 * np.ptp(margins)
            low, high = min(0.0, margins.min()) - pad, max(0.0, margins.max()) + pad
            room = 0.3 * (high - low)  # for the labels of the two vertical lines
            low, high = (
                min(low, -room) if margins.mean() >= 0 else low,
                high if margins.mean() >= 0 else max(high, room),
            )
            grid = np.linspace(low, high, 300)
            heights = gaussian_kde(margins)(grid)
            axes.plot(grid, heights, color=COLORS["accent"][0])
            axes.fill_between(grid, heights, color=COLORS["accent"][0], alpha=0.15, linewidth=0)
            axes.set_ylim(0, 1.2 * heights.max())
            axes.set_xlim(low, high)
        else:
            axes.vlines(margins, 0, 1, color=COLORS["accent"][0], linewidth=2)
            axes.set_yticks([])
            pad = 0.4 * (np.ptp([0.0, *margins]) or 1.0)
            axes.set_xlim(min(0.0, margins.min()) - pad, max(0.0, margins.max()) + pad)
        axes.axvline(0, color=COLORS["muted"][0], linewidth=1.2, linestyle="--")
        mean, positive = margins.mean(), (margins > 0).mean()
        axes.axvline(mean, color=COLORS["accent"][0], linewidth=1.2)
        for x, text, color, at_left in (
            (0, "reference: all at 0", "ink", mean >= 0),
            (mean, f"mean {mean:.2f}; {positive:.0%} above 0", "accent", mean < 0),
        ):
            axes.annotate(
                text,
                (x, 1),
                (-5 if at_left else 5, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if at_left else "left",
                va="top",
                color=COLORS[color][0],
                fontsize=8.5,
            )
        alt = f"Density over {len(margins)} pairs: mean {mean:.3g}, {positive:.0%} of the pairs above 0."
        return draw(name, title, alt, figure)


def scatter(name: str, title: str, chosen: np.ndarray, rejected: np.ndarray) -> Drawing | None:
    """One dot per pair, the share of pairs in each quadrant, and the line at which the margin is 0."""
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    chosen, rejected = chosen[finite], rejected[finite]
    if not len(chosen):
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title, "Rejected log-ratio (nats per answer)", "Chosen log-ratio (nats per answer)")
        many = len(chosen) > MOST_VECTOR_DOTS
        axes.scatter(
            rejected,
            chosen,
            s=10 if many else 16,
            color=RASTER_DOT if many else COLORS["chosen"][0],
            alpha=0.5,
            linewidths=0,
            rasterized=many,
        )
        for limits, values in ((axes.set_xlim, rejected), (axes.set_ylim, chosen)):
            low, high = min(values.min(), 0.0), max(values.max(), 0.0)
            pad = 0.3 * ((high - low) or 1.0)  # for the names of the quadrants
            limits(low - pad, high + pad)
        axes.axhline(0, color=COLORS["ink"][0], linewidth=1.2)
        axes.axvline(0, color=COLORS["ink"][0], linewidth=1.2)
        axes.axline((0, 0), slope=1, color=COLORS["muted"][0], linewidth=1, linestyle=":")
        shares = {
            "only chosen rose": (0.01, 0.985, ((chosen > 0) & (rejected < 0)).mean()),
            "both rose": (0.99, 0.985, ((chosen > 0) & (rejected > 0)).mean()),
            "both fell": (0.01, 0.015, ((chosen < 0) & (rejected < 0)).mean()),
            "only rejected rose": (0.99, 0.015, ((chosen < 0) & (rejected > 0)).mean()),
        }
        for label, (x, y, share) in shares.items():
            axes.text(
                x,
                y,
                "\n".join(label.split()) + f" {share:.0%}",  # narrow, since a quadrant can be
                transform=axes.transAxes,
                ha="left" if x < 0.5 else "right",
                va="bottom" if y < 0.5 else "top",
                fontsize=8.5,
                weight="bold",
            )
        quadrants = ", ".join(f"{label} {share:.0%}" for label, (_, _, share) in shares.items())
        alt = f"Scatter of {len(chosen)} pairs, chosen against rejected log-ratio; {quadrants}. Dotted: margin 0."
        drawing = draw(name, title, alt, figure)
        drawing.dots = frame(axes)
        return drawing


def trade_off(name: str, title: str, ylabel: str, dots: Sequence[Dot], percent: bool = False) -> Drawing | None:
    """One dot per run, best in the upper right corner, with the Pareto front. DPO at lambda 1 is a diamond."""
    dots = [dot for dot in dots if np.isfinite([dot.x, dot.y]).all()]
    if not dots:
        return None
    for dot, front in zip(dots, pareto_front([(dot.x, dot.y) for dot in dots]), strict=True):
        dot.front = front
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title, "Chosen log-ratio (nats per answer; right is better)", ylabel)
        edge = sorted((dot for dot in dots if dot.front), key=lambda dot: dot.x)
        axes.plot(
            [dot.x for dot in edge],
            [dot.y for dot in edge],
            color=COLORS["accent"][0],
            linestyle="--",
            linewidth=1.5,
            label="Pareto front" if len(edge) > 1 else None,
            zorder=1,
        )
        for dot in dots:
            color = COLORS[dot.color][0]
            if dot.low is not None and dot.high is not None:
                axes.vlines(dot.x, dot.low, dot.high, color=color, alpha=0.45, linewidth=1.5)
            axes.scatter(dot.x, dot.y, s=46, marker="D" if dot.reference else "o", color=color, zorder=3)
        if any(dot.reference for dot in dots):
            axes.plot([], [], color=COLORS["muted"][0], marker="D", linestyle="", label="DPO, λ = 1 (reference)")
        axes.margins(0.14, 0.18)
        label_dots(axes, dots, edge)
        if percent:
            _in_percent(axes)
        add_legend(figure)
        places = "; ".join(f"{dot.label} at {dot.x:.3g}, {dot.y:.3g}{' (front)' if dot.front else ''}" for dot in dots)
        return draw(name, title, f"Trade-off of chosen log-ratio against {ylabel}. {places}.", figure)


def _in_percent(axes: Axes) -> None:
    """Ticks in percent, none of which is above 100% or below 0%."""
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    (low, high), ticks = axes.get_ylim(), axes.get_yticks()
    axes.set_yticks([tick for tick in ticks if max(low, -1e-9) <= tick <= min(high, 1 + 1e-9)])


def _spreads(values: np.ndarray) -> bool:
    """Whether the values differ by more than rounding, so they can be binned or smoothed."""
    return bool(np.ptp(values) > 1e-9 * max(1.0, np.abs(values).max()))


def _first(values: Sequence[float]) -> float:
    return next(value for value in values if np.isfinite(value))
