"""
At lambda = 1 `DPOShiftTrainer` is `DPOTrainer`; at any other lambda it is the closed form, in loss and in gradient.

At lambda = 1 every weight and every logged number are equal bit for bit, with these differences, each tested below:

- `rewards/*` and `logps/*` are means over pairs in float64 where TRL takes means of batch means in float32. Over
  batches of one size they agree to 1e-5; in an evaluation whose last batch is smaller they do not, and ours are exact.
- We log more: `shift/*`, `displacement/*`, `dpo_loss` and `perplexity/chosen`, and intervals, after TRL's keys.
- With several evaluation sets we name every metric by its set; TRL names only `loss` and the timings so, and logs the
  others under one name for all.
"""

import inspect
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import jitter, make_rows, make_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    TrainerCallback,
)
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer


ROWS, EVAL_ROWS = make_rows(12), make_rows(8, seed=1)
SHIFTABLE = ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"]
OTHERS = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft"]
MEANS_OVER_PAIRS = ("rewards/", "logps/")
ADDED = [
    "shift/lambda", "shift/margins", "shift/accuracies",
    "displacement/chosen", "displacement/rejected",
    "displacement/chosen_per_token", "displacement/rejected_per_token",
    "displacement/chosen_fell", "displacement/both_rose", "displacement/only_chosen_rose",
    "displacement/only_rejected_rose", "displacement/both_fell", "dpo_loss", "perplexity/chosen",
]  # fmt: skip
ADDED_IN_EVALUATION = [
    *(f"displacement/{answer}_p{quantile}" for answer in ("chosen", "rejected") for quantile in (5, 25, 50, 75, 95)),
    *(
        f"{name}_{end}"
        for name in (
            "rewards/accuracies", "rewards/margins",
            "displacement/chosen", "displacement/rejected", "displacement/chosen_fell",
        )
        for end in ("low", "high")
    ),
]  # fmt: skip
TIMINGS = ("runtime", "samples_per_second", "steps_per_second")

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ARCHITECTURES = {
    "gpt2": (transformers.GPT2Config, {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": (transformers.LlamaConfig, SIZES),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "qwen3": (transformers.Qwen3Config, SIZES),
    "mistral": (transformers.MistralConfig, {**SIZES, "sliding_window": 8}),
    "gemma2": (transformers.Gemma2Config, {**SIZES, "tie_word_embeddings": True, "sliding_window": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {**SIZES, "tie_word_embeddings": True, "sliding_window": 8}),
    "mixtral": (transformers.MixtralConfig, {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {**SIZES, **EXPERTS}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes the folder of a tiny model of an architecture, once."""
    made = {}

    def make(architecture):
        if architecture not in made:
            config_class, sizes = ARCHITECTURES[architecture]
            path = tmp_path_factory.mktemp("models") / architecture
            torch.manual_seed(0)
            tokenizer = make_tokenizer()
            config = config_class(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1, **sizes)
            model = AutoModelForCausalLM.from_config(config)
            jitter(model, 0.1)  # else its next-token distribution is all but uniform
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[architecture] = str(path)
        return made[architecture]

    return make


def instance(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def another(path, size=0.05):
    """A model like the one in `path` with other weights."""
    return jitter(instance(path), size, seed=2)


def lora(**kwargs):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1, **kwargs)


def trained_adapter(path):
    """A PEFT model whose adapter is not at its starting point, as after SFT with LoRA."""
    torch.manual_seed(4)
    return get_peft_model(instance(path), lora(init_lora_weights=False))


def run(trainer_class, model, settings, changes=None, options=None, rows=ROWS, eval_rows=EVAL_ROWS, train=True):
    settings = {**settings, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, **(changes or {})}
    if trainer_class is DPOTrainer:
        args = DPOConfig(**settings)
    else:
        args = DPOShiftConfig(**{"shift_lambda": 1.0, "shared_prompt": False, **settings})
    trainer = trainer_class(model, args=args, train_dataset=rows, eval_dataset=eval_rows, **(options or {}))
    if train:
        trainer.train()
    return trainer


def assert_same(stock, ours, *, uneven=False):
    """The same weights, and the same log but for the differences that this file's docstring names."""
    left, right = stock.model.state_dict(), ours.model.state_dict()
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    history, mine = stock.state.log_history, ours.state.log_history
    assert len(history) == len(mine)
    for theirs, entry in zip(history, mine, strict=True):
        assert [key for key in entry if key in theirs] == list(theirs)
        prefix = "eval_" if "eval_loss" in theirs else ""
        added = [*ADDED, *(ADDED_IN_EVALUATION if prefix else [])] if {"loss", "eval_loss"} & set(theirs) else []
        added = [f"{prefix}{name}" for name in added]
        assert [key for key in entry if key not in theirs] == added
        for key, value in theirs.items():
            if key.endswith(TIMINGS):
                continue
            if not key.removeprefix("eval_").startswith(MEANS_OVER_PAIRS):
                assert entry[key] == value, key
            elif not (uneven and prefix):
                assert entry[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    # The comparison says nothing unless both trained
    assert all(entry["grad_norm"] > 0 for entry in history if "grad_norm" in entry)
    assert len({entry["loss"] for entry in history if "loss" in entry}) > 1


def assert_parity(model, settings, changes=None, options=None, **kwargs):
    """Train both, with what `model` and `options` make afresh for each, and compare."""
    fresh = [
        run(trainer_class, model(), settings, changes, options() if options else None, **kwargs)
        for trainer_class in (DPOTrainer, DPOShiftTrainer)
    ]
    assert_same(*fresh)
    return fresh


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_alike(architecture, folder, settings):
    # AutoTokenizer takes some architectures for a sign of their own tokenizer, which knows none of our words
    stock, _ = assert_parity(
        lambda: folder(architecture), settings, None, lambda: {"processing_class": make_tokenizer()}
    )
    assert stock.aux_loss_enabled == (architecture in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, id="accumulation"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            id="reentrant_checkpointing",
        ),
        pytest.param({"bf16": True}, id="bf16_autocast"),
        pytest.param({"model_init_kwargs": {"dtype": "bfloat16"}, "optim": "sgd"}, id="bf16_weights"),
        pytest.param({"bf16": True, "gradient_checkpointing": True}, id="bf16_checkpointing"),
        pytest.param({"precompute_ref_log_probs": True}, id="precomputed"),
        pytest.param(
            {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3, "ld_alpha": 0.4},
            id="precomputed_ld_alpha",
        ),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 1}, id="sync_ref_model"),
        pytest.param({"ld_alpha": 0.5}, id="ld_alpha"),
        pytest.param({"ld_alpha": 0.0}, id="ld_alpha_zero"),
        pytest.param({"max_length": 8}, id="truncation"),
        pytest.param({"pad_to_multiple_of": 16}, id="padding"),
        pytest.param({"remove_unused_columns": False}, id="all_columns"),
        pytest.param({"eval_on_start": True}, id="evaluation_first"),
        pytest.param({"logging_steps": 2, "max_steps": 5}, id="two_steps_a_log"),
        pytest.param({"lambda_schedule": "linear_decrease", "lambda_min": 1.0}, id="moving_nowhere"),
    ],
)
def test_every_way_of_training_trains_alike(changes, folder, settings):
    theirs = {key: value for key, value in changes.items() if not key.startswith("lambda_")}
    stock = run(DPOTrainer, folder("llama"), settings, theirs)
    assert_same(stock, run(DPOShiftTrainer, folder("llama"), settings, changes))


@pytest.mark.parametrize(
    ("model", "options", "changes"),
    [
        pytest.param(str, lambda path: {"peft_config": lora()}, {}, id="lora"),
        pytest.param(str, lambda path: {"peft_config": lora()}, {"bf16": True}, id="lora_bf16"),
        pytest.param(
            str, lambda path: {"peft_config": lora()}, {"gradient_checkpointing": True}, id="lora_checkpointing"
        ),
        pytest.param(
            str, lambda path: {"peft_config": lora()}, {"precompute_ref_log_probs": True}, id="lora_precomputed"
        ),
        pytest.param(
            str, lambda path: {"peft_config": lora(), "ref_model": another(path)}, {}, id="lora_explicit_ref_model"
        ),
        pytest.param(trained_adapter, None, {}, id="trained_adapter"),
        pytest.param(trained_adapter, None, {"precompute_ref_log_probs": True}, id="trained_adapter_precomputed"),
        pytest.param(trained_adapter, lambda path: {"ref_model": another(path)}, {}, id="trained_adapter_ref_model"),
        pytest.param(instance, None, {}, id="instance"),
        pytest.param(str, lambda path: {"ref_model": another(path)}, {}, id="explicit_ref_model"),
        pytest.param(str, lambda path: {"ref_model": another(path, 2.0)}, {"beta": 0.01}, id="far_ref_model"),
        pytest.param(
            str,
            lambda path: {"ref_model": another(path)},
            {"precompute_ref_log_probs": True, "bf16": True},
            id="explicit_ref_model_precomputed",
        ),
    ],
)
def test_every_policy_and_reference_train_alike(model, options, changes, folder, settings):
    path = folder("llama")
    stock, ours = assert_parity(lambda: model(path), settings, changes, (lambda: options(path)) if options else None)
    assert type(stock.model) is type(ours.model)
    assert (stock.ref_model is None) == (ours.ref_model is None)
    assert getattr(ours.model, "peft_config", {}).keys() == getattr(stock.model, "peft_config", {}).keys()


@pytest.mark.parametrize("loss_type", SHIFTABLE + OTHERS)
def test_every_loss_type_trains_alike(loss_type, folder, settings):
    # Off the reference from the first step on, so that no term is zero
    assert_parity(
        lambda: folder("llama"),
        settings,
        {"loss_type": [loss_type], "label_smoothing": 0.1, "eval_strategy": "no"},
        lambda: {"ref_model": another(folder("llama"))},
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, id="sigmoid_and_sft"),
        pytest.param({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, id="mpo"),
        pytest.param({"loss_type": ["ipo", "hinge"]}, id="ipo_and_hinge"),
        pytest.param({"f_divergence_type": "forward_kl"}, id="forward_kl"),
        pytest.param({"f_divergence_type": "js_divergence"}, id="js_divergence"),
        pytest.param({"f_divergence_type": "alpha_divergence"}, id="alpha_divergence"),
        pytest.param(
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, id="alpha_divergence_limit"
        ),
        pytest.param({"f_divergence_type": "js_divergence", "loss_type": ["hinge", "sft"]}, id="js_mixture"),
        pytest.param({"use_weighting": True}, id="weighting"),
        pytest.param({"use_weighting": True, "loss_type": ["ipo"], "ld_alpha": 0.5}, id="weighting_ipo_ld_alpha"),
    ],
)
def test_mixtures_divergences_and_weighting_train_alike(changes, folder, settings):
    path = folder("llama")
    assert_parity(lambda: path, settings, {**changes, "eval_strategy": "no"}, lambda: {"ref_model": another(path)})


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.7])
def test_experts_train_alike_at_every_weight_of_the_auxiliary_loss(coefficient, folder, settings):
    stock, ours = assert_parity(lambda: folder("mixtral"), settings, {"router_aux_loss_coef": coefficient})
    assert ours.aux_loss_enabled == stock.aux_loss_enabled == (coefficient != 0.0)
    assert ("aux_loss" in ours.state.log_history[0]) == (coefficient != 0.0)


