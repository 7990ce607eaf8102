"""The report reads runs of a stock `DPOTrainer`, and folders with scores of pairs alone, and says what these lack."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows
from trl import DPOConfig, DPOTrainer

from dposhift_trl.artifacts import write_whole
from dposhift_trl.report import ReportError, figures, write_report
from dposhift_trl.report.__main__ import main
from dposhift_trl.report.drawing import Drawing
from dposhift_trl.report.pair_scores import metrics_of_pairs
from dposhift_trl.report.run_folder import read_run
from dposhift_trl.training.metrics import PairScores, evaluation_metrics, pair_metrics


BETA = 0.2


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """The output folder of a stock `DPOTrainer`, evaluated before, during and after training."""
    args = DPOConfig(
        str(tmp_path_factory.mktemp("stock") / "run"), beta=BETA, max_steps=4, learning_rate=1e-2, seed=3,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=2,
        eval_on_start=True, logging_steps=1, save_steps=2, bf16=False, use_cpu=True, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(tiny_model, args=args, train_dataset=make_rows(16), eval_dataset=make_rows(8, seed=1))
    trainer.train()
    trainer.save_state()
    trainer.create_model_card()
    return Path(args.output_dir)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy without weights."""
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "*.pt")))


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(
        figures, "draw", lambda name, title, alt, figure: Drawing(name, title, alt, b"", b"", "<svg/>")
    )


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def with_log(folder: Path, history: list[dict]) -> Path:
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 4}))
    return folder


def test_rewards_over_beta_are_the_log_ratios_of_a_real_run(folder):
    run = read_run(folder, BETA)
    before, after = (entry for entry in log_of(folder) if "eval_loss" in entry and entry["step"] in (0, 4))
    for answer in ("chosen", "rejected"):
        # Before training the policy is the reference
        moved = after[f"eval_logps/{answer}"] - before[f"eval_logps/{answer}"]
        assert moved != 0
        assert run.last[f"displacement/{answer}"] == pytest.approx(moved, abs=1e-5)
    assert run.beta == pytest.approx(BETA, rel=1e-5)
    assert run.lambda_text == "λ 1"
    assert "without an interval" in str(run.verdict)
    assert run.verdict.headline.startswith(f"Chosen answers {(run.verdict.tiles[0].value > 0 and 'rose') or 'fell'}")
    assert "(no interval)" in run.verdict.headline
    (note,) = [note for note in run.notes if "stock `DPOTrainer`" in note]
    assert "beta, 0.2 (from --beta)" in note
    assert "python -m dposhift_trl.diagnose" in note
    assert not [note for note in run.notes if "audit.json" in note]


def test_the_page_of_a_stock_run_shows_its_log_ratios(folder, undrawn, here, tmp_path):
    output = here(folder, "--beta", BETA, "--output", tmp_path / "out").out
    assert output.splitlines()[0] == read_run(folder, BETA).verdict.headline
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Chosen log-ratio, nats per answer" in page
    assert "stock <code>DPOTrainer</code>" in page


def test_the_log_of_the_newest_checkpoint_is_read_if_there_is_no_other(folder):
    (folder / "trainer_state.json").unlink()
    run = read_run(folder, BETA)
    assert run.last["step"] == 4
    assert any("checkpoint-4" in note for note in run.notes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("training_args.yaml", "stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\n", id="LLaMA-Factory"),
        pytest.param("training_args.json", '{"beta": 0.2, "loss_type": ["sigmoid"], "adam_beta1": 0.9}', id="TRL"),
        pytest.param("config.yml", "rl: dpo\nrl_beta: 0.2\n", id="axolotl"),
        pytest.param("config.yaml", "rl: dpo\ntrl:\n  beta: 0.2\n", id="axolotl-section"),
        pytest.param("README.md", "# Card\n\n```yaml\nrl: dpo\nrl_beta: 0.2\n```\n", id="axolotl-card"),
        pytest.param("README.md", "| Setting | Value |\n| --- | --- |\n| beta | 0.2 |\n", id="table"),
    ],
)
def test_beta_is_read_from_text_files(name, text, folder):
    (folder / name).write_text(text)
    run = read_run(folder)
    assert run.beta == pytest.approx(BETA, rel=1e-5)
    assert any(f"0.2 ({name})" in note for note in run.notes)


