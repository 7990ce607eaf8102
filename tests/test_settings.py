"""The settings in force: none changes silently, and card, trackers and log name what trained."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import make_rows
from transformers import TrainerCallback
from trl import SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer, LambdaScheduleCallback
from dposhift_trl.training.settings import READ_LATER, READ_ONCE


ROWS, EVAL_ROWS = make_rows(8), make_rows(5, seed=1)


@pytest.fixture
def make(tiny_model, settings):
    def make(callbacks=None, eval_dataset=None, **changes):
        args = DPOShiftConfig(**{**settings, "max_steps": 2, **changes})
        return DPOShiftTrainer(
            tiny_model, args=args, train_dataset=ROWS, eval_dataset=eval_dataset, callbacks=callbacks
        )

    return make


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    args = DPOShiftConfig(
        str(tmp_path_factory.mktemp("out")), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, max_steps=1,
    )  # fmt: skip
    return DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS, eval_dataset=EVAL_ROWS)


@pytest.mark.parametrize("name", sorted(READ_ONCE))
def test_a_setting_that_is_changed_after_it_was_read_is_an_error(name, trainer, monkeypatch):
    old = getattr(trainer.args, name)
    monkeypatch.setattr(trainer.args, name, [*old, "sft"] if isinstance(old, list) else "changed")
    for work in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=rf"`args\.{name}` must not change after the trainer was created, which"):
            work()


def test_the_error_names_both_values_and_what_to_do(trainer, monkeypatch):
    monkeypatch.setattr(trainer.args, "shift_lambda", 0.5)
    message = (
        "`args.shift_lambda` must not change after the trainer was created, which read 0.95, got 0.5. Pass the new "
        "value to `DPOShiftConfig` and create another trainer."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.train()


def test_a_list_of_settings_that_is_changed_in_place_is_an_error(make):
    trainer = make(loss_type=["sigmoid"])
    trainer.args.loss_type.append("sft")
    with pytest.raises(ValueError, match=r"`args\.loss_type` must not change"):
        trainer.train()


def test_a_setting_that_is_changed_during_training_is_an_error(make):
    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.beta = 0.5

    with pytest.raises(
        ValueError, match=r"`args\.beta` must not change after the trainer was created, which read 0\.1"
    ):
        make(callbacks=[Changes()]).train()


def test_settings_that_are_read_later_take_effect(make):
    """Each is either refused or read: the two sets are all settings that transformers does not have."""
    ours = {f.name for f in dataclasses.fields(DPOShiftConfig)}
    assert ours >= READ_ONCE | READ_LATER
    trainer = make(eval_dataset=EVAL_ROWS)
    trainer.args.save_pair_scores = False
    trainer.args.num_train_epochs = 7  # of transformers, read by `train`
    trainer.train()
    trainer.evaluate()
    assert not list(Path(trainer.args.output_dir).glob("pairs/*"))


def card(trainer):
    trainer.create_model_card()
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    return dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| l"))


def reported(trainer):
    """What trackers get from transformers' callbacks."""
    return {
        name: trainer.args.to_dict()[name] for name in ("lambda_schedule", "shift_lambda", "lambda_min", "lambda_max")
    }


def test_card_and_trackers_name_the_settings_that_trained(make):
    trainer = make(lambda_schedule="linear_decrease")
    trainer.train()
    trainer.args.shift_lambda, trainer.args.learning_rate = 0.5, 1.0  # too late
    found = card(trainer)
    assert (found["lambda schedule"], found["lambda"]) == ("linear_decrease", "0.75 to 1.0")
    assert found["learning rate"] == "0.01"
    assert reported(trainer)["lambda_schedule"] == "linear_decrease"


