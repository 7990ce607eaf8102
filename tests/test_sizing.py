"""The page on memory and time: its formulas against the measurements, and the arithmetic of its table."""

import importlib.util
import re

import pytest
import torch
import transformers
from test_docs import ROOT, section


PAGE = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
GIB = 2**30
RATE = 770e12  # bf16 products of an H200, measured


def rows(text):
    return [
        [cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| ([^|]*\d.*) \|$", text, re.MULTILINE)
    ]


def number(text):
    return float(text.replace(",", ""))


@pytest.fixture(scope="module")
def models():
    """Parameters, layers, and channels of the models that were measured."""
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    sizes = {}
    for name in ("llama-0.5b", "qwen-1.5b"):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(step.MODELS[name])
        config = model.config
        sizes[name] = (model.num_parameters(), config.num_hidden_layers, config.hidden_size)
    return sizes


def measured(model, shape):
    """Pairs, seconds per step, and GiB with the reference cached."""
    row = next(
        row for row in rows(section(MEASUREMENTS, "On a GPU, 2026-11-27")) if row[:3] == [model, shape, "cached"]
    )
    return int(row[3]), float(row[4]), float(row[7])


def test_the_formulas_agree_with_the_measurements(models):
    ratios, used = [], {"llama-0.5b": [], "qwen-1.5b": []}
    cells = [row for row in rows(section(PAGE, "Memory")) if row[0] in models]
    assert len(cells) == 6
    for model, shape, pairs, formula, gib in cells:
        parameters, layers, channels = models[model]
        prompt, answer = map(int, shape.split("/"))
        tokens = int(pairs) * (prompt + 2 * answer)
        expected = (16 * parameters + 4 * tokens * layers * channels) / GIB
        count, seconds, peak = measured(model, shape)
        assert (int(pairs), float(gib)) == (count, peak)
        assert float(formula) == round(expected, 1)
        ratios.append(peak / expected)
        used[model].append(6 * parameters * tokens / seconds / RATE)
    assert round(min(ratios), 2) >= 1
    assert max(ratios) <= 1.12  # "0 to 12% above"
    assert [f"{f(shares):.2f}" for shares in used.values() for f in (min, max)] == ["0.20", "0.23", "0.29", "0.35"]


def test_the_measured_epochs_are_right():
    text = " ".join(PAGE.split())
    told = re.search(r"cached: (\d+) pairs per second .*? and (\d+) for .*? takes (\d+) and (\d+) minutes", text)
    steps = [measured(model, "UltraFeedback") for model in ("llama-0.5b", "qwen-1.5b")]
    rates = [round(pairs / seconds) for pairs, seconds, _ in steps]
    minutes = [round(60_000 * seconds / pairs / 60) for pairs, seconds, _ in steps]
    assert [int(number) for number in told.groups()] == [*rates, *minutes]


def test_the_table_of_models_is_what_the_formulas_give():
    table = rows(section(PAGE, "From 0.1B to 8B"))
    assert len(table) == 6
    for _, billions, shape, *memory, hours in table:
        layers, channels = map(number, shape.split(" × "))
        for gib, (weight, value) in zip(map(number, memory), ((16, 4), (8, 2), (2, 2)), strict=True):
            expected = (weight * number(billions) * 1e9 + value * 4 * 795 * layers * channels) / GIB
            assert gib == pytest.approx(expected, abs=0.06, rel=0.02)
        assert number(hours) == pytest.approx(
            60_000 * 795 * 6 * number(billions) * 1e9 / (0.30 * RATE) / 3600, rel=0.05
        )
