"""The callbacks: which of them sets lambda, and what checkpoints save of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer, LambdaScheduleCallback
from dposhift_trl.training.callbacks import AdaptiveLambdaCallback, configured_schedule
from dposhift_trl.training.checks import TrainingStopped


ROWS = make_rows(24)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True)


def at(callback, args, global_step, max_steps):
    callback.on_step_begin(args, TrainerState(global_step=global_step, max_steps=max_steps), TrainerControl())
    return callback.shift_lambda


def test_progress_is_the_share_of_completed_steps(args):
    callback = LambdaScheduleCallback(lambda progress: 1 - 0.5 * progress)
    assert [at(callback, args, step, 4) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_before_training_lambda_is_that_of_progress_zero():
    assert LambdaScheduleCallback(lambda progress: 0.9 - 0.1 * progress).shift_lambda == 0.9


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_a_schedule_that_is_not_positive_and_finite_is_an_error(value):
    with pytest.raises(ValueError, match="`schedule` must return a lambda above 0"):
        LambdaScheduleCallback(lambda progress: value)


BAD = {
    "zero at the end": (lambda t: 1 - t, "a lambda above 0, got 0.0 at progress 1.0. Return a number in (0, 1]"),
    "zero halfway": (lambda t: abs(1 - 2 * t), "a lambda above 0, got 0.0 at progress 0.5."),
    "not finite": (lambda t: 1.0 if t < 0.3 else float("nan"), "a lambda above 0, got nan at progress 0.3."),
    "raises": (lambda t: 1 / (1 - t), "a number, got ZeroDivisionError (float division by zero) at progress 1.0. Ret"),
    "nothing": (lambda t: None, "a number, got TypeError"),
}


@pytest.mark.parametrize(("schedule", "message"), BAD.values(), ids=BAD)
def test_a_schedule_that_fails_anywhere_is_refused_when_it_is_passed(schedule, message):
    with pytest.raises(ValueError, match=re.escape(f"`schedule` must return {message}")):
        LambdaScheduleCallback(schedule)


def test_a_schedule_is_a_function():
    with pytest.raises(TypeError, match=r"`schedule` must be a function of progress, got 0\.5\. Write for example"):
        LambdaScheduleCallback(0.5)


def test_a_schedule_is_tried_at_the_steps_of_the_run_before_the_first(args):
    callback = LambdaScheduleCallback(lambda t: 0.0 if t == 2 / 7 else 1.0)  # not a multiple of 1 / 1000
    with pytest.raises(ValueError, match=r"got 0\.0 at progress 0\.2857"):
        callback.on_train_begin(args, TrainerState(max_steps=7), TrainerControl())
    callback.on_train_begin(args, TrainerState(global_step=3, max_steps=7), TrainerControl())  # resumed after it


def test_a_schedule_above_one_is_refused_before_the_model_is_loaded(settings):
    callback = LambdaScheduleCallback(lambda progress: 1 + progress)
    with pytest.raises(ValueError, match=r"must not exceed 1, got 1\.001 at progress 0\.001"):
        DPOShiftTrainer("no/model", args=DPOShiftConfig(**settings), train_dataset=ROWS, callbacks=[callback])


@pytest.mark.parametrize("last", [False, True], ids=["halfway", "last step"])
def test_a_schedule_that_fails_in_training_stops_it_after_the_step_is_saved(last, tiny_model, settings):
    class Fails(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == (3 if last else 1):
                trainer.lambda_callback.schedule = lambda progress: -0.5

    callbacks = [LambdaScheduleCallback(lambda progress: 0.9), Fails()]
    trainer = make_trainer(tiny_model, settings, callbacks)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    step, progress = (4, 1.0) if last else (2, 0.5)
    assert str(stopped.value) == (
        f"`schedule` must return a lambda above 0, got -0.5 at progress {progress}. Return a number in (0, 1] for "
        f"every progress in [0, 1]. Step {step} is saved."
    )
    checkpoint = Path(settings["output_dir"]) / f"checkpoint-{step}"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    assert logged(trainer, "shift/lambda") == [0.9] * step
    if not last:  # and training goes on from there with a schedule that holds
        resumed = make_trainer(tiny_model, settings, [LambdaScheduleCallback(lambda progress: 0.9)])
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert logged(resumed, "shift/lambda") == [0.9] * 4


def test_a_schedule_above_one_needs_the_flag(args):
    callback = LambdaScheduleCallback(lambda progress: 1 + progress)
    assert at(callback, args, 0, 4) == 1.0
    with pytest.raises(ValueError, match=r"must not exceed 1, got 1\.25 at progress 0\.25"):
        at(callback, args, 1, 4)
    args.allow_lambda_above_one = True
    assert at(callback, args, 1, 4) == 1.25


def test_a_schedule_with_a_plain_dpo_config_is_an_error(tiny_model, settings):
    callback = LambdaScheduleCallback(lambda progress: 0.3)
    with pytest.raises(
        ValueError, match="must be a `DPOShiftConfig` with a `LambdaScheduleCallback`, got a `DPOConfig`"
    ):
        DPOShiftTrainer(tiny_model, args=DPOConfig(**settings), train_dataset=ROWS, callbacks=[callback])


def make_trainer(model, settings, callbacks=None, **changes):
    args = DPOShiftConfig(**{**settings, **changes})
    return DPOShiftTrainer(model, args=args, train_dataset=ROWS, callbacks=callbacks)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Half(LambdaScheduleCallback):
    """A schedule that can be passed as a class."""

    def __init__(self):
        super().__init__(lambda progress: 0.5)


@pytest.mark.parametrize("callback", [LambdaScheduleCallback(lambda progress: 0.5), Half], ids=["instance", "class"])
def test_a_schedule_that_is_added_replaces_the_configured_one(callback, tiny_model, settings):
    trainer = make_trainer(tiny_model, settings, shift_lambda=0.9)
    trainer.add_callback(callback)
    assert trainer.shift_lambda == 0.5
    trainer.train()
    assert logged(trainer, "shift/lambda") == [0.5] * 4
    trainer.create_model_card()
    card = (Path(settings["output_dir"]) / "README.md").read_text()
    assert "a function of progress, given in code" in card
    assert "0.9" not in card.split("lambda schedule")[1].splitlines()[0]


def test_a_schedule_can_be_added_after_the_configured_one_was_removed(tiny_model, settings):
    trainer = make_trainer(tiny_model, settings, shift_lambda=0.9)
    trainer.remove_callback(trainer.lambda_callback)
    trainer.add_callback(LambdaScheduleCallback(lambda progress: 0.5))
    assert trainer.shift_lambda == 0.5


SECOND = "`callbacks` must contain at most one `LambdaScheduleCallback`, got 2. Pass one"
BESIDE_ADAPTIVE = "`lambda_schedule='adaptive'` is not supported with a `(LambdaScheduleCallback|Half)` in `callbacks`"


@pytest.mark.parametrize("second", [LambdaScheduleCallback(lambda progress: 0.6), Half], ids=["instance", "class"])
def test_a_second_schedule_is_an_error_whose_remedy_works(second, tiny_model, settings):
    first = LambdaScheduleCallback(lambda progress: 0.5)
    with pytest.raises(ValueError, match=SECOND):
        make_trainer(tiny_model, settings, callbacks=[first, second])
    trainer = make_trainer(tiny_model, settings, callbacks=[first])
    with pytest.raises(ValueError, match=SECOND):
        trainer.add_callback(second)
    assert trainer.lambda_callback is first
    trainer.remove_callback(first)  # the remedy
    trainer.add_callback(second)
    assert trainer.shift_lambda in (0.5, 0.6)
    assert trainer.lambda_callback is not first


@pytest.mark.parametrize("own", [LambdaScheduleCallback(lambda progress: 0.5), Half], ids=["instance", "class"])
def test_a_schedule_next_to_the_adaptive_one_is_an_error(own, tiny_model, settings):
    with pytest.raises(ValueError, match=BESIDE_ADAPTIVE):
        make_trainer(tiny_model, settings, callbacks=[own], lambda_schedule="adaptive")
    trainer = make_trainer(tiny_model, settings, lambda_schedule="adaptive")
    with pytest.raises(ValueError, match=BESIDE_ADAPTIVE):
        trainer.add_callback(own)
    assert type(trainer.lambda_callback) is AdaptiveLambdaCallback


def test_an_adaptive_schedule_with_equal_bounds_is_a_constant_lambda(settings):
    args = DPOShiftConfig(**settings, lambda_schedule="adaptive", lambda_min=0.8, lambda_max=0.8)
    callback = configured_schedule(args)
    assert type(callback) is LambdaScheduleCallback
    assert [callback.schedule(progress) for progress in (0.0, 0.5, 1.0)] == [0.8] * 3


@pytest.mark.parametrize("as_class", [False, True], ids=["instance", "class"])
def test_other_callbacks_are_added_unchanged(as_class, tiny_model, settings):
    steps = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer = make_trainer(tiny_model, settings, shift_lambda=0.9)
    configured = trainer.lambda_callback
    trainer.add_callback(Spy if as_class else Spy())
    assert trainer.lambda_callback is configured
    trainer.train()
    assert steps == [1, 2, 3, 4]
    assert logged(trainer, "shift/lambda") == [0.9] * 4


def test_with_a_plain_dpo_config_there_is_no_lambda(tiny_model, settings):
    trainer = DPOShiftTrainer(tiny_model, args=DPOConfig(**settings), train_dataset=ROWS)
    assert not hasattr(trainer, "shift_lambda")
    assert not hasattr(trainer, "lambda_callback")


@pytest.mark.parametrize("restore", [False, True], ids=["", "restored callbacks"])
def test_the_token_count_continues_from_the_checkpoint_and_not_from_the_last_log(restore, tiny_model, settings):
    settings |= {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = make_trainer(tiny_model, settings)
    whole.train()
    counts = logged(whole, "num_tokens")
    assert len(counts) == 2
    assert counts[1] > counts[0] > 0
    resumed = make_trainer(tiny_model, settings, restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-4")
    assert logged(resumed, "num_tokens") == counts


def test_a_checkpoint_without_a_count_resumes_from_the_last_log(tiny_model, settings):
    """Earlier versions did not save the count."""
    settings |= {"logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tiny_model, settings)
    whole.train()
    path = Path(settings["output_dir"]) / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["TokenCountCallback"]
    path.write_text(json.dumps(state))
    resumed = make_trainer(tiny_model, settings)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")


def test_a_second_train_call_restarts_adaptive_lambda(tiny_model, settings):
    trainer = make_trainer(tiny_model, settings, lambda_schedule="adaptive", lambda_target=3.0, max_steps=8)
    trainer.train()
    first = logged(trainer, "shift/lambda")
    assert trainer.shift_lambda < first[0]
    trainer.train()
    assert logged(trainer, "shift/lambda")[0] == first[0]


def test_a_run_twice_as_long_has_the_same_lambdas_at_the_same_progress(args):
    """The time constants of adaptive lambda are shares of the run: 1 / 15 and 1 / 3 of its steps."""
    lambdas = {}
    for max_steps in (300, 600):
        callback = AdaptiveLambdaCallback(0.0, "displacement/chosen", 0.2, 1.0)
        state = TrainerState(max_steps=max_steps)
        callback.on_train_begin(args, state, TrainerControl())
        assert callback.controller.smoothing_steps == max_steps / 15
        assert callback.controller.integral_steps == max_steps / 3
        matrix = torch.zeros(2, 9, dtype=torch.float64)
        matrix[:, 0] = torch.tensor([-1.3, 0.7])  # 0.3 standard deviations below the target
        taken = []
        for step in range(max_steps):
            callback.observe(matrix)
            state.global_step = step + 1
            callback.on_step_end(args, state, TrainerControl())
            taken.append(callback.shift_lambda)
        lambdas[max_steps] = taken[max_steps // 10 - 1 :: max_steps // 10]
    assert lambdas[600] == pytest.approx(lambdas[300], abs=0.01)
    assert 0.2 < lambdas[300][-1] < lambdas[300][0] - 0.1
