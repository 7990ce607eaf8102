"""FSDP2 and DeepSpeed ZeRO on two CPU processes: what is trained, and what the launch files train, equals DDP's."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_rows
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from sharded_matrix import TESTS, differences, launch, result_of, save_models, surroundings, trainings
from transformers import AutoModelForCausalLM, Trainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring.sharded import whole
from dposhift_trl.training.sharded import Sharded, check_parallelism, release


REPOSITORY = TESTS.parent
# Every way in which sharding differs: who makes the head whole, where the reference is, what is saved
FEW = [
    "SFT, head in a group of its own",
    "rows, opt",
    "rows, LoRA with a trained head",
    "shared, gpt2",
    "shared, gpt2, resumed",
    "shared, reference scored in each step",
    "shared, rows that are passed later",
    "shared, reference given",
    "shared, adapter trained further",
    "shared, LoRA with checkpointing",
    "shared, batches by tokens",
]
MODES = {"fsdp2": "FSDPLlamaForCausalLM", "zero3": "DeepSpeedEngine"}
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
EACH_MODE = pytest.mark.parametrize("mode", ["fsdp2", pytest.param("zero3", marks=DEEPSPEED)])
LAUNCH_FILES = {"fsdp2": "fsdp2.yaml", "zero3": "deepspeed_zero3.yaml"}

pytestmark = pytest.mark.xdist_group("sharded")  # two processes each, so not beside one another


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains the few jobs in a mode, once, and returns them by name."""
    folder, known = tmp_path_factory.mktemp("sharded"), {}
    save_models(folder / "models")

    def of(mode):
        if mode not in known:
            jobs = trainings(folder / mode, folder / "models")
            known[mode] = {name: jobs[name] for name in FEW}
            cache = {"DPOSHIFT_CACHE": str(folder / mode / "cache")}
            run = launch(mode, list(known[mode].values()), **cache)
            assert run.returncode == 0, run.stderr[-3000:]
        return known[mode]

    return of


@EACH_MODE
@pytest.mark.parametrize("name", FEW)
def test_what_is_trained_equals_ddp(name, mode, trained):
    job, reference = trained(mode)[name], trained("ddp")[name]
    result = result_of(job)
    assert result["wrapped"] != result_of(reference)["wrapped"]
    assert result["distributed_type"] == {"fsdp2": "FSDP", "zero3": "DEEPSPEED"}[mode]
    assert name.startswith("SFT") or result["shares_prompts"] is name.startswith("shared")
    norms = ["fused RMSNorm"] if name.startswith("shared") else []
    assert result["operations"] == (["fused GELU"] if "gpt2" in name else norms)
    # Otherwise TRL places the reference with "auto" on each GPU
    assert mode != "fsdp2" or result["loaded_with"] == {"device_map": None}
    loss, weights = differences(job, reference)
    # ZeRO-3 sums gradients in another order
    assert loss <= (2e-7 if mode == "fsdp2" else 5e-7)
    assert weights <= (2e-7 if mode == "fsdp2" else 1e-6)


@EACH_MODE
def test_a_resumed_training_equals_an_uninterrupted_one(mode, trained):
    assert differences(trained(mode)["shared, gpt2, resumed"], trained(mode)["shared, gpt2"])[1] == 0.0