def test_with_an_uneven_last_batch_only_the_means_over_pairs_differ_and_ours_are_the_exact_ones(folder, settings):
    uneven = make_rows(9, seed=1)
    path = folder("llama")
    stock, ours, whole = (
        run(trainer_class, path, settings, changes, {"ref_model": another(path)}, eval_rows=uneven)
        for trainer_class, changes in (
            (DPOTrainer, {}),
            (DPOShiftTrainer, {}),
            (DPOTrainer, {"per_device_eval_batch_size": 9}),
        )
    )
    assert_same(stock, ours, uneven=True)
    (theirs, _), (mine, _), (exact, _) = (
        [entry for entry in trainer.state.log_history if "eval_loss" in entry] for trainer in (stock, ours, whole)
    )
    pair_keys = [key for key in theirs if key.removeprefix("eval_").startswith(MEANS_OVER_PAIRS)]
    assert len(pair_keys) == 6
    assert {key: mine[key] for key in pair_keys} == pytest.approx({key: exact[key] for key in pair_keys}, rel=1e-5)
    assert theirs["eval_logps/chosen"] != pytest.approx(exact["eval_logps/chosen"], rel=1e-4)


# --- Forms of the constructor ----------------------------------------------------------------------------------------


def test_the_arguments_stand_where_trls_stand(folder, settings):
    path = folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainers = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (DPOShiftTrainer, DPOShiftConfig)):
        model = instance(path)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        args = config_class(
            **{**settings, "max_steps": 3},
            **({} if config_class is DPOConfig else {"shift_lambda": 1.0, "shared_prompt": False}),
        )
        callback = TrainerCallback()
        trainer = trainer_class(
            model, another(path), args, DataCollatorForPreference(pad_token_id=1, max_length=9), ROWS, EVAL_ROWS,
            tokenizer, None, [callback], (optimizer, scheduler), None, None,
        )  # fmt: skip
        assert callback in trainer.callback_handler.callbacks
        assert trainer.optimizer is optimizer
        assert trainer.processing_class is tokenizer
        trainer.train()
        assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] <= 9
        trainers.append(trainer)
    assert_same(*trainers)
    ours = [name for name, parameter in inspect.signature(DPOShiftTrainer.__init__).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]  # fmt: skip
    assert ours == list(inspect.signature(DPOTrainer.__init__).parameters)[: len(ours)]


