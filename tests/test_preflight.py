"""What is known before the first stage trains is told then, by a dry run as by a run; and stages share no state."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_rows, make_tokenizer
from datasets import IterableDataset
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.launcher import launcher_mistakes
from dposhift_trl.pipeline import preflight
from dposhift_trl.pipeline.loading import load_tokenizer
from dposhift_trl.recipe import load_recipe
from dposhift_trl.reference.__main__ import main as reference
from dposhift_trl.run import main


STAGE = {
    "bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False, "max_steps": 2,
    "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "per_device_train_batch_size": 4,
    "max_length": 64,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, tiny_model):
    make_rows(12).to_json(tmp_path / "rows.jsonl")
    values = {
        "output_dir": str(tmp_path / "run"),
        "report": False,
        "model": {"model_name_or_path": tiny_model},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "sft": {**STAGE},
        "dpo": {**STAGE, "learning_rate": 1e-2},
    }
    path = tmp_path / "recipe.yaml"
    YAML(typ="safe").dump(values, path)
    return path


@pytest.fixture
def refuse(recipe, tmp_path, capfd):
    """The one line that refuses a run and its dry run alike, before anything is trained."""

    def refuse(*overrides):
        lines = []
        for arguments in (["--dry-run"], []):
            capfd.readouterr()
            assert main([str(recipe), *arguments, *overrides]) == 2
            lines.append(capfd.readouterr().err.splitlines()[-1])
        assert lines[0] == lines[1]
        assert not list(tmp_path.glob("run/*/finished.json"))
        return lines[0]

    return refuse


def save(model, folder, change=None, tokenizer=None):
    """Save a model and its tokenizer, with changes of a file: `(name, {key: value})`."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    if change is not None:
        name, values = change
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return f"model.model_name_or_path={folder}"


def gpt2(**changes):
    small = {"vocab_size": 42, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**small, "bos_token_id": 0, "eos_token_id": 0, **changes}))


# Settings


def test_a_model_folder_that_does_not_exist_is_told_at_once(refuse):
    assert refuse("model.model_name_or_path=/no/where") == (
        "`model.model_name_or_path` must be a Hub name or a folder, got '/no/where', which does not exist. Correct "
        "the path."
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("dpo.metric_for_best_model=dpo_los", "`dpo.metric_for_best_model` must be one of loss, entropy, "),
        ("sft.metric_for_best_model=rewards/margins", "`sft.metric_for_best_model` must be one of loss, entropy, "),
        ("dpo.report_to=comet_ml", "`dpo.report_to` requires the package of 'comet_ml', which is not installed."),
        ("dpo.report_to=[clearml]", "`dpo.report_to` requires the package of 'clearml', which is not installed."),
        ("dpo.use_liger_kernel=true", "`dpo.use_liger_kernel` requires liger-kernel, got True."),
        ("dpo.optim=adamw_8bit", "`dpo.optim` cannot be 'adamw_8bit' here: "),
        ("dpo.optim=apollo_adamw", "`dpo.optim` cannot be 'apollo_adamw' here: "),
        ("dpo.optim=galore_adamw", "`dpo.optim` cannot be 'galore_adamw' here: "),
        ("dpo.optim=schedule_free_adamw", "`dpo.optim` cannot be 'schedule_free_adamw' here: "),
        ("dpo.optim_args=nonsense", "`dpo.optim` cannot be 'adamw_torch_fused' here: "),
        ("dpo.lr_scheduler_type=cosine_with_min_lr", "`dpo.lr_scheduler_type` cannot be 'cosine_with_min_lr' h"),
        ("dpo.lr_scheduler_kwargs={cycles: 3}", "`dpo.lr_scheduler_type` cannot be 'linear' here: "),
        ("dpo.torch_compile_backend=indcutor", "`dpo.torch_compile_backend` must be one of "),
        ("dpo.fp16=true", "`dpo.fp16` requires a GPU, got True."),
        ("dpo.activation_offloading=true", "`dpo.activation_offloading` requires a GPU, got True."),
        ("dpo.push_to_hub=true", "`dpo.push_to_hub` requires the Hub, got `HF_HUB_OFFLINE=1`."),
        ("dpo.router_aux_loss_coef=0.1", "`dpo.router_aux_loss_coef` requires a mixture of experts"),
        (
            "model={use_peft: true, load_in_4bit: true}",
            "`model.load_in_4bit` and `load_in_8bit` require bitsandbytes.",
        ),
    ],
    ids=lambda value: value.partition("=")[0] + value.partition("=")[2] if "=" in value else "",
)
def test_a_setting_of_stage_two_that_cannot_work_here_is_told_before_stage_one_trains(
    refuse, tiny_model, override, line
):
    overrides = [override, f"model.model_name_or_path={tiny_model}"]
    assert refuse(*overrides).startswith(line)


