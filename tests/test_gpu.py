"""On GPUs: the launch files against one process, and DPO in bf16 against DPOTrainer. Not run without CUDA."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rows, make_tokenizer
from ruamel.yaml import YAML
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer


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


def write_recipe(folder, model, bf16):
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
        "dpo": {**stage, "shift_lambda": 0.75, "learning_rate": 1e-4},
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
@pytest.mark.parametrize("launch_file", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_a_launch_file_trains_like_one_process(launch_file, bf16, tiny_llama, tmp_path):
    if launch_file == "deepspeed_zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    processes = min(torch.cuda.device_count(), 2)
    if launch_file == "ddp" and processes == 1:
        pytest.skip("needs two GPUs")
    recipe = write_recipe(tmp_path, tiny_llama, bf16)
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
        (DPOShiftTrainer, DPOShiftConfig(**settings, shift_lambda=1.0)),
    ):
        assert args.n_gpu
        args._n_gpu = 1  # DataParallel would take every GPU in sight
        trainer = trainer_class(tiny_llama, args=args, train_dataset=make_rows(16))
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0][0] == found[1][0] == pytest.approx(0.693147, abs=1e-3)
    assert found[0] == pytest.approx(found[1], abs=1e-3)
