"""One self-contained HTML page about a run, or comparing several, and its figures as files."""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from .. import __version__
from ..artifacts import FIGURES, PAGE, whole_files, write_whole
from .comparison import compare_runs
from .drawing import Drawing, color_variables
from .errors import ReportError
from .one_run import describe_run
from .run_folder import Run, read_run
from .texts import plain, signed


MARK = '<meta name="generator" content="dposhift_trl'  # marks a page that may be replaced

# Names of the figures of any report
DRAWN = {
    *("chosen", "logps", "logratios", "margin", "accuracy", "lambda", "loss", "sft_loss"),
    *("histogram_chosen", "histogram_rejected", "margin_density", "scatter", "trade_off_margin", "trade_off_accuracy"),
    *("curves_chosen", "curves_rejected", "curves_margin", "curves_accuracy"),
}


def write_report(folders: Sequence[Path], destination: Path, beta: float | None = None) -> Path:
    """
    Write `report.html`, `figures/*.png` and `figures/*.svg` about one run, or comparing several.

    The page says what is missing from a run folder. A figure without numbers is left out. The files are written
    together: after a kill or on a full disk an earlier report stays, and the next call writes a new one.

    Args:
        folders (`Sequence[Path]`):
            Folders of `dposhift_trl.run`, or output folders of a [`DPOShiftTrainer`].
        destination (`Path`):
            Folder to write to. It must be new, empty, or contain an earlier report. Other files beside an earlier
            report are kept.
        beta (`float`, *optional*):
            Beta of runs of a stock `DPOTrainer`, as [`~report.run_folder.read_run`] takes it.

    Returns:
        `Path`: The page.

    Raises:
        ReportError: If a folder contains no run, or `destination` contains other files or cannot be written.
    """
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    if not folders:
        raise ReportError("`folders` must name at least one run, got none.")
    _check_destination(destination)
    runs = [read_run(folder, beta) for folder in folders]
    _make_names_unique(runs)
    values, drawings = describe_run(runs[0]) if len(runs) == 1 else compare_runs(runs)
    page = _render(runs, values, drawings)
    try:
        with whole_files(destination) as unfinished:
            write_whole(unfinished / PAGE, page)
            for drawing in drawings:
                write_whole(unfinished / FIGURES / f"{drawing.name}.png", drawing.png)
                write_whole(unfinished / FIGURES / f"{drawing.name}.svg", drawing.svg)
        for name in DRAWN - {drawing.name for drawing in drawings}:  # in an earlier report only
            for kind in (".png", ".svg"):
                (destination / FIGURES / f"{name}{kind}").unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"{destination}: the report cannot be written: {error.strerror or error}.") from error
    return destination / PAGE


def _check_destination(destination: Path) -> None:
    try:
        if destination.exists() and not destination.is_dir():
            raise ReportError(f"{destination} is a file. Choose a folder for the report.")
        page, figures = destination / PAGE, destination / FIGURES
        if figures.is_symlink() or (figures.exists() and not figures.is_dir()):
            raise ReportError(f"{figures} must be a folder, got a file or a link. Choose a new folder.")
        if page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]:
            return
        names = sorted(entry.name for entry in destination.iterdir()) if destination.is_dir() else []
        # What a report that was killed leaves: files on their way, and figures before their page
        others = [name for name in names if not name.endswith(".tmp") and name != FIGURES]
        if figures.is_dir():
            names = sorted(entry.name for entry in figures.iterdir())
            others += [f"{FIGURES}/{name}" for name in names if Path(name.removesuffix(".tmp")).stem not in DRAWN]
    except OSError as error:
        raise ReportError(f"{destination} cannot be read: {error.strerror or error}.") from error
    if others:
        raise ReportError(f"{destination} contains other files ({others[0]}) and no report. Choose a new folder.")


def _make_names_unique(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    for index, run in enumerate(runs, 1):
        if sum(other.name == run.name for other in runs) > 1:
            run.name += f" ({index})"


def _render(runs: Sequence[Run], values: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: plain(value, 3) if math.isfinite(value) else "–"
    environment.filters["amount"] = _amount
    environment.filters["signed"] = signed
    environment.filters["plain"] = plain
    environment.filters["prose"] = lambda text: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    # Safe without escaping: drawn from numbers and names of metrics; names of runs are escaped by matplotlib
    environment.filters["drawn"] = lambda drawing: Markup(drawing.inline)
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("report.html.j2").render(
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        light=color_variables(dark=False),
        dark=color_variables(dark=True),
        runs=runs,
        drawings=drawings,
        several=len(runs) > 1,
        **values,
    )


def _amount(value: float | None, unit: str) -> str:
    """A number of a tile: nats with their sign, a share in percent."""
    if value is None:
        return "–"
    return f"{value:.1%}" if unit == "share" else signed(value, 2 if abs(value) < 100 else 1)
