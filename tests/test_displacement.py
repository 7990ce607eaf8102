"""The losses that the displacement benchmark compares with DPO-Shift, and its statistics."""

import dataclasses
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import displacement
import displacement_losses as losses
from displacement import (
    BEFORE,
    DPO,
    METHODS,
    SETTINGS,
    Method,
    known_results,
    make_base,
    measure,
    parse,
    tables,
    train,
)
from displacement_data import FILES, load_pairs
from displacement_table import against_best_fixed, holm, interval, table

from dposhift_trl.data.demo import demo_dataset
from dposhift_trl.losses import dpo_shift_loss
from dposhift_trl.training.metrics import PairScores


CHOSEN = [-8.0, -12.0, -9.0, -20.0]
REJECTED = [-30.0, -11.0, -14.0, -6.0]
REF_CHOSEN = [-10.0, -10.0, -10.0, -18.0]
REF_REJECTED = [-10.0, -10.0, -12.0, -8.0]
PAIRWISE = [field.name for field in dataclasses.fields(PairScores)]
TOKENS = ([4.0, 6.0, 5.0, 10.0], [8.0, 5.0, 7.0, 3.0])


@pytest.fixture
def scores() -> PairScores:
    """Four pairs whose log-ratios are (2, -20), (-2, -1), (1, -2) and (-2, 2) nats."""
    chosen, rejected, *references = (
        torch.tensor(values, dtype=torch.float64) for values in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    )
    tokens = (torch.tensor(values, dtype=torch.float64) for values in TOKENS)
    unused = torch.zeros(4, dtype=torch.float64)
    return PairScores(chosen.requires_grad_(), rejected.requires_grad_(), *references, *tokens, unused, unused, unused)


def softplus(z: float) -> float:
    """`-log sigmoid(z)` by the definition."""
    return math.log1p(math.exp(-z))


def gradients(loss: torch.Tensor, scores: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(loss.sum(), (scores.chosen_logps, scores.rejected_logps))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.dpo_positive(0.1, 5.0), [softplus(2.2), softplus(-1.1), softplus(0.3), softplus(-1.4)]),
        (
            losses.cal_dpo(0.1),
            [
                softplus(22) + (2 - 5) ** 2 + (-20 + 5) ** 2,
                softplus(-1) + (-2 - 5) ** 2 + (-1 + 5) ** 2,
                softplus(3) + (1 - 5) ** 2 + (-2 + 5) ** 2,
                softplus(-4) + (-2 - 5) ** 2 + (2 + 5) ** 2,
            ],
        ),
        (
            losses.simpo(2.0, 1.0),
            [
                softplus(2 * (-8 / 4 + 30 / 8) - 1),
                softplus(2 * (-12 / 6 + 11 / 5) - 1),
                softplus(2 * (-9 / 5 + 14 / 7) - 1),
                softplus(2 * (-20 / 10 + 6 / 3) - 1),
            ],
        ),
        # Targets 0.6, 0.55, 0.6 and 0.65: the ratios are 0.2, 7.5, 2.5 and -4.25
        (losses.acpo(0.1, 0.05), [softplus(0.6), softplus(-0.1), softplus(0.3), softplus(-0.2)]),
        (losses.gate_dpo(0.1, 5.0, -2.0), [softplus(2.2), softplus(-0.1), softplus(0.3), softplus(-0.4)]),
        (losses.gated_by_ratio(0.1, -5.0), [softplus(2.2), softplus(-0.1), softplus(0.3), softplus(-0.4)]),
        (losses.beta_dpo(0.1), [softplus(22 * b) for b in [0.1 * (1 + 0.6 * 0.5)]] + [None] * 3),
        (
            losses.saturated(0.1, 10.0),
            [
                softplus(0.1 * (2 + 10 * math.tanh(2))),
                softplus(0.1 * (-2 + 10 * math.tanh(0.1))),
                softplus(0.1 * (1 + 10 * math.tanh(0.2))),
                softplus(0.1 * (-2 - 2)),
            ],
        ),
        (
            losses.shifted_per_token(0.1, 0.75),
            [
                softplus(0.1 * (2 + 20 * 0.75 * 4 / 8)),
                softplus(0.1 * (-2 + 1 * 0.75 * 6 / 5)),
                softplus(0.1 * (1 + 2 * 0.75 * 5 / 7)),
                softplus(0.1 * (-2 - 2)),
            ],
        ),
        # Only both answers of the second pair fell, the chosen one by more: lambda 0
        (losses.by_own_fall(0.1), [softplus(2.2), softplus(-0.2), softplus(0.3), softplus(-0.4)]),
    ],
    ids=[
        "DPO-Positive",
        "Cal-DPO",
        "SimPO",
        "ACPO",
        "Gate-DPO",
        "gate on the ratio",
        "beta-DPO",
        "saturated",
        "per token",
        "by its own fall",
    ],
)
def test_a_loss_is_its_formula(loss, expected, scores):
    found = loss(scores).tolist()
    for value, wanted in zip(found, expected, strict=True):
        if wanted is not None:
            assert value == pytest.approx(wanted, rel=1e-12)


