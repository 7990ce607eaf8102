"""The reference of a trainer, and what the copy on which TRL's loss is taken leaves behind."""

import json

import pytest
import torch
from conftest import make_rows
from transformers import AutoModelForCausalLM

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer, LambdaScheduleCallback
from dposhift_trl.training.checks import TrainingStopped
from dposhift_trl.training.references import lack_scores


ROWS = make_rows(12)


def make(model, settings, trainer_class=DPOShiftTrainer, collator=None, **changes):
    args = DPOShiftConfig(**{**settings, **changes})
    return trainer_class(
        model, args=args, data_collator=collator, train_dataset=ROWS, eval_dataset=make_rows(6, seed=1)
    )


@pytest.mark.parametrize("precompute", [None, True, False], ids=["auto", "precomputed", "online"])
@pytest.mark.parametrize("shared", ["auto", False], ids=["shared", "rows"])
def test_the_collator_of_another_trainer_trains_as_one_of_its_own(shared, precompute, tiny_model, settings):
    first = make(tiny_model, settings, shared_prompt=shared)
    losses = []
    for collator in (None, first.data_collator):
        options = {"collator": collator, "shared_prompt": False, "precompute_ref_log_probs": precompute}
        trainer = make(tiny_model, settings, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 2


def test_what_a_subclass_counts_in_its_loss_is_kept(tiny_model, settings):
    class Counting(DPOShiftTrainer):
        seen = 0

        def _compute_loss(self, model, inputs, return_outputs):
            self.seen += 1
            return super()._compute_loss(model, inputs, return_outputs)

    trainer = make(tiny_model, settings, Counting, max_steps=3)
    trainer.train()
    assert trainer.seen == 3


def test_rows_lack_scores_until_the_reference_has_scored_them(tiny_model, settings):
    trainer = make(tiny_model, settings)
    assert not lack_scores(trainer.train_dataset)
    assert lack_scores(ROWS)
    assert lack_scores(ROWS.to_iterable_dataset())
    assert not lack_scores([1, 2])


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_scores_that_are_not_finite_are_reported_with_the_rows_that_were_predicted(tiny_model, settings, tmp_path):
    trainer = make(tiny_model, {**settings, "output_dir": str(tmp_path)}, shared_prompt=False)
    trainer.train()
    with torch.no_grad():
        trainer.model.transformer.wte.weight.fill_(float("nan"))
    rows = trainer.train_dataset.select([2, 3])
    with pytest.raises(TrainingStopped):
        trainer.predict(rows)
    (report,) = tmp_path.glob("non_finite_at_step_*/rows.json")
    found = [entry["row"]["chosen"] for entry in json.loads(report.read_text())["rows"]]
    assert found == [ROWS[2]["chosen"], ROWS[3]["chosen"]]


def test_no_checkpoint_is_saved_after_training_scores_that_are_not_finite_though_an_evaluation_follows(
    tiny_model, settings, tmp_path
):
    trainer = make(tiny_model, {**settings, "output_dir": str(tmp_path), "max_steps": 1})
    trainer.train()
    (_, matrix), *_ = trainer._recorder._batches["train"] or [(0, torch.zeros(1, 9))]
    trainer._recorder.add("train", 1, torch.full_like(matrix, float("nan")))
    trainer.model.eval()
    with pytest.raises(TrainingStopped, match="not finite at step 1"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_trainer_whose_schedule_was_removed_says_what_to_add(tiny_model, settings):
    trainer = make(tiny_model, settings)
    trainer.remove_callback(LambdaScheduleCallback)
    with pytest.raises(AttributeError, match=r"No callback sets lambda\. Add a `LambdaScheduleCallback`"):
        trainer.train()


def test_a_schedule_that_cannot_be_created_leaves_the_configured_one(tiny_model, settings):
    trainer = make(tiny_model, settings, shift_lambda=0.8)
    with pytest.raises(TypeError):
        trainer.add_callback(LambdaScheduleCallback)
    assert trainer.shift_lambda == 0.8


def test_an_explicit_reference_waits_on_the_cpu_and_is_the_same_object(tiny_model, settings):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    args = DPOShiftConfig(**settings)
    trainer = DPOShiftTrainer(tiny_model, reference, args, train_dataset=ROWS)
    assert trainer.ref_model is reference
    assert {weight.device.type for weight in reference.parameters()} == {"cpu"}
