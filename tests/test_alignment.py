"""The last layer's gradients of two answers, against autograd; and lambda for the pairs where they agree."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.alignment import ALIGNMENT, gradient_alignment
from dposhift_trl.trainer import TrainingStopped


# Of every second pair the answers share a word; the end of all is cut off
ROWS, EVAL_ROWS = (
    Dataset.from_list(
        [
            {
                "prompt": f"w{i} w{i + 1} ",
                "chosen": f"w{i} w{i + 2} w{i + 3}",
                "rejected": f"w{i + (i % 2) * 9} w30 w31",
            }
            for i in rows
        ]
    )
    for rows in (range(16), range(16, 28))
)
CUT = {"max_length": 4}


def by_autograd(model, batch):
    """Inner products of the gradients with respect to the head's weight alone, from the logits of each row."""
    head = model.get_output_embeddings()
    gradients = []
    for ids, real, scored in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        hidden = model.base_model(input_ids=ids[None], attention_mask=real[None]).last_hidden_state[0].detach()
        weight = head.weight.detach().clone().requires_grad_()
        logits = hidden @ weight.t()
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        log_probs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        gradients.append(torch.autograd.grad((log_probs * scored[1:]).sum(), weight)[0])
    chosen, rejected = gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]
    return (
        torch.stack([(w * r).sum() for w, r in zip(chosen, rejected, strict=True)]),
        torch.stack([(w * w).sum() for w in chosen]),
    )


@pytest.mark.parametrize("capped", [False, True])
def test_the_products_are_those_of_the_gradients(capped, tiny_model):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if capped:
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=42, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5,
            )
        )  # fmt: skip
    model = model.double().eval()
    rows = [
        {"prompt_ids": [2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [4, 7]},
        {"prompt_ids": [9], "chosen_ids": [8], "rejected_ids": [8, 8, 8, 1]},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [1, 2], "rejected_ids": [1, 2]},
    ]
    batch = DataCollatorForPreference(pad_token_id=1)(rows)
    found, expected = gradient_alignment(model, batch), by_autograd(model, batch)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-10)  # of an identical pair both are the norm


def make(model, settings, eval_rows=None, peft=None, **changes):
    args = DPOShiftConfig(**{**settings, **CUT, **changes})
    return DPOShiftTrainer(model, args=args, train_dataset=ROWS, eval_dataset=eval_rows, peft_config=peft)


@pytest.mark.parametrize("kind", ["full", "lora", "rows"])
def test_lambda_is_for_the_pairs_whose_gradients_agree_and_one_for_the_others(kind, tiny_model, settings):
    peft = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True) if kind == "lora" else None
    changes = {"shared_prompt": False} if kind == "rows" else {}
    trainer = make(tiny_model, settings, EVAL_ROWS, peft, shift_lambda=0.4, per_pair_lambda=True, **changes)
    scores = []
    record = trainer._file_pair_metrics

    def spy(logs, mode):
        scores.extend((mode, matrix) for _, matrix in trainer._pair_scores[mode])
        record(logs, mode)

    trainer._file_pair_metrics = spy
    trainer.train()
    metrics = trainer.evaluate()
    model, collator = (
        AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        DataCollatorForPreference(pad_token_id=1, **CUT),
    )
    for mode, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        matrix = torch.cat([matrix for m, matrix in scores if m == mode])
        aligned = {row: gradient_alignment(model, collator([dataset[row]]))[0].item() for row in range(len(dataset))}
        assert 0 < sum(value > 0 for value in aligned.values()) < len(aligned)
        for row, shift_lambda in matrix[:, [8, 6]].tolist():
            assert shift_lambda == (0.4 if aligned[int(row)] > 0 else 1.0)
    aligned = torch.tensor(trainer.eval_dataset[ALIGNMENT][:]) > 0
    assert metrics["eval_shift/lambda"] == pytest.approx(torch.where(aligned, 0.4, 1.0).mean().item(), rel=1e-6)


def test_it_changes_the_weights_and_all_pairs_at_lambda_one_are_dpo(tiny_model, settings):
    weights = {}
    for name, changes in {
        "fixed": {"shift_lambda": 0.4}, "per pair": {"shift_lambda": 0.4, "per_pair_lambda": True},
        "dpo": {"shift_lambda": 1.0}, "per pair at 1": {"shift_lambda": 1.0, "per_pair_lambda": True},
    }.items():  # fmt: skip
        trainer = make(tiny_model, settings, **changes)
        trainer.train()
        weights[name] = torch.cat([x.flatten() for x in trainer.model.parameters()])
    assert not torch.allclose(weights["fixed"], weights["per pair"], atol=1e-5)
    assert not torch.allclose(weights["dpo"], weights["per pair"], atol=1e-5)
    assert torch.allclose(weights["dpo"], weights["per pair at 1"], rtol=1e-4, atol=1e-6)


def test_it_is_refused_where_it_cannot_be_measured(tiny_model, settings):
    with pytest.raises(ValueError, match="`per_pair_lambda` must be left out with `precompute_ref_log_probs: false`"):
        DPOShiftConfig(**settings, per_pair_lambda=True, precompute_ref_log_probs=False)
    with pytest.raises(TypeError, match="`per_pair_lambda` must be true or false, got 'yes'"):
        DPOShiftConfig(**settings, per_pair_lambda="yes")
    args = DPOShiftConfig(**settings, per_pair_lambda=True)
    with pytest.raises(ValueError, match="`per_pair_lambda` must be left out with streams"):
        DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS.to_iterable_dataset())
    args = DPOShiftConfig(**settings, per_pair_lambda=True, disable_dropout=False)
    with pytest.raises(ValueError, match=r"`per_pair_lambda` must be left out with .* dropout"):
        DPOShiftTrainer(tiny_model, args=args, train_dataset=ROWS)


def test_a_stream_to_evaluate_has_no_measured_gradients(tiny_model, settings):
    trainer = make(tiny_model, settings, per_pair_lambda=True, shift_lambda=0.5)
    with pytest.raises(TrainingStopped, match="`per_pair_lambda` needs rows whose gradients were measured"):
        trainer.evaluate(EVAL_ROWS.to_iterable_dataset())


def test_rows_that_were_measured_are_trained_on_with_lambda_for_all_where_that_is_asked_for(tiny_model, settings):
    measured = make(tiny_model, settings, per_pair_lambda=True, shift_lambda=0.5).train_dataset
    assert ALIGNMENT in measured.column_names
    args = DPOShiftConfig(**settings, shift_lambda=0.5, precompute_ref_log_probs=False)
    trainer = DPOShiftTrainer(tiny_model, args=args, train_dataset=measured)
    trainer.train()
    assert trainer.state.log_history[0]["shift/lambda"] == 0.5
