"""The report shows what is in a run folder, says what is missing, and opens in a browser without errors."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dposhift_trl.artifacts import write_whole
from dposhift_trl.identity import weights_identity
from dposhift_trl.report import ReportError, figures, write_report
from dposhift_trl.report.__main__ import main
from dposhift_trl.report.answers import difference
from dposhift_trl.report.drawing import Drawing, color_variables
from dposhift_trl.report.figures import Dot, curves, pareto_front, trade_off
from dposhift_trl.report.labels import shortened, spread
from dposhift_trl.report.page import DRAWN
from dposhift_trl.report.run_folder import read_run
from dposhift_trl.report.texts import as_text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script> & \"quotes\" <img src='https://example.org/x.png'> {{ 7 * 7 }} $x$ end"


def evaluation(step, chosen, rejected, shift_lambda, beta=0.1):
    """Log entry of an evaluation, computed as the metrics are, except for the intervals."""
    margin, accuracy = beta * (chosen - rejected).mean(), (chosen > rejected).mean()
    values = {
        "loss": 0.69 - 0.002 * step,
        "dpo_loss": 0.69 - 0.003 * step,
        "shift/lambda": shift_lambda,
        "logps/chosen": -20 + chosen.mean(),
        "logps/rejected": -40 + rejected.mean(),
        "displacement/chosen": chosen.mean(),
        "displacement/rejected": rejected.mean(),
        "displacement/chosen_per_token": chosen.mean() / 10,
        "displacement/chosen_fell": (chosen < 0).mean(),
        "perplexity/chosen": math.exp(2 - chosen.mean() / 10),
        "rewards/margins": margin,
        "rewards/margins_low": margin - 0.1 * (step > 0),
        "rewards/margins_high": margin + 0.1 * (step > 0),
        "rewards/accuracies": accuracy,
        "rewards/accuracies_low": max(accuracy - 0.03, 0.0),
        "rewards/accuracies_high": min(accuracy + 0.03, 1.0),
    }
    return {"step": step, **{f"eval_{name}": float(value) for name, value in values.items()}}


def make_run(folder: Path, shift_lambda=0.75, pairs=40, fall=1.0, steps=(0, 10, 20), text="answer") -> Path:
    """A run folder as `dposhift_trl.run` writes it, with made-up numbers."""
    rng = np.random.default_rng(3)
    chosen, rejected = rng.normal(-1, 1, pairs), rng.normal(-20, 8, pairs)
    history = []
    for step in steps:
        share = step / max(steps) if max(steps) else 0
        history.append(evaluation(step, fall * share * chosen, share * rejected, shift_lambda))
        entry = {name.removeprefix("eval_"): value for name, value in history[-1].items() if "_low" not in name}
        history.append({**entry, "step": step + 5, "num_tokens": 100.0 * (step + 5)})
        columns = {
            "row_index": np.arange(pairs),
            "chosen_logps": -20 + fall * share * chosen,
            "rejected_logps": -40 + share * rejected,
            "ref_chosen_logps": np.full(pairs, -20.0),
            "ref_rejected_logps": np.full(pairs, -40.0),
            "chosen_tokens": np.full(pairs, 10),
            "rejected_tokens": np.full(pairs, 12),
            "shift_lambda": np.full(pairs, shift_lambda),
            "chosen_logratios": fall * share * chosen,
            "rejected_logratios": share * rejected,
        }
        (folder / "dpo" / "pairs").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / "dpo" / "pairs" / f"eval-{step:06d}.parquet")
    history.append({"step": max(steps), "train_runtime": 4.0})
    (folder / "sft").mkdir()
    losses = [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 2.0, "eval_loss": 2.1}]
    for stage, log in (("sft", losses), ("dpo", history)):
        state = {"log_history": log, "global_step": 20, "max_steps": 20}
        (folder / stage / "trainer_state.json").write_text(json.dumps(state))
        versions = {"dposhift_trl": "0.1.0", "trl": "1.16.0"}
        finished = {"step": 20, "seconds": 12.5, "device": "cpu", "processes": 1, "versions": versions}
        (folder / stage / "finished.json").write_text(json.dumps(finished))
        (folder / stage / "model.safetensors").write_text(f"{stage} {shift_lambda}")
    findings = {
        "empty": {"policy": "drop", "count": 2, "examples": [{"row": 4}, {"row": 9}]},
        "cut": {"policy": "keep", "count": 0, "examples": []},
    }
    (folder / "audit.json").write_text(json.dumps({"train": {"rows": 50, "kept": 48, "findings": findings}}))
    (folder / "recipe.yaml").write_text(f"seed: 1\nrun_name: {json.dumps(text)}\n")
    rows = [{"prompt": f"question {i}", "chosen": text, "rejected": "no", "row_index": i} for i in range(pairs)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "eval_rows.parquet")
    return folder


def add_answers(folder: Path, texts=(), **changes) -> Path:
    """Generated answers as `dposhift_trl.generate` writes them: one question per pair of texts."""
    figures = {
        "count": len(texts), "mean_tokens": 12.34, "median_tokens": 11.5, "empty": 0.0, "cut": 0.25,
        "repetition": 0.05, "distinct_1": 0.4, "distinct_2": None,
    }  # fmt: skip
    report = {
        "settings": {"prompts": None, "limit": 64, "max_new_tokens": 256},
        "models": ["sft", "dpo"],
        "weights": {name: weights_identity(folder / name) for name in ("sft", "dpo")},
        "modes": ["greedy", "sampled"],
        "questions": len(texts),
        "left_out": {},
        "statistics": {
            "sft": {"greedy": figures, "sampled": figures},
            "dpo": {"greedy": {**figures, "repetition": 0.9, "cut": 1.0}, "sampled": figures},
        },
        "chosen": figures,
    }
    lines = [
        {
            "question_id": index, "category": None, "prompt": f"ask {index} {HOSTILE}", "follow_ups": [],
            "answers": {
                name: {"greedy": [text], "sampled": ["drawn"]} for name, text in zip(("sft", "dpo"), pair, strict=True)
            },
            "chosen": "a good answer",
        }
        for index, pair in enumerate(texts)
    ]  # fmt: skip
    (folder / "generations").mkdir(exist_ok=True)
    (folder / "generations" / "statistics.json").write_text(json.dumps({**report, **changes}))
    (folder / "generations" / "side_by_side.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


ANSWERS = [
    ("the same words", "the same words"),
    (HOSTILE, "nothing alike"),
    ("one two three four", "one two three five"),
    *[("", "")] * 6,
]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The report of a complete run with hostile texts."""
    folder = make_run(tmp_path_factory.mktemp("one") / "run", text=HOSTILE)
    add_answers(folder, ANSWERS)
    assert main([str(folder)]) == 0
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("several")
    settings = {"dpo": (1.0, 9.0), "mild": (0.95, 5.0), "low $\\frac": (0.5, 1.0)}
    folders = [make_run(root / name, shift_lambda, fall=fall) for name, (shift_lambda, fall) in settings.items()]
    assert main([*map(str, folders), "--output", str(root / "out")]) == 0
    return root / "out" / "report.html"


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are composed but not rendered, which takes most of the time."""

    def draw(name, title, alt, figure):
        return Drawing(name, title, alt, b"png", b"svg", "<svg></svg>")

    monkeypatch.setattr(figures, "draw", draw)


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, in order, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self._skipping = [], "", False
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skipping = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skipping = False

    def handle_data(self, data):
        if not self._skipping:
            self.text += data + " "


def test_a_run_has_its_verdict_figures_pairs_audit_recipe_and_versions(one):
    page = Page(one)
    for text in (
        "The log-probability of the chosen answers fell by",
        "48 of 50 rows kept.",
        "empty 2 drop 4, 9",
        "empty: an answer is empty or only whitespace",
        "seed: 1",
        "trl 1.16.0",
        "cpu, 1 process(es)",
        "12.5",
        "625",  # tokens per second
        "Nothing is missing: every file of the run was read.",
    ):
        assert text in page.text, text
    names = "chosen logps logratios margin accuracy loss sft_loss "
    names += "histogram_chosen histogram_rejected margin_density scatter"
    written = sorted(path.name for path in (one.parent / "figures").iterdir())
    assert written == sorted(f"{name}.{kind}" for name in names.split() for kind in ("png", "svg"))
    assert all((one.parent / "figures" / name).stat().st_size > 2000 for name in written)


def test_the_pairs_that_fell_and_rose_most_are_listed_in_order(one):
    ratios = re.findall(r"Row \d+: chosen ([+−][\d.]+)", Page(one).text)
    values = [float(value.replace("−", "-")) for value in ratios]
    fell, rose = [v for v in values if v < 0], [v for v in values if v > 0]
    assert fell == sorted(fell)
    assert len(fell) == 5
    assert rose == sorted(rose, reverse=True)
    assert 1 <= len(rose) <= 5


@pytest.mark.parametrize("which", ["one", "several"])
def test_the_page_loads_nothing_and_is_small(which, request):
    path = request.getfixturevalue(which)
    source = path.read_text(encoding="utf-8")
    assert len(source.encode()) < 3_000_000
    for tag, attributes in Page(path).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in source


def test_texts_of_pairs_are_text_and_nothing_else(one):
    source, page = one.read_text(encoding="utf-8"), Page(one)
    assert "<script>alert" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert " ".join(HOSTILE.split()) in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]


@pytest.mark.parametrize("which", ["one", "several"])
def test_the_page_is_accessible(which, request):
    page = Page(request.getfixturevalue(which))
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    images = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(images) == len(drawn) > 0
    assert all(len(image["aria-label"]) > 40 for image in images)
    assert all(svg["aria-hidden"] == "true" for svg in drawn)
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    used = {reference for _, a in page.tags for v in a.values() for reference in re.findall(r"url\(#(.+?)\)", v or "")}
    used |= {attributes["href"][1:] for tag, attributes in page.tags if tag == "use"}
    assert used <= set(identities)
    scrolled = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in scrolled)


def test_generated_answers_have_a_table_a_verdict_and_the_examples_that_differ_most(one):
    text = Page(one).text
    assert "sft greedy 9 12.3 11.5 0% 25% 0.050 0.400 –" in text
    assert "chosen in the data 9 12.3" in text
    assert "It occurs in dpo greedy (repetition 0.90 and 100% cut)." in text
    assert "9 questions from the evaluation rows, answers of at most 256 tokens" in text
    assert "7 of 9 questions have the same greedy answer" in text
    assert re.findall(r"Question (\d+): ask", text) == ["1", "2", "0", "3", "4", "5"]
    assert f"sft {' '.join(HOSTILE.split())} dpo nothing alike chosen in the data a good answer" in text
    assert "dpo (empty)" in text
    assert "drawn" not in text


def test_a_run_without_answers_names_the_command_that_writes_them(tmp_path, undrawn):
    text = Page(write_report([make_run(tmp_path / "run", pairs=3)], tmp_path / "out")).text
    assert "python -m dposhift_trl.generate RUN_DIR" in text
    assert "Nothing is missing: every file of the run was read." in text


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b"{}", b"[" * 99_999, b'{"models": ["a"], "modes": ["b"]}'])
def test_broken_statistics_of_answers_are_noted_and_the_rest_is_shown(content, tmp_path, undrawn):
    folder = add_answers(make_run(tmp_path / "run", pairs=3), ANSWERS)
    (folder / "generations" / "statistics.json").write_bytes(content)
    text = Page(write_report([folder], tmp_path / "out")).text
    assert re.search("statistics.json (is|must|cannot be read)", text)
    assert "chosen answers fell by" in text
    assert main([str(folder), str(make_run(tmp_path / "b", pairs=3)), "--output", str(tmp_path / "both")]) == 0


def test_broken_lines_of_answers_are_counted_and_the_others_shown(tmp_path, undrawn):
    folder = add_answers(make_run(tmp_path / "run", pairs=3), ANSWERS[:2])
    path = folder / "generations" / "side_by_side.jsonl"
    path.write_text(path.read_text() + '{"answers": 3}\n[]\n{\n{"answers": {"sft": {"greedy": [1]}}}\n')
    text = Page(write_report([folder], tmp_path / "out")).text
    assert "side_by_side.jsonl: 4 of 6 lines cannot be read" in text
    assert "nothing alike" in text
    path.unlink()
    text = Page(write_report([folder], tmp_path / "out")).text
    assert "side_by_side.jsonl is missing" in text
    assert "It occurs in dpo greedy" in text


def text_of(folder: Path) -> str:
    return Page(write_report([folder], folder / "report")).text


def test_answers_of_a_model_that_was_trained_again_are_left_out(tmp_path, undrawn):
    folder = add_answers(make_run(tmp_path / "run", pairs=3), ANSWERS)
    assert "Greedy answers that differ most" in text_of(folder)
    (folder / "dpo" / "model.safetensors").write_text("trained again")
    text = text_of(folder)
    assert "The generated answers are not of the weights that dpo/ now holds, so they are left out." in text
    assert "Greedy answers that differ most" not in text
    assert "nothing alike" not in text


def test_answers_that_do_not_say_what_they_are_of_are_left_out(tmp_path, undrawn):
    folder = add_answers(make_run(tmp_path / "run", pairs=3), ANSWERS, weights=None)
    assert "nothing alike" not in text_of(folder)


def test_answers_of_a_run_without_its_weights_are_shown_with_a_note(tmp_path, undrawn):
    folder = add_answers(make_run(tmp_path / "run", pairs=3), ANSWERS)
    (folder / "dpo" / "model.safetensors").unlink()
    text = text_of(folder)
    assert "nothing alike" in text
    assert "it is unknown whether the generated answers are of this run" in text


def test_scores_of_pairs_after_the_last_logged_evaluation_are_left_out(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=3)
    pairs = folder / "dpo" / "pairs"
    table = pq.read_table(pairs / "eval-000020.parquet")
    pq.write_table(table.set_column(1, "chosen_logps", [[-999.0] * 3]), pairs / "eval-000030.parquet")
    text = text_of(folder)
    assert "The scores of pairs of step 30 are left out, since the log has no evaluation there" in text
    assert "-999" not in text
    assert "Row 0: chosen" in text


def test_scores_of_pairs_of_another_training_are_left_out(tmp_path, undrawn):
    folder, other = make_run(tmp_path / "run", pairs=5), make_run(tmp_path / "other", pairs=5, fall=2.0)
    shutil.copy(other / "dpo" / "pairs" / "eval-000020.parquet", folder / "dpo" / "pairs")
    text = text_of(folder)
    assert "eval-000020.parquet is left out, since its means are not those that the log has for step 20" in text
    assert "Row 0: chosen" not in text


def test_every_turn_of_a_conversation_is_shown(tmp_path, undrawn):
    folder = add_answers(make_run(tmp_path / "run", pairs=3), ANSWERS[:1])
    line = {
        "question_id": "q81", "category": "writing", "prompt": [{"role": "user", "content": "hello"}],
        "follow_ups": ["go on"], "chosen": None,
        "answers": {"sft": {"greedy": ["a1", "a2"]}, "dpo": {"greedy": ["b1", "b2"]}},
    }  # fmt: skip
    (folder / "generations" / "side_by_side.jsonl").write_text(json.dumps(line))
    text = Page(write_report([folder], tmp_path / "out")).text
    assert "Question q81 (writing): user: hello Prompt user: hello sft a1 dpo b1 Follow-up go on sft a2 dpo b2" in text


def test_runs_with_answers_are_compared_by_them_too(tmp_path, undrawn):
    folders = [make_run(tmp_path / name, shift_lambda, pairs=5) for name, shift_lambda in (("a", 1.0), ("b", 0.9))]
    text = Page(write_report(folders, tmp_path / "out")).text
    assert "Repetition" not in text
    add_answers(folders[1], ANSWERS)
    page = write_report(folders, tmp_path / "out")
    cells = re.findall(r'data-value="([^"]*)">([^<]*)</td>', page.read_text())
    assert [cell for cell in cells if cell[1] in ("0.900", "–")].count(("nan", "–")) == 2
    assert ("0.9", "0.900") in cells
    assert "different questions or settings" not in Page(page).text
    add_answers(folders[0], ANSWERS, settings={"max_new_tokens": 5})
    assert "different questions or settings" in Page(write_report(folders, tmp_path / "out")).text


def test_texts_differ_by_the_share_of_what_only_one_of_them_has():
    assert difference("abcd", "abcd") == difference("", "") == 0
    assert difference("abcd", "abce") == pytest.approx(1 / 2)
    assert difference("a", "b") == difference("", "words") == 1


def as_adaptive(folder: Path, lambdas=(1.0, 0.6, 1.0), recipe=True, **settings) -> Path:
    """A run whose controller set lambda to these values at the evaluations."""
    path = folder / "dpo" / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry, value in zip((e for e in state["log_history"] if "eval_loss" in e), lambdas, strict=True):
        entry["eval_shift/lambda"] = value
    settings_of_controller = {"lambda_min": 0.25, "lambda_max": 1.0, "target": 0.0, "metric": "displacement/chosen"}
    state["stateful_callbacks"] = {"AdaptiveLambdaCallback": {"args": settings_of_controller}}
    path.write_text(json.dumps(state))
    values = {"lambda_schedule": "adaptive", "lambda_min": 0.25, **settings}
    (folder / "recipe.yaml").write_text(json.dumps({"dpo": values}))
    if not recipe:
        (folder / "recipe.yaml").unlink()
    return folder


@pytest.mark.parametrize("recipe", [True, False], ids=["recipe", "state"])
def test_an_adaptive_run_is_named_by_its_bounds_and_target_and_is_not_dpo(recipe, tmp_path):
    run = read_run(as_adaptive(make_run(tmp_path / "run", 1.0, pairs=5, fall=9.0), recipe=recipe))
    assert run.lambda_text == "λ adaptive 0.25 to 1, target 0"
    assert run.outcome.lambdas == (1.0, 1.0)
    assert not run.outcome.is_dpo
    assert "`lambda_target`" in str(run.verdict) or "no advice" in str(run.verdict)
    assert "this is DPO" not in str(run.verdict)


def test_the_target_of_an_adaptive_run_is_named_and_drawn(tmp_path, monkeypatch):
    drawn = {}
    draw = figures.draw
    monkeypatch.setattr(figures, "draw", lambda name, *rest: drawn.setdefault(name, draw(name, *rest)))
    folder = as_adaptive(make_run(tmp_path / "run", pairs=5), lambda_target=-2.5)
    text = Page(write_report([folder], tmp_path / "out")).text
    assert "DPO-Shift report: λ adaptive 0.25 to 1, target -2.5" in text
    assert b"lower bound" in drawn["lambda"].svg
    share = as_adaptive(make_run(tmp_path / "b"), lambda_target=0.5, lambda_target_metric="displacement/chosen_fell")
    assert read_run(share).lambda_text == "λ adaptive 0.25 to 1, target share 0.5"


def test_knots_that_return_to_their_start_are_named_with_the_value_between(tmp_path):
    run = read_run(as_adaptive(make_run(tmp_path / "run", pairs=5), lambda_schedule=[[0, 1], [0.5, 0.6], [1, 1]]))
    assert run.plan.adaptive  # the controller's state is what ran
    path = run.folder / "dpo" / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        entry.pop("shift/lambda", None)
    path.write_text(json.dumps({**state, "stateful_callbacks": {}}))
    run = read_run(run.folder)
    assert run.lambda_text == "λ 1 to 0.6 to 1"
    assert not run.outcome.is_dpo


@pytest.mark.parametrize(
    "recipe",
    [
        "dpo: 3", "[]", "dpo: {lambda_min: x}", "dpo: {lambda_schedule: nope}", "dpo: [", "{1: &a [*a]}",
        "dpo: {lambda_schedule: [[0]]}", "dpo: {shift_lambda: [1]}", "dpo:",
    ],
)  # fmt: skip
def test_without_a_valid_recipe_lambda_is_read_from_the_log(recipe, tmp_path):
    folder = make_run(tmp_path / "run", 0.8, pairs=3)
    (folder / "recipe.yaml").write_text(recipe)
    assert read_run(folder).lambda_text == "λ 0.8"


def test_the_density_is_the_mean_of_gaussians_of_scott_s_width(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda name, title, alt, figure: drawn.append(figure))
    values = np.random.default_rng(0).normal(2, 3, 50)
    figures.density("x", "t", "x", np.append(values, math.nan))
    grid, heights = drawn[0].axes[0].lines[0].get_data()
    width = values.std(ddof=1) * 50**-0.2
    expected = [np.exp(-0.5 * ((x - values) / width) ** 2).mean() / (width * math.sqrt(2 * math.pi)) for x in grid]
    assert heights == pytest.approx(expected, rel=1e-9)
    assert len(grid) == 300


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [[2.0], [0.0] * 20, [0.1 + 0.2, 0.3] * 10, [1.0, 2.0, 3.0, 4.0]], ids=["one", "zero", "rounding", "few"]
)
def test_values_that_have_no_density_are_drawn_as_strokes(values, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda name, title, alt, figure: drawn.append(figure))
    figures.density("x", "t", "x", np.array(values))
    assert drawn[0].axes[0].get_ylabel() == "One stroke per pair"
    assert len(drawn[0].axes[0].collections[0].get_segments()) == len(values)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_color_has_a_contrast_of_4_5_on_page_and_card(dark, one):
    source = one.read_text(encoding="utf-8")
    backgrounds = re.findall(r"--page: (#\w{6}); --card: (#\w{6});", source)[dark]
    colors = {name: color for name, color in color_variables(dark).items() if name != "grid"}
    for name, color in colors.items():
        assert f"--{name}: {color};" in source
        for background in backgrounds:
            light, dim = sorted([luminance(color), luminance(background)], reverse=True)
            assert (light + 0.05) / (dim + 0.05) >= 4.5, (name, background)


def test_every_color_of_a_drawing_is_a_variable_on_the_page(one):
    body = one.read_text(encoding="utf-8").split("</style>")[1]
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []


def test_several_runs_are_compared_with_a_recommendation_and_its_rule(several):
    page = Page(several)
    assert "low $\\frac: of the 3 runs whose accuracy is not significantly below that of dpo" in page.text
    assert "one seed and one evaluation set" in page.text
    assert "if it keeps at least half of DPO's margin" in page.text
    rows = re.findall(r'<th scope="row" data-value="([^"]*)"', several.read_text(encoding="utf-8"))
    assert rows == ["low $\\frac", "mild", "dpo"]
    sorts = [attributes["aria-sort"] for tag, attributes in page.tags if "aria-sort" in attributes]
    assert sorts.count("descending") == 1
    assert len(sorts) == 9 == [tag for tag, _ in page.tags].count("button")
    written = {path.stem for path in (several.parent / "figures").iterdir()}
    assert {"trade_off_margin", "trade_off_accuracy", "curves_chosen", "curves_rejected"} <= written


def test_a_trade_off_with_nothing_to_explain_has_no_legend(recwarn):
    drawing = trade_off("margin", "Trade-off", "Margin", [Dot("a", -1.0, 1.0)])
    assert drawing is not None
    assert recwarn.list == []


def test_without_a_run_at_lambda_1_there_is_no_recommendation(tmp_path, undrawn):
    folders = [make_run(tmp_path / "a", 0.9), make_run(tmp_path / "b" / "a", 0.8)]
    page = Page(write_report(folders, tmp_path / "out"))
    assert "no DPO run to compare with" in page.text
    assert "b/a" in page.text


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        pytest.param(["audit.json"], "There is no record of a row audit", id="audit"),
        pytest.param(["eval_rows.parquet"], "does not contain the text of this row", id="rows"),
        pytest.param(["recipe.yaml"], "recipe.yaml is missing", id="recipe"),
        pytest.param(["sft"], "There is no SFT stage", id="sft"),
        pytest.param(["dpo"], "There is no DPO stage", id="dpo"),
        pytest.param(["dpo/pairs"], "There are no scores of pairs", id="pairs"),
        pytest.param(["dpo/finished.json"], "not recorded: no readable finished.json in dpo/", id="finished"),
        pytest.param(["dpo/trainer_state.json"], "dpo: no trainer_state.json can be read", id="state"),
        pytest.param(
            ["audit.json", "recipe.yaml", "sft", "dpo/pairs", "dpo/trainer_state.json", "dpo/finished.json"],
            "There is no verdict",
            id="nearly-all",
        ),
    ],
)
def test_a_missing_file_is_noted_and_the_rest_is_shown(tmp_path, gone, says, undrawn):
    folder = make_run(tmp_path / "run", pairs=3, steps=(0, 20))
    for name in gone:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    assert says in Page(write_report([folder], folder / "report")).text


@pytest.mark.parametrize(
    "name",
    [
        "audit.json",
        "eval_rows.parquet",
        "recipe.yaml",
        "sft/finished.json",
        "dpo/finished.json",
        "dpo/trainer_state.json",
        "dpo/pairs/eval-000020.parquet",
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe{", b"[1, {}]", b"{", None], ids=["empty", "binary", "list", "cut", "directory"]
)
def test_a_broken_file_is_noted_and_the_rest_is_shown(tmp_path, name, content, undrawn, capsys):
    folder = make_run(tmp_path / "run", pairs=3, steps=(0, 20))
    (folder / name).unlink()
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().err == ""
    text = Page(folder / "report" / "report.html").text
    assert re.search(rf"{Path(name).name} (is |must |cannot be read)|no {Path(name).name} can be read", text)
    assert "48 of 50 rows kept." in text or name == "audit.json"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "recipe.yaml is empty"),
        (b"- a", "recipe.yaml must contain a mapping, got list"),
        (b"\xff", "recipe.yaml is not UTF-8 text"),
        (b"\0", "recipe.yaml is not valid YAML: unacceptable character"),
        (None, "recipe.yaml must be a file, got a directory"),
        (b"dpo: text", "recipe.yaml has no valid settings of lambda"),
    ],
    ids=["empty", "list", "encoding", "binary", "directory", "section"],
)
def test_the_note_of_a_broken_recipe_says_what_is_wrong(tmp_path, content, reason):
    folder = make_run(tmp_path / "run", 0.8, pairs=3, steps=(0, 20))
    (folder / "recipe.yaml").unlink()
    (folder / "recipe.yaml").mkdir() if content is None else (folder / "recipe.yaml").write_bytes(content)
    run = read_run(folder)
    assert [note for note in run.notes if note.startswith(reason)]
    assert run.lambda_text == "λ 0.8"


@pytest.mark.parametrize(
    "audit",
    [{"train": None}, {"train": {"findings": {"empty": 3}}}, {"train": {"rows": None, "kept": None, "findings": {}}}],
)
def test_an_audit_with_other_content_raises_no_error(tmp_path, audit, undrawn):
    folder = make_run(tmp_path / "run", pairs=3, steps=(0, 20))
    (folder / "audit.json").write_text(json.dumps(audit))
    assert main([str(folder)]) == 0


def test_scores_that_are_not_numbers_are_left_out_and_noted(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=6, steps=(0, 20))
    path = folder / "dpo" / "pairs" / "eval-000020.parquet"
    table = pq.read_table(path).to_pydict()
    table["chosen_logratios"][:2] = [math.nan, math.inf]
    pq.write_table(pa.table(table), path)
    state = json.loads((folder / "dpo" / "trainer_state.json").read_text())
    state["log_history"] += ["junk", {"loss": 1.0}, {"step": None}, {"step": 20, "eval_loss": math.nan, "loss": "x"}]
    (folder / "dpo" / "trainer_state.json").write_text(json.dumps(state))
    text = Page(write_report([folder], folder / "report")).text
    assert "2 of 6 evaluated pairs have a score that is not a number" in text


@pytest.mark.filterwarnings("error")
def test_one_pair_is_drawn_without_a_density(tmp_path):
    page = write_report([make_run(tmp_path / "run", pairs=1, steps=(0,))], tmp_path / "out")
    assert "One stroke per pair" in page.read_text(encoding="utf-8")


def test_an_interrupted_run_is_read_from_its_newest_checkpoint(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=3)
    for step in (5, 10):
        (folder / "dpo" / f"checkpoint-{step}").mkdir()
        shutil.copy(folder / "dpo" / "trainer_state.json", folder / "dpo" / f"checkpoint-{step}")
    (folder / "dpo" / "trainer_state.json").unlink()
    assert "the log is from checkpoint-10" in Page(write_report([folder], folder / "report")).text


def test_the_output_folder_of_a_plain_trainer_is_a_run(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=8) / "dpo"
    text = Page(write_report([folder], folder / "report")).text
    assert "The log-probability of the chosen answers fell by" in text
    assert "audit.json is missing" in text


def test_a_named_evaluation_set_is_found(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=8)
    state = (folder / "dpo" / "trainer_state.json").read_text().replace('"eval_', '"eval_test_')
    (folder / "dpo" / "trainer_state.json").write_text(state)
    for path in (folder / "dpo" / "pairs").iterdir():
        path.rename(path.with_name(path.name.replace("eval-", "eval_test-")))
    page = write_report([folder], folder / "report")
    assert "chosen answers fell by" in Page(page).text
    assert (page.parent / "figures" / "scatter.svg").is_file()


def test_many_pairs_and_long_texts_stay_below_3_megabytes(tmp_path):
    folder = make_run(tmp_path / "run", pairs=4000, steps=(0, 20), text="long " * 1000)
    page = write_report([folder], folder / "report")
    assert page.stat().st_size < 1_000_000
    assert "more characters are not shown" in Page(page).text
    assert "data:image/png;base64" in page.read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_files(tmp_path):
    folder = make_run(tmp_path / "run", pairs=8)
    sums = []
    for name in ("a", "b"):
        write_report([folder], tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        sums.append([zlib.crc32(path.read_bytes()) for path in files])
    assert sums[0] == sums[1]


def test_an_earlier_report_is_replaced_and_other_files_are_kept(tmp_path, capsys, undrawn):
    folder = make_run(tmp_path / "run", pairs=3, steps=(0, 20))
    assert main([str(folder)]) == main([str(folder)]) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "report.html").write_text("<p>mine</p>")
    capsys.readouterr()
    assert main([str(folder), "--output", str(foreign)]) == 2
    assert (
        capsys.readouterr().err
        == f"{foreign} contains other files (report.html) and no report. Choose a new folder.\n"
    )
    assert (foreign / "report.html").read_text() == "<p>mine</p>"
    assert main([str(folder), "--output", str(folder)]) == 2
    assert main([str(folder), "--output", str(foreign / "report.html")]) == 2
    assert "is a file" in capsys.readouterr().err


def report_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"]
)
@pytest.mark.parametrize("count", [0, 1, 8])
def test_a_report_that_cannot_be_written_leaves_the_earlier_one_and_is_written_by_the_next_call(
    error, count, tmp_path, undrawn, monkeypatch
):
    folder = make_run(tmp_path / "run", pairs=3)
    calls = []

    def write_some(path, content):
        calls.append(path)
        if len(calls) > count:
            raise error
        write_whole(path, content)

    def stop():
        with monkeypatch.context() as patch:
            patch.setattr("dposhift_trl.report.page.write_whole", write_some)
            with pytest.raises((ReportError, KeyboardInterrupt)):
                write_report([folder], folder / "report")
        calls.clear()

    stop()
    assert not (folder / "report").exists()
    write_report([folder], folder / "report")
    earlier = report_files(folder / "report")
    (folder / "audit.json").unlink()
    stop()
    assert report_files(folder / "report") == earlier
    assert main([str(folder)]) == 0
    assert report_files(folder / "report").keys() == earlier.keys()
    assert report_files(folder / "report")["report.html"] != earlier["report.html"]


LEFT = {
    "figures without a page": ["figures/logps.png", "figures/curves_margin.svg.tmp"],
    "a page on its way": ["report.html.tmp"],
    "an unfinished report": [".unfinished.tmp/report.html", ".unfinished.tmp/figures/loss.svg"],
}


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_what_a_kill_left_of_a_report_is_no_reason_to_refuse(left, tmp_path, undrawn, capsys):
    folders = [make_run(tmp_path / name, pairs=3) for name in "ab"]
    for names, destination in ((folders[:1], folders[0] / "report"), (folders, tmp_path / "comparison")):
        for name in left:
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            (destination / name).write_text("left by a kill")
        assert main([*map(str, names), "--output", str(destination)]) == 0, capsys.readouterr().err
        assert (destination / "report.html").is_file()
        assert not (destination / ".unfinished.tmp").exists()


@pytest.mark.parametrize("name", ["figures/mine.png", "figures/logps/mine", "mine.tmp/x", "mine"])
def test_a_folder_with_files_of_another_kind_is_refused(name, tmp_path, undrawn):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    kept = name in ("figures/logps/mine", "mine.tmp/x")  # in folders that no report writes
    folder = make_run(tmp_path / "run", pairs=3)
    assert main([str(folder), "--output", str(tmp_path / "out")]) == (0 if kept else 2)
    assert path.read_text() == "mine"


def test_figures_of_an_earlier_report_are_gone_and_files_of_others_kept(tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=3)
    write_report([folder], folder / "report")
    (folder / "report" / "figures" / "mine.png").write_text("mine")
    (folder / "report" / "notes.txt").write_text("mine")
    shutil.rmtree(folder / "dpo" / "pairs")
    write_report([folder], folder / "report")
    names = {path.name for path in (folder / "report" / "figures").iterdir()}
    assert {"mine.png", "logps.png"} <= names
    assert "scatter.png" not in names
    assert (folder / "report" / "notes.txt").read_text() == "mine"


def test_figures_are_not_written_through_a_link(tmp_path, undrawn, capsys):
    folder, elsewhere = make_run(tmp_path / "run", pairs=3), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "report").mkdir()
    (folder / "report" / "figures").symlink_to(elsewhere)
    assert main([str(folder)]) == 2
    assert "figures must be a folder, got a file or a link" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def test_every_figure_has_a_name_that_a_later_report_knows(one, several):
    for page in (one, several):
        assert {path.stem for path in (page.parent / "figures").iterdir()} <= DRAWN


@pytest.mark.parametrize("name", ["audit.json", "recipe.yaml", "eval_rows.parquet", "dpo/pairs/eval-000020.parquet"])
@pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_a_pipe_or_device_in_place_of_a_file_is_noted_and_not_waited_for(kind, name, tmp_path, undrawn):
    folder = make_run(tmp_path / "run", pairs=3)
    (folder / name).unlink()
    kind(folder / name)
    text = Page(write_report([folder], folder / "report")).text
    assert re.search(rf"{Path(name).name} must be a file, got a (FIFO|device)", text)


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} contains no run" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ReportError, match="at least one run"):
        write_report([], tmp_path / "out")


def test_a_conversation_becomes_lines():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
    assert as_text(messages) == "user: hi\nassistant: yo"
    assert as_text(None) == "(missing)"
    assert as_text({"a": 1}) == '{"a": 1}'


def test_the_pareto_front_is_what_no_other_run_beats():
    points = [(0, 0), (1, 3), (2, 2), (2, 1), (3, 0), (math.nan, 9), (1, 3)]
    assert pareto_front(points) == [False, True, True, False, True, False, True]


def test_labels_are_moved_apart_and_stay_on_the_figure():
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([0.95, 0.99], 0.1) == pytest.approx([0.9, 1.0])


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_figure():
    name = "a run whose folder has a very long name, as those of sweeps often do"
    assert figures.trade_off("x", "t", "y", [figures.Dot(name, 1.0, 1.0), figures.Dot(name, 1.0, 1.0)])
    assert curves("x", "t", "y", [figures.Line(name, "chosen", [1, 2], [1.0, 2.0])])
    assert len(shortened(name)) == 26
    assert shortened("short") == "short"


def test_a_figure_without_numbers_is_none():
    nothing = np.array([math.nan])
    assert curves("x", "t", "y", [figures.Line("a", "chosen", [1], [math.nan])]) is None
    assert figures.histogram("x", "t", "x", "chosen", nothing, nothing) is None
    assert figures.density("x", "t", "x", nothing) is None
    assert figures.scatter("x", "t", nothing, nothing) is None
    assert figures.trade_off("x", "t", "y", [figures.Dot("a", math.nan, 1.0)]) is None


def browse(page: Path, width: int, tmp_path: Path, script="", *flags: str) -> tuple[str, str]:
    """
    Open the page in a frame, since a headless window is at least 500 pixels wide. Returns what `script` returns, in
    which `page` is the document of the frame, and the output of the console.
    """
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{page.as_uri()}" style="width: {width}px; height: 900px; border: 0"></iframe><script>'
        "onload = () => { const page = document.querySelector('iframe').contentDocument;"
        f"document.title = JSON.stringify((() => {{ {script} }})()); }}</script>"
    )
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",  # for the frame alone: the page itself reads no file
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        f"--window-size={max(width, 500)},900",
        "--dump-dom",
        *flags,
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return json.loads(html.unescape(title[1])), console


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390], ids=["wide", "phone"])
@pytest.mark.parametrize("which", ["one", "several"])
def test_in_a_browser_nothing_overflows_and_the_console_is_silent(which, width, request, tmp_path):
    script = """
        const root = page.documentElement;
        const drawn = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
        for (const element of page.querySelectorAll("details")) element.open = true;
        return [root.scrollWidth, drawn.length, drawn.every(box => box.width > 250 && box.height > 150),
                getComputedStyle(page.body).backgroundColor];
    """
    (scroll_width, drawn, visible, background), console = browse(
        request.getfixturevalue(which), width, tmp_path, script
    )
    assert scroll_width <= width
    assert drawn > 3
    assert visible
    assert background == "rgb(255, 255, 255)"
    assert console == ""


@in_a_browser
def test_in_a_browser_a_click_on_a_heading_sorts_the_table(several, tmp_path):
    script = """
        const names = () => [...page.querySelectorAll("#runs tbody th")].map(cell => cell.dataset.value);
        const buttons = page.querySelectorAll("#runs th button"), found = [names()];
        for (const index of [1, 1, 0]) {
            buttons[index].focus();
            buttons[index].click();
            found.push(names(), buttons[index].parentElement.getAttribute("aria-sort"));
        }
        return [...found, page.activeElement === buttons[0]];
    """
    found, console = browse(several, 1280, tmp_path, script)
    low, mild, dpo = "low $\\frac", "mild", "dpo"
    down, up = [dpo, mild, low], [low, mild, dpo]
    assert found == [up, down, "descending", up, "ascending", [mild, low, dpo], "descending", True]
    assert console == ""


@in_a_browser
def test_in_a_browser_a_dark_page_has_dark_colors_in_its_drawings_too(one, tmp_path):
    script = """
        const text = page.querySelector("figure svg text");
        return [getComputedStyle(page.body).backgroundColor, getComputedStyle(text).fill];
    """
    (background, ink), console = browse(one, 390, tmp_path, script, "--blink-settings=preferredColorScheme=0")
    assert background == "rgb(20, 24, 29)"
    assert ink.startswith("rgb(1") or ink.startswith("rgb(2")
    assert console == ""


@in_a_browser
def test_in_a_browser_the_page_prints(one, tmp_path):
    out = tmp_path / "page.pdf"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [str(CHROMIUM), *flags, "--no-pdf-header-footer", f"--print-to-pdf={out}", one.as_uri()],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert out.read_bytes().startswith(b"%PDF")
    assert out.stat().st_size > 20_000