@pytest.mark.filterwarnings("ignore:.*pad_token")  # TRL's, which deprecates it for DPO only
def test_a_padding_token_of_stage_two_that_is_unknown_is_told_before_stage_one_trains(refuse):
    line = refuse("dpo.pad_token=nonsense")
    assert line == "`dpo.pad_token` must be in the tokenizer's vocabulary, got 'nonsense'. Remove it."


def test_all_mistakes_are_told_together_and_a_finished_stage_is_not_asked(recipe, tmp_path):
    loaded = load_recipe(
        str(recipe), ["sft.use_liger_kernel=true", "dpo.use_liger_kernel=true", "dpo.report_to=mlflow"]
    )
    with pytest.raises(preflight.RunError) as raised:
        preflight.check_settings(loaded)
    names = [line.split("`")[1] for line in str(raised.value).splitlines()]
    assert names == ["sft.use_liger_kernel", "dpo.report_to", "dpo.use_liger_kernel"]
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "finished.json").write_text("{}")
    with pytest.raises(preflight.RunError, match=r"^`dpo.report_to` [^\n]*\n`dpo.use_liger_kernel` [^\n]*$"):
        preflight.check_settings(loaded)


@pytest.mark.parametrize("token", [None, "hf_token"])
def test_without_a_login_or_a_network_nothing_can_be_pushed(recipe, monkeypatch, token):
    monkeypatch.setattr(preflight.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(preflight, "get_token", lambda: token)
    monkeypatch.setattr(preflight.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(huggingface_hub.utils._http, "_GLOBAL_CLIENT", None)
    loaded = load_recipe(str(recipe), ["dpo.push_to_hub=true"])
    with pytest.raises(preflight.RunError) as raised:
        preflight.check_settings(loaded)
    fault = "cannot reach the Hub: " if token else "requires a login to the Hub, got none. Run `hf auth login`"
    assert str(raised.value).startswith(f"`dpo.push_to_hub` {fault}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft={packing: true, max_length: null}", "`sft.max_length` must be set with `packing`, got null."),
        ("sft={padding_free: true}", "`sft.padding_free` without `packing` does not truncate"),
    ],
)
def test_settings_of_stage_one_that_do_not_go_together_are_told(recipe, override, line):
    loaded = load_recipe(str(recipe), [override.replace("{", "{bf16: false, use_cpu: true, report_to: none, ")])
    with pytest.raises(preflight.RunError) as raised:
        preflight.check_settings(loaded)
    assert str(raised.value).startswith(line)


# Model


def test_an_encoder_decoder_is_refused(refuse, tmp_path):
    config = T5Config(vocab_size=42, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=1)
    line = refuse(save(T5ForConditionalGeneration(config), tmp_path / "t5"))
    assert "must be a causal language model" in line
    assert "an encoder-decoder (T5ForConditionalGeneration)" in line


