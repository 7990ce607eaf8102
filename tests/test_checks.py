"""What stops training on purpose, each check by itself; test_trl_seam.py and test_trainer.py have them in training."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dposhift_trl.columns import with_row_index
from dposhift_trl.training.checks import (
    TrainingStopped,
    check_rows_left,
    check_starts_at_reference,
    stop_on_non_finite,
    unreachable_dropout,
)
from dposhift_trl.training.metrics import PairScores


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def scores(chosen, rejected, ref_chosen=-50.0, ref_rejected=-50.0, loss=0.7):
    count = len(chosen)
    constants = [ref_chosen, ref_rejected, 5.0, 7.0, 0.5, loss]
    columns = [chosen, rejected, *([value] * count for value in constants), range(count)]
    return PairScores(*(torch.tensor(list(column), dtype=torch.float64) for column in columns))


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
def test_a_split_without_examples_is_refused(stream):
    rows = make_rows(2).to_iterable_dataset() if stream else make_rows(2)
    check_rows_left(rows, "train", 8)
    message = "No eval examples left: every prompt is at least as long as `max_length` (8). Raise `max_length`."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_rows_left(rows.filter(lambda row: False), "eval", 8)


# A share of the log-probability, -50 here, or of one nat where that is more
@pytest.mark.parametrize(("half_precision", "allowed"), [(False, 1e-4), (True, 0.02)], ids=["float32", "half"])
@pytest.mark.parametrize("answer", ["chosen", "rejected"])
@pytest.mark.parametrize("logp", [-50.0, -0.1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_policy_may_differ_from_its_reference_by_rounding_alone(half_precision, allowed, answer, logp, sign, model):
    def check(difference):
        logps = {"chosen": [logp] * 2, "rejected": [logp] * 2}
        logps[answer][1] += sign * difference
        matrix = scores(**logps, ref_chosen=logp, ref_rejected=logp).as_matrix()
        check_starts_at_reference(matrix, model, half_precision=half_precision)

    tolerance = allowed * max(abs(logp), 1.0)
    check(0.9 * tolerance)
    with pytest.raises(TrainingStopped, match=re.escape(f"differ by up to {1.1 * tolerance:.4g} nats per answer")):
        check(1.1 * tolerance)


def stopped_by(model):
    with pytest.raises(TrainingStopped) as stopped:
        check_starts_at_reference(scores([-48.0], [-50.0]).as_matrix(), model, half_precision=True)
    return str(stopped.value)


def test_the_likely_cause_is_named(model):
    message = stopped_by(model)
    assert message.startswith("The reference is not the policy: before the first step their log-probabilities differ")
    assert f"is loaded from {model.config._name_or_path!r}, not copied from the model in memory" in message
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(model, config)
    assert "which does not start at zero. Pass the model that the adapter was put on" in stopped_by(adapted)
    adapted.peft_config["default"].init_lora_weights = "gaussian"
    assert "(`init_lora_weights='gaussian'`). Set `init_lora_weights=True`, or pass" in stopped_by(adapted)
    adapted.add_adapter("ref", config)
    assert "is the copy of the adapter that TRL makes under the name `ref`. Pass the model" in stopped_by(adapted)


def test_dropout_that_no_module_holds_is_found():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=8, num_hidden_layers=2, attention_dropout=0.25, **sizes)
    model = LlamaForCausalLM(config)
    assert unreachable_dropout(model) == ["`LlamaAttention.attention_dropout=0.25`"]
    assert "`disable_dropout` does not reach `LlamaAttention.attention_dropout=0.25`." in stopped_by(model)
    model.router_jitter_noise, model.drop = 0.1, {"first": 0.0, "second": 0.5}
    assert "`LlamaForCausalLM.router_jitter_noise=0.1`" in unreachable_dropout(model)
    assert "`LlamaForCausalLM.drop=0.5`" in unreachable_dropout(model)
    config.attention_dropout = 0.0
    assert unreachable_dropout(LlamaForCausalLM(config)) == []
    assert unreachable_dropout(torch.nn.Dropout(0.5)) == []  # which `disable_dropout` reaches


ROWS = with_row_index(make_rows(6))


def stop(pairs, folder, rows=ROWS, save=True):
    with pytest.raises(TrainingStopped) as stopped:
        stop_on_non_finite(pairs, 7, "eval", rows, folder, {"lambda": 0.5, "rate": float("inf")}, save=save)
    path = folder / "non_finite_at_step_7" / "rows.json"
    return str(stopped.value), json.loads(path.read_text()) if path.exists() else None


def test_the_pairs_that_are_not_finite_are_saved_with_their_texts(tmp_path):
    pairs = scores([-48.0, float("nan"), -46.0, float("-inf")], [-52.0, float("inf"), -51.0, -50.0])
    pairs.batch_loss[:] = float("nan")
    pairs.row_index = torch.tensor([5.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    message, saved = stop(pairs, tmp_path, ROWS.select([4, 2, 1, 0]))
    assert "not finite at step 7 (eval), rows [2, 1]. Their scores and texts are in" in message
    assert (saved["step"], saved["split"], saved["lambda"], saved["rate"]) == (7, "eval", 0.5, "Infinity")
    texts = [{name: ROWS[row][name] for name in ("prompt", "chosen", "rejected")} for row in (2, 1)]
    assert [row.pop("row") for row in saved["rows"]] == texts
    found = [(row["row_index"], row["chosen_logps"], row["rejected_logps"]) for row in saved["rows"]]
    assert found == [(2.0, "NaN", "Infinity"), (1.0, "-Infinity", -50.0)]


def test_where_the_loss_alone_is_not_finite_the_whole_batch_is_saved(tmp_path):
    message, saved = stop(scores([-48.0, -46.0], [-52.0, -51.0], loss=float("nan")), tmp_path)
    assert "rows [0, 1]" in message
    assert [row["batch_loss"] for row in saved["rows"]] == ["NaN", "NaN"]


@pytest.mark.parametrize(
    "rows", [None, make_rows(4), make_rows(4).to_iterable_dataset()], ids=["none", "table", "stream"]
)
def test_rows_without_numbers_have_no_texts(rows, tmp_path):
    _, saved = stop(scores([float("nan")], [-52.0]), tmp_path, rows)
    assert saved["rows"][0]["row"] == {"prompt": None, "chosen": None, "rejected": None}


def test_a_number_that_no_row_has_gets_no_text(tmp_path):
    pairs = replace(scores([float("nan")], [-52.0]), row_index=torch.tensor([-1.0]))
    assert stop(pairs, tmp_path)[1]["rows"][0]["row"]["prompt"] is None


def test_one_process_alone_writes(tmp_path):
    message, saved = stop(scores([float("nan")], [-52.0]), tmp_path, save=False)
    assert "rows [0]" in message
    assert saved is None