def test_gates_scale_the_rejected_gradient_alone(scores):
    chosen, rejected = gradients(losses.gate_dpo(0.1, 5.0, -2.0)(scores), scores)
    by_token = torch.tensor([-30 / 8, -11 / 5, -14 / 7, -6 / 3], dtype=torch.float64)
    torch.testing.assert_close(rejected, -chosen * torch.sigmoid(5 * (by_token + 2)), rtol=1e-12, atol=0)
    plain, _ = gradients(
        dpo_shift_loss(scores.chosen_logratios, scores.rejected_logratios, beta=0.1, shift_lambda=1.0), scores
    )
    torch.testing.assert_close(chosen, plain, rtol=1e-12, atol=0)
    chosen, rejected = gradients(losses.gated_by_ratio(0.1, -5.0)(scores), scores)
    torch.testing.assert_close(
        rejected, -chosen * torch.sigmoid(scores.rejected_logratios.detach() + 5), rtol=1e-12, atol=0
    )


def test_acpo_has_one_lambda_per_pair(scores):
    chosen, rejected = gradients(losses.acpo(0.1, 0.05)(scores), scores)
    torch.testing.assert_close(
        -rejected / chosen, torch.tensor([0.2, 1.0, 1.0, 0.0], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


TOKEN_IDS = torch.tensor([[-1, 5, 6, 7, 8], [-1, -1, 1, 2, -1], [-1, 9, 6, 7, -1], [-1, -1, 3, 1, 2]])
LOG_PROBS = torch.tensor([[0.0] * 5] * 2 + [[0, -1, -2, -3, 0], [0, 0, -4, -5, -6]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("gate", "factors"),
    [
        (losses.by_probability, LOG_PROBS[2:].exp()),
        (losses.on_tokens(0.5, 1.0), [[1, 1, 0.5, 0.5, 1], [1, 1, 1, 0.5, 0.5]]),
        (losses.on_tokens(1.0, 0.5), [[1, 0.5, 1, 1, 0.5], [1, 1, 0.5, 1, 1]]),
    ],
    ids=["by probability", "shared tokens", "own tokens"],
)
def test_gates_scale_the_gradients_of_rejected_tokens(gate, factors, scores):
    scores = dataclasses.replace(scores, **{n: getattr(scores, n)[:2] for n in PAIRWISE})
    log_probs = LOG_PROBS.clone().requires_grad_()
    gated = losses.gate_tokens(scores, gate, log_probs, TOKEN_IDS)
    assert losses.dpo(0.1)(gated).tolist() == losses.dpo(0.1)(scores).tolist()
    found = torch.autograd.grad(gated.rejected_logps.sum(), log_probs)[0]
    inside = TOKEN_IDS[2:] >= 0
    torch.testing.assert_close(found[2:][inside], torch.as_tensor(factors, dtype=torch.float64)[inside])
    assert not found[:2].any()


def test_beta_dpo_remembers_the_mean_margin(scores):
    loss = losses.beta_dpo(0.1)
    mean = 0.1 * (22 - 1 + 3 - 4) / 4
    assert loss(scores)[2].item() == pytest.approx(softplus(3 * 0.1 * (1 + 0.6 * mean)), rel=1e-12)
    assert loss(scores)[2].item() == pytest.approx(softplus(3 * 0.1 * (1 + 0.6 * 0.9 * mean)), rel=1e-12)


def test_a_loss_of_its_own_is_trained_with(tmp_path):
    """At a fixed lambda written as such a loss, weights equal those of the trainer's own loss."""
    data = demo_dataset()
    data["train"], data["test"] = data["train"].select(range(24)), data["test"].select(range(8))
    options = parse(["--max-steps", "2", "--batch-size", "4"])
    base = str(make_base(tmp_path / "base", data, 1, 0.1))

    def half():
        return lambda p: dpo_shift_loss(p.chosen_logratios, p.rejected_logratios, beta=0.1, shift_lambda=0.5)

    weights = {
        name: dict(train(method, base, data, 1, tmp_path / "run", options).model.state_dict())
        for name, method in {
            "own": Method(make_loss=half),
            "fixed": METHODS["fixed 0.5"],
            "DPO": METHODS["DPO (lambda 1)"],
            "gated": Method(make_loss=lambda: losses.dpo(0.1), gate=losses.on_tokens(1.0, 1.0)),
            "half gated": Method(make_loss=lambda: losses.dpo(0.1), gate=losses.on_tokens(0.5, 1.0)),
        }.items()
    }
    difference = {name: max((w - weights["own"][n]).abs().max() for n, w in weights[name].items()) for name in weights}
    assert difference["fixed"] < 1e-6
    assert difference["DPO"] > 1e-5
    gated, half_gated = (
        max((w - weights["DPO"][n]).abs().max() for n, w in weights[name].items()) for name in ("gated", "half gated")
    )
    assert gated < 1e-6
    assert half_gated > 1e-5


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_tables_hold_means_intervals_and_what_differs_from_the_baseline():
    columns = ("displacement/chosen", "displacement/chosen_fell", "rewards/margins", "rewards/accuracies")
    results = {
        "DPO (lambda 1)": [dict.fromkeys(columns, value) for value in (-3.0, -1.0)],
        "other": [dict.fromkeys(columns, value) for value in (-1.0, 0.0)],
        "equal": [dict.fromkeys(columns, value) for value in (-2.0, -0.0001)],
    }
    text = table(results, "DPO (lambda 1)")
    # t = 12.706 for one degree of freedom, standard error 1
    assert "| DPO (lambda 1) | -2.000 ± 12.706 |" in text
    # Differences 1 and 0.9999: p = 3e-5 before correction; 2 and 1: p = 0.2
    assert "| equal | -1.000 ± 12.706* |" in text
    assert "| other | -0.500 ± 6.353 |" in text


def test_methods_are_compared_with_the_best_fixed_lambda_at_their_accuracy():
    def runs(chosen: float, accuracy: float) -> list[dict[str, float]]:
        names = ("displacement/chosen", "displacement/chosen_fell", "rewards/margins", "rewards/accuracies")
        tiny = 1e-6 * chosen  # so that differences vary over seeds
        return [dict(zip(names, (chosen + seed * (1 + tiny), 0.5, 1.0, accuracy), strict=True)) for seed in (0.0, 1.0)]

    results = {
        "lambda 1": runs(-5.0, 0.9),
        "fixed 0.5": runs(-2.0, 0.8),
        "fixed 0.25": runs(-1.0, 0.7),
        "between": runs(-1.5, 0.75),
        "equal": runs(-1.5, 0.8095),
        "best": runs(-1.5, 0.95),
        "before": [{"perplexity/chosen": 2.0}] * 2,
    }
    rows = against_best_fixed(results, ["lambda 1", "fixed 0.5", "fixed 0.25"]).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["between", "equal", "best"]
    assert [row.split("|")[2].strip() for row in rows] == ["fixed 0.5", "fixed 0.5", "lambda 1"]
    assert [row.split("|")[3].strip() for row in rows] == ["+0.500*", "+0.500*", "+3.500*"]


def test_real_pairs_are_split_by_prompt(tmp_path, monkeypatch):
    rows = [
        {"prompt": f"p{index // 3}", "chosen": f"good {index}", "rejected": f"bad {index}", "votes": 3}
        for index in range(900)
    ]
    (tmp_path / FILES["pandalm"]).write_text("\n".join(map(json.dumps, rows)))
    model = save_tiny_model(tmp_path / "gpt2")
    data, again, other = (load_pairs("pandalm", tmp_path, model, seed) for seed in (1, 1, 2))
    prompts = {part: {row["prompt"][0]["content"] for row in data[part]} for part in data}
    assert len(data["train"]) == 300
    assert len(data["test"]) == 150
    assert not prompts["train"] & prompts["test"]
    assert data["train"][0]["chosen"][0]["role"] == "assistant"
    assert data["test"].to_list() == again["test"].to_list()
    assert data["test"].to_list() != other["test"].to_list()


def test_a_missing_file_of_a_real_set_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"pandalm_human.jsonl does not exist. Name its folder with --files\."):
        load_pairs("pandalm", tmp_path, save_tiny_model(tmp_path / "gpt2"), 1)


def test_too_few_real_pairs_are_refused(tmp_path):
    rows = [{"prompt": f"p{index}", "chosen": "good", "rejected": "bad"} for index in range(200)]
    (tmp_path / FILES["pandalm"]).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="must have 300 pairs to train on that are short enough, got 50"):
        load_pairs("pandalm", tmp_path, save_tiny_model(tmp_path / "gpt2"), 1)


def test_results_of_other_settings_are_refused(tmp_path):
    file, used = tmp_path / "results.jsonl", {"data": "demo", "learning_rate": 1e-4}
    assert known_results(file, used) == {}
    lines = [
        {"settings": used, "seed": 1, "method": "fixed 0.5", "metrics": {"rewards/margins": 1.0}},
        {"settings": {**used, "data": "hard"}, "seed": 1, "method": "fixed 0.5", "metrics": {"rewards/margins": 2.0}},
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert known_results(file, used) == {(1, "fixed 0.5"): {"rewards/margins": 1.0}}
    with pytest.raises(SystemExit, match="choose another --results"):
        known_results(file, {**used, "learning_rate": 1e-5})


def test_the_model_before_training_has_no_log_ratios(tmp_path):
    data = demo_dataset()
    data["train"], data["test"] = data["train"].select(range(24)), data["test"].select(range(8))
    options = parse(["--max-steps", "2"])
    base = str(make_base(tmp_path / "base", data, 1, 0.1))
    before, after = (
        measure(train(METHODS[name], base, data, 1, tmp_path / "run", options), 0) for name in (BEFORE, DPO)
    )
    assert list(before) == ["perplexity/chosen"]
    assert before["perplexity/chosen"] > 1
    assert after["displacement/chosen"] != 0
    text = table({BEFORE: [before, before], DPO: [after, after]}, DPO)
    assert f"| {BEFORE} |  |" in text
    assert BEFORE not in against_best_fixed({BEFORE: [before] * 2, DPO: [after] * 2, "other": [after] * 2}, [DPO])


RESULTS = Path(displacement.__file__).with_name("displacement.jsonl")
ROOT = RESULTS.parent.parent


def published(data: str) -> dict[str, list[dict[str, float]]]:
    """Metrics of the published runs on a dataset, by method."""
    found: dict[str, list[dict[str, float]]] = {}
    for line in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        if line["settings"]["data"] == data:
            found.setdefault(line["method"], []).append(line["metrics"])
    return found


def test_the_published_tables_are_what_their_commands_print():
    page = RESULTS.with_name("README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python benchmarks/displacement.py (.*--results .*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        options = parse(shlex.split(command))
        assert ROOT / options.results == RESULTS
        known = known_results(RESULTS, {name: getattr(options, name) for name in SETTINGS})
        printed = tables({name: [known[seed, name] for seed in options.seeds] for name in options.methods})
        assert [line for text in printed for line in text.splitlines() if line not in page] == []


def test_the_comparison_repeats_the_published_results():
    decimals = {"displacement/chosen": 2, "displacement/chosen_fell": 2, "rewards/margins": 2, "rewards/accuracies": 3}
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!Method|---).* ± .*\|$", page, re.MULTILINE)
    expected = []
    for runs in map(published, ("demo", "hard")):
        for method in dict.fromkeys(row.split(" | ")[0].removeprefix("| ") for row in rows):
            assert len(runs[method]) == 5
            cells = [(interval([run[name] for run in runs[method]]), places) for name, places in decimals.items()]
            expected.append(f"| {method} | " + " | ".join(f"{m:.{n}f} ± {h:.{n}f}" for (m, h), n in cells) + " |")
    assert rows == expected


def test_the_readme_repeats_the_published_results():
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("## On real preferences")[1]
    head, _, *rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", page, re.MULTILINE)
    ]
    names = {"before": BEFORE, "DPO": DPO, "DPO + 1.0 `sft`": "DPO + 1.0 sft"}
    methods = [names.get(name, name.replace("λ", "fixed")) for name in head[1:]]
    runs = published("pandalm")
    assert {len(runs[method]) for method in methods} == {3}
    texts = {
        "displacement/chosen": "{:+.1f}".format,
        "displacement/chosen_fell": lambda share: f"{100 * share:.0f}%",
        "rewards/margins": "{:.2f}".format,
        "rewards/accuracies": lambda share: f"{share:.3f}".lstrip("0"),
        "perplexity/chosen": "{:.2f}".format,
    }
    for row, (name, text) in zip(rows, texts.items(), strict=True):
        found = [[run[name] for run in runs[method] if name in run] for method in methods]
        assert row[1:] == [text(sum(values) / len(values)) if values else "" for values in found]
