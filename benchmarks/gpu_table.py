"""What a run of `gpu.sh` says, as Markdown, from its records; and the shapes and kinds of step it knows."""

import json
import math
import statistics
import time
from typing import Any


DATASHEET = 989e12  # dense bf16 of an H100 SXM and an H200

# Means of prompt and answer, sigma of their logarithms, pairs in a batch
SHAPES = {
    "448/64": (448, 64, 0.0, 0.0, 16),
    "UltraFeedback": (185, 305, 1.0, 0.7, 16),
    "1024/256": (1024, 256, 0.0, 0.0, 8),
    "ragged": (512, 128, 0.8, 0.8, 16),
    "3584/512": (3584, 512, 0.0, 0.0, 2),
}
SMOKE_SHAPES = {"32/8": (32, 8, 0.0, 0.0, 4), "ragged": (24, 12, 0.8, 0.8, 4)}
LONGEST = 2048  # of a ragged row
STOCK, BEST_STOCK = "TRL", "TRL, best"
CACHED, SCORED, BEST, BY_TOKENS, OWN_NORMS = "cached", "scored", "best", "by tokens", "own RMSNorm"


def times(value: float, unit: float) -> str:
    return f"{value / unit:.1f}" if unit else "?"


def time_of(record: dict[str, Any]) -> float:
    """Seconds of all steps of a record: each the median, where batches are of one shape."""
    seconds = record["seconds"]
    ragged = {**SHAPES, **SMOKE_SHAPES}[record["shape"]][3] > 0
    return sum(seconds) if ragged else statistics.median(seconds) * len(seconds)


def step_table(records: list[dict[str, Any]], rate: float) -> list[str]:
    """Lines of the table of steps; ratios are of pairs a second."""
    heading = ("model", "prompt/answer", "kind", "pairs", "s per step", "pairs/s", "tokens/s", "MFU", "of 989", "GiB")
    heading += (f"times {STOCK}", f"times {BEST_STOCK}", "of the limit")
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    measured = {(r["model"], r["shape"], r["kind"]): r for r in records if "profile" not in r}
    shapes = {**SMOKE_SHAPES, **SHAPES}
    for model, shape, kind in sorted(measured, key=lambda key: (key[0], list(shapes).index(key[1]))):
        record = measured[model, shape, kind]
        if "seconds" not in record:
            note = record.get("error") or record.get("skipped")
            lines.append(f"| {model} | {shape} | {kind} | | {note} |{' |' * (len(heading) - 5)}")
            continue
        total = time_of(record)
        ratios = []
        for other in (STOCK, BEST_STOCK):
            theirs = measured.get((model, shape, other), {})
            known = "seconds" in theirs
            ratios.append(record["pairs"] / total * time_of(theirs) / theirs["pairs"] if known else math.nan)
        reached = ""
        if kind in (CACHED, SCORED) and not shapes[shape][2]:
            prompt, answer = shapes[shape][:2]
            limit = (2 * prompt + 2 * answer) / (prompt + 2 * answer) * (5 / 4 if kind == CACHED else 1)
            reached = f"{ratios[0] / limit:.0%} of {limit:.2f}"
        cells = (
            f"{record['pairs'] / len(record['seconds']):.0f}",
            f"{total / len(record['seconds']):.4f}",
            f"{record['pairs'] / total:.2f}",
            f"{record['tokens'] / total:.0f}",
            f"{record['flops'] / total / rate:.1%}",
            f"{record['flops'] / total / DATASHEET:.1%}",
            "" if record["gib"] is None else f"{record['gib']:.1f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            reached,
        )
        lines.append(f"| {model} | {shape} | {kind} | {' | '.join(cells)} |")
    return lines


