"""
Trainings of every kind, sharded and not, and how far apart they end.

    python tests/sharded_matrix.py fsdp2 zero3 zero2 [--only PATTERN]

Runs each training of [`trainings`] on two processes: with DDP and in each mode, see sharded.py. Prints a table of the
largest differences to DDP: of the loss over all steps, and of the saved weights. ZeRO needs `pip install deepspeed`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM


TESTS = Path(__file__).parent
LORA = {"r": 4, "target_modules": "all-linear"}
LORA_WITH_HEAD = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
SAVES = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
STOCK, SFT = {"trainer": "trl.DPOTrainer"}, {"trainer": "dposhift_trl.ChosenSFTTrainer"}
ROWS, SHARED = {"shift_lambda": 0.75, "shared_prompt": False}, {"shift_lambda": 0.75, "shared_prompt": True}


def save_models(folder: Path) -> None:
    """Tiny models: GPT-2, whose head is tied to its embeddings, and Llama and OPT, whose heads are not."""
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    wide = {
        **sizes,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    llama = LlamaConfig(**wide, intermediate_size=48, tie_word_embeddings=False)
    opt = OPTConfig(**wide, ffn_dim=48, word_embed_proj_dim=32, tie_word_embeddings=False, dropout=0.0)
    models: dict[str, Any] = {
        "gpt2": (GPT2LMHeadModel, GPT2Config(**sizes, n_positions=64, n_embd=32, n_layer=2, n_head=2)),
        "llama": (LlamaForCausalLM, llama),
        "opt": (OPTForCausalLM, opt),
    }
    for name, (model_class, config) in models.items():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def trainings(folder: Path, models: Path) -> dict[str, dict[str, Any]]:
    """The jobs of sharded.py by name, in the order in which they have to run."""
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, model: str = "llama", settings: dict[str, Any] | None = None, **fields: Any) -> None:
        jobs[name] = {"folder": str(folder / name), "model": str(models / model), "settings": settings or {}, **fields}

    add("stock DPOTrainer", **STOCK)
    add("SFT", **SFT)
    add("SFT, head in a group of its own", "opt", **SFT)
    for reading, own in (("rows", ROWS), ("shared", SHARED)):
        for model in ("llama", "gpt2", "opt"):
            add(f"{reading}, {model}", model, {**own, **SAVES})
            add(
                f"{reading}, {model}, resumed",
                model,
                {**own, **SAVES},
                resume=f"{folder}/{reading}, {model}/checkpoint-2",
            )
        add(f"{reading}, lambda 1", settings={**own, "shift_lambda": 1.0})
        add(f"{reading}, reference scored in each step", settings={**own, "precompute_ref_log_probs": False})
        add(f"{reading}, reference precomputed", settings={**own, "precompute_ref_log_probs": True})
        add(
            f"{reading}, rows that are passed later",
            settings={**own, "shared_prompt": own["shared_prompt"] and "auto"},
            unseen_rows=9,
        )
        add(
            f"{reading}, reference given",
            settings={**own, "precompute_ref_log_probs": True},
            given=True,
            unseen_rows=9,
        )
        add(f"{reading}, LoRA", settings={**own, **SAVES}, lora=LORA)
        add(
            f"{reading}, LoRA, resumed",
            settings=own | SAVES,
            lora=LORA,
            resume=f"{folder}/{reading}, LoRA/checkpoint-2",
        )
        add(f"{reading}, LoRA with a trained head", settings=own, lora=LORA_WITH_HEAD)
        add(
            f"{reading}, adapter trained further",
            settings=own,
            lora={**LORA, "init_lora_weights": False},
            adapted=True,
        )
        add(f"{reading}, accumulation", "opt", {**own, "gradient_accumulation_steps": 2, "max_steps": 2})
        add(f"{reading}, checkpointing", settings={**own, "gradient_checkpointing": True})
        add(f"{reading}, LoRA with checkpointing", settings={**own, "gradient_checkpointing": True}, lora=LORA)
        add(f"{reading}, adaptive lambda", settings={**own, "lambda_schedule": "adaptive", "lambda_target": 0.0})
        add(f"{reading}, stream", settings=own, stream=True)
        add(f"{reading}, two epochs", settings={**own, "max_steps": -1, "num_train_epochs": 2}, rows=30)
        add(f"{reading}, best model", settings={**own, **SAVES, "load_best_model_at_end": True})
        add(f"{reading}, bf16", settings={**own, "bf16": True})
    add("shared, batches by tokens", settings={**SHARED, "max_tokens_per_batch": 48, "gradient_accumulation_steps": 2})
    return jobs


def launch(mode: str, jobs: list[dict[str, Any]], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run jobs in one group of two processes."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(jobs, file)
        file.flush()
        command = [*torchrun(), str(TESTS / "sharded.py"), mode, file.name]
        return subprocess.run(command, env=surroundings() | environment, capture_output=True, text=True, timeout=1800)


def torchrun() -> list[str]:
    """The launcher, for two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def surroundings() -> dict[str, str]:
    """Environment of the processes."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """What the first process has left, or an error."""
    path = Path(job["folder"], "result_0.json")
    return json.loads(path.read_text()) if path.exists() else {"error": "no result"}


def differences(left: dict[str, Any], right: dict[str, Any]) -> tuple[float, float]:
    """The largest difference of what two jobs logged, relative to 1 or to its size, and of the weights they saved."""
    logged = [[*result["logs"], result["metrics"]] for result in (result_of(left), result_of(right))]
    assert len(logged[0]) == len(logged[1]), "the jobs logged at different steps"
    worst = 0.0
    for ours, theirs in zip(*logged, strict=True):
        for name in re.findall(r"\S+", " ".join(ours)):
            if "loss" in name or "logps" in name or "margins" in name or name == "grad_norm":
                worst = max(worst, abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name])))
    weights = [_weights(Path(job["folder"])) for job in (left, right)]
    assert weights[0].keys() == weights[1].keys(), weights[0].keys() ^ weights[1].keys()
    assert weights[0], "the jobs saved no weights"
    return worst, max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved weights, without a head that repeats the embeddings."""
    weights = {
        name: value.float()
        for file in ("model.safetensors", "adapter_model.safetensors")
        if (folder / file).exists()
        for name, value in load_file(folder / file).items()
    }
    head, embeddings = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    if head is not None and embeddings is not None and torch.equal(head, embeddings):
        del weights["lm_head.weight"]
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="+", choices=("fsdp2", "zero2", "zero3"))
    parser.add_argument("--only", default="", help="regular expression that the names of the trainings have to match")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "sharded-matrix"))
    options = parser.parse_args()
    save_models(options.folder / "models")
    found: dict[str, list[str]] = {}
    for mode in ("ddp", *options.modes):
        jobs = trainings(options.folder / mode, options.folder / "models")
        jobs = {name: job for name, job in jobs.items() if re.search(options.only, name)}
        left = list(jobs)
        while left:
            for name in left:
                if "resume" not in jobs[name]:
                    shutil.rmtree(jobs[name]["folder"], ignore_errors=True)
                else:
                    Path(jobs[name]["folder"], "result_0.json").unlink(missing_ok=True)
            run = launch(mode, [jobs[name] for name in left], DPOSHIFT_CACHE=str(options.folder / mode / "cache"))
            failed = next((i for i, name in enumerate(left) if "error" in result_of(jobs[name])), None)
            if failed is None:
                break
            print(f"{mode}, {left[failed]}: {run.stderr[-1500:]}", file=sys.stderr, flush=True)
            left = left[failed + 1 :]  # a job that fails ends its processes
        if mode == "ddp":
            continue
        for name, job in jobs.items():
            if "error" in (result := result_of(job)):
                cell = f"failed: {result['error'].strip().splitlines()[-1][:60]}"
            else:
                reference = trainings(options.folder / "ddp", options.folder / "models")[name]
                cell = "{:.0e} / {:.0e}".format(*differences(job, reference))
            found.setdefault(name, []).append(cell)
    print(f"| training | {' | '.join(options.modes)} |\n| --- |{' --- |' * len(options.modes)}")
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