def test_an_encoder_is_refused(refuse, tmp_path):
    config = BertConfig(vocab_size=42, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    line = refuse(save(BertForMaskedLM(config), tmp_path / "bert"))
    assert "another kind of model (BertForMaskedLM)" in line


@pytest.mark.parametrize("value", [None, []], ids=["null", "empty"])
def test_a_model_without_the_name_of_its_class_is_told_which_one_is_usual(refuse, tmp_path, value):
    line = refuse(save(gpt2(), tmp_path / "gpt2", ("config.json", {"architectures": value})))
    assert line.endswith(
        "its `config.json` must name the class of the model, got none. If it is a GPT2LMHeadModel, add "
        '`"architectures": ["GPT2LMHeadModel"]`.'
    )


def test_a_generation_config_that_cannot_be_saved_is_refused(refuse, tmp_path):
    change = ("generation_config.json", {"do_sample": False, "temperature": 0.5})
    line = refuse(save(gpt2(), tmp_path / "model", change))
    assert "its `generation_config.json` cannot be saved with a checkpoint: " in line
    assert "`temperature`" in line
    assert line.endswith("Correct the file.")


def test_a_tokenizer_larger_than_the_embedding_is_refused(refuse, tmp_path):
    line = refuse(save(gpt2(vocab_size=40), tmp_path / "model"))
    assert "the tokenizer has a token with the id 41, but the model has only 40 embeddings." in line


def test_an_adapter_without_its_base_model_is_refused(refuse, tmp_path, tiny_model):
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone"), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    line = refuse(f"model.model_name_or_path={folder}")
    assert "is an adapter whose base model cannot be loaded: " in line
    assert line.endswith("Write its place as `base_model_name_or_path` into the `adapter_config.json`.")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.lora_target_modules=[q_projj]"], "`model.lora_target_modules` {'q_projj'} do not fit the model: "),
        (["model.lora_target_modules=[lm_head]"], "must not include the LM head"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_lora_modules_that_the_model_does_not_have_or_trl_does_not_train_are_refused(refuse, overrides, part):
    assert part in refuse("model.use_peft=true", *overrides)


def test_a_model_that_supports_no_checkpointing_of_activations_is_refused(refuse, tmp_path):
    config = CTRLConfig(vocab_size=42, n_positions=64, n_embd=8, dff=8, n_layer=1, n_head=2)
    line = refuse(save(CTRLLMHeadModel(config), tmp_path / "ctrl"), "dpo.gradient_checkpointing=true")
    assert line.startswith("`dpo.gradient_checkpointing` must be false with this model, CTRLLMHeadModel")


def test_attention_that_is_not_installed_is_refused(refuse):
    line = refuse("model.attn_implementation=flash_attention_2")
    assert line.startswith("`model.attn_implementation` cannot be 'flash_attention_2' here: ")


# Positions


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: gpt2(), 64),
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    vocab_size=42, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
                    word_embed_proj_dim=8, max_position_embeddings=30,
                )
            ),
            30,
        ),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=42, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=42,  # as large as the vocabulary, and rotary
                )
            ),
            None,
        ),
    ],
    ids=["learned", "learned with an offset", "rotary"],
)  # fmt: skip
def test_the_positions_are_those_of_the_model_s_table(recipe, tmp_path, model, positions):
    loaded = load_recipe(str(recipe), [save(model(), tmp_path / "model")])
    base = str(tmp_path / "model")
    assert preflight.check_model(loaded, base, load_tokenizer(loaded, base)) == positions


@pytest.mark.parametrize("length", [None, 64])
def test_rows_beyond_the_positions_are_told_with_their_number(refuse, tmp_path, length):
    rows = make_rows(8).to_list()
    rows[5]["prompt"] = " ".join(["w1"] * 40)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lengths = [f"{name}.max_length={'null' if length is None else length}" for name in ("sft", "dpo")]
    line = refuse(save(gpt2(n_positions=32), tmp_path / "model"), *lengths)
    assert line.startswith(
        f"`dpo.max_length` must be at most 32, the positions of the model, got {length or 'null'}: 1 train rows"
    )
    assert line.endswith(f"the first one is row 5 of {tmp_path}/rows.jsonl. Set `dpo.max_length: 32`.")


def test_stage_one_reads_no_rejected_answer_so_none_is_too_long_for_it(recipe, tmp_path):
    rows = make_rows(8).to_list()
    rows[5]["rejected"] = " w1" * 90
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([str(recipe), "--dry-run", "sft.max_length=null", "dpo=null"]) == 0


def test_long_rows_that_are_truncated_to_the_positions_are_trained_on(recipe, tmp_path, capfd):
    rows = make_rows(8).to_list()
    rows[5]["chosen"] += " w1" * 60
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([str(recipe), "--dry-run", "data.audit=keep"]) == 0


def test_rows_that_make_no_batch_are_not_all_dropped(refuse, recipe):
    line = refuse("dpo.dataloader_drop_last=true", "dpo.per_device_train_batch_size=13", "dpo.max_steps=-1")
    assert line == (
        "`dpo.dataloader_drop_last` must be false with fewer train rows than a batch of 13, got True with 12. Remove "
        "it, or lower `per_device_train_batch_size`."
    )
    overrides = ["dpo.dataloader_drop_last=true", "dpo.per_device_train_batch_size=12"]
    assert main([str(recipe), "--dry-run", *overrides]) == 0


def test_a_stream_s_rows_are_not_known_so_its_length_must_fit(refuse):
    line = refuse("data.streaming=true", "sft.max_length=null", "dpo.max_length=65")
    assert line == (
        "`dpo.max_length` must be at most 64, the positions of the model, with `data.streaming`, got 65. Set "
        "`dpo.max_length: 64`."
    )


# The trainers