def test_the_pickled_arguments_are_not_read(folder, here):
    assert list(folder.glob("**/training_args.bin"))
    error = here(folder, code=2).err
    assert "No text file in it names beta. Pass --beta" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param({"a.yaml": "beta: 0.1", "b.yaml": "beta: 0.3"}, "0.1 (a.yaml), 0.3 (b.yaml)", id="two-betas"),
        pytest.param({"a.yaml": "beta: -1"}, "No text file in it names beta", id="negative"),
        pytest.param({"a.yaml": "beta: true"}, "No text file in it names beta", id="true"),
        pytest.param(
            {"a.yaml": "beta: [", "b.json": "[]", "README.md": "```yaml\n&a [*a\n```"}, "Pass --beta", id="bad"
        ),
        pytest.param({"config.json": '{"beta": 0.1}'}, "No text file in it names beta", id="of-the-model"),
        pytest.param({"vocab.json": '{"beta": 3}'}, "No text file in it names beta", id="token"),
        pytest.param({"a.yaml": "pref_beta: 0.1\npref_loss: simpo"}, "must have a reference, got simpo", id="simpo"),
        pytest.param({"a.yaml": "rl: orpo\nbeta: 0.1"}, "must have a reference, got orpo", id="orpo"),
        pytest.param({"a.yaml": "rl: ipo\nbeta: 0.1"}, "the loss must not be ipo (a.yaml)", id="axolotl-ipo"),
        pytest.param({"a.yaml": "pref_beta: 0.1\npref_loss: ipo"}, "rewards per token", id="LLaMA-Factory-ipo"),
    ],
)
def test_without_one_beta_or_a_reference_one_line_says_what_is_needed(files, says, folder, here):
    for name, text in files.items():
        (folder / name).write_text(text)
    error = here(folder, code=2).err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("reward", [-0.7, 0.7])
def test_without_beta_the_direction_is_known(reward, folder, here):
    error = here(with_log(folder, [{"step": 4, "eval_rewards/chosen": reward}]), code=2).err
    assert f"became {'less' if reward < 0 else 'more'} likely" in error


@pytest.mark.parametrize("beta", ["0", "-0.1", "nan", "inf", "x"])
def test_beta_is_a_number_above_0(beta, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), f"--beta={beta}"])
    assert stopped.value.code == 2
    assert "must be a finite number above 0" in capsys.readouterr().err


def test_a_given_beta_wins_over_a_file_and_the_note_says_so(folder):
    (folder / "a.yaml").write_text("beta: 0.5")
    run = read_run(folder, BETA)
    assert run.beta == pytest.approx(BETA, rel=1e-5)
    assert any("from --beta; a.yaml says 0.5" in note for note in run.notes)


def test_rewards_that_are_log_probabilities_are_refused(folder):
    log = [{"step": step, "rewards/chosen": BETA * -step, "logps/chosen": -float(step)} for step in (1, 2)]
    with pytest.raises(ReportError, match="the run had no reference"):
        read_run(with_log(folder, log), BETA)


def test_without_evaluations_the_last_logs_of_training_count_and_the_note_says_so(folder):
    log = [
        {"step": step, "rewards/chosen": -0.1 * step, "rewards/rejected": -1.0, "rewards/margins": 1.0 - 0.1 * step,
         "rewards/accuracies": 0.75, "logps/chosen": -50.0, "loss": 0.6}
        for step in range(1, 21)
    ]  # fmt: skip
    run = read_run(with_log(folder, [*log, {"step": 20, "train_runtime": 1.0}]), BETA)
    assert run.last["displacement/chosen"] == pytest.approx(-0.1 * 15.5 / BETA)
    assert "fell by 7.75 nats per answer" in str(run.verdict)
    assert any("the mean of the last 10 logs of training (steps 11 to 20)" in note for note in run.notes)
    assert not any("without a verdict" in note for note in run.notes)


