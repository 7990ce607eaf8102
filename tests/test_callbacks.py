import pytest
from conftest import make_rows
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig

from dposhift_trl import DPOShiftTrainer, LambdaScheduleCallback


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True)


def at(callback, args, global_step, max_steps):
    callback.on_step_begin(args, TrainerState(global_step=global_step, max_steps=max_steps), TrainerControl())
    return callback.shift_lambda


def test_progress_is_completed_steps_over_all_steps(args):
    callback = LambdaScheduleCallback(lambda progress: 1 - 0.5 * progress)
    assert [at(callback, args, step, 4) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_before_any_training_lambda_is_that_of_progress_zero():
    assert LambdaScheduleCallback(lambda progress: 0.9 - 0.1 * progress).shift_lambda == 0.9


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_a_schedule_that_leaves_the_positive_numbers_is_stopped(value):
    with pytest.raises(ValueError, match="`schedule` must return a lambda above 0"):
        LambdaScheduleCallback(lambda progress: value)


def test_a_schedule_above_one_needs_the_flag(args):
    callback = LambdaScheduleCallback(lambda progress: 1 + progress)
    assert at(callback, args, 0, 4) == 1.0
    with pytest.raises(ValueError, match=r"must not exceed 1, got 1\.25 at progress 0\.25"):
        at(callback, args, 1, 4)
    args.allow_lambda_above_one = True
    assert at(callback, args, 1, 4) == 1.25


def test_trls_own_config_takes_no_lambda_and_says_so(tiny_model, settings):
    callback = LambdaScheduleCallback(lambda progress: 0.3)
    with pytest.raises(ValueError, match="`args` must be a `DPOShiftConfig` if a `LambdaScheduleCallback` sets"):
        DPOShiftTrainer(tiny_model, args=DPOConfig(**settings), train_dataset=make_rows(4), callbacks=[callback])
