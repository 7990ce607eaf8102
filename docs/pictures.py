"""
The pictures of the documentation, from `schedules.py`, the measurements, and runs of the demo.

    python docs/pictures.py                              # draws docs/images/*.svg again
    python docs/pictures.py 1=runs/dpo 0.75=runs/shift   # reads these runs into docs/images/demo.json first

An SVG follows the reader's light or dark scheme, and the same numbers give the same bytes.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from dposhift_trl.schedules import LAMBDA_DEFAULTS, make_lambda_schedule


IMAGES = Path(__file__).parent / "images"
MEASUREMENTS = Path(__file__).parent.parent / "benchmarks" / "displacement.jsonl"
NUMBERS = IMAGES / "demo.json"
METRICS = (
    "logps/chosen", "logps/rejected", "displacement/chosen", "displacement/chosen_fell", "rewards/margins",
    "rewards/accuracies",
)  # fmt: skip

STYLE = """
  svg { --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --grid: #d8dee4;
        --0: #b34700; --1: #8b6c00; --2: #0067a6; --3: #00704d; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #16191d; --ink: #e8eaed; --muted: #a3adb8; --grid: #3a424b;
          --0: #f29a52; --1: #d9b84a; --2: #62b7ee; --3: #4fcaa3; } }
  text { font: 12px system-ui, 'DejaVu Sans', sans-serif; fill: var(--muted); }
  .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
  .label { font-weight: 600; }
  .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
  .grid { stroke: var(--grid); }
"""
Points = Sequence[tuple[float, float]]


def picture(width: int, height: int, alt: str, parts: Sequence[str]) -> str:
    """An SVG on paper of the reader's scheme."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{alt}">\n<style>{STYLE}</style>\n'
        f'<rect width="{width}" height="{height}" rx="6" fill="var(--paper)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", color: str = "") -> str:
    style = f' style="fill: var(--{color})"' if color else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{style}>{words}</text>'


def number(words: str) -> str:
    return words.replace("-", "−")


class Panel:
    """Axes in a rectangle of the picture."""

    def __init__(self, box: tuple[float, float, float, float], xs: Sequence[float], ys: Sequence[float]):
        self.left, self.top, self.width, self.height = box
        self.xs, self.ys = xs, ys

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = (self.xs[0], self.xs[-1]), (self.ys[0], self.ys[-1])
        return self.left + (x - x0) / (x1 - x0) * self.width, self.top + (y1 - y) / (y1 - y0) * self.height

    def axes(self, title: str, xlabel: str) -> list[str]:
        bottom = self.top + self.height
        rows = [(self.at(self.xs[0], y)[1], number(f"{y:g}")) for y in self.ys]
        return [
            text(self.left - 30, self.top - 14, title, "title"),
            *(f'<path class="grid" d="M{self.left:.1f} {y:.1f}h{self.width:.1f}"/>' for y, _ in rows),
            *(text(self.left - 6, y + 4, words, anchor="end") for y, words in rows),
            *(text(self.at(x, self.ys[0])[0], bottom + 17, number(f"{x:g}"), anchor="middle") for x in self.xs),
            *([text(self.left + self.width / 2, bottom + 34, xlabel, anchor="middle")] if xlabel else []),
        ]

    def line(self, points: Points, color: int) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        return f'<polyline class="line" stroke="var(--{color})" points="{path}"/>'

    def ends(self, labels: Sequence[tuple[float, str, int]]) -> list[str]:
        """Labels right of the axes, lowest first, moved up where two would overlap."""
        placed: list[str] = []
        ceiling = float("inf")
        for value, words, color in sorted(labels):
            ceiling = min(self.at(self.xs[-1], value)[1], ceiling - 15)
            placed.append(text(self.left + self.width + 6, ceiling + 4, words, "label", color=str(color)))
        return placed


def draw_schedules() -> str:
    """Lambda against progress, one panel for each schedule that is a function of progress."""
    settings: dict[str, Any] = {
        "fixed": {"shift_lambda": 0.95},
        "linear_increase": {},
        "linear_decrease": {},
        "cosine_increase": {},
        "cosine_decrease": {},
        "[[0, 1.0], [0.2, 1.0], [1, 0.8]]": {"lambda_schedule": [[0, 1.0], [0.2, 1.0], [1, 0.8]]},
    }
    parts = []
    for index, (name, changes) in enumerate(settings.items()):
        schedule: Callable[[float], float] = make_lambda_schedule(
            SimpleNamespace(**LAMBDA_DEFAULTS | {"lambda_schedule": name} | changes)
        )
        panel = Panel((56 + index % 3 * 236, 40 + index // 3 * 150, 172, 80), (0, 0.5, 1), (0.7, 0.8, 0.9, 1))
        parts += panel.axes(name, "progress" if index > 2 else "")
        parts.append(panel.line([(step / 50, schedule(step / 50)) for step in range(51)], 2))
    return picture(740, 330, "Lambda against progress for six schedules", parts)


def draw_demo(numbers: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Log-probability of both answers in the demo against the optimizer step, one line per lambda."""
    panels = (
        (Panel((48, 44, 240, 200), (0, 50, 100, 150), (-10, -8, -6, -4, -2, 0)), "logps/chosen", "Chosen answers"),
        (Panel((440, 44, 190, 200), (0, 50, 100, 150), (-120, -80, -40, 0)), "logps/rejected", "Rejected answers"),
    )
    parts: list[str] = []
    for panel, metric, title in panels:
        parts += panel.axes(f"{title}: log-probability, nats", "optimizer step")
        labels = []
        for color, (shift_lambda, run) in enumerate(numbers.items()):
            parts.append(panel.line(list(zip(run["step"], run[metric], strict=True)), color))
            name = "DPO" if float(shift_lambda) == 1 else f"λ {shift_lambda}"
            labels.append((run[metric][-1], number(f"{name}  {run[metric][-1]:.1f}"), color))
        parts += panel.ends(labels)
    return picture(740, 300, "In the demo the chosen answers fall far less with DPO-Shift than with DPO", parts)


def draw_trade_off() -> str:
    """Margin against the log-ratio of the chosen answers, for the fixed lambdas of the two measured datasets."""
    results = MEASUREMENTS.read_text(encoding="utf-8")
    demo, hard = (measured_lambdas(results, data) for data in ("demo", "hard"))
    panels = (
        (Panel((52, 44, 266, 200), (-7, -6, -5, -4, -3, -2, -1, 0), (3, 3.5, 4, 4.5)), demo, "Demo: margin"),
        (Panel((420, 44, 266, 200), (-0.4, -0.3, -0.2, -0.1, 0, 0.1), (0, 0.05, 0.1, 0.15, 0.2)), hard,
         "Near misses, a fifth swapped: margin"),
    )  # fmt: skip
    parts: list[str] = []
    for panel, runs, title in panels:
        parts += panel.axes(title, "chosen log-ratio, nats per answer")
        parts.append(panel.line([(chosen, margin) for _, chosen, margin in runs], 2))
        for shift_lambda, chosen, margin in runs:
            x, y = panel.at(chosen, margin)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--{0 if shift_lambda == 1 else 2})"/>')
            if shift_lambda == 1:
                parts.append(text(x, y - 10, "DPO", "label", "middle", "0"))
            elif shift_lambda in (0.95, 0.75):
                parts.append(text(x, y + 20, f"λ {shift_lambda}", "label", "middle", "2"))
            elif shift_lambda in (0.5, 0.25):
                parts.append(text(x - 10, y + 5, f"λ {shift_lambda}", "label", "end", "2"))
    return picture(740, 300, "Lower lambdas keep the chosen answers; they cost margin on one of two datasets", parts)


def measured_lambdas(results: str, data: str) -> list[tuple[float, float, float]]:
    """Lambda, and means over seeds of chosen log-ratio and margin, of the fixed lambdas on a dataset."""
    runs: dict[float, list[dict[str, float]]] = {}
    for line in map(json.loads, results.splitlines()):
        value = re.fullmatch(r"DPO \(lambda (1)\)|fixed ([\d.]+)", line["method"])
        if value is not None and line["settings"]["data"] == data:
            runs.setdefault(float(value[1] or value[2]), []).append(line["metrics"])
    return [
        (value, *(mean(found[name] for found in runs[value]) for name in ("displacement/chosen", "rewards/margins")))
        for value in sorted(runs, reverse=True)
    ]


def read_run(folder: str) -> dict[str, list[float]]:
    """The evaluations of stage 2 of a run."""
    log = json.loads((Path(folder) / "dpo" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluations = [entry for entry in log if "eval_logps/chosen" in entry]
    metrics = {name: [round(entry[f"eval_{name}"], 4) for entry in evaluations] for name in METRICS}
    return {"step": [entry["step"] for entry in evaluations], **metrics}


def pictures() -> dict[str, str]:
    """Each picture by the name of its file."""
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    return {"schedules.svg": draw_schedules(), "demo.svg": draw_demo(numbers), "trade_off.svg": draw_trade_off()}


if __name__ == "__main__":
    if runs := dict(argument.split("=", 1) for argument in sys.argv[1:]):
        NUMBERS.write_text(json.dumps({name: read_run(folder) for name, folder in runs.items()}, indent=1) + "\n")
    for name, svg in pictures().items():
        (IMAGES / name).write_text(svg, encoding="utf-8")
