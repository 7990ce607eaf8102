"""The documentation names what is there: every metric, schedule, file, function, and link."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from test_architecture import LAYERS

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.schedules import ADAPTIVE, LAMBDA_SCHEDULES
from dposhift_trl.training.metrics import PairScores, evaluation_metrics, pair_metrics


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dposhift_trl"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def names_in_first_column(text):
    """Names in backticks in the first cell of each table row."""
    return [
        name for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    ]


def section(text, heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


METRICS = names_in_first_column(section(GLOSSARY, "Metrics"))


def test_the_glossary_explains_every_metric_of_ours_once():
    numbers = torch.arange(1.0, 4.0)
    scores = PairScores(*(numbers + offset for offset in range(9)))
    ours = {*pair_metrics(scores, 0.1), *evaluation_metrics(scores, 0.1)}
    assert sorted(name for name in METRICS if "/" in name and not name.startswith("logits/")) == sorted(
        name for name in ours if "/" in name
    )
    assert ours <= set(METRICS)


def test_the_glossary_explains_every_name_that_a_run_logs(tiny_model, settings):
    rows = make_rows(16)
    args = DPOShiftConfig(**{**settings, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1})
    trainer = DPOShiftTrainer(tiny_model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    logged = {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    assert {"loss", "shift/lambda", "displacement/chosen_p5", "num_tokens"} <= logged
    timing = {name for name in logged if name.endswith(("runtime", "_per_second"))}
    assert logged - timing - set(METRICS) == set()


def test_the_glossary_explains_every_schedule():
    names = names_in_first_column(section(GLOSSARY, "Lambda schedules"))
    assert set(names) - {"lambda_schedule", "[[t, lambda], ...]"} == {*LAMBDA_SCHEDULES, ADAPTIVE}


def test_the_layout_on_the_page_is_the_layout_that_is_tested():
    rows = re.findall(r"^\| (`[^|]*) \|", section(ARCHITECTURE, "Layout"), re.MULTILINE)
    layers = [tuple(re.findall(r"`(\w+)(?:\.py|/)`", row)) for row in rows]
    assert layers == [layer for layer in LAYERS if layer != ("__main__",)]


def defined(path):
    """Dotted names of the classes, functions, and methods of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in getattr(node, "body", []) if hasattr(inner, "name")}
    return names


STEPS = re.findall(r"^(?:\d+\.|  ) +`([\w/]+\.py)` `([\w.]+)`", ARCHITECTURE, re.MULTILINE)


def test_the_page_has_its_steps():
    assert len(STEPS) >= 22


@pytest.mark.parametrize(("path", "name"), STEPS, ids=[f"{path} {name}" for path, name in STEPS])
def test_every_step_names_what_its_file_defines(path, name):
    assert name in defined(PACKAGE / path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page):
    names = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|sh|toml|md|j2))`", page.read_text(encoding="utf-8")))
    written = {"recipe.yaml", "next_steps.md", "table.md"}  # by a run and by benchmarks/gpu.sh
    assert [
        name for name in names - written if not any((x / name).exists() for x in (ROOT, PACKAGE, page.parent))
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], (
                target
            )