@pytest.mark.parametrize("added_later", [False, True])
def test_card_and_trackers_name_the_function_that_trained(added_later, make):
    callback = LambdaScheduleCallback(lambda progress: 1 - 0.5 * progress)
    trainer = make(callbacks=None if added_later else [callback])
    if added_later:
        trainer.add_callback(callback)
    trainer.train()
    assert (card(trainer)["lambda schedule"], card(trainer)["lambda"]) == (
        "a function of progress, given in code",
        "0.5 to 1.0",
    )
    assert reported(trainer) == {
        "lambda_schedule": "a function of progress, given in code",
        "shift_lambda": None,
        "lambda_min": 0.5,
        "lambda_max": 1.0,
    }
    assert json.loads(trainer.args.to_json_string())["shift_lambda"] is None
    assert [e["shift/lambda"] for e in trainer.state.log_history if "shift/lambda" in e] == [1.0, 0.75]


def test_a_schedule_that_is_changed_in_the_callback_takes_effect_and_is_named(make):
    trainer = make(shift_lambda=0.9)
    trainer.lambda_callback.schedule = lambda progress: 0.6
    trainer.train()
    assert (card(trainer)["lambda"], reported(trainer)["lambda_max"]) == ("0.6", 0.6)
    assert [e["shift/lambda"] for e in trainer.state.log_history if "shift/lambda" in e] == [0.6, 0.6]


def test_a_callback_that_says_what_the_settings_say_is_named_as_they_are(make):
    trainer = make(callbacks=[LambdaScheduleCallback(lambda progress: 0.8)], shift_lambda=0.8)
    assert (card(trainer)["lambda schedule"], reported(trainer)["shift_lambda"]) == ("fixed", 0.8)


def test_a_callback_with_hooks_of_its_own_is_named_without_a_range(make):
    class Own(LambdaScheduleCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.shift_lambda = 0.3

    trainer = make(callbacks=[Own(lambda progress: 1.0)])
    trainer.train()
    assert card(trainer)["lambda schedule"] == "`Own`, given in code"
    assert "lambda" not in card(trainer)
    assert reported(trainer)["lambda_max"] is None


def test_an_adaptive_lambda_is_named_with_its_target(make):
    trainer = make(lambda_schedule="adaptive", lambda_target=-0.5)
    trainer.train()
    found = card(trainer)
    assert (found["lambda schedule"], found["lambda"]) == ("adaptive", "0.75 to 1.0")
    assert found["lambda target"] == "-0.5 (displacement/chosen)"
    assert reported(trainer)["lambda_schedule"] == "adaptive"


# The best checkpoint of several evaluation sets

BEST = {"load_best_model_at_end": True} | {
    f"{work}_{setting}": value for work in ("eval", "save") for setting, value in (("strategy", "steps"), ("steps", 1))
}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (None, "eval_first_dpo_loss"),
        ("rewards/margins", "eval_first_rewards/margins"),
        ("second_dpo_loss", "second_dpo_loss"),
        ("eval_second_loss", "eval_second_loss"),
    ],
)
def test_the_best_checkpoint_is_that_of_the_first_of_several_sets_unless_one_is_named(metric, expected, make):
    sets = {"first": EVAL_ROWS, "second": make_rows(4, seed=2)}
    trainer = make(eval_dataset=sets, metric_for_best_model=metric, **BEST)
    assert trainer.args.metric_for_best_model == expected
    trainer.train()
    name = f"eval_{expected.removeprefix('eval_')}"
    logged = [entry[name] for entry in trainer.state.log_history if name in entry]
    best = max if "margins" in expected else min
    assert trainer.state.best_metric == best(logged)


def test_stage_1_chooses_its_best_checkpoint_by_the_first_set_too(tiny_model, settings):
    args = SFTConfig(**{**settings, "max_steps": 1, **BEST})
    sets = {"first": EVAL_ROWS, "second": EVAL_ROWS}
    trainer = ChosenSFTTrainer(tiny_model, args=args, train_dataset=ROWS, eval_dataset=sets)
    trainer.train()
    assert trainer.args.metric_for_best_model == "eval_first_loss"
    assert trainer.state.best_metric is not None


def test_with_one_evaluation_set_the_metric_keeps_its_name(make):
    assert make(eval_dataset=EVAL_ROWS, **BEST).args.metric_for_best_model == "dpo_loss"
