"""On GPUs: attention kernels, trainers and launch files. Skipped without CUDA; `bash benchmarks/gpu.sh` runs them."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_rows, make_tokenizer
from pairs import FAMILIES, RMS_NORM_FAMILIES, VOCAB, collate, make_model
from ruamel.yaml import YAML
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring import enable_shared_prompt
from dposhift_trl.scoring.hooks import hooks_of
from dposhift_trl.scoring.operations import RMS_NORM
from dposhift_trl.scoring.verify import measure_shared_prompt


ROOT = Path(__file__).parent.parent
PAIRS_A_STEP = 8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def tiny_llama(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def write_recipe(folder, model, bf16, **dpo):
    make_rows(64).to_json(folder / "rows.jsonl")
    stage = {
        "bf16": bf16, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "learning_rate": 1e-3, "max_grad_norm": 1.0, "per_device_eval_batch_size": 4,
        "max_steps": 4, "logging_steps": 1, "eval_steps": 4, "save_steps": 4,
    }  # fmt: skip
    recipe = {
        "output_dir": "set by each run",
        "model": {"model_name_or_path": model},
        "data": {"path": str(folder / "rows.jsonl"), "eval_size": 8},
        "sft": stage,
        "dpo": {**stage, "shift_lambda": 0.75, "learning_rate": 1e-4, **dpo},
    }
    YAML(typ="safe").dump(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def run(recipe, output_dir, launcher=(), processes=1):
    each = PAIRS_A_STEP // processes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:processes]
    done = subprocess.run(
        [
            sys.executable, *launcher, "-m", "dposhift_trl.run", str(recipe), f"output_dir={output_dir}",
            f"sft.per_device_train_batch_size={each}", f"dpo.per_device_train_batch_size={each}",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ",".join(visible)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def losses(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("launch_file", [pytest.param("ddp", marks=pytest.mark.two_gpus), "fsdp2", "deepspeed_zero3"])
def test_a_launch_file_trains_like_one_process(launch_file, bf16, tiny_llama, tmp_path):
    if launch_file == "deepspeed_zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    processes = min(torch.cuda.device_count(), 2)
    if launch_file == "ddp" and processes == 1:
        pytest.skip("needs two GPUs")
    # Sharded models score padded rows, so that one process has to do so too
    recipe = write_recipe(tmp_path, tiny_llama, bf16, **({} if launch_file == "ddp" else {"shared_prompt": False}))
    launcher = [
        "-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes" / "accelerate" / f"{launch_file}.yaml",
        "--num_processes", str(processes), "--mixed_precision", "bf16" if bf16 else "no",
    ]  # fmt: skip
    run(recipe, tmp_path / "many", launcher, processes)
    run(recipe, tmp_path / "one")
    for stage in ("sft", "dpo"):
        many, one = losses(tmp_path / "many" / stage), losses(tmp_path / "one" / stage)
        assert many == pytest.approx(one, abs=1e-3 if bf16 else 1e-5)
        assert len(set(one)) > 2  # it did train
    assert losses(tmp_path / "many" / "dpo")[0] == pytest.approx(0.693147, abs=1e-3 if bf16 else 1e-5)


def test_at_lambda_one_bf16_losses_equal_dpo_trainers(tiny_llama, settings):
    settings |= {"bf16": True, "use_cpu": False}
    found = []
    for trainer_class, args in (
        (DPOTrainer, DPOConfig(**settings)),
        (DPOShiftTrainer, DPOShiftConfig(**settings, shift_lambda=1.0, shared_prompt=False)),
    ):
        trainer = on_one_gpu(trainer_class, tiny_llama, args)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0][0] == found[1][0] == pytest.approx(0.693147, abs=1e-3)
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def on_one_gpu(trainer_class, model, args, **options):
    assert args.n_gpu
    args._n_gpu = 1  # DataParallel would take every GPU in sight
    return trainer_class(model, args=args, train_dataset=make_rows(16), **options)


def wide_model(family, **changes):
    """With heads of 16 channels, the fewest that flex attention takes."""
    return make_model(family, **{"hidden_size": 64, "head_dim": 16, **changes}).cuda()


BF16 = functools.partial(torch.autocast, "cuda", torch.bfloat16)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma2", "gpt_oss")])
def test_flash_attention_by_segments_agrees_with_padded_rows_to_rounding(family):
    model = wide_model(family)
    enable_shared_prompt(model)
    assert measure_shared_prompt(model, BF16).fault is None
    assert set(hooks_of(model).attended) == {"varlen_attn"}
    assert (RMS_NORM.name in hooks_of(model).operations) == (family in RMS_NORM_FAMILIES)


@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention_by_segments_agrees_over_many_of_its_blocks(window):
    shapes = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 2048, "sliding_window": window}
    model = wide_model("mistral", **shapes)
    enable_shared_prompt(model)
    torch.manual_seed(0)
    pairs = [[torch.randint(3, VOCAB, (n,)).tolist() for n in lengths] for lengths in ((700, 300, 9), (1, 400, 500))]
    assert measure_shared_prompt(model, BF16, collate(*pairs)).fault is None
    assert set(hooks_of(model).attended) == {"varlen_attn"}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_flex_attention_agrees_with_padded_rows_to_rounding_in_float32(family):
    model = wide_model(family)
    enable_shared_prompt(model)
    assert measure_shared_prompt(model).fault is None
    assert set(hooks_of(model).attended) == {"flex attention"}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_trainer_shares_prompts_and_learns_what_dpo_trainer_learns(bf16, tiny_llama, settings, caplog):
    settings |= {"bf16": bf16, "use_cpu": False, "learning_rate": 1e-3}
    stock = on_one_gpu(DPOTrainer, tiny_llama, DPOConfig(**settings))
    with caplog.at_level("INFO", logger="dposhift_trl"):
        ours = on_one_gpu(DPOShiftTrainer, tiny_llama, DPOShiftConfig(**settings, shift_lambda=1.0))
    assert ours.shares_prompts
    assert (
        f"attention: {'varlen_attn' if bf16 else 'flex attention (varlen_attn does not take float32)'}" in caplog.text
    )
    logs = []
    for trainer in (stock, ours):
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for theirs, mine in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-3 if bf16 else 1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2 if bf16 else 1e-4)


def test_a_step_waits_for_the_device_only_where_trl_indexes_its_metrics_by_a_mask(tiny_llama, settings):
    args = DPOShiftConfig(**settings | {"bf16": True, "use_cpu": False})
    trainer = on_one_gpu(DPOShiftTrainer, tiny_llama, args)
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    trainer.model.train()
    for batch in batches[:2]:
        trainer.compute_loss(trainer.model, batch).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.compute_loss(trainer.model, batches[2]).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 2, waits