def test_the_last_positional_argument_is_the_peft_config(folder, settings):
    args = DPOShiftConfig(**settings)
    trainer = DPOShiftTrainer(
        folder("llama"), None, args, None, ROWS, None, None, None, None, (None, None), None, lora()
    )
    assert isinstance(trainer.model, PeftModel)


def test_a_tokenizer_given_as_processing_class_is_the_one_used(folder, settings):
    path = folder("llama")

    def tokenizer():
        backwards = AutoTokenizer.from_pretrained(path)
        backwards.pad_token = "w7"
        return {"processing_class": backwards}

    stock, ours = assert_parity(lambda: instance(path), settings, None, tokenizer)
    assert stock.data_collator.pad_token_id == ours.data_collator.collator.pad_token_id == 9


def test_a_stream_of_rows_trains_alike(folder, settings):
    assert_parity(
        lambda: folder("llama"), settings,
        rows=ROWS.to_iterable_dataset(), eval_rows=EVAL_ROWS.to_iterable_dataset(),
    )  # fmt: skip


def test_rows_with_the_prompt_in_both_answers_and_rows_of_messages_train_alike(folder, settings):
    implicit = Dataset.from_list(
        [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in ROWS]
    )
    assert_parity(lambda: folder("llama"), settings, rows=implicit)
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    messages = Dataset.from_list(
        [
            {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
            for row in ROWS
        ]
    )

    def chatty():
        tokenizer = AutoTokenizer.from_pretrained(folder("llama"))
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role == 'user' and 'w0 ' or 'w1 ' }}{{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}w1 {% endif %}"
        )
        return {"processing_class": tokenizer}

    assert_parity(lambda: folder("llama"), settings, options=chatty, rows=messages)