def test_an_evaluation_set_with_a_name_counts(folder):
    log = [{"step": 4, "eval_test_rewards/chosen": -1.0, "eval_test_rewards/rejected": -2.0, "eval_test_loss": 0.5}]
    run = read_run(with_log(folder, log), BETA)
    assert run.last["displacement/chosen"] == -1.0 / BETA
    assert not any("there are no evaluations" in note for note in run.notes)


def test_a_log_with_log_ratios_of_its_own_is_not_divided(folder):
    log = [
        {"step": 4, "eval_rewards/chosen": -1.0, "eval_displacement/chosen": -5.0, "eval_displacement/rejected": -6.0}
    ]
    run = read_run(with_log(folder, log), 0.7)
    assert run.last["displacement/chosen"] == -5.0
    assert run.lambda_text == "λ unknown"


# Scores of pairs alone


def scored(count: int, fall: float = -3.0) -> PairScores:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2)]
    reference = torch.full((count,), -50.0, dtype=torch.float64)
    tokens = torch.arange(5, 5 + count, dtype=torch.float64)
    return PairScores(
        reference + fall + noise[0], reference - 20 + noise[1], reference, reference, tokens, tokens + 2,
        torch.full((count,), 0.9, dtype=torch.float64), torch.zeros(count), torch.arange(count),
    )  # fmt: skip


def test_the_metrics_of_saved_pairs_are_those_that_the_evaluation_logged():
    pairs = scored(40)
    columns = {
        name: column.to_numpy()
        for name, column in zip(pairs.as_table().column_names, pairs.as_table().columns, strict=True)
    }
    logged = pair_metrics(pairs, BETA) | evaluation_metrics(pairs, BETA)
    found = metrics_of_pairs(columns, BETA)
    assert found == pytest.approx({name: logged[name] for name in found}, rel=1e-12)
    assert {
        "perplexity/chosen",
        "displacement/chosen_low",
        "displacement/chosen_fell_high",
        "shift/lambda",
    } <= found.keys()


def test_pairs_without_lengths_or_with_scores_that_are_not_finite_are_counted_without_them():
    columns = {
        "chosen_logratios": np.array([-1.0, math.nan, -3.0]),
        "rejected_logratios": np.array([-5.0, -5.0, -5.0]),
    }
    found = metrics_of_pairs(columns, 1.0)
    assert found["displacement/chosen"] == -2.0
    assert found["rewards/margins"] == 3.0
    assert not any(name.startswith(("perplexity", "logps")) for name in found)
    assert metrics_of_pairs({"chosen_logratios": columns["chosen_logratios"]}, 1.0) == {}
    assert metrics_of_pairs({name: values[1:2] for name, values in columns.items()}, 1.0) == {}


def test_a_folder_with_scores_of_pairs_alone_gets_its_verdict_and_page(tmp_path, undrawn):
    for step, fall in ((0, 0.0), (8, -3.0)):
        write_whole(tmp_path / "pairs" / f"eval-{step:06d}.parquet", scored(40, fall).as_table())
    run = read_run(tmp_path)
    chosen, _, margin, accuracy = run.verdict.tiles
    assert chosen.low < chosen.value < chosen.high < 0
    assert (margin.rating, accuracy.rating) == ("good", "good")
    assert "The preference was learned" in str(run.verdict)
    assert run.lambda_text == "λ 0.9"
    assert any(
        "computed from the scores of pairs, with margins at beta 1: pass `--beta`" in note for note in run.notes
    )
    assert read_run(tmp_path, BETA).last["rewards/margins"] == pytest.approx(BETA * run.last["rewards/margins"])
    page = write_report([tmp_path], tmp_path / "report").read_text()
    assert run.verdict.headline.split(";")[0] in page or str(run.verdict)[:60] in page
    assert "Row 0" in page or "Row 1" in page


def test_broken_scores_of_pairs_alone_are_noted(tmp_path, undrawn):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "eval-000008.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"chosen_logratios": [1.0]}), tmp_path / "pairs" / "eval-000004.parquet")
    run = read_run(tmp_path)
    assert "There is no verdict" in str(run.verdict)
    assert any("eval-000008.parquet cannot be read" in note for note in run.notes)
