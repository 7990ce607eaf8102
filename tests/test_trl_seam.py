"""
What trainer.py and collator.py take for granted of TRL, one assertion a fact, and the check of it at run time.

A test whose message begins with "TRL changed" says which line of ours to look at before anything else in the suite.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trl
from conftest import jitter, make_rows, make_tokenizer
from datasets import Dataset
from packaging.specifiers import SpecifierSet
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Trainer
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer, LambdaScheduleCallback
from dposhift_trl.columns import ROW_INDEX, with_row_index
from dposhift_trl.training.seam import ShiftedModel
from dposhift_trl.training.trainer import TRL_WINDOW, TrainingStopped


ROWS, EVAL_ROWS = make_rows(12), make_rows(8, seed=1)
SHIFTABLE = ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"]
OTHERS = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft"]
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
STOCK_COMPUTE_LOSS = DPOTrainer._compute_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny Llama, whose embedding and head are two matrices, and its tokenizer."""
    return make_folder(tmp_path_factory.mktemp("models") / "llama", LlamaConfig)


def make_folder(path, config_class, **sizes):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        pad_token_id=1, **sizes,
    )  # fmt: skip
    jitter(AutoModelForCausalLM.from_config(config), 0.1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def another(folder, size=0.05):
    """A model like the one in `folder` with other weights."""
    return jitter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), size, seed=2)


def make(trainer_class, model, settings, changes=None, rows=ROWS, eval_rows=None, **options):
    settings = {**settings, "max_steps": 2, "train_sampling_strategy": "sequential", **(changes or {})}
    args = (DPOConfig if trainer_class is DPOTrainer else DPOShiftConfig)(**settings)
    return trainer_class(model, args=args, train_dataset=rows, eval_dataset=eval_rows, **options)


class Seen:
    """A model that keeps what it was called with and what it returned."""

    def __init__(self, model, change=None):
        self.model, self.change = model, change or (lambda outputs: outputs)
        self.calls, self.outputs = [], []

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        self.outputs.append(self.change(self.model(**kwargs)))
        return self.outputs[-1]


@pytest.fixture
def stock(folder, settings):
    """A stock trainer off its reference, and its first batch with references laid in."""
    trainer = make(DPOTrainer, folder, settings, ref_model=another(folder))
    batch = next(iter(trainer.get_train_dataloader()))
    batch.update(zip(REFERENCES, trainer.compute_ref_log_probs(trainer.ref_model, batch), strict=True))
    return trainer, batch


def loss_of(trainer, batch, change=None, **swapped):
    """TRL's loss with references taken from the batch, and the model that saw the call."""
    seen = Seen(trainer.model, change)
    trainer.precompute_ref_logps = True
    return trainer._compute_loss(seen, {**batch, **swapped}, False), seen


# --- Facts of the loss -----------------------------------------------------------------------------------------------


def test_compute_loss_hands_model_and_inputs_to_the_private_method(stock, monkeypatch):
    trainer, batch = stock
    got = []
    monkeypatch.setattr(DPOTrainer, "_compute_loss", lambda self, *args: got.append(args))
    trainer.compute_loss("model", batch, True)
    assert got == [("model", batch, True)], "TRL changed: `compute_loss` passes something else to `_compute_loss`"
    parameters = list(inspect.signature(DPOTrainer.compute_loss).parameters)
    assert parameters == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"], (
        "TRL changed: the arguments of `compute_loss`"
    )


def test_the_model_is_called_once_with_labels_through_the_fused_head(stock):
    _, seen = loss_of(*stock)
    assert len(seen.calls) == 1, "TRL changed: `_compute_loss` calls its model more than once"
    assert seen.calls[0]["fused_lm_head"] is True, "TRL changed: the fused head is asked for by another name"
    assert "labels" in seen.calls[0], "TRL changed: the model is called without labels"
    labels, mask = seen.calls[0]["labels"], stock[1]["completion_mask"]
    assert torch.equal(labels != -100, mask == 1), "TRL changed: the labels are not the completions'"


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_the_logits_for_compute_metrics_come_from_a_call_without_the_fused_head(stock):
    trainer, batch = stock
    seen = Seen(trainer.model)
    trainer.precompute_ref_logps = True
    with torch.no_grad():
        trainer._compute_loss(seen, batch, True)
    assert [call.get("fused_lm_head", False) for call in seen.calls] == [True, False], (
        "TRL changed: `return_outputs` makes other calls of the model, which `ShiftedModel` counts"
    )


def test_log_probabilities_have_the_batchs_rows_one_column_fewer_and_zeros_outside_the_answers(stock):
    _, seen = loss_of(*stock)
    log_probs, mask = seen.outputs[0].log_probs, stock[1]["completion_mask"]
    assert log_probs.shape == (2 * 4, mask.shape[1] - 1), "TRL changed: the shape of `log_probs`"
    assert not (log_probs * (mask[:, 1:] == 0)).any(), "TRL changed: `log_probs` are not zero outside the answers"
    assert (log_probs[mask[:, 1:] == 1] < 0).all(), "TRL changed: `log_probs` do not cover the answers"
    assert dataclasses.is_dataclass(seen.outputs[0]), "TRL changed: the fused head's output is no dataclass to replace"
    assert log_probs.dtype == torch.float32, "TRL changed: the precision of `log_probs`"