@EACH_MODE
def test_the_scores_of_a_reference_are_found_in_the_cache_whatever_divides_it(mode, trained):
    for name in ("shared, gpt2", "shared, adapter trained further"):
        fingerprint, found = (result_of(trained(which)[name])["reference"] for which in ("ddp", mode))
        assert fingerprint is not None
        # Under FSDP, the base of an adapter is scored once it is divided
        assert found == (None if (mode, "adapter" in name) == ("fsdp2", True) else fingerprint)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of two stages of a few steps on a tiny model."""
    folder = tmp_path_factory.mktemp("recipe")
    save_models(folder / "models")
    for split, count in (("train", 32), ("test", 8)):
        make_rows(count, seed=count).to_json(folder / f"{split}.jsonl")
    stage = {
        "max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    text = {
        "model": {"model_name_or_path": str(folder / "models" / "llama")},
        "data": {"path": str(folder), "eval_split": "test"},
        "sft": stage,
        "dpo": {**stage, "shift_lambda": 0.75},
        "report": False,
    }
    (folder / "recipe.yaml").write_text(json.dumps(text))
    return folder / "recipe.yaml"


def run(mode, recipe, output, *overrides):
    """Both stages through the launch file, as the README has it; returns the output."""
    options = [
        "--config_file",
        str(REPOSITORY / "recipes" / "accelerate" / LAUNCH_FILES[mode]),
        "--num_processes",
        "2",
    ]
    script = [str(TESTS / "sharded.py"), "launched", "-m", "dposhift_trl.run", str(recipe), f"output_dir={output}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script, *overrides]
    environment = surroundings() | {"DPOSHIFT_CACHE": str(output / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def logged(stage, name):
    history = json.loads((stage / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@EACH_MODE
def test_the_launch_file_trains_both_stages_and_resumes_in_float32(mode, recipe, tmp_path):
    run(mode, recipe, tmp_path, "sft.bf16=false", "dpo.bf16=false")
    assert logged(tmp_path / "dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(tmp_path / "dpo", "displacement/chosen")[0] == 0.0
    weights = load_file(tmp_path / "dpo" / "model.safetensors")
    # What a kill after the second step leaves
    shutil.rmtree(tmp_path / "dpo" / "checkpoint-4")
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "dpo" / name).unlink()
    assert "resuming from" in run(mode, recipe, tmp_path, "sft.bf16=false", "dpo.bf16=false")
    resumed = load_file(tmp_path / "dpo" / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@EACH_MODE
def test_the_launch_file_trains_and_merges_an_adapter_in_bf16(mode, recipe, tmp_path):
    lora = ["model.use_peft=true", "model.lora_target_modules=[q_proj,v_proj]", "model.merge_adapter=true"]
    run(mode, recipe, tmp_path, "sft.bf16=true", "dpo.bf16=true", *lora)
    # The scores of policy and reference are rounded alike
    assert logged(tmp_path / "dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    stage = tmp_path / "dpo"
    merged = AutoModelForCausalLM.from_pretrained(stage / "merged").state_dict()
    expected = AutoPeftModelForCausalLM.from_pretrained(stage).merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    base = AutoModelForCausalLM.from_pretrained(Path(recipe).parent / "models" / "llama").state_dict()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


def test_the_whole_model_is_saved_with_sharded_checkpoints(trained, tmp_path):
    (job,) = (trained("ddp")[name] for name in ["shared, gpt2"])
    sharded = {**job, "folder": str(tmp_path / "out"), "environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}
    resumed = {**sharded, "resume": str(tmp_path / "out" / "checkpoint-2")}
    result = launch("fsdp2", [sharded, resumed])
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-2" / "pytorch_model_fsdp_0" / ".metadata").exists()
    assert differences(sharded, job)[1] <= 2e-7


@pytest.mark.parametrize(("size", "kind"), [("cp_size", "context"), ("sp_size", "sequence")])
def test_a_divided_sequence_is_refused(size, kind):
    accelerator = Accelerator(cpu=True)
    accelerator.state.parallelism_config = type("Sizes", (), {"cp_size": 1, "sp_size": 1, size: 2})()
    try:
        with pytest.raises(ValueError, match=rf"^`parallelism_config\.{size}` must be 1, got 2: {kind} parallelism"):
            check_parallelism(accelerator)
    finally:
        accelerator.state.parallelism_config = None
    check_parallelism(accelerator)


def test_a_checkpoint_has_a_folder_before_trainer_looks_for_the_best_one(tiny_model, tmp_path, monkeypatch):
    args = DPOShiftConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = DPOShiftTrainer(tiny_model, args=args, train_dataset=make_rows(8))
    monkeypatch.setattr(Trainer, "save_model", lambda *_: None)  # as with `SHARDED_STATE_DICT`
    trainer.save_model(str(tmp_path / "checkpoint-2"), _internal_call=True)
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize("keep_weights", [False, True])
def test_the_weights_of_an_engine_that_is_done_are_freed(keep_weights):
    model, ended = torch.nn.Linear(2, 3), []
    model.weight.ds_tensor = torch.ones(4)  # the part of this process
    model.destroy = lambda: ended.append(True)
    release(model, keep_weights=keep_weights)
    assert ended
    sizes = [tensor.numel() for tensor in (model.weight, model.weight.ds_tensor, model.bias)]
    assert sizes == ([6, 4, 3] if keep_weights else [0, 0, 0])


@pytest.mark.parametrize(("plugin", "flattens"), [(None, False), (1, True), (2, False)])
def test_only_fsdp1_flattens_weights(plugin, flattens):
    state = SimpleNamespace() if plugin is None else SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=plugin))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=state))
    assert Sharded.flattens_weights.fget(trainer) is flattens


def test_with_flattened_weights_pairs_are_scored_as_dpo_trainer_scores_them(tiny_model, tmp_path, monkeypatch):
    args = DPOShiftConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainers = []
    for flattens in (False, True):
        monkeypatch.setattr(Sharded, "flattens_weights", flattens)
        trainers.append(DPOShiftTrainer(tiny_model, args=args, train_dataset=make_rows(8)))
    assert [trainer.shares_prompts for trainer in trainers] == [True, False]
    assert [trainer.precompute_ref_logps for trainer in trainers] == [True, False]


def test_a_parameter_that_is_not_divided_is_whole_as_it_is():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert whole(parameter) is parameter
    assert whole(None) is None