@pytest.mark.parametrize("kind", [dict, DatasetDict], ids=["dict", "DatasetDict"])
def test_several_evaluation_sets_keep_their_metrics_apart_where_trl_names_them_alike(kind, folder, settings):
    sets = kind({"near": EVAL_ROWS, "far": make_rows(8, seed=5)})
    path = folder("llama")
    options = {"ref_model": another(path)}
    stock = run(DPOTrainer, path, settings, options=options, eval_rows=sets)
    ours = run(DPOShiftTrainer, path, settings, options={"ref_model": another(path)}, eval_rows=sets)
    evaluations = [
        [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
        for trainer in (stock, ours)
    ]
    for name, theirs, mine in zip(("near", "far") * 2, *evaluations, strict=True):
        assert theirs[f"eval_{name}_loss"] == mine[f"eval_{name}_loss"]
        assert "eval_entropy" in theirs  # TRL's name, without the set's
        assert mine[f"eval_{name}_entropy"] == theirs["eval_entropy"]
        assert mine[f"eval_{name}_rewards/margins"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-5)
        assert all(key.startswith(f"eval_{name}_") for key in mine if key.startswith("eval_"))
    everything = ours.evaluate()
    assert everything["eval_near_logps/chosen"] != everything["eval_far_logps/chosen"]


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_sees_what_it_sees_in_trl(folder, settings):
    seen = []

    def compute_metrics(prediction):
        logits = torch.as_tensor(prediction.predictions)
        seen.append((logits, torch.as_tensor(prediction.label_ids), torch.as_tensor(prediction.inputs)))
        return {"largest": logits.max().item()}

    _, ours = assert_parity(
        lambda: folder("llama"), settings, {"include_for_metrics": ["inputs", "loss"]},
        lambda: {"compute_metrics": compute_metrics},
    )  # fmt: skip
    assert "eval_largest" in ours.state.log_history[2]
    assert len(seen) == 4  # two evaluations each
    for theirs, mine in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(left, right) for left, right in zip(theirs, mine, strict=True))


def test_rows_given_to_evaluate_are_prepared_and_scored_as_trl_does(folder, settings):
    path = folder("llama")
    raw = make_rows(8, seed=9)
    stock, ours = (
        run(trainer_class, path, settings, options={"ref_model": another(path)}, train=False)
        for trainer_class in (DPOTrainer, DPOShiftTrainer)
    )
    for rows, prefix in ((raw, "eval"), ({"a": raw}, "eval"), (raw, "test"), (raw.to_iterable_dataset(), "eval")):
        theirs, mine = stock.evaluate(rows, None, prefix), ours.evaluate(rows, metric_key_prefix=prefix)
        whole = f"{prefix}_a" if isinstance(rows, dict) else prefix
        assert mine[f"{whole}_loss"] == theirs[f"{whole}_loss"]
        for key in ("rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy"):
            assert mine[f"{whole}_{key}"] == pytest.approx(theirs[f"eval_{key}"], rel=1e-5, abs=1e-5)


def test_scores_of_a_prediction_do_not_leak_into_the_next_evaluation(folder, settings):
    path = folder("llama")
    trainer = run(
        DPOShiftTrainer, path, settings, {"prediction_loss_only": True}, {"ref_model": another(path)}, train=False
    )
    before = trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    after = trainer.evaluate()
    for name in ("rewards/margins", "logps/chosen", *ADDED):
        assert after[f"eval_{name}"] == before[f"eval_{name}"], name


def test_references_precomputed_for_rows_given_to_evaluate_are_trls(folder, settings):
    stock, ours = (
        run(
            trainer_class, folder("llama"), settings, {"precompute_ref_log_probs": True},
            {"ref_model": another(folder("llama"))}, train=False,
        )
        for trainer_class in (DPOTrainer, DPOShiftTrainer)
    )  # fmt: skip
    raw = make_rows(8, seed=9)
    assert stock.evaluate(raw)["eval_loss"] == ours.evaluate(raw)["eval_loss"]


def test_references_that_lie_in_the_rows_unasked_are_ignored_as_trl_does(folder, settings):
    stale = ROWS.add_column("ref_chosen_logps", [-1.0] * 12).add_column("ref_rejected_logps", [-2.0] * 12)
    path = folder("llama")
    assert_parity(lambda: path, settings, options=lambda: {"ref_model": another(path)}, rows=stale)


def test_a_column_of_the_users_own_may_be_called_row_index(folder, settings):
    named = ROWS.add_column("row_index", [f"row {index}" for index in range(12)])
    assert_parity(lambda: folder("llama"), settings, rows=named)