@pytest.mark.parametrize("trainer", [DPOShiftTrainer, ChosenSFTTrainer])
@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "one of several"])
def test_an_empty_dataset_is_named(tiny_model, settings, trainer, stream, where):
    rows = make_rows(4)
    empty = IterableDataset.from_generator(lambda: iter(())) if stream else rows.select([])
    datasets = {"train_dataset": rows, "eval_dataset": rows, where: empty}
    name = f"`{where}`"
    if datasets.pop("one of several", None) is not None:
        datasets["eval_dataset"], name = {"full": rows, "none": empty}, "`eval_dataset['none']`"
    args = (DPOShiftConfig if trainer is DPOShiftTrainer else SFTConfig)(**settings)
    with pytest.raises(ValueError, match="at least one row") as raised:
        trainer(tiny_model, args=args, **datasets)
    assert str(raised.value) == f"{name} must have at least one row, got none. Pass a dataset with rows."


@pytest.mark.parametrize(
    ("model_size", "ref_size", "message"),
    [
        (40, None, "`model` must have an embedding of every token: the tokenizer has a token with the id 41"),
        (42, 40, "`ref_model` must have an embedding of every token: the tokenizer has a token with the id 41"),
        (42, 42 + 1024, "`ref_model` must have the vocabulary of `model`, 42 tokens, got one with 1066."),
    ],
)
def test_models_whose_vocabulary_is_not_the_tokenizer_s_are_refused(tmp_path, settings, model_size, ref_size, message):
    reference = None if ref_size is None else gpt2(vocab_size=ref_size)
    save(gpt2(vocab_size=model_size), tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer") as raised:
        DPOShiftTrainer(str(tmp_path / "model"), reference, DPOShiftConfig(**settings), train_dataset=make_rows(4))
    assert str(raised.value).startswith(message)


def test_a_reference_padded_to_another_size_is_accepted(settings):
    trainer = DPOShiftTrainer(
        gpt2(), gpt2(vocab_size=64), DPOShiftConfig(**settings), train_dataset=make_rows(4),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()


# State between the stages


@pytest.mark.parametrize("half", ["sft", "dpo"])
def test_stages_of_different_precision_run_and_stage_two_is_that_of_a_run_of_its_own(recipe, tmp_path, half):
    precision = [f"{name}.bf16={str(name == half).lower()}" for name in ("sft", "dpo")]
    assert main([str(recipe), *precision]) == 0
    assert AcceleratorState._shared_state == {}
    sft = f"model.model_name_or_path={tmp_path / 'run' / 'sft'}"
    assert main([str(recipe), precision[1], "sft=null", sft, f"output_dir={tmp_path / 'alone'}"]) == 0
    weights, alone = (load_file(tmp_path / run / "dpo" / "model.safetensors") for run in ("run", "alone"))
    assert weights.keys() == alone.keys()
    assert all(torch.equal(weights[name], alone[name]) for name in weights)


# The environment


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "x"}, "The environment variable LOCAL_RANK must be an integer, got 'x'."),
        ({"WORLD_SIZE": "1.5"}, "The environment variable WORLD_SIZE must be an integer, got '1.5'."),
        ({"ACCELERATE_USE_CPU": "junk"}, "The environment variable ACCELERATE_USE_CPU must be true or false, got"),
        (
            {"WORLD_SIZE": "2"},
            "The environment variable WORLD_SIZE is 2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "The environment variable RANK must be less than WORLD_SIZE (2), got 2.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_junk_of_a_launcher_is_told_before_a_process_waits_for_others(refuse, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refuse().startswith(message)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOCAL_RANK": "-1", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"ACCELERATE_USE_CPU": "True", "LOCAL_RANK": ""},
    ],
)
def test_what_a_launcher_sets_is_accepted(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher_mistakes() == []


def test_a_user_without_a_home_is_told_what_to_set(recipe, monkeypatch, capsys):
    monkeypatch.delenv("DPOSHIFT_CACHE")
    monkeypatch.setattr("dposhift_trl.reference.cache.HF_HOME", "~/.cache/huggingface")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user is unknown and HOME not set
    assert reference(["list"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("The cache of reference scores, ~/.cache/huggingface/dposhift_trl/reference, needs a home")
    with pytest.raises(preflight.RunError, match=r"`dpo\.precompute_ref_log_probs` needs a folder: The cache"):
        preflight.check_settings(load_recipe(str(recipe)))


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_launcher_with_another_precision_than_the_recipe_is_refused(how, recipe, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main([str(recipe), "dpo.bf16=true", *how]) == 2
    error = capsys.readouterr().err
    assert "`sft.bf16` and `fp16` must agree with the launcher's `mixed_precision`, which is bf16, got no." in error
    assert "`dpo.bf16`" not in error
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")  # which no key of a recipe sets
    with pytest.raises(preflight.RunError, match=r"which is fp8, got bf16\. Pass `--mixed_precision no` to"):
        preflight.check_settings(load_recipe(str(recipe), ["dpo.bf16=true"]))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert main([str(recipe), "--dry-run"]) == 0
