"""What a run prints while it trains: lines that fit, numbers in columns, and a status line that leaves no trace."""

import doctest
import re
from types import SimpleNamespace

import pytest
import torch
from test_run import write_recipe

from dposhift_trl import ChosenSFTTrainer, console
from dposhift_trl.pipeline import header, progress
from dposhift_trl.pipeline.progress import ProgressLines
from dposhift_trl.run import main as main
from dposhift_trl.sweep import launch
from dposhift_trl.training.checks import TrainingStopped


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_recipe(tmp_path, tiny_model)


@pytest.fixture
def terminal(monkeypatch):
    """Let the command believe that it prints to a terminal of some width."""

    def set_width(columns, can_rewrite=True):
        for module in (console, progress):
            monkeypatch.setattr(module, "columns", lambda: columns)
        monkeypatch.setattr(progress, "is_terminal", lambda: can_rewrite)
        monkeypatch.setattr(progress, "REFRESH", 0.0)

    return set_width


def test_examples():
    assert doctest.testmod(progress).failed == 0


PREFERENCE = {
    "loss": 0.6612, "rewards/margins": 0.0517, "rewards/accuracies": 0.594, "displacement/chosen": -1.234,
    "displacement/chosen_fell": 0.18, "shift/lambda": 0.875, "learning_rate": 1e-6,
}  # fmt: skip
EXTREME = {
    "loss": 123.4, "rewards/margins": -44.4, "rewards/accuracies": 1.0, "displacement/chosen": -1098.0,
    "displacement/chosen_fell": 1.0, "shift/lambda": 1.0, "learning_rate": 1e-6,
}  # fmt: skip
LANGUAGE = {"loss": 7.097, "mean_token_accuracy": 0.27, "learning_rate": 3e-3}
ARGS = SimpleNamespace(disable_tqdm=True)


def lines(capsys, columns, logs, max_steps=20, lambda_varies=False):
    """A log and an evaluation as they are printed."""
    printer = ProgressLines("dpo", lambda_varies)
    state = SimpleNamespace(global_step=0, max_steps=max_steps, is_world_process_zero=True)
    printer.on_train_begin(ARGS, state, None)
    printer.on_step_begin(ARGS, state, None)
    state.global_step = 2
    printer.on_step_end(ARGS, state, None)
    printer.on_log(ARGS, state, None, logs=logs)
    printer.on_log(ARGS, state, None, logs={f"eval_{name}": value for name, value in logs.items()})
    return capsys.readouterr().out.splitlines()


def test_a_log_and_the_evaluation_beneath_it_are_aligned(capsys, terminal):
    terminal(120, can_rewrite=False)
    step, evaluation = lines(capsys, 120, PREFERENCE, lambda_varies=True)
    start = "step  2/20  loss .661  margin +.05  acc .59  chosen -1.2 (18% fell)  lambda .875"
    assert step.startswith(start)
    assert re.fullmatch(r"  +[.\d]+ s/step  eta 0:0\d", step.removeprefix(start).replace("  .", "   ."))
    assert evaluation.startswith(start.replace("step", "eval"))


@pytest.mark.parametrize("logs", [PREFERENCE, EXTREME, LANGUAGE], ids=["usual", "extreme", "language"])
@pytest.mark.parametrize("max_steps", [20, 150, 60_000])
@pytest.mark.parametrize("lambda_varies", [False, True])
def test_no_line_wraps_at_80_columns_and_what_matters_is_in_it(logs, max_steps, lambda_varies, capsys, terminal):
    terminal(80, can_rewrite=False)
    printed = lines(capsys, 80, logs, max_steps, lambda_varies)
    assert all(len(line) < 80 for line in printed)
    names = ["loss", *(["margin", "chosen", "fell"] if "rewards/margins" in logs else ["perplexity"])]
    names += ["lambda"] if lambda_varies and "shift/lambda" in logs else []
    assert all(name in line for line in printed for name in names)


def test_without_a_terminal_nothing_is_left_out(capsys, terminal):
    terminal(None, can_rewrite=False)
    step, _ = lines(capsys, None, PREFERENCE, 60_000, lambda_varies=True)
    assert all(name in step for name in ("acc", "lambda", "s/step", "eta"))
    assert "\r" not in step


def test_a_run_prints_a_header_and_a_line_for_each_log_and_no_dictionary(recipe, here):
    done = here(recipe)
    assert "  steps    6, 4 pairs each\n" in done.out
    assert re.search(r"^  device   cpu \(.*, \d+ cores\), 1 process, float32$", done.out, re.MULTILINE)
    assert "  lambda   1 -> 0.75 (linear_decrease), beta 0.1\n" in done.out
    assert "  scoring  shared tokens read once; reference precomputed\n" in done.out
    assert "  metrics  none\n" in done.out
    printed = re.findall(r"^(step|eval) (\d)/6 ", done.out, re.MULTILINE)
    logged = [("step", step) for step in "123456"]
    for place, step in ((0, "0"), (3, "2"), (6, "4"), (9, "6")):
        logged.insert(place, ("eval", step))
    assert printed == logged * 2
    assert "{" not in done.out
    assert done.out.rstrip().splitlines()[-1].startswith("The log-probability of the chosen answers")


