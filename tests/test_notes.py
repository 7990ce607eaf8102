"""What users are told once, in one line: settings without effect, slow arithmetic, plain DPO, and dropped rows."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import make_rows
from test_run import write_recipe
from trl import DPOConfig, SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer, launcher
from dposhift_trl.pipeline.notes import PackageLogs, recipe_notes
from dposhift_trl.recipe import load_recipe
from dposhift_trl.run import main as main
from dposhift_trl.training.settings import warn_of_slow_precision


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_recipe(tmp_path, tiny_model)


FIXED = "dpo.lambda_schedule=fixed"


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], []),
        (["dpo.lambda_min=0.5"], []),
        (["dpo.shift_lambda=0.9"], ["dpo.shift_lambda"]),
        ([FIXED, "dpo.shift_lambda=0.9"], []),
        ([FIXED, "dpo.lambda_min=0.5", "dpo.lambda_max=1.0"], ["dpo.lambda_min", "dpo.lambda_max"]),
        (["dpo.lambda_target=-1"], ["dpo.lambda_target"]),
        (["dpo.lambda_schedule=adaptive", "dpo.lambda_target=-1", "dpo.lambda_min=0.5"], []),
        (["dpo.lambda_schedule=[[0, 1.0], [1, 0.5]]", "dpo.lambda_max=1.0"], ["dpo.lambda_max"]),
        (["model.lora_r=8"], ["model.lora_r"]),
        (["model.use_peft=true", "model.lora_r=8", "model.lora_target_modules=[c_attn]"], []),
    ],
    ids=lambda value: " ".join(value) or "none",
)
def test_keys_without_effect_are_named_and_no_others(overrides, keys, recipe):
    notes = list(recipe_notes(load_recipe(str(recipe), overrides)))
    assert [note.split("`")[1] for note in notes] == keys
    assert all("\n" not in note for note in notes)


def test_a_run_and_a_dry_run_say_so_once(recipe, here):
    note = "`dpo.shift_lambda` has no effect with `lambda_schedule: linear_decrease`."
    for options in (["--dry-run"], []):
        assert here(recipe, "sft=null", "dpo.max_steps=1", "dpo.shift_lambda=0.9", *options).out.count(note) == 1


def test_a_tokenizer_without_chat_template_is_mentioned_for_conversations_only(recipe, tmp_path, here):
    mentioned = "no chat template"
    assert mentioned not in here(recipe, "--dry-run").out
    rows = make_rows(24).map(
        lambda row: {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}]
            for name in ("prompt", "chosen", "rejected")
        }
    )
    rows.to_json(tmp_path / "conversations.jsonl")
    done = here(recipe, "--dry-run", f"data.path={tmp_path / 'conversations.jsonl'}")
    assert done.out.count(mentioned) == 1


def test_a_warning_of_the_package_is_printed_once_on_one_line(capsys):
    with PackageLogs() as logs:
        for _ in range(2):
            logging.getLogger("dposhift_trl.training.sharing").warning("[RANK 0] shared_prompt is off: it is\nlate")
        logging.getLogger("transformers").warning("not ours")
    assert capsys.readouterr().err == "shared_prompt is off: it is\\nlate\n"
    assert logs.why_not_shared == "it is\nlate"
    logging.getLogger("dposhift_trl").warning("after the run")
    assert "after the run" not in logs.messages


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
    ],
    ids=["python", "accelerate launch", "several asked for", "several started", "no launcher"],
)
def test_a_lone_process_of_several_is_seen(environment, alone, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launcher.lone_process() is not None) == alone


def test_plain_dpo_settings_are_mentioned(tiny_model, settings, caplog):
    rows = make_rows(8)
    DPOShiftTrainer(tiny_model, args=DPOShiftConfig(**settings), train_dataset=rows)
    assert "plain DPO" not in caplog.text
    DPOShiftTrainer(tiny_model, args=DPOConfig(**settings), train_dataset=rows)
    assert caplog.text.count("A `DPOConfig` trains with plain DPO. To shift, pass a `DPOShiftConfig`.") == 1


@pytest.mark.parametrize(
    ("dtype", "mixed", "device", "capabilities", "slow"),
    [
        (torch.float32, "bf16", "cpu", {"avx2": True}, True),
        (torch.bfloat16, "no", "cpu", {"avx2": True}, True),
        (torch.float32, "no", "cpu", {"avx2": True}, False),
        (torch.float32, "bf16", "cpu", {"avx512_bf16": True}, False),
        (torch.float32, "bf16", "cpu", {"architecture": "aarch64", "bf16": True}, False),
        (torch.float32, "bf16", "cuda", {"avx2": True}, False),
    ],
    ids=["mixed", "weights", "float32", "x86", "arm", "gpu"],
)
def test_bfloat16_on_a_cpu_without_its_instructions(dtype, mixed, device, capabilities, slow, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    warn_of_slow_precision(dtype, SimpleNamespace(mixed_precision=mixed, device=torch.device(device)))
    assert ("about 3 times slower" in caplog.text) == slow


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(ChosenSFTTrainer, SFTConfig), (DPOShiftTrainer, DPOShiftConfig)],
    ids=["sft", "dpo"],
)
def test_both_trainers_ask(trainer_class, config_class, tiny_model, settings, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    trainer_class(tiny_model, args=config_class(**settings | {"bf16": True}), train_dataset=make_rows(8))
    assert caplog.text.count("about 3 times slower") == 1


@pytest.mark.parametrize(("target", "binds"), [(-1000.0, False), (1000.0, True)])
def test_an_adaptive_target_that_never_binds(target, binds, tiny_model, settings, caplog):
    args = DPOShiftConfig(**settings, lambda_schedule="adaptive", lambda_target=target)
    DPOShiftTrainer(tiny_model, args=args, train_dataset=make_rows(16)).train()
    assert ("kept lambda at `lambda_max` (1) throughout" in caplog.text) == (not binds)


def test_rows_dropped_for_their_length_name_the_length_that_keeps_them(recipe, here):
    done = here(recipe, "--dry-run", "sft=null", "dpo.max_length=12", "data.min_rows_kept=0.1")
    assert (
        "train: 11 of 19 rows kept: 8 cut (drop). `max_length` 12 drops 42% of the rows; 15 would keep 100% of all.\n"
        in done.out
    )
    assert "would keep" not in here(recipe, "--dry-run", "sft=null").out