def test_the_first_half_of_a_batch_is_the_chosen_answers(stock):
    trainer, batch = stock
    first = trainer.train_dataset[0]
    length = len(first["prompt_ids"] + first["chosen_ids"])
    assert batch["input_ids"][0, :length].tolist() == first["prompt_ids"] + first["chosen_ids"], (
        "TRL changed: the collator's first row is not the first chosen answer"
    )
    length = len(first["prompt_ids"] + first["rejected_ids"])
    assert batch["input_ids"][4, :length].tolist() == first["prompt_ids"] + first["rejected_ids"], (
        "TRL changed: the collator's second half is not the rejected answers"
    )
    likelier = torch.tensor([0.9] * 4 + [1.0] * 4)[:, None]
    better, _ = loss_of(trainer, batch, lambda o: dataclasses.replace(o, log_probs=o.log_probs * likelier))
    assert better < loss_of(trainer, batch)[0], "TRL changed: the loss takes the second half for the chosen answers"


def test_with_the_flag_set_the_loss_reads_the_two_references_from_its_inputs(stock):
    trainer, batch = stock
    trainer.ref_model = None  # not to be asked
    loss, _ = loss_of(trainer, batch)
    higher, _ = loss_of(trainer, batch, ref_rejected_logps=batch["ref_rejected_logps"] + 1)
    lower, _ = loss_of(trainer, batch, ref_chosen_logps=batch["ref_chosen_logps"] - 1)
    assert higher < loss, "TRL changed: `ref_rejected_logps` of the inputs is not read"
    assert lower < loss, "TRL changed: `ref_chosen_logps` of the inputs is not read"
    for name in REFERENCES:
        with pytest.raises(KeyError, match=name):
            loss_of(trainer, {key: value for key, value in batch.items() if key != name})


def test_the_references_are_read_only_after_the_policy_is_scored(stock):
    trainer, batch = stock
    bare = {key: value for key, value in batch.items() if key not in REFERENCES}

    class Late(Seen):
        def __call__(self, **kwargs):
            outputs = super().__call__(**kwargs)
            bare.update({name: batch[name] for name in REFERENCES})
            return outputs

    trainer.precompute_ref_logps = True
    loss = trainer._compute_loss(Late(trainer.model), bare, False)
    assert torch.equal(loss, loss_of(trainer, batch)[0]), "TRL changed: references are read before the model's call"


def test_a_gradient_flows_through_the_references_of_the_inputs(stock):
    trainer, batch = stock
    reference = batch["ref_rejected_logps"].clone().requires_grad_()
    loss, _ = loss_of(trainer, batch, ref_rejected_logps=reference)
    [gradient] = torch.autograd.grad(loss, reference, allow_unused=True)
    assert gradient is not None, "TRL changed: references are detached, and lambda's gradient with them"
    assert (gradient < 0).all(), "TRL changed: a higher rejected reference does not lower the loss"


def test_the_sigmoid_loss_is_the_closed_form_and_a_mean_over_pairs(stock):
    trainer, batch = stock
    loss, seen = loss_of(trainer, batch)
    chosen, rejected = seen.outputs[0].log_probs.sum(dim=1).chunk(2)
    z = trainer.beta * (chosen - batch["ref_chosen_logps"] - rejected + batch["ref_rejected_logps"])
    assert loss.item() == pytest.approx(F.softplus(-z).mean().item(), rel=1e-6), "TRL changed: the sigmoid loss"


def test_inputs_that_are_not_the_losss_own_go_to_the_model(stock):
    trainer, batch = stock
    _, seen = loss_of(trainer, batch, row_index=torch.arange(4))
    assert "row_index" in seen.calls[0], "TRL changed: inputs unknown to the loss are kept from the model; pop no more"
    own = {"completion_mask", *REFERENCES}
    assert not own & set(seen.calls[0]), "TRL changed: the loss's own inputs are passed to the model"


def test_reference_log_probabilities_are_the_two_halves_of_a_batch(stock):
    trainer, batch = stock
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    assert chosen.shape == rejected.shape == (4,), "TRL changed: `compute_ref_log_probs` does not return two halves"
    seen = Seen(trainer.ref_model)
    trainer.compute_ref_log_probs(seen, batch)
    whole = seen.outputs[0].log_probs.sum(dim=1)
    assert torch.equal(torch.cat([chosen, rejected]), whole), (
        "TRL changed: `compute_ref_log_probs` is no sum over tokens"
    )
    assert not chosen.requires_grad, "TRL changed: `compute_ref_log_probs` keeps a graph"
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"], (
        "TRL changed: the arguments of `compute_ref_log_probs`"
    )