# --- What TRL refuses, we refuse in its words ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        pytest.param(lambda path: {"train_dataset": None}, {}, id="no_rows"),
        pytest.param(lambda path: {"train_dataset": [{"prompt": "w1"}]}, {}, id="list_of_rows"),
        pytest.param(lambda path: {"train_dataset": DatasetDict({"train": ROWS})}, {}, id="splits_for_rows"),
        pytest.param(lambda path: (lambda m: {"model": m, "ref_model": m})(instance(path)), {}, id="policy_as_ref"),
        pytest.param(
            lambda path: {
                "model": instance(path),
                "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
            },
            {},
            id="quantized_instance",
        ),
        pytest.param(
            lambda path: {"model": trained_adapter(path), "peft_config": lora()}, {}, id="adapter_on_adapter"
        ),
        pytest.param(lambda path: {"peft_config": {"r": 4}}, {}, id="peft_config_as_dict"),
        pytest.param(lambda path: {"processing_class": "tokenizer"}, {}, id="processing_class_as_string"),
        pytest.param(lambda path: {}, {"router_aux_loss_coef": 0.1}, id="experts_wanted"),
        pytest.param(lambda path: {"peft_config": lora()}, {"sync_ref_model": True}, id="sync_and_lora"),
        pytest.param(
            lambda path: {"train_dataset": ROWS.to_iterable_dataset()},
            {"precompute_ref_log_probs": True},
            id="precompute_a_stream",
        ),
        pytest.param(
            lambda path: {"train_dataset": ROWS.add_column("image", ["x"] * 12)}, {}, id="images_for_a_text_model"
        ),
    ],
)  # fmt: skip
def test_trls_own_errors_pass_through_word_for_word(arguments, changes, folder, settings):
    path = folder("llama")
    raised = []
    for trainer_class, config_class in (
        (DPOTrainer, DPOConfig),
        (DPOShiftTrainer, partial(DPOShiftConfig, shift_lambda=1.0)),
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
            trainer_class(
                **{"model": path, "args": config_class(**{**settings, **changes}), "train_dataset": ROWS}
                | arguments(path)
            )
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": ["sigmiod"]},
        {"loss_type": ["exo_pair"]},
        {"loss_type": ["aot"], "use_weighting": True},
        {"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"},
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_losses_that_trl_refuses_are_refused_with_the_settings(changes, folder, settings):
    with pytest.raises((ValueError, NotImplementedError)):
        run(DPOTrainer, folder("llama"), settings, changes)
    with pytest.raises(
        ValueError, match=r"^`(loss_type|label_smoothing|use_weighting|f_divergence_type|sync_ref_model)` "
    ):
        DPOShiftConfig(shift_lambda=1.0, **settings, **changes)


# --- What surrounds training -----------------------------------------------------------------------------------------


def test_attributes_are_trls(folder, settings):
    changes = {"beta": 0.3, "ld_alpha": 0.5, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 2.0]}
    stock, ours = (
        run(trainer_class, folder("llama"), settings, changes, train=False)
        for trainer_class in (DPOTrainer, DPOShiftTrainer)
    )
    for name in (
        "beta", "precompute_ref_logps", "loss_types", "loss_weights", "ld_alpha", "f_divergence_type",
        "label_smoothing", "use_weighting", "aux_loss_enabled", "padding_free", "loss_is_scaled_for_ga",
        "model_accepts_loss_kwargs",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(stock, name), name
    assert set(vars(stock)) <= set(vars(ours))
    assert isinstance(ours, DPOTrainer)
    assert (stock.model.model_tags, ours.model.model_tags) == (["trl", "dpo"], ["trl", "dpo", "dpo-shift"])
    assert ours.ref_model is not ours.model


def test_the_first_step_leaves_trls_flag_for_precomputed_references_as_it_was(folder, settings):
    for precompute in (False, True):
        trainer = run(DPOShiftTrainer, folder("llama"), settings, {"precompute_ref_log_probs": precompute})
        assert trainer.precompute_ref_logps is precompute


def test_the_log_is_written_in_trls_order(folder, settings):
    stock, ours = (
        run(trainer_class, folder("llama"), settings, {"eval_on_start": True})
        for trainer_class in (DPOTrainer, DPOShiftTrainer)
    )
    shapes = [
        [(entry["step"], "eval_loss" in entry, "train_runtime" in entry) for entry in trainer.state.log_history]
        for trainer in (stock, ours)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[1] == [
        (0, True, False), (1, False, False), (2, False, False), (2, True, False), (3, False, False), (3, True, False),
        (3, False, True),
    ]  # fmt: skip


def test_the_config_is_in_training_args_bin_and_comes_back(folder, settings):
    changes = {"lambda_schedule": [[0, 1.0], [0.5, 0.75], [1, 0.9]], "shift_lambda": 0.8}
    trainer = run(DPOShiftTrainer, folder("llama"), settings, changes, train=False)
    trainer.save_model()
    back = torch.load(f"{settings['output_dir']}/training_args.bin", weights_only=False)
    assert type(back) is DPOShiftConfig
    assert back.to_dict() == trainer.args.to_dict()
    assert pickle.loads(pickle.dumps(trainer.args)).lambda_schedule == [[0.0, 1.0], [0.5, 0.75], [1.0, 0.9]]
    assert json.loads(back.to_json_string())["shift_lambda"] == 0.8


FLAGS = [
    "--output_dir",
    "out",
    "--lambda_schedule",
    "linear_decrease",
    "--lambda_min",
    "0.8",
    "--use_cpu",
    "--bf16",
    "false",
]


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_flags_parse_to_the_config(parser_class):
    [args] = parser_class((DPOShiftConfig,)).parse_args_into_dataclasses(FLAGS)
    assert (args.lambda_schedule, args.lambda_min, args.lambda_max, args.shift_lambda) == (
        "linear_decrease",
        0.8,
        1.0,
        0.95,
    )
    [args] = parser_class((DPOShiftConfig,)).parse_args_into_dataclasses(
        ["--output_dir", "out", "--lambda_schedule", "[[0, 1.0], [1, 0.75]]", "--use_cpu", "--bf16", "false"]
    )
    assert args.lambda_schedule == [[0.0, 1.0], [1.0, 0.75]]
    with pytest.raises(ValueError, match="`shift_lambda` must not exceed 1"):
        parser_class((DPOShiftConfig,)).parse_args_into_dataclasses(["--output_dir", "out", "--shift_lambda", "1.05"])


def test_every_field_of_ours_has_a_flag_and_none_hides_one_of_trls():
    ours = set(DPOShiftConfig.__dataclass_fields__) - set(DPOConfig.__dataclass_fields__)
    for name, field in DPOConfig.__dataclass_fields__.items():
        mine = DPOShiftConfig.__dataclass_fields__[name]
        if name == "precompute_ref_log_probs":  # which is "auto" unless asked for or away
            continue
        assert (mine.type, mine.default) == (field.type, field.default), name
    actions = {action.dest for action in HfArgumentParser((DPOShiftConfig,))._actions}
    assert ours <= actions


def test_a_yaml_file_parses_beside_trls_other_dataclasses_and_flags_override_it(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "model_name_or_path: some/model\n"
        "dataset_name: some/rows\n"
        "output_dir: out\n"
        "learning_rate: 5.0e-7\n"
        "loss_type: [sigmoid, sft]\n"
        "loss_weights: [1.0, 0.1]\n"
        "lambda_schedule: [[0, 1.0], [1, 0.75]]\n"
        "shift_lambda: 0.9\n"
        "use_cpu: true\n"
        "bf16: false\n"
        "use_peft: true\n"
    )
    parser = TrlParser((ScriptArguments, DPOShiftConfig, ModelConfig, DatasetMixtureConfig))
    script, args, model, mixture = parser.parse_args_and_config(
        ["--config", str(config), "--shift_lambda", "0.85", "--lora_r", "4"], fail_with_unknown_args=True
    )
    assert script.dataset_name == "some/rows"
    assert (model.model_name_or_path, model.use_peft, model.lora_r) == ("some/model", True, 4)
    assert isinstance(mixture, DatasetMixtureConfig)
    assert (args.learning_rate, args.loss_type, args.loss_weights) == (5e-7, ["sigmoid", "sft"], [1.0, 0.1])
    assert (args.shift_lambda, args.lambda_schedule) == (0.85, [[0.0, 1.0], [1.0, 0.75]])
    config.write_text("output_dir: out\nuse_cpu: true\nbf16: false\nshift_lamda: 0.9\n")
    with pytest.raises(ValueError, match="shift_lamda"):
        TrlParser((DPOShiftConfig,)).parse_args_and_config(["--config", str(config)])
    config.write_text("output_dir: out\nuse_cpu: true\nbf16: false\nshift_lambda: '0.9'\n")
    [args] = TrlParser((DPOShiftConfig,)).parse_args_and_config(["--config", str(config)])
    assert args.shift_lambda == 0.9


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("rewards/accuracies", True),
        ("eval_rewards/margins", True),
        ("logps/chosen", True),
        ("dpo_loss", False),
        ("displacement/chosen_fell", False),
        ("perplexity/chosen", False),
        ("displacement/chosen_p5", True),
        ("loss", False),
        (None, False),
    ],
)
def test_the_best_checkpoint_is_found_by_any_metric_and_in_its_direction(metric, greater, folder, settings):
    changes = {
        "load_best_model_at_end": True, "metric_for_best_model": metric, "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "shift_lambda": 0.8, "save_only_model": True,
    }  # fmt: skip
    path = folder("llama")
    trainer = run(DPOShiftTrainer, path, settings, changes, {"ref_model": another(path)})
    assert trainer.args.greater_is_better is greater
    key = "eval_" + (metric or "dpo_loss").removeprefix("eval_")
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(values) == 3
    assert trainer.state.best_metric == (max if greater else min)(values)
    assert trainer.state.best_global_step == values.index(trainer.state.best_metric) + 1
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{trainer.state.best_global_step}"


