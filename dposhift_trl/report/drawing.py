"""How a figure looks, and how it becomes PNG, SVG, and SVG inside the page."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


# Name: (light page, dark page). Files are drawn in the light colors; inside the page each color is a CSS variable
COLORS = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#57606a", "#a3adb8"),
    "grid": ("#d8dee4", "#3a424b"),
    "chosen": ("#0067a6", "#62b7ee"),
    "rejected": ("#b34700", "#f29a52"),
    "accent": ("#00704d", "#4fcaa3"),
    "purple": ("#8b3f80", "#dd9fd2"),
    "brown": ("#7a5c00", "#d9b84a"),
    "red": ("#b3263b", "#ff8a98"),
    "slate": ("#4a5a8a", "#a5b4e8"),
}
PAPER = "#ffffff"
SIZE = (5.2, 3.5)

STYLE: Any = {  # matplotlib's stubs list the keys as literals, which differ between releases
    "text.parse_math": False,  # the name of a run may contain a dollar
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.family": "DejaVu Sans",  # shipped with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["muted"][0],
    "axes.labelcolor": COLORS["ink"][0],
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLORS["grid"][0],
    "grid.linewidth": 0.8,
    "text.color": COLORS["ink"][0],
    "xtick.color": COLORS["muted"][0],
    "ytick.color": COLORS["muted"][0],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 2,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@dataclass
class Drawing:
    """
    A rendered figure.

    Args:
        name (`str`), title (`str`):
            Name of its files, and its title.
        alt (`str`):
            What it shows, in words.
        png (`bytes`), svg (`bytes`):
            Contents of its files.
        inline (`str`):
            SVG for the page.
        dots (`dict[str, Any]`, *optional*):
            What the script of the page needs to say which pair a dot is.
    """

    name: str
    title: str
    alt: str
    png: bytes
    svg: bytes
    inline: str
    dots: dict[str, Any] = field(default_factory=dict)


def new_axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure with labeled axes."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, x=0, ha="left")  # where the text of the page starts, too
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def frame(axes: Axes) -> dict[str, list[float]]:
    """Where the axes are in the SVG (left, top, right, bottom), and their limits, once the figure is drawn."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    (left, low), (right, high) = axes.get_position().get_points().tolist()
    width, height = (72 * size for size in figure.get_size_inches().tolist())  # points, the unit of the SVG
    box = [left * width, (1 - high) * height, right * width, (1 - low) * height]
    return {
        "box": [round(value, 2) for value in box],
        "x": [float(end) for end in axes.get_xlim()],
        "y": [float(end) for end in axes.get_ylim()],
    }


def add_legend(figure: Figure) -> None:
    """Add a legend below the axes, if anything in them has a label."""
    if not any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        return
    figure.legend(loc="outside lower left", ncols=2, columnspacing=1.2, handlelength=1.6, borderaxespad=0)


def draw(name: str, title: str, alt: str, figure: Figure) -> Drawing:
    """Render a figure. The same figure gives the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.dpi = 160
    # `savefig` would draw the figure twice
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    figure.set_layout_engine("none")  # computed above, in half of the time of drawing
    salt: Any = {"svg.hashsalt": name}
    with matplotlib.rc_context(salt):
        # Without metadata there is no date in the file
        FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Drawing(name, title, alt, png.getvalue(), svg.getvalue(), _inlined(name, svg.getvalue().decode("utf-8")))


def _inlined(name: str, svg: str) -> str:
    """An SVG as part of the page: colors as CSS variables, unique ids, and nothing that looks like an address."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg).replace("xlink:href", "href")
    for variable, (light, _) in COLORS.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = svg.replace(f"fill: {PAPER}", "fill: none").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    return svg.strip()


def color_variables(dark: bool) -> Mapping[str, str]:
    """Hexadecimal value of each color, for the style sheet."""
    return {name: pair[dark] for name, pair in COLORS.items()}