def table_of(records: list[dict[str, Any]], budget: float) -> str:
    """What a run says, as Markdown."""

    def of(part: str, *keys: str) -> list[dict[str, Any]]:
        return [record for record in records if record["part"] == part and all(key in record for key in keys)]

    lines: list[str] = []
    facts = {key: value for record in of("device") for key, value in record.items()}
    rate = facts.get("bf16_flops", float("nan"))
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    lines += [
        f"{time.strftime('%Y-%m-%d')}, {facts.get('device')}, {facts.get('gib', '?')} GiB, driver/clock/power "
        f"{facts.get('driver_clock_power', '-')}; {versions}, Python {facts.get('python')}",
        f"bf16 matrix products {rate / 1e12:.0f} TFLOP/s, copy {facts.get('copy_bytes', 0) / 1e12:.2f} TB/s; "
        f"varlen_attn{facts.get('varlen_attn')}",
    ]

    lines += ["", "The start-up check, in units of the effect of one rounding (scores / gradients):", ""]
    cells: dict[str, dict[str, str]] = {}
    for record in of("check", "family"):
        text = record.get("error") or record.get("skipped")
        if text is None:
            scores = times(record["scores"], record["rounding"])
            text = f"{scores} / {times(record['gradients'], record['gradient_rounding'])}"
            text += " WRONG" if record["fault"] else ""
            expected = {"varlen": "varlen_attn", "flex": "flex attention", "branches": "one call per branch"}
            if expected[record["way"]] not in record["attended"]:
                text = f"- ({text} by branches)"
            elif len(record["attended"]) > 1:
                text += " (some layers by branches)"
        cells.setdefault(record["family"], {})[f"{record['way']}, {record['dtype']}"] = text
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines += [f"| family | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {family} | {' | '.join(row.get(c, '') for c in columns)} |" for family, row in cells.items()]

    lines += ["", "Training, stock TRL against ours, largest difference of three steps:", ""]
    lines += ["| family | precision | loss | gradient norm | metrics | attention |", "| --- |" + " --- |" * 5]
    for record in of("training", "family"):
        text = record.get("error") or record.get("skipped")
        if text is None:
            metrics = record["metric_differences"]
            worst = max(metrics, key=metrics.get, default="")
            text = f"{record['loss_difference']:.1e} | {record['grad_norm_difference']:.1e} | "
            text += f"{metrics.get(worst, 0):.1e} ({worst}) | "
            text += "; ".join(record["attended"]) if record["shares"] else "not shared"
        else:
            text += " | | | "
        lines.append(f"| {record['family']} | {record['dtype']} | {text} |")

    for record in of("tests", "summary"):
        lines += ["", f"pytest -m gpu: {record['summary']}", *(f"- {name[:200]}" for name in record["failed"])]

    lines += ["", "Steps:", ""]
    for record in of("steps", "trainer"):
        rest = {key: value for key, value in record.items() if key not in ("part", "model", "trainer")}
        lines.append(f"- {record['model']}, {record['trainer']}: {json.dumps(rest)}")
    lines += ["", *step_table(of("steps", "kind"), rate)]
    for record in of("steps", "waits"):
        lines += [
            "",
            f"{record['profile']}, {record['shape']}, {record['kind']}: the device is busy {record['busy']:.3f} of "
            f"{record['seconds_profiled']:.3f} s (profiled); {record['waits']} waits for it in a step: "
            f"{', '.join(record['waits_at'])}",
            *(f"    {milliseconds:9.2f} ms {count:6d} {name}" for name, count, milliseconds in record["top"]),
        ]

    for record in of("grid", "metrics"):
        lines.append(f"- lambda {record['shift_lambda']}: {json.dumps(record['metrics'])}")
    for record in records:
        if "error" in record:
            where = ", ".join(str(value) for key, value in record.items() if key != "error")
            lines.append(f"- {where}: {record['error']}")
    lines += [f"{r['part']}: left out, {r['skipped']}" for r in records if set(r) == {"part", "skipped"}]
    took = ", ".join(
        f"{r['part']} {r['took']:.0f} s" + (f" (exit status {r['rc']})" if r["rc"] != 0 else "")
        for r in records
        if "took" in r
    )
    lines.append(f"Budget {budget:.0f} s: {took}")
    return "\n".join(lines)