def test_reference_log_probabilities_are_those_the_loss_takes_for_itself(stock):
    trainer, batch = stock
    given, _ = loss_of(trainer, batch)
    trainer.precompute_ref_logps = False
    own = trainer._compute_loss(trainer.model, {k: v for k, v in batch.items() if k not in REFERENCES}, False)
    assert torch.equal(given, own), "TRL changed: the loss's own references differ from `compute_ref_log_probs`"


@pytest.mark.parametrize("trained", [False, True], ids=["fresh_adapter", "trained_adapter"])
def test_with_an_adapter_the_reference_is_the_base_or_the_copy_named_ref(trained, folder, settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=not trained)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if trained:
        torch.manual_seed(4)
        trainer = make(DPOTrainer, get_peft_model(model, config), settings)
    else:
        trainer = make(DPOTrainer, model, settings, peft_config=config)
    assert trainer.ref_model is None, "TRL changed: a PEFT policy has a reference model of its own"
    assert ("ref" in trainer.model.peft_config) == trained, "TRL changed: the adapter named `ref`"
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        scores = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], fused_lm_head=True,
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        ).log_probs.sum(dim=1)  # fmt: skip
    before = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert torch.allclose(before, scores), (
        "TRL changed: before the first step an adapter's reference is not the policy"
    )
    jitter(trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default"), 1.0)
    after = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert torch.equal(before, after), "TRL changed: the reference follows the adapter in training"


def test_without_ref_model_a_full_policys_reference_is_read_from_its_folder(folder, settings):
    model = jitter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.5)
    trainer = make(DPOTrainer, model, settings)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    same = all(torch.equal(value, saved[name]) for name, value in trainer.ref_model.state_dict().items())
    assert same, "TRL changed: the reference is no longer reloaded, and `_check_reference_is_policy` may go"


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
def test_with_prompt_learning_the_answers_stand_in_the_last_columns(config_class, folder, settings):
    trainer = make(DPOTrainer, folder, settings, peft_config=config_class(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = next(iter(trainer.get_train_dataloader()))
    batch.update(zip(REFERENCES, trainer.compute_ref_log_probs(trainer.model, batch), strict=True))
    _, seen = loss_of(trainer, batch)
    mask = batch["completion_mask"][:, 1:]
    last = seen.outputs[0].log_probs[:, -mask.shape[1] :]
    assert torch.equal(last != 0, mask == 1), "TRL changed: where prompt learning puts the answers' log-probabilities"


# --- Facts of logging, data and everything around --------------------------------------------------------------------


def test_metrics_are_lists_by_mode_averaged_by_log_into_the_dictionary_given_and_then_cleared(stock):
    trainer, batch = stock
    loss_of(trainer, batch)
    assert set(trainer._metrics) == {"train", "eval"}, "TRL changed: the modes of `_metrics`"
    assert all(isinstance(values, list) for values in trainer._metrics["train"].values()), (
        "TRL changed: `_metrics` no longer holds lists"
    )
    trainer._metrics["train"]["ours"] = [1.0, 3.0]
    logs = {"loss": 0.5}
    trainer.model.train()
    trainer.log(logs)
    assert logs["ours"] == 2.0, "TRL changed: `log` does not average `_metrics` into the dictionary it is given"
    assert trainer._metrics["train"] == {}, "TRL changed: `log` does not clear `_metrics`"
    trainer._metrics["eval"]["ours"] = [4.0]
    trainer.model.eval()
    trainer.log(logs)
    assert logs["eval_ours"] == 4.0, "TRL changed: evaluation metrics are named otherwise"
    assert trainer.state.log_history[-1]["eval_ours"] == 4.0, "TRL changed: `log` does not fill `log_history`"


def test_the_mode_is_train_exactly_when_the_model_is_in_training_mode(stock):
    trainer, batch = stock
    for mode in ("train", "eval"):
        trainer._metrics["train"].clear(), trainer._metrics["eval"].clear()
        trainer.model.train(mode == "train")
        loss_of(trainer, batch)
        filled = [name for name in ("train", "eval") if trainer._metrics[name]]
        assert filled == [mode], "TRL changed: what makes a batch one of training"


def test_the_tokens_of_training_are_counted_in_one_attribute(stock):
    trainer, batch = stock
    trainer.model.train()
    loss_of(trainer, batch)
    assert trainer._total_train_tokens == batch["attention_mask"].sum().item(), "TRL changed: `_total_train_tokens`"


def test_the_means_that_we_replace_are_logged_by_the_loss(stock):
    trainer, batch = stock
    trainer.model.train()
    loss_of(trainer, batch)
    replaced = [name for name in trainer._metrics["train"] if name.startswith(("rewards/", "logps/"))]
    assert replaced == [
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected",
    ], "TRL changed: the names of its reward metrics"  # fmt: skip


def test_columns_that_are_not_in_the_signature_are_dropped_and_ours_is_added_to_it(stock, folder, settings):
    trainer, _ = stock
    trainer._set_signature_columns_if_needed()
    assert isinstance(trainer._signature_columns, list), "TRL changed: `_signature_columns` is no list to append to"
    assert set(REFERENCES) <= set(trainer._signature_columns), "TRL changed: the columns of references"
    assert trainer._remove_unused_columns(with_row_index(ROWS.add_column("prompt_ids", [[1]] * 12))).column_names == [
        "prompt_ids"
    ], "TRL changed: columns outside `_signature_columns` stay"
    ours = make(DPOShiftTrainer, folder, settings)
    kept = ours._remove_unused_columns(ours.train_dataset).column_names
    assert kept == [ROW_INDEX, "prompt_ids", "chosen_ids", "rejected_ids"], "TRL changed: our column is dropped"


def test_dataloaders_use_the_collator_that_the_trainer_holds_when_they_are_made(folder, settings):
    trainer = make(DPOTrainer, folder, settings, eval_rows=EVAL_ROWS)
    collator, calls = trainer.data_collator, []
    trainer.data_collator = lambda examples: calls.append(examples) or collator(examples)
    next(iter(trainer.get_train_dataloader()))
    next(iter(trainer.get_eval_dataloader()))
    assert len(calls) >= 2, "TRL changed: dataloaders do not use `data_collator`, or keep the first one"
    assert "prompt_ids" in calls[0][0], "TRL changed: what a collator is given"


def test_our_collator_says_which_row_each_pair_is(folder, settings):
    for rows in (ROWS, ROWS.to_iterable_dataset()):
        trainer = make(DPOShiftTrainer, folder, settings, rows=rows)
        batches = [batch[ROW_INDEX].tolist() for batch in trainer.get_train_dataloader()]
        if rows is not ROWS:  # those of the chosen rows, and again
            assert all(batch[: len(batch) // 2] * 2 == batch for batch in batches)
            batches = [batch[: len(batch) // 2] for batch in batches]
        assert [row for batch in batches for row in batch] == list(range(12)), (
            "TRL changed: rows lose their number on the way to the batch"
        )


def test_rows_keep_their_text_columns_after_preparation(stock):
    columns = stock[0].train_dataset.column_names
    assert {"prompt", "chosen", "rejected"} <= set(columns), "TRL changed: texts are dropped, rows.json needs them"


def test_the_trainer_has_the_attributes_we_read(stock):
    trainer, _ = stock
    expected = {
        "loss_types": ["sigmoid"], "ld_alpha": None, "beta": 0.1, "aux_loss_enabled": False,
        "precompute_ref_logps": False,
    }  # fmt: skip
    found = {name: getattr(trainer, name, "missing") for name in expected}
    assert found == expected, "TRL changed: an attribute of the trainer"
    assert trainer.ref_model is not None, "TRL changed: `ref_model`"


def test_the_flag_for_precomputed_references_is_read_at_every_loss(stock):
    trainer, batch = stock
    for flag in (True, False):
        trainer.precompute_ref_logps = flag
        seen = Seen(trainer.ref_model)
        trainer.ref_model = seen
        trainer._compute_loss(trainer.model, batch, False)
        trainer.ref_model = seen.model
        assert len(seen.calls) == (not flag), "TRL changed: `precompute_ref_logps` is not what decides at each loss"


def test_experts_announce_their_auxiliary_loss_in_one_attribute(tmp_path, settings):
    path = make_folder(tmp_path / "mixtral", MixtralConfig, num_local_experts=4)
    for coefficient in (0.5, 0.0):
        trainer = make(DPOTrainer, path, settings, {"router_aux_loss_coef": coefficient})
        assert trainer.aux_loss_enabled is bool(coefficient), "TRL changed: `aux_loss_enabled`"


def test_the_model_card_is_written_to_the_readme_of_the_output_folder(stock, settings):
    stock[0].create_model_card()
    card = Path(settings["output_dir"]) / "README.md"
    assert card.exists(), "TRL changed: `create_model_card` writes elsewhere"
    parameters = list(inspect.signature(DPOTrainer.create_model_card).parameters)
    assert parameters == ["self", "model_name", "dataset_name", "tags"], "TRL changed: arguments of the model card"


def test_a_trainers_name_paper_and_tags_are_class_attributes():
    assert DPOTrainer._name == "DPO", "TRL changed: `_name`"
    assert {"title", "id"} <= set(DPOTrainer._paper), "TRL changed: `_paper`"
    assert DPOTrainer._tag_names == ["trl", "dpo"], "TRL changed: `_tag_names`"


def test_evaluation_passes_its_prefix_by_name(folder, settings, monkeypatch):
    trainer = make(DPOTrainer, folder, settings, eval_rows={"a": EVAL_ROWS, "b": EVAL_ROWS})
    got, loop = [], Trainer.evaluation_loop
    monkeypatch.setattr(
        Trainer, "evaluation_loop", lambda self, *args, **kwargs: got.append(kwargs) or loop(self, *args, **kwargs)
    )
    trainer.evaluate()
    trainer.evaluate({"c": make_rows(4, seed=3)})
    prefixes = [kwargs.get("metric_key_prefix") for kwargs in got]
    assert prefixes == ["eval_a", "eval_b", "eval_c"], "TRL changed: how `evaluation_loop` learns the set's name"


def test_the_config_is_a_dataclass_that_checks_itself_after_construction(monkeypatch):
    ran = []
    check = DPOConfig.__post_init__
    monkeypatch.setattr(DPOConfig, "__post_init__", lambda self: ran.append(self) or check(self))
    args = DPOShiftConfig("out", use_cpu=True, bf16=False)
    assert ran == [args], "TRL changed: `__post_init__` no longer runs once, and our checks of lambda with it"
    assert dataclasses.is_dataclass(DPOConfig), "TRL changed: the config is no dataclass"
    assert args.loss_type == ["sigmoid"], "TRL changed: `loss_type` is no list"
    assert args.f_divergence_type == "reverse_kl", "TRL changed: the name of plain DPO's divergence"


def test_the_constructor_takes_its_arguments_in_this_order():
    assert list(inspect.signature(DPOTrainer.__init__).parameters) == [
        "self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
        "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config",
    ], "TRL changed: the arguments of the constructor"  # fmt: skip


def test_this_trl_is_within_the_window_that_the_message_names():
    assert SpecifierSet(TRL_WINDOW.removeprefix("trl")).contains(trl.__version__), "TRL changed: outside our window"


def test_the_window_that_the_message_names_is_the_one_the_package_asks_for():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"(trl[<>=][^"]*)"', project).group(1) == TRL_WINDOW


# --- The check at run time catches a TRL that no longer fits ---------------------------------------------------------


class Changed:
    """A model as a TRL of another kind would see it: `change` makes its outputs of the fused head into others."""

    def __init__(self, model, change):
        self.model, self.change = model, change

    def __call__(self, **kwargs):
        outputs = self.model(**kwargs)
        return self.change(outputs) if kwargs.get("fused_lm_head") else outputs


def calls_the_model_twice(self, model, inputs, return_outputs):
    class Twice(Changed):
        def __call__(self, **kwargs):
            self.model(**kwargs)
            return self.model(**kwargs)

    return STOCK_COMPUTE_LOSS(self, Twice(model, None), inputs, return_outputs)


def takes_the_rejected_half_first(self, model, inputs, return_outputs):
    def swap(outputs):
        return dataclasses.replace(outputs, log_probs=torch.cat(outputs.log_probs.chunk(2)[::-1]))

    return STOCK_COMPUTE_LOSS(self, Changed(model, swap), inputs, return_outputs)


def takes_references_of_its_own(self, model, inputs, return_outputs):
    self.precompute_ref_logps = False
    return STOCK_COMPUTE_LOSS(self, model, inputs, return_outputs)


def detaches_the_references(self, model, inputs, return_outputs):
    def detach(outputs):
        inputs.update({name: inputs[name].detach() for name in REFERENCES})
        return outputs

    return STOCK_COMPUTE_LOSS(self, Changed(model, detach), inputs, return_outputs)


def doubles_the_loss(self, model, inputs, return_outputs):
    return 2 * STOCK_COMPUTE_LOSS(self, model, inputs, return_outputs)


def sums_over_pairs(self, model, inputs, return_outputs):
    return (len(inputs["input_ids"]) // 2) * STOCK_COMPUTE_LOSS(self, model, inputs, return_outputs)


def takes_means_over_tokens(self, model, inputs, return_outputs):
    mask = inputs["completion_mask"][:, 1:]

    def mean(outputs):
        return dataclasses.replace(outputs, log_probs=outputs.log_probs / mask.sum(dim=1, keepdim=True))

    return STOCK_COMPUTE_LOSS(self, Changed(model, mean), inputs, return_outputs)


def scores_the_prompt_too(self, model, inputs, return_outputs):
    # As our side of the seam would see it: a fused head that ignores the labels
    if isinstance(model.model, torch.nn.Module):
        model.model = Changed(model.model, lambda o: dataclasses.replace(o, log_probs=o.log_probs - 1.0))
    return STOCK_COMPUTE_LOSS(self, model, inputs, return_outputs)


def has_no_fused_head(self, model, inputs, return_outputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    scores = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
    chosen, rejected = (scores * inputs["completion_mask"][:, 1:]).sum(dim=1).chunk(2)
    return -F.logsigmoid(
        self.beta * (chosen - inputs["ref_chosen_logps"] - rejected + inputs["ref_rejected_logps"])
    ).mean()


FAULTS = {
    calls_the_model_twice: "calls the model 2 times",
    takes_the_rejected_half_first: "the loss of a batch is",
    takes_references_of_its_own: "the loss of a batch is",
    detaches_the_references: "the gradient of a batch's loss",
    doubles_the_loss: "the loss of a batch is",
    sums_over_pairs: "the loss of a batch is",
    takes_means_over_tokens: "the loss of a batch is",
    scores_the_prompt_too: "not zero outside the answers",
}


def assert_stopped(trainer, words):
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(TrainingStopped) as caught:
        trainer.train()
    message = str(caught.value)
    assert words in message
    assert f"`trl` {trl.__version__} is not compatible" in message
    assert f"Install {TRL_WINDOW}" in message
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("given", [False, True], ids=["ref_from_folder", "ref_model"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_trl_that_no_longer_fits_is_stopped_on_the_first_batch(fault, given, folder, settings, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", fault)
    options = {"ref_model": another(folder)} if given else {}
    # With the shared prompt the model is not asked for the rows as TRL lays them out
    trainer = make(DPOShiftTrainer, folder, settings, {"shared_prompt": False}, **options)
    assert_stopped(trainer, FAULTS[fault])


@pytest.mark.parametrize("shift_lambda", [1.0, 0.999, 0.3])
def test_the_fault_shows_whatever_lambda_is(shift_lambda, folder, settings, monkeypatch):
    for fault in (takes_the_rejected_half_first, doubles_the_loss, calls_the_model_twice):
        monkeypatch.setattr(DPOTrainer, "_compute_loss", fault)
        assert_stopped(make(DPOShiftTrainer, folder, settings, {"shift_lambda": shift_lambda}), FAULTS[fault])


@pytest.mark.parametrize("changes", [{"bf16": True}, {"per_device_train_batch_size": 1}, {"beta": 0.01}], ids=str)
def test_the_fault_shows_in_half_precision_one_pair_or_a_small_beta(changes, folder, settings, monkeypatch):
    for fault in (takes_references_of_its_own, takes_the_rejected_half_first, detaches_the_references):
        monkeypatch.setattr(DPOTrainer, "_compute_loss", fault)
        assert_stopped(make(DPOShiftTrainer, folder, settings, changes), FAULTS[fault])


def test_the_fault_shows_in_an_evaluation_before_training(folder, settings, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", takes_references_of_its_own)
    trainer = make(DPOShiftTrainer, folder, settings, eval_rows=EVAL_ROWS)
    with pytest.raises(TrainingStopped, match="the loss of a batch is"):
        trainer.evaluate()


def test_a_fault_of_the_gradient_shows_though_an_evaluation_came_first(folder, settings, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", detaches_the_references)
    changes = {"eval_on_start": True, "eval_strategy": "steps"}
    trainer = make(DPOShiftTrainer, folder, settings, changes, eval_rows=EVAL_ROWS)
    assert_stopped(trainer, "the gradient of a batch's loss")


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": ["hinge"]}, {"loss_type": ["ipo"]}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}],
    ids=["hinge", "ipo", "sigmoid_and_sft"],
)
@pytest.mark.parametrize(
    "fault", [takes_the_rejected_half_first, takes_references_of_its_own, doubles_the_loss], ids=lambda f: f.__name__
)
def test_the_fault_shows_whatever_the_loss_type_is(fault, changes, folder, settings, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", fault)
    assert_stopped(make(DPOShiftTrainer, folder, settings, changes), FAULTS[fault])


def test_the_fault_shows_where_a_callback_of_the_users_own_moves_lambda(folder, settings, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", takes_references_of_its_own)
    callbacks = [LambdaScheduleCallback(lambda progress: 0.5)]
    trainer = make(DPOShiftTrainer, folder, settings, {"shift_lambda": 1.0}, callbacks=callbacks)
    assert_stopped(trainer, FAULTS[takes_references_of_its_own])


def test_a_trl_without_the_fused_head_is_stopped_by_name(folder, settings, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", has_no_fused_head)
    assert_stopped(make(DPOShiftTrainer, folder, settings), "")


# --- and leaves a TRL that fits alone --------------------------------------------------------------------------------


def lora(**kwargs):
    return LoraConfig(task_type="CAUSAL_LM", r=4, **kwargs)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        pytest.param({}, None, id="float32"),
        pytest.param({"bf16": True}, None, id="bf16_autocast"),
        pytest.param({"model_init_kwargs": {"dtype": "bfloat16"}}, None, id="bf16_weights"),
        pytest.param({"model_init_kwargs": {"dtype": "float16"}}, None, id="float16_weights"),
        pytest.param({"per_device_train_batch_size": 1}, None, id="one_pair"),
        pytest.param({"gradient_checkpointing": True}, None, id="checkpointing"),
        pytest.param({"precompute_ref_log_probs": True}, None, id="precomputed"),
        pytest.param({"ld_alpha": 0.3}, None, id="ld_alpha"),
        pytest.param({"disable_dropout": False}, None, id="dropout"),
        pytest.param({"beta": 1e-4}, lambda f: {"ref_model": another(f, 1.0)}, id="far_reference_small_beta"),
        pytest.param({"beta": 100.0}, lambda f: {"ref_model": another(f, 1.0)}, id="far_reference_large_beta"),
        pytest.param({"beta": 10.0, "bf16": True}, lambda f: {"ref_model": another(f, 1.0)}, id="far_reference_bf16"),
        pytest.param({}, lambda f: {"peft_config": lora()}, id="lora"),
        pytest.param({"bf16": True}, lambda f: {"peft_config": lora()}, id="lora_bf16"),
        pytest.param(
            {}, lambda f: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, id="prompt"
        ),
        pytest.param(
            {}, lambda f: {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, id="prefix"
        ),
        pytest.param({"eval_on_start": True, "eval_strategy": "steps"}, None, id="evaluation_first"),
        pytest.param({"max_length": 4}, None, id="answers_cut_away"),
        pytest.param({"shift_lambda": 1.0}, None, id="lambda_one"),
        pytest.param({"shift_lambda": 1.2, "allow_lambda_above_one": True}, lambda f: {}, id="lambda_above_one"),
    ],
)
def test_a_trl_that_fits_trains_on(changes, options, folder, settings):
    trainer = make(
        DPOShiftTrainer, folder, settings, changes, eval_rows=EVAL_ROWS, **(options(folder) if options else {})
    )
    trainer.train()
    assert trainer._seam_is_checked
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("loss_type", SHIFTABLE + OTHERS)
def test_a_trl_that_fits_trains_on_with_every_loss_type(loss_type, folder, settings):
    shift_lambda = 0.7 if loss_type in SHIFTABLE else 1.0
    changes = {"loss_type": [loss_type], "label_smoothing": 0.1, "shift_lambda": shift_lambda, "max_steps": 1}
    trainer = make(DPOShiftTrainer, folder, settings, changes, ref_model=another(folder))
    trainer.train()
    assert trainer._seam_is_checked
    assert trainer.state.global_step == 1


def test_the_check_is_made_once_and_leaves_no_trace_in_metrics_or_token_count(folder, settings, monkeypatch):
    checked, trainers = [], []
    check = DPOShiftTrainer._check_seam
    monkeypatch.setattr(DPOShiftTrainer, "_check_seam", lambda self, scored: checked.append(1) or check(self, scored))
    for skip in (False, True):
        trainer = make(DPOShiftTrainer, folder, settings)
        trainer._seam_is_checked = skip
        trainer.train()
        trainers.append(trainer)
    assert checked == [1]
    left, right = (
        [{k: v for k, v in entry.items() if "runtime" not in k and "second" not in k} for entry in t.state.log_history]
        for t in trainers
    )
    assert left == right
    assert left[0]["num_tokens"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*(t.model.parameters() for t in trainers), strict=True))


@pytest.mark.parametrize("precomputed", [False, True], ids=["online", "precomputed"])
@pytest.mark.parametrize("shift_lambda", [1.0, 0.95])
def test_at_lambda_one_and_nowhere_else_trl_is_handed_the_reference_itself(
    shift_lambda, precomputed, folder, settings, monkeypatch
):
    handed = []

    def compute_loss(self, model, inputs, return_outputs):
        result = STOCK_COMPUTE_LOSS(self, model, inputs, return_outputs)
        if type(model) is ShiftedModel:  # and not the check of the first batch
            handed.append((model.scores, inputs))
        return result

    monkeypatch.setattr(DPOTrainer, "_compute_loss", compute_loss)
    changes = {"shift_lambda": shift_lambda, "precompute_ref_log_probs": precomputed}
    make(DPOShiftTrainer, folder, settings, changes).train()
    assert len(handed) == 2
    for scores, inputs in handed:
        assert inputs["ref_chosen_logps"] is scores.ref_chosen_logps
        assert (inputs["ref_rejected_logps"] is scores.ref_rejected_logps) == (shift_lambda == 1.0)


# --- Scores that are not finite --------------------------------------------------------------------------------------

POISON = "w39"


@pytest.fixture(scope="module")
def poisoned(folder, tmp_path_factory):
    """Folder of a model that answers a row with `POISON` in it, and no other, by not-a-number."""
    path, tokenizer = tmp_path_factory.mktemp("models") / "poisoned", make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(POISON)] = float("nan")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def rows_with_poison_at(places, count=12, seed=0):
    rows = [{key: text.replace(POISON, "w38") for key, text in row.items()} for row in make_rows(count, seed)]
    for place in places:
        rows[place]["chosen"] = f" {POISON}{rows[place]['chosen']}"
    return Dataset.from_list(rows)


def stopped(action):
    """The rows of the report that the message names, the message and the report."""
    with pytest.raises(TrainingStopped) as caught:
        action()
    message = str(caught.value)
    path = Path(re.search(r"are in (\S+rows\.json)", message).group(1))
    named = json.loads(re.search(r"rows (\[[^]]*\])", message).group(1))
    return named, message, json.loads(path.read_text(encoding="utf-8"), parse_constant=no_json), path


def no_json(constant):
    raise ValueError(f"{constant} is not JSON")


def test_training_stops_at_a_score_that_is_not_finite_with_the_step_the_rows_and_their_texts(poisoned, settings):
    rows = rows_with_poison_at([6])
    trainer = make(DPOShiftTrainer, poisoned, settings, rows=rows)
    named, message, report, path = stopped(trainer.train)
    assert 6 in named
    assert "not finite at step 1 (train)" in message
    assert path == Path(settings["output_dir"]) / "non_finite_at_step_1" / "rows.json"
    assert (report["step"], report["split"], report["lambda"]) == (1, "train", 0.95)
    assert report["learning_rate"] > 0
    [row] = [entry for entry in report["rows"] if entry["row_index"] == 6]
    assert row["row"]["prompt"] == rows[6]["prompt"]
    assert POISON in row["row"]["chosen"]
    assert row["chosen_logps"] == "NaN"
    assert row["rejected_logps"] < 0
    assert trainer.state.global_step == 1
    assert all(torch.isfinite(p).all() for n, p in trainer.model.named_parameters() if "embed_tokens" not in n)


def test_evaluation_stops_at_a_score_that_is_not_finite(poisoned, settings):
    rows = rows_with_poison_at([5], count=8, seed=1)
    trainer = make(
        DPOShiftTrainer, poisoned, settings, {"eval_strategy": "steps", "eval_steps": 1}, eval_rows=rows,
        rows=rows_with_poison_at([]),
    )  # fmt: skip
    named, message, report, _ = stopped(trainer.train)
    assert 5 in named
    assert "not finite at step 1 (eval)" in message
    assert report["split"] == "eval"
    [row] = [entry for entry in report["rows"] if entry["row_index"] == 5]
    assert row["row"]["chosen"].startswith(f" {POISON} ")


def test_a_reference_that_is_not_finite_stops_training_too(folder, poisoned, settings):
    reference = AutoModelForCausalLM.from_pretrained(poisoned, dtype=torch.float32)
    trainer = make(DPOShiftTrainer, folder, settings, rows=rows_with_poison_at([6]), ref_model=reference)
    named, _, report, _ = stopped(trainer.train)
    assert 6 in named
    [row] = [entry for entry in report["rows"] if entry["row_index"] == 6]
    assert row["ref_chosen_logps"] == "NaN"
    assert row["chosen_logps"] < 0


def test_rows_given_to_evaluate_are_named_too(poisoned, settings):
    trainer = make(DPOShiftTrainer, poisoned, settings, rows=rows_with_poison_at([]))
    named, message, report, _ = stopped(lambda: trainer.evaluate(rows_with_poison_at([5], count=8, seed=7)))
    assert 5 in named
    assert "not finite at step 0 (eval)" in message
    assert report["learning_rate"] is None


@pytest.mark.parametrize(
    ("bias", "said"), [(float("inf"), "Infinity"), (-float("inf"), "-Infinity")], ids=["above", "below"]
)
def test_an_infinite_score_is_written_as_text_that_every_json_parser_reads(bias, said, folder, settings):
    trainer = make(DPOShiftTrainer, folder, settings, {"precompute_ref_log_probs": False})
    references = trainer.compute_ref_log_probs
    trainer.compute_ref_log_probs = lambda *args: tuple(logps + bias for logps in references(*args))
    _, _, report, _ = stopped(trainer.train)
    assert {row["ref_rejected_logps"] for row in report["rows"]} == {said}
    assert report["rows"][0]["chosen_logps"] < 0


def test_a_stream_names_the_row_though_it_has_no_text_to_show(poisoned, settings):
    rows = rows_with_poison_at([6]).to_iterable_dataset()
    named, _, report, _ = stopped(make(DPOShiftTrainer, poisoned, settings, rows=rows).train)
    assert 6 in named
    assert {entry["row"]["prompt"] for entry in report["rows"]} == {None}


def test_only_the_rows_whose_own_scores_are_not_finite_are_named(poisoned, settings):
    named, _, report, _ = stopped(make(DPOShiftTrainer, poisoned, settings, rows=rows_with_poison_at([5, 6])).train)
    assert named == [5, 6]
    assert len(report["rows"]) == 2


def test_in_the_very_first_batch_the_rows_are_blamed_and_not_trl(poisoned, settings):
    named, message, _, _ = stopped(make(DPOShiftTrainer, poisoned, settings, rows=rows_with_poison_at([1])).train)
    assert 1 in named
    assert "is not compatible" not in message


def test_the_texts_are_those_of_the_rows_given_to_evaluate(poisoned, settings):
    trainer = make(
        DPOShiftTrainer, poisoned, settings, rows=rows_with_poison_at([]), eval_rows=rows_with_poison_at([], 8, seed=1)
    )
    other = rows_with_poison_at([5], count=8, seed=7)
    _, _, report, _ = stopped(lambda: trainer.evaluate(other))
    [row] = [entry for entry in report["rows"] if entry["row_index"] == 5]
    assert row["row"]["prompt"] == other[5]["prompt"]


def test_the_texts_are_those_of_the_evaluation_set_at_fault(poisoned, settings):
    sets = {"near": rows_with_poison_at([], 8, seed=1), "far": rows_with_poison_at([5], 8, seed=2)}
    trainer = make(DPOShiftTrainer, poisoned, settings, rows=rows_with_poison_at([]), eval_rows=sets)
    _, _, report, _ = stopped(trainer.evaluate)
    [row] = [entry for entry in report["rows"] if entry["row_index"] == 5]
    assert row["row"]["prompt"] == sets["far"][5]["prompt"]


def test_lambda_is_logged_as_the_number_it_is(folder, settings):
    trainer = make(DPOShiftTrainer, folder, settings, {"max_steps": 1})
    trainer.train()
    assert trainer.state.log_history[0]["shift/lambda"] == 0.95