def test_the_best_checkpoint_of_one_evaluation_set_is_found_by_its_own_metric(folder, settings):
    changes = {
        "load_best_model_at_end": True, "metric_for_best_model": "far_rewards/margins", "eval_steps": 1,
        "save_strategy": "best", "save_only_model": True,
    }  # fmt: skip
    sets = {"near": EVAL_ROWS, "far": make_rows(8, seed=5)}
    path = folder("llama")
    trainer = run(DPOShiftTrainer, path, settings, changes, {"ref_model": another(path)}, eval_rows=sets)
    values = [e["eval_far_rewards/margins"] for e in trainer.state.log_history if "eval_far_loss" in e]
    assert trainer.state.best_metric == max(values)


# --- At another lambda: the closed form in float64 -------------------------------------------------------------------


def closed_form(loss_type, chosen, rejected, *, shift_lambda, beta, chosen_length, rejected_length, epsilon, tau=0.05):
    """Loss of each pair in float64 from its two log-ratios, each loss type as its paper writes it."""
    z = beta * (chosen - shift_lambda * rejected)
    mean = chosen / chosen_length - shift_lambda * rejected / rejected_length
    log_p, log_q = -torch.log1p(torch.exp(-z)), -torch.log1p(torch.exp(z))
    p = 1 / (1 + torch.exp(-z))
    mix = 1 / (1 + torch.exp(-z / tau))
    return {
        "sigmoid": lambda: -log_p,
        "hinge": lambda: torch.clamp(1 - z, min=0),
        "ipo": lambda: (mean - 1 / (2 * beta)) ** 2,
        "robust": lambda: (-(1 - epsilon) * log_p + epsilon * log_q) / (1 - 2 * epsilon),
        "exo_pair": lambda: (
            p * (log_p - torch.log(torch.tensor(1 - epsilon, dtype=p.dtype)))
            + (1 - p) * (log_q - torch.log(torch.tensor(epsilon, dtype=p.dtype)))
        ),
        "discopop": lambda: -log_p * (1 - mix) + torch.exp(-z) * mix,
        "sigmoid_norm": lambda: torch.log1p(torch.exp(-beta * mean)),
    }[loss_type]()