@pytest.mark.parametrize(
    ("threads", "processes", "device", "advice"),
    [
        (1, 1, "cpu", "process 8"),
        (1, 2, "cpu", "process 4"),
        (1, 5, "cpu", None),
        (4, 1, "cpu", None),
        (1, 1, "cuda", None),
    ],
)
def test_cores_that_a_run_leaves_idle_are_told(threads, processes, device, advice, monkeypatch):
    monkeypatch.setattr(header, "usable_cores", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    told = header._idle_cores(SimpleNamespace(device=torch.device(device), world_size=processes))
    assert told is None if advice is None else told.endswith(f"--num_cpu_threads_per_{advice}`.")


def test_a_run_can_print_dictionaries_as_before(recipe, here):
    done = here(recipe, "sft=null", "logging_format=dict", "dpo.disable_tqdm=true")
    assert done.out.count("{'loss': ") == 6
    assert done.out.count("{'eval_loss': ") == 4
    assert "step 1/6" not in done.out


def test_why_shared_tokens_are_not_read_once_is_in_the_header(recipe, here):
    done = here(recipe, "sft=null", "dpo.disable_dropout=false", "dpo.max_steps=1", "dpo.eval_strategy=no")
    scoring = "both rows of each pair read (with dropout, each row draws its own mask); reference scored at each step"
    assert f"  scoring  {scoring}\n" in done.out


def test_no_logs_but_the_evaluations_where_none_were_asked_for(recipe, here):
    done = here(recipe, "sft=null", "dpo.logging_strategy=no")
    assert re.findall(r"^(step|eval) ", done.out, re.MULTILINE) == ["eval"] * 4


def shown(out):
    """What a terminal shows of lines that are written over each other."""
    return [line.split("\r\033[K")[-1] for line in out.split("\n")]


def test_the_status_line_of_a_terminal_leaves_no_trace(recipe, here, terminal):
    terminal(80)
    # By default it depends on the verbosity of transformers in this process
    done = here(recipe, "sft=null", "dpo.per_device_eval_batch_size=4", "dpo.disable_tqdm=false")
    drawn = re.findall(r"\r\033\[K(dpo [^\r\n]*)", done.out)
    assert any("evaluating, batch 1 of 2" in line for line in drawn), drawn
    assert any(re.fullmatch(r"dpo 3/6  \[#{10}-{10}\]  eta \d+:\d\d", line) for line in drawn)
    assert all(len(line) < 80 for line in drawn)
    assert not any(line.startswith("dpo 3/6") for line in shown(done.out))


def test_no_status_line_with_disable_tqdm(recipe, here, terminal):
    terminal(80)
    assert "\r" not in here(recipe, "sft=null", "dpo.disable_tqdm=true").out


def test_an_error_in_training_is_on_a_line_of_its_own(recipe, here, terminal, monkeypatch):
    terminal(80)
    step = ChosenSFTTrainer.training_step

    def fail(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise TrainingStopped("no more")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ChosenSFTTrainer, "training_step", fail)
    done = here(recipe, "dpo=null", code=1)
    assert done.err.endswith("\nno more\n")
    assert shown(done.out)[-1] == ""


@pytest.mark.parametrize(("width", "expected"), [(None, 1), (40, 3)])
def test_a_paragraph_is_wrapped_to_the_terminal(width, expected, monkeypatch):
    monkeypatch.setattr(console, "columns", lambda: width)
    found = console.wrapped("word " * 20)
    assert len(found) == expected
    assert width is None or all(len(line) <= width for line in found)


def test_a_sweep_finds_the_step_and_the_error_among_the_lines(tmp_path):
    lines = "eval   0/150  loss .693\nstep  20/150  loss .661\n"
    bars = "Map: 100%|##| 2400/2400 [00:00<00:00]\n"
    (tmp_path / "log").write_text(f"{bars}step 300/300  loss 3.1\n{bars}{lines}")
    assert launch._progress(tmp_path / "log") == "step 20 of 150"
    (tmp_path / "log").write_text(" 13%|#3 | 20/150 [00:01<00:09]\n 50%|### | 1/2 [00:01<00:01]\n")
    assert launch._progress(tmp_path / "log") == "step 20 of 150"
    assert launch.last_error(f"`x` must be y\n{lines}") == "`x` must be y"