def answer_sums(per_token, mask, ld_alpha=None):
    """Log-probability of each answer, with tokens past the shorter answer of the pair weighted by `ld_alpha`."""
    lengths = mask.sum(dim=1)
    pairs = len(mask) // 2
    sums = []
    for row, (values, here) in enumerate(zip(per_token, mask.bool(), strict=True)):
        scored = values[here]
        if ld_alpha is None:
            sums.append(scored.sum())
        else:
            shorter = int(min(lengths[row % pairs], lengths[row % pairs + pairs]))
            sums.append(scored[:shorter].sum() + ld_alpha * scored[shorter:].sum())
    return torch.stack(sums).chunk(2)


def batch_loss(per_token, reference, mask, args, shift_lambda):
    """Mean loss of a batch from float64 log-probabilities per token, `loss_type` and `loss_weights` included."""
    chosen, rejected = answer_sums(per_token, mask, args.ld_alpha)
    ref_chosen, ref_rejected = answer_sums(reference, mask, args.ld_alpha)
    chosen_length, rejected_length = mask.sum(dim=1).chunk(2)
    total = 0.0
    for loss_type, weight in zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True):
        if loss_type == "sft":
            half = len(mask) // 2
            loss = -per_token[:half][mask[:half].bool()].mean()
        else:
            loss = closed_form(
                loss_type, chosen - ref_chosen, rejected - ref_rejected, shift_lambda=shift_lambda, beta=args.beta,
                chosen_length=chosen_length, rejected_length=rejected_length, epsilon=args.label_smoothing,
            ).mean()  # fmt: skip
        total = total + weight * loss
    return total


def per_token_scores(model, batch):
    """Log-probability of every next token by the model's own logits, in float64. Shape: `(2B, T - 1)`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    scores = F.log_softmax(logits.double(), dim=-1)
    return scores.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)


class Watched:
    """A model that keeps the per-token log-probabilities it returned, with their gradient."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **kwargs):
        outputs = self.model(**kwargs)
        if kwargs.get("fused_lm_head"):
            self.log_probs = outputs.log_probs
            self.log_probs.retain_grad()
        return outputs


@pytest.mark.parametrize("shift_lambda", [0.95, 0.5])
@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param({"loss_type": [loss_type]}, id=loss_type) for loss_type in SHIFTABLE),
        pytest.param({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, id="sigmoid_sft"),
        pytest.param({"loss_type": ["ipo", "robust", "sft"], "loss_weights": [0.5, 2.0, 0.1]}, id="ipo_robust_sft"),
        pytest.param({"ld_alpha": 0.4}, id="ld_alpha"),
        pytest.param({"loss_type": ["hinge"], "ld_alpha": 0.0}, id="hinge_ld_alpha_zero"),
    ],
)
def test_loss_and_gradient_are_those_of_the_closed_form(changes, shift_lambda, folder, settings):
    path = folder("llama")
    changes = {"beta": 0.3, "label_smoothing": 0.1, **changes, "shift_lambda": shift_lambda}
    trainer = run(DPOShiftTrainer, path, settings, changes, {"ref_model": another(path)}, train=False)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    watched = Watched(trainer.model)
    loss = trainer.compute_loss(watched, batch)
    loss.backward()
    mask = batch["completion_mask"][:, 1:]
    per_token = watched.log_probs.detach().double().requires_grad_()
    with torch.no_grad():
        reference = per_token_scores(trainer.ref_model.eval(), batch)
        own = per_token_scores(trainer.model.eval(), batch)
    assert torch.allclose(per_token * mask, own * mask, atol=1e-5)
    expected = batch_loss(per_token, reference, mask, trainer.args, shift_lambda)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert per_token.grad.abs().max() > 0
    found = watched.log_probs.grad.double() * mask  # outside the answers it reaches no weight
    assert torch.allclose(found, per_token.grad, rtol=1e-4, atol=1e-6)
    # The shift is in it: at lambda = 1 the gradient is another
    plain = per_token.detach().requires_grad_()
    batch_loss(plain, reference, mask, trainer.args, 1.0).backward()
    assert not torch.allclose(found, plain.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        pytest.param(None, {}, id="full"),
        pytest.param({"peft_config": lora(init_lora_weights=False)}, {"disable_dropout": True}, id="lora"),
        pytest.param(None, {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(None, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, id="mixture"),
    ],
)
def test_a_step_over_an_accumulation_window_is_that_of_the_closed_form(options, changes, folder, settings):
    """SGD over two batches of two, against autograd through a float64 copy of the model and the closed form."""
    path = folder("llama")
    rate, shift_lambda = 0.5, 0.6
    trainer = run(
        DPOShiftTrainer, path, settings,
        {
            "optim": "sgd", "learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "beta": 0.3,
            "train_sampling_strategy": "sequential", "shift_lambda": shift_lambda, "eval_strategy": "no", **changes,
        },
        {"ref_model": another(path), **(options or {})}, rows=ROWS.select(range(4)), train=False,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    after = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    model = trainer.model.eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(before[name])
    model.double(), trainer.ref_model.double()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    loss = 0.0
    for batch in batches:
        with torch.no_grad():
            reference = per_token_scores(trainer.ref_model, batch)
        mask = batch["completion_mask"][:, 1:]
        loss = loss + batch_loss(per_token_scores(model, batch), reference, mask, trainer.args, shift_lambda) / 2
    gradients = torch.autograd.grad(loss, list(trained.values()))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    moved = 0.0
    for (name, start), gradient in zip(trained.items(), gradients, strict=True):
        step = after[name].double() - start.detach()
        assert torch.allclose(step, -rate * gradient, rtol=1e-3, atol=2e-6), name
        moved = max(moved, step.abs().max().item())
    assert moved > 1e-3
    assert all(torch.equal(after[name], before[name]) for name in before if name not in trained)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_every_metric_at_another_lambda_is_the_mean_over_pairs_of_its_formula(ld_alpha, folder, settings):
    path, rows = folder("llama"), make_rows(9, seed=1)
    changes = {"beta": 0.2, "shift_lambda": 0.3, "ld_alpha": ld_alpha, "per_device_eval_batch_size": 4}
    trainer = run(DPOShiftTrainer, path, settings, changes, {"ref_model": another(path)}, eval_rows=rows, train=False)
    metrics = trainer.evaluate()
    policy, reference = instance(path).double().eval(), another(path).double().eval()
    tokenizer, collator = AutoTokenizer.from_pretrained(path), DataCollatorForPreference(pad_token_id=1)
    scores = []
    for row in rows:  # each pair by itself
        ids = [tokenizer(text)["input_ids"] for text in (row["prompt"], row["chosen"], row["rejected"])]
        batch = collator([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))])
        mask = batch["completion_mask"][:, 1:]
        with torch.no_grad():
            sums = [answer_sums(per_token_scores(model, batch), mask, ld_alpha) for model in (policy, reference)]
        scores.append([value.item() for pair in sums for value in pair])
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(scores, dtype=torch.float64).T
    lr_w, lr_l = chosen - ref_chosen, rejected - ref_rejected
    z = 0.2 * (lr_w - 0.3 * lr_l)
    expected = {
        "loss": F.softplus(-z),
        "rewards/chosen": 0.2 * lr_w, "rewards/rejected": 0.2 * lr_l, "rewards/margins": 0.2 * (lr_w - lr_l),
        "rewards/accuracies": lr_w > lr_l, "logps/chosen": chosen, "logps/rejected": rejected,
        "shift/lambda": torch.full_like(z, 0.3), "shift/margins": z, "shift/accuracies": z > 0,
        "displacement/chosen": lr_w, "displacement/rejected": lr_l, "displacement/chosen_fell": lr_w < 0,
        "dpo_loss": F.softplus(-0.2 * (lr_w - lr_l)),
    }  # fmt: skip
    assert 0 < (lr_w > lr_l).double().mean() < 1
    for name, values in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(values.double().mean().item(), rel=2e-4, abs=1e-5), name
    assert (z > 0).double().mean() != (lr_w > lr_l).double().mean()
