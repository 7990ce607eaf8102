"""
What only a GPU can show, in one run of minutes: `bash benchmarks/gpu.sh`.

Parts run in this order, each in a process of its own with a time limit, so that one that fails stops no other:

1. device: card, versions, rate of bf16 matrix products, bandwidth of a copy.
2. check: the start-up check of every family, each kernel of attention against padded rows, in bf16 and float32.
3. training: losses, gradient norms and metrics of a few steps, stock TRL against `DPOShiftTrainer`.
4. tests: `pytest -m gpu`, without what needs two cards.
5. steps: seconds, tokens a second, MFU and peak memory of a step, two models with random weights, five shapes.
6. grid: displacement by lambda of a model in a folder, if `--model` names one.

`results.json` holds all records, `table.md` what is printed last, `log.txt` what each part printed, tracebacks
included.

A step is what training runs: a batch is collated, then `training_step`, clipping and AdamW, in bf16 mixed precision
with weights in float32. Kinds of step:

- TRL: `trl.DPOTrainer` with its defaults: checkpointed gradients, the reference scored in each step, SDPA, fused head.
- TRL, best: the reference precomputed, no checkpointing, batches of pairs of similar length.
- cached: `DPOShiftTrainer` with its defaults, its reference already scored.
- scored: the same while the reference is still being scored, as in a first epoch.
- by tokens: cached, with batches filled up to a number of tokens (`max_tokens_per_batch`).
- best: cached, no checkpointing, ragged batches by tokens.

Each kind takes its steps alone, one after the other, because two do not fit on every card together. The first kind is
timed again at the end: the two times show the drift.

Tokens per second counts the tokens of the padded rows without their padding, whatever the kind, so that ratios are
ratios of pairs per second. MFU is the arithmetic of a step without what checkpointing repeats: forward and backward,
and forward for a reference that is scored. Stock counts all tokens of its rows except padding, ours counts each unique
token once. It is given relative to the rate measured in part 1 and to the datasheet's 989 TFLOP/s (H100 SXM, H200).

Lengths of `ragged` are log-normal, with means of 512 and 128 tokens and sigma 0.8. Those of `UltraFeedback` have the
means of that dataset, 185 tokens per prompt and 305 per answer (https://huggingface.co/papers/2310.01377; the 3.2 kB
per pair of argilla/ultrafeedback-binarized-preferences agree). Their sigmas, 1.0 and 0.7, are assumptions. Rows end at
2048 tokens.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
DATASHEET = 989e12  # dense bf16 of an H100 SXM and an H200

# Seconds at most of each part; what the last ones need is kept free for them
LIMITS = {"device": 45, "check": 100, "training": 100, "tests": 100, "steps": 400, "grid": 120}
STEPS_SHARE = 0.5
KEPT = {"steps": 5, "grid": 5}

# Means of prompt and answer, sigma of their logarithms, pairs in a batch
SHAPES = {
    "448/64": (448, 64, 0.0, 0.0, 16),
    "UltraFeedback": (185, 305, 1.0, 0.7, 16),
    "1024/256": (1024, 256, 0.0, 0.0, 8),
    "ragged": (512, 128, 0.8, 0.8, 16),
    "3584/512": (3584, 512, 0.0, 0.0, 2),
}
SMOKE_SHAPES = {"32/8": (32, 8, 0.0, 0.0, 4), "ragged": (24, 12, 0.8, 0.8, 4)}
LONGEST = 2048  # of a ragged row
STOCK, BEST_STOCK = "TRL", "TRL, best"
CACHED, SCORED, BEST, BY_TOKENS = "cached", "scored", "best", "by tokens"
FLEX_FAMILIES = ("llama", "gemma2", "mistral", "gpt_oss", "qwen2")


class Part:
    """What a part knows: its time, and where its records go."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.name: str = args.part
        self.end = time.monotonic() + args.seconds

    @property
    def left(self) -> float:
        """Seconds until the part is to end."""
        return self.end - time.monotonic()

    def record(self, **values: Any) -> None:
        """Keep a record, at once, so that a part that is cut off leaves what it has."""
        line = json.dumps({"part": self.name, **values})
        print(line)
        with open(self.args.records, "a") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def attempt(self, **values: Any) -> Iterator[None]:
        """A piece of work whose failure is recorded, under these values, and stops nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            self.record(**values, error=f"{type(error).__name__}: {first[:200]}")


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def seconds_of(function: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of a call, on the device of the run."""
    import torch

    times = []
    for _ in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def device(part: Part) -> None:
    """Card, versions and the two rates that bound everything else."""
    import inspect

    import torch

    from dposhift_trl.scoring.attention import KERNELS, VarlenAttention

    smoke = part.args.smoke
    kind = "cpu" if smoke else "cuda"
    packages = (
        "torch",
        "triton",
        "transformers",
        "trl",
        "accelerate",
        "peft",
        "datasets",
        "flash-attn",
        "liger-kernel",
    )
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    part.record(device=device_name(), versions=versions, python=sys.version.split()[0])
    if not smoke:
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        with part.attempt():
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
            part.record(driver_clock_power=answer, gib=round(properties.total_memory / 2**30, 1))
    function = next((k.function for k in KERNELS["cuda"] if isinstance(k, VarlenAttention)), None)
    part.record(varlen_attn=str(inspect.signature(function)) if function else "not there")
    size = 256 if smoke else 8192
    left, right = (torch.randn(size, size, device=kind, dtype=torch.bfloat16) for _ in range(2))
    part.record(bf16_flops=2 * size**3 / seconds_of(lambda: left @ right))
    source = torch.randn(2**20 if smoke else 2**29, device=kind)
    target = torch.empty_like(source)
    part.record(copy_bytes=8 * source.numel() / seconds_of(lambda: target.copy_(source)))


@contextlib.contextmanager
def only(*chosen: Any) -> Iterator[None]:
    """Lets pairs attend by these kernels alone, on any device."""
    from dposhift_trl.scoring.attention import KERNELS

    before = dict(KERNELS)
    KERNELS.update(dict.fromkeys(KERNELS, chosen))
    try:
        yield
    finally:
        KERNELS.update(before)


def kernels(smoke: bool) -> dict[str, Any]:
    """Ways to attend; in a smoke run, flash attention's stand-in and, uncompiled, flex attention."""
    import torch

    from dposhift_trl.scoring.attention import BranchAttention, FlexAttention, VarlenAttention

    found: dict[str, Any] = {"varlen": VarlenAttention(), "flex": FlexAttention(), "branches": BranchAttention()}
    if smoke:
        import varlen

        found["varlen"] = VarlenAttention(varlen.varlen_attn, frozenset((torch.float32, torch.bfloat16)))
        del found["flex"]  # whose backward pass a CPU does not have
    return found


def autocast(kind: str, dtype: str) -> Callable[[], Any]:
    import torch

    return functools.partial(torch.autocast, kind, torch.bfloat16) if dtype == "bf16" else nullcontext


def long_batch(vocab_size: int, smoke: bool) -> dict[str, Any]:
    """Six pairs whose rows reach over several blocks of a kernel."""
    import pairs

    rng, most = random.Random(0), 40 if smoke else 700

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(rng.randint(low, high))]

    rows = []
    for _ in range(6):
        agreed = tokens(1, 9)
        rows.append((tokens(1, most), agreed + tokens(1, most // 2), agreed + tokens(1, most // 2)))
    return pairs.collate(*rows)


def check(part: Part) -> None:
    """The start-up check of every family by every kernel, in units of the effect of one rounding."""
    import pairs
    import torch
    import torch._dynamo

    from dposhift_trl.scoring import enable_shared_prompt
    from dposhift_trl.scoring.hooks import hooks_of
    from dposhift_trl.scoring.verify import TOLERANCE, measure_shared_prompt

    smoke = part.args.smoke
    kind = "cpu" if smoke else "cuda"
    ways = kernels(smoke)
    part.record(tolerance=TOLERANCE)
    wide = {"hidden_size": 64, "head_dim": 16}
    families = [name for name in pairs.FAMILIES if not name.endswith("-eager")]
    families = families[1:4] if smoke else families
    longer = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 2048}
    longer_window = {"mistral": {"sliding_window": 100}, "qwen2": {"sliding_window": 100}}

    def measure(family: str, way: str, dtype: str, long: bool) -> None:
        values = {"family": family + (", long rows" if long else ""), "way": way, "dtype": dtype}
        if part.left < 3:
            part.record(**values, skipped="no time left")
            return
        with part.attempt(**values), only(ways[way], ways["branches"]):
            changes = {**longer, **longer_window.get(family, {})} if long else wide
            model = pairs.make_model(family, **changes).to(kind)
            enable_shared_prompt(model)
            batch = long_batch(pairs.VOCAB, smoke) if long else None
            agreement = measure_shared_prompt(model, autocast(kind, dtype), batch)
            part.record(
                **values,
                attended=sorted(hooks_of(model).attended),
                scores=agreement.scores,
                rounding=agreement.rounding,
                gradients=agreement.gradients,
                gradient_rounding=agreement.gradient_rounding,
                fault=agreement.fault,
            )

    for family in families:
        measure(family, "varlen", "bf16", long=False)
    for family in ("llama", "mistral", "qwen2"):
        measure(family, "varlen", "bf16", long=True)
    for dtype in ("bf16", "float32"):
        for family in families:
            measure(family, "branches", dtype, long=False)
    if "flex" in ways:
        torch._dynamo.config.recompile_limit = 64  # one process compiles for every family here
        for family in FLEX_FAMILIES:
            measure(family, "flex", "float32", long=False)
        measure("llama", "flex", "float32", long=True)
        measure("llama", "flex", "bf16", long=False)


def training(part: Part) -> None:
    """A few steps of stock TRL and of ours, with the same weights and rows: what they log."""
    import pairs
    import torch
    import torch._dynamo
    from conftest import make_rows, make_tokenizer
    from trl import DPOConfig, DPOTrainer

    from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
    from dposhift_trl.scoring.hooks import hooks_of

    smoke = part.args.smoke
    kind = "cpu" if smoke else "cuda"
    ways = kernels(smoke)
    torch._dynamo.config.recompile_limit = 64  # one process compiles for every family here
    rows, tokenizer = make_rows(16), make_tokenizer()
    families = ("llama",) if smoke else ("llama", "qwen2", "gemma3_text", "gpt2", "qwen3", "mistral", "gemma2", "phi3")
    chosen = {"bf16": ("varlen", "branches"), "float32": ("flex", "branches")}

    def logs(trainer_class: Any, config_class: Any, family: str, dtype: str, **changes: Any) -> tuple[Any, Any]:
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "output_dir": folder, "bf16": dtype == "bf16", "use_cpu": smoke, "report_to": "none", "max_steps": 3,
                "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
                "save_strategy": "no", "seed": 3, **changes,
            }  # fmt: skip
            args = config_class(**settings)
            args._n_gpu = min(1, args.n_gpu)
            model, reference = (pairs.make_model(family, hidden_size=64, head_dim=16).to(kind) for _ in range(2))
            model.config.use_cache = False
            trainer = trainer_class(model, reference, args, None, rows, processing_class=tokenizer)
            trainer.train()
            return [entry for entry in trainer.state.log_history if "loss" in entry], trainer

    for family in families:
        for dtype in ("bf16", "float32"):
            values = {"family": family, "dtype": dtype}
            if part.left < 6:
                part.record(**values, skipped="no time left")
                continue
            with part.attempt(**values):
                stock, _ = logs(DPOTrainer, DPOConfig, family, dtype)
                chain = [ways[name] for name in chosen[dtype] if name in ways]
                with only(*chain):
                    ours, trainer = logs(DPOShiftTrainer, DPOShiftConfig, family, dtype, shift_lambda=1.0)
                names = [
                    n for n in stock[0] if n in ours[0] and n.startswith(("rewards/", "logps/", "entropy", "mean_"))
                ]
                model = trainer.accelerator.unwrap_model(trainer.model)
                part.record(
                    **values,
                    shares=trainer.shares_prompts,
                    attended=sorted(hooks_of(model).attended.values()) if trainer.shares_prompts else [],
                    loss=[entry["loss"] for entry in stock],
                    loss_difference=max(abs(a["loss"] - b["loss"]) for a, b in zip(stock, ours, strict=True)),
                    grad_norm_difference=max(
                        abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(stock, ours, strict=True)
                    ),
                    metric_differences={
                        n: max(abs(float(a[n]) - float(b[n])) for a, b in zip(stock, ours, strict=True)) for n in names
                    },
                )


def tests(part: Part) -> None:
    """The tests that need one card; without a GPU, all of them are skipped."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not two_gpus", "-p", "no:cacheprovider"]
    # Other releases than those of CI deprecate other things
    command += ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
    command += ["-n", "0" if part.args.smoke else "6", "--tb=short", "--show-capture=no", "tests/test_gpu.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output, cut = "", False
    try:
        output, _ = process.communicate(timeout=max(5, part.left - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        output, cut = process.communicate()[0], True
    print(output)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    lines = [line for line in output.strip().splitlines() if line.strip()]
    summary = lines[-1] if lines else "nothing printed"
    if cut:
        counts = {word: len(re.findall(rf"\b{word}\b", output)) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
        summary = f"cut off; until then {counts}"
    part.record(rc=process.returncode, summary=summary, failed=failed[:40])


def draw_pairs(shape: tuple[int, int, float, float, int], count: int, vocab_size: int) -> list[dict[str, Any]]:
    """Pairs of arbitrary tokens, with log-probabilities as a reference might have given them."""
    prompt, answer, prompt_sigma, answer_sigma, _ = shape
    rng = random.Random(0)

    def tokens(mean: int, sigma: float, most: int) -> list[int]:
        length = round(mean * math.exp(rng.gauss(0, sigma) - sigma**2 / 2)) if sigma else mean
        return [rng.randrange(3, vocab_size) for _ in range(max(2, min(length, most)))]

    rows = []
    for _ in range(count):
        ids = tokens(prompt, prompt_sigma, LONGEST // 2 if prompt_sigma else prompt)
        answers = [tokens(answer, answer_sigma, LONGEST - len(ids) if answer_sigma else answer) for _ in range(2)]
        logps = {f"ref_{n}_logps": -10.0 * len(a) for n, a in zip(("chosen", "rejected"), answers, strict=True)}
        rows.append({"prompt_ids": ids, "chosen_ids": answers[0], "rejected_ids": answers[1], **logps})
    return rows


def in_batches(rows: list[dict[str, Any]], size: int, *, by_length: bool = False) -> list[list[dict[str, Any]]]:
    if by_length:
        rows = sorted(
            rows, key=lambda row: -len(row["prompt_ids"]) - max(map(len, (row["chosen_ids"], row["rejected_ids"])))
        )
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def by_tokens(rows: list[dict[str, Any]], batches: int) -> list[list[dict[str, Any]]]:
    """The same pairs in batches filled up to a number of tokens, as `max_tokens_per_batch` has them."""
    from dposhift_trl.training.batching import TokenBudgetSampler

    lengths = [sum(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in rows]
    most = max(max(lengths), math.ceil(1.05 * sum(lengths) / batches))
    return [[rows[i] for i in batch] for batch in TokenBudgetSampler(lengths, most)]


class Bench:
    """One trainer, stock or ours, on a model with random weights, and the steps that it takes."""

    def __init__(self, part: Part, name: str, ours: bool):
        import torch
        import transformers
        from datasets import Dataset
        from step import MODELS, make_tokenizer
        from trl import DPOConfig, DPOTrainer

        from dposhift_trl import DPOShiftConfig, DPOShiftTrainer

        self.part, self.name, self.ours = part, name, ours
        self.kind = "cpu" if part.args.smoke else "cuda"
        self.config = MODELS[name]
        torch.manual_seed(0)
        with torch.device(self.kind):
            self.model, self.reference = (
                transformers.AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=torch.float32)
                for _ in range(2)
            )
        self.folder = tempfile.TemporaryDirectory()
        settings = {
            "output_dir": self.folder.name, "bf16": True, "use_cpu": part.args.smoke, "report_to": "none",
            "disable_tqdm": True, "max_length": 4096, "per_device_train_batch_size": 2, "save_strategy": "no",
        }  # fmt: skip
        words = {"prompt": "5 6 7 8 ", "chosen": "9 10 11", "rejected": "12 13"}
        options: dict[str, Any] = {"shift_lambda": 1.0, "precompute_ref_log_probs": True} if ours else {}
        args = (DPOShiftConfig if ours else DPOConfig)(**settings, **options)
        args._n_gpu = min(1, args.n_gpu)
        self.trainer: Any = (DPOShiftTrainer if ours else DPOTrainer)(
            model=self.model,
            ref_model=self.reference,
            args=args,
            train_dataset=Dataset.from_list([words] * 4),
            processing_class=make_tokenizer(self.config.vocab_size),
        )
        self.trainer.accelerator.free_memory()  # as `train` does
        if ours:
            self.reference.cpu()
        else:
            self.trainer.ref_model = self.reference
        self.checkpoint(True)
        self.trainer._prepare_for_training(100, None, None)
        self.trainer.current_gradient_accumulation_steps = 1
        self.model.train()

    def bring_reference(self) -> None:
        """From the memory of the host, where it is once it is scored."""
        self.trainer.ref_model = self.reference.to(self.kind)

    def checkpoint(self, on: bool) -> None:
        """Whether gradients are checkpointed."""
        if on:
            self.model.activation_checkpointing_enable(self.trainer.args.activation_checkpointing_kwargs)
        else:
            self.model.activation_checkpointing_disable()

    def inputs(self, rows: list[dict[str, Any]], cached: bool) -> dict[str, Any]:
        from accelerate.utils import send_to_device

        if not cached and not self.ours:
            rows = [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in rows]
        return send_to_device(self.trainer.data_collator(rows), self.trainer.accelerator.device)

    def loss(self, rows: list[dict[str, Any]]) -> float:
        """Of a batch, with the reference's log-probabilities as the rows have them."""
        import torch

        before, self.trainer.precompute_ref_logps = self.trainer.precompute_ref_logps, True
        try:
            with torch.no_grad():
                return self.trainer.compute_loss(self.trainer.model_wrapped, self.inputs(rows, cached=True)).item()
        finally:
            self.trainer.precompute_ref_logps = before

    def step(self, rows: list[dict[str, Any]], cached: bool) -> float:
        """Seconds of one step."""
        import torch

        trainer = self.trainer
        if self.kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        inputs = self.inputs(rows, cached)
        if self.ours and not cached:
            trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        if not self.ours:
            trainer.precompute_ref_logps = cached
        trainer.training_step(trainer.model_wrapped, inputs)
        trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()
        if self.kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def work(self, rows: list[dict[str, Any]], cached: bool) -> tuple[int, float]:
        """Tokens of the rows without padding, and the floating-point operations of a step on the tokens it reads."""
        config, model = self.config, self.model
        matrices = sum(p.numel() for n, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in n)
        head = config.vocab_size * config.hidden_size
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        tokens = row_tokens = scored = seen = 0
        for row in rows:
            prompt, chosen, rejected = (len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
            row_tokens += 2 * prompt + chosen + rejected
            scored += chosen + rejected
            if self.ours:
                tokens += prompt + chosen + rejected - 1  # the last of the prompt twice, no last token of a row
                seen += prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in (chosen, rejected))
            else:
                tokens += 2 * prompt + chosen + rejected
                seen += sum((prompt + n) ** 2 / 2 for n in (chosen, rejected))
        forward = 2 * tokens * matrices + 2 * scored * head + 4 * config.num_hidden_layers * width * seen
        return row_tokens, forward * (3 if cached else 4)

    def measure(self, shape: str, kind: str, batches: list[Any], *, cached: bool, checkpointing: bool) -> None:
        """Record the steps of one kind over batches, after one that is not counted."""
        import torch

        part, values = self.part, {"model": self.name, "shape": shape, "kind": kind}
        if part.left < 6:
            part.record(**values, skipped="no time left")
            return
        try:
            with part.attempt(**values):
                self.checkpoint(checkpointing)
                self.step(batches[0], cached)
                if self.kind == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times, work = [], []
                for rows in batches:
                    times.append(self.step(rows, cached))
                    work.append((len(rows), *self.work(rows, cached)))
                    if part.left < 4:
                        break
                pairs, tokens, flops = (sum(column) for column in zip(*work, strict=True))
                part.record(
                    **values,
                    seconds=times,
                    pairs=pairs,
                    tokens=tokens,
                    flops=flops,
                    gib=torch.cuda.max_memory_allocated() / 2**30 if self.kind == "cuda" else None,
                )
        finally:
            self.model.zero_grad()
            if self.kind == "cuda":
                torch.cuda.empty_cache()

    def profile(self, shape: str, rows: list[dict[str, Any]]) -> None:
        """Where the time of a step goes, into the log; how often it waits for the device."""
        import torch

        if self.kind == "cpu" or self.part.left < 25:
            return
        with self.part.attempt(profile=self.name, shape=shape):
            self.checkpoint(True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    self.step(rows, cached=True)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            places = [
                f"{w.filename.split('site-packages/')[-1]}:{w.lineno}"
                for w in caught
                if "synchroniz" in str(w.message)
            ]
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                seconds = self.step(rows, cached=True)
            averages = profile.key_averages()
            on_device = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
            busy = sum(event.self_device_time_total for event in on_device) / 1e6
            print(averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70))
            top = sorted(on_device, key=lambda event: -event.self_device_time_total)[:12]
            self.part.record(
                profile=self.name,
                shape=shape,
                kind=CACHED if self.ours else f"{STOCK}, reference cached",
                waits=len(places),
                waits_at=sorted(set(places)),
                seconds_profiled=seconds,
                busy=busy,
                top=[(event.key[:80], event.count, round(event.self_device_time_total / 1e3, 2)) for event in top],
            )

    def close(self) -> None:
        """Free what the steps held."""
        import gc

        import torch

        self.trainer.accelerator.free_memory()
        del self.trainer, self.model, self.reference
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()
            self.part.record(model=self.name, gib_left=torch.cuda.memory_allocated() / 2**30)
        self.folder.cleanup()


def steps(part: Part) -> None:
    """Time, memory and MFU of a step."""
    from step import quiet

    smoke = part.args.smoke
    models = ("tiny",) if smoke else ("llama-0.5b", "qwen-1.5b")
    shapes = SMOKE_SHAPES if smoke else SHAPES
    way = only(*kernels(True).values()) if smoke else nullcontext()
    # Time of each model, and of stock within it; what is left goes to those that follow
    with quiet(argparse.Namespace(threads=1 if smoke else 8)), way:
        for number, name in enumerate(models):
            share = part.left * (0.42 if number < len(models) - 1 else 1.0)
            whole, part.end = part.end, time.monotonic() + share
            with part.attempt(model=name):
                steps_of_a_model(part, name, shapes)
            part.end = whole


def steps_of_a_model(part: Part, name: str, shapes: dict[str, Any]) -> None:
    count = 3
    drawn: dict[str, list[dict[str, Any]]] = {}

    def rows_of(shape: str, config: Any) -> list[dict[str, Any]]:
        if shape not in drawn:
            drawn[shape] = draw_pairs(shapes[shape], count * shapes[shape][-1], config.vocab_size)
        return drawn[shape]

    first = next(iter(shapes))
    end, part.end = part.end, part.end - 0.45 * part.left
    started = time.monotonic()
    bench = Bench(part, name, ours=False)
    part.record(model=name, trainer=STOCK, seconds_to_build=time.monotonic() - started)
    size = shapes[first][-1]
    with part.attempt(model=name, shape=first):
        loss = bench.loss(rows_of(first, bench.config)[:size])
        part.record(model=name, trainer=STOCK, loss=loss, optimizer=str(bench.trainer.args.optim))
    for shape, (*_, size) in shapes.items():
        batches = in_batches(rows_of(shape, bench.config), size)
        bench.measure(shape, STOCK, batches, cached=False, checkpointing=True)
        sorted_batches = in_batches(rows_of(shape, bench.config), size, by_length=True)
        bench.measure(shape, BEST_STOCK, sorted_batches, cached=True, checkpointing=False)
    bench.measure(
        first, f"{STOCK}, again", in_batches(rows_of(first, bench.config), size), cached=False, checkpointing=True
    )
    bench.profile(first, in_batches(rows_of(first, bench.config), shapes[first][-1])[0])
    bench.close()
    del bench

    part.end = end
    started = time.monotonic()
    bench = Bench(part, name, ours=True)
    trainer = bench.trainer
    attended: list[str] = []
    if trainer.shares_prompts:
        from dposhift_trl.scoring.hooks import hooks_of

        attended = sorted(hooks_of(bench.model).attended.values())
    part.record(
        model=name, trainer="DPOShiftTrainer", seconds_to_build=time.monotonic() - started,
        shares=trainer.shares_prompts, attended=attended,
    )  # fmt: skip
    with part.attempt(model=name, shape=first):
        part.record(
            model=name, trainer="DPOShiftTrainer", loss=bench.loss(rows_of(first, bench.config)[: shapes[first][-1]])
        )
    for shape, (*_, sigma, size) in shapes.items():
        rows = rows_of(shape, bench.config)
        batches = in_batches(rows, size)
        bench.measure(shape, CACHED, batches, cached=True, checkpointing=True)
        if sigma:
            bench.measure(shape, BY_TOKENS, by_tokens(rows, len(batches)), cached=True, checkpointing=True)
        bench.measure(
            shape, BEST, by_tokens(rows, len(batches)) if sigma else batches, cached=True, checkpointing=False
        )
    bench.profile(first, in_batches(rows_of(first, bench.config), shapes[first][-1])[0])
    bench.bring_reference()
    for shape, (*_, size) in shapes.items():
        batches = in_batches(rows_of(shape, bench.config), size)
        bench.measure(shape, SCORED, batches, cached=False, checkpointing=True)
    bench.close()


def grid(part: Part) -> None:
    """Displacement by lambda, from a model in a folder, on the built-in demo's pairs."""
    folder = part.args.model
    if not folder or not (Path(folder) / "config.json").is_file():
        part.record(skipped="no folder with a model was given (--model DIR)")
        return
    from displacement import COLUMNS, settings
    from step import quiet

    from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
    from dposhift_trl.data.demo import demo_dataset

    smoke = part.args.smoke
    with quiet(argparse.Namespace(threads=1 if smoke else 8)), tempfile.TemporaryDirectory() as output:
        data = demo_dataset()
        few = {name: rows.select(range(8 if smoke else min(len(rows), 960))) for name, rows in data.items()}
        for value in (1.0, 0.95, 0.75, 0.5):
            if part.left < 10:
                part.record(shift_lambda=value, skipped="no time left")
                continue
            with part.attempt(shift_lambda=value):
                changes = {"learning_rate": 1e-5, "per_device_train_batch_size": 4 if smoke else 16, "bf16": not smoke}
                args = DPOShiftConfig(
                    **settings(output, 1, **changes, use_cpu=smoke, num_train_epochs=1, max_steps=2 if smoke else 60),
                    shift_lambda=value, save_pair_scores=False,
                )  # fmt: skip
                trainer = DPOShiftTrainer(folder, args=args, train_dataset=few["train"], eval_dataset=few["test"])
                trainer.train()
                metrics = trainer.evaluate()
                part.record(shift_lambda=value, metrics={name: metrics[f"eval_{name}"] for name in COLUMNS})


PARTS = {"device": device, "check": check, "training": training, "tests": tests, "steps": steps, "grid": grid}
# Those that time nothing run beside each other
GROUPS = (("device",), ("check", "training", "tests"), ("steps",), ("grid",))


def run_parts(args: argparse.Namespace) -> None:
    """Run every part in a process, and write what is known after each group."""
    start, records = time.monotonic(), args.out / "records.jsonl"
    records.unlink(missing_ok=True)
    records.touch()
    for group in GROUPS:
        running = {}
        for name in group:
            if args.parts and name not in args.parts:
                continue
            left = args.budget - (time.monotonic() - start)
            kept = KEPT.get(name, STEPS_SHARE * args.budget)
            seconds = min(LIMITS[name], left - kept)
            if seconds < 15:
                append(records, part=name, skipped=f"no time left of {args.budget:.0f} s")
                continue
            command = [sys.executable, __file__, "--part", name, "--seconds", f"{seconds - 5:.0f}"]
            command += ["--records", str(records)] + ["--smoke"] * args.smoke
            command += ["--model", args.model] if args.model else []
            log = (args.out / f"{name}.log").open("w")
            log.write(f"===== {name}, {seconds:.0f} s at most\n")
            log.flush()
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            running[name] = process, log, time.monotonic(), seconds
        for name, (process, log, began, seconds) in running.items():
            try:
                code: int | None = process.wait(max(1, seconds + 5 - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            log.close()
            took = time.monotonic() - began
            append(records, part=name, took=round(took, 1), rc=code)
            status = "killed at its limit" if code is None else f"exit status {code}"
            print(f"{name}: ended after {took:.0f} s, {status}", flush=True)
            if code != 0:
                print("\n".join((args.out / f"{name}.log").read_text().splitlines()[-12:]), flush=True)
        write_results(args)
    logs = [args.out / f"{name}.log" for name in PARTS]
    (args.out / "log.txt").write_text("\n".join(log.read_text() for log in logs if log.exists()))
    for path in (*logs, records):
        path.unlink(missing_ok=True)


def write_results(args: argparse.Namespace) -> None:
    records = [json.loads(line) for line in (args.out / "records.jsonl").read_text().splitlines()]
    (args.out / "results.json").write_text(json.dumps(records, indent=1))
    (args.out / "table.md").write_text(table_of(records, args.budget) + "\n")


def append(records: Path, **values: Any) -> None:
    with records.open("a") as file:
        file.write(json.dumps(values) + "\n")


def times(value: float, unit: float) -> str:
    return f"{value / unit:.1f}" if unit else "?"


def time_of(record: dict[str, Any]) -> float:
    """Seconds of all steps of a record: each the median, where batches are of one shape."""
    seconds = record["seconds"]
    ragged = {**SHAPES, **SMOKE_SHAPES}[record["shape"]][3] > 0
    return sum(seconds) if ragged else statistics.median(seconds) * len(seconds)


def step_table(records: list[dict[str, Any]], rate: float) -> list[str]:
    """Lines of the table of steps; ratios are of pairs a second."""
    heading = ("model", "prompt/answer", "step", "s a step", "pairs/s", "tokens/s", "MFU", "of 989", "GiB")
    heading += (f"times {STOCK}", f"times {BEST_STOCK}", "of the limit")
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    measured = {(r["model"], r["shape"], r["kind"]): r for r in records if "profile" not in r}
    shapes = {**SMOKE_SHAPES, **SHAPES}
    for model, shape, kind in sorted(measured, key=lambda key: (key[0], list(shapes).index(key[1]))):
        record = measured[model, shape, kind]
        if "seconds" not in record:
            note = record.get("error") or record.get("skipped")
            lines.append(f"| {model} | {shape} | {kind} | {note} |{' |' * (len(heading) - 4)}")
            continue
        total = time_of(record)
        ratios = []
        for other in (STOCK, BEST_STOCK):
            theirs = measured.get((model, shape, other), {})
            known = "seconds" in theirs
            ratios.append(record["pairs"] / total * time_of(theirs) / theirs["pairs"] if known else math.nan)
        reached = ""
        if kind in (CACHED, SCORED) and not shapes[shape][2]:
            prompt, answer = shapes[shape][:2]
            limit = (2 * prompt + 2 * answer) / (prompt + 2 * answer) * (5 / 4 if kind == CACHED else 1)
            reached = f"{ratios[0] / limit:.0%} of {limit:.2f}"
        cells = (
            f"{total / len(record['seconds']):.4f}",
            f"{record['pairs'] / total:.2f}",
            f"{record['tokens'] / total:.0f}",
            f"{record['flops'] / total / rate:.1%}",
            f"{record['flops'] / total / DATASHEET:.1%}",
            "" if record["gib"] is None else f"{record['gib']:.1f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            reached,
        )
        lines.append(f"| {model} | {shape} | {kind} | {' | '.join(cells)} |")
    return lines


def table_of(records: list[dict[str, Any]], budget: float) -> str:
    """What a run says, as Markdown."""

    def of(part: str, *keys: str) -> list[dict[str, Any]]:
        return [record for record in records if record["part"] == part and all(key in record for key in keys)]

    lines: list[str] = []
    facts = {key: value for record in of("device") for key, value in record.items()}
    rate = facts.get("bf16_flops", float("nan"))
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    lines += [
        f"{time.strftime('%Y-%m-%d')}, {facts.get('device')}, {facts.get('gib', '?')} GiB, driver/clock/power "
        f"{facts.get('driver_clock_power', '-')}; {versions}, Python {facts.get('python')}",
        f"bf16 matrix products {rate / 1e12:.0f} TFLOP/s, copy {facts.get('copy_bytes', 0) / 1e12:.2f} TB/s; "
        f"varlen_attn{facts.get('varlen_attn')}",
    ]

    lines += ["", "The start-up check, in units of the effect of one rounding (scores / gradients):", ""]
    cells: dict[str, dict[str, str]] = {}
    for record in of("check", "family"):
        text = record.get("error") or record.get("skipped")
        if text is None:
            scores = times(record["scores"], record["rounding"])
            text = f"{scores} / {times(record['gradients'], record['gradient_rounding'])}"
            text += " WRONG" if record["fault"] else ""
            expected = {"varlen": "varlen_attn", "flex": "flex attention", "branches": "one call a branch"}
            if expected[record["way"]] not in record["attended"]:
                text = f"- ({text} by branches)"
            elif len(record["attended"]) > 1:
                text += " (some layers by branches)"
        cells.setdefault(record["family"], {})[f"{record['way']}, {record['dtype']}"] = text
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines += [f"| family | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {family} | {' | '.join(row.get(c, '') for c in columns)} |" for family, row in cells.items()]

    lines += ["", "Training, stock TRL against ours, largest difference of three steps:", ""]
    lines += ["| family | precision | loss | gradient norm | metrics | attention |", "| --- |" + " --- |" * 5]
    for record in of("training", "family"):
        text = record.get("error") or record.get("skipped")
        if text is None:
            metrics = record["metric_differences"]
            worst = max(metrics, key=metrics.get, default="")
            text = f"{record['loss_difference']:.1e} | {record['grad_norm_difference']:.1e} | "
            text += f"{metrics.get(worst, 0):.1e} ({worst}) | "
            text += "; ".join(record["attended"]) if record["shares"] else "not shared"
        else:
            text += " | | | "
        lines.append(f"| {record['family']} | {record['dtype']} | {text} |")

    for record in of("tests", "summary"):
        lines += ["", f"pytest -m gpu: {record['summary']}", *(f"- {name[:200]}" for name in record["failed"])]

    lines += ["", "Steps:", ""]
    for record in of("steps", "trainer"):
        rest = {key: value for key, value in record.items() if key not in ("part", "model", "trainer")}
        lines.append(f"- {record['model']}, {record['trainer']}: {json.dumps(rest)}")
    lines += ["", *step_table(of("steps", "kind"), rate)]
    for record in of("steps", "waits"):
        lines += [
            "",
            f"{record['profile']}, {record['shape']}, {record['kind']}: the device is busy {record['busy']:.3f} of "
            f"{record['seconds_profiled']:.3f} s (profiled); {record['waits']} waits for it in a step: "
            f"{', '.join(record['waits_at'])}",
            *(f"    {milliseconds:9.2f} ms {count:6d} {name}" for name, count, milliseconds in record["top"]),
        ]

    for record in of("grid", "metrics"):
        lines.append(f"- lambda {record['shift_lambda']}: {json.dumps(record['metrics'])}")
    lines += [""] + [f"{r['part']}: {r['error']}" for r in records if "error" in r and set(r) == {"part", "error"}]
    lines += [f"{r['part']}: left out, {r['skipped']}" for r in records if set(r) == {"part", "skipped"}]
    took = ", ".join(
        f"{r['part']} {r['took']:.0f} s" + (f" (exit status {r['rc']})" if r["rc"] != 0 else "")
        for r in records
        if "took" in r
    )
    lines.append(f"Budget {budget:.0f} s: {took}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="on a CPU, with tiny models and a stand-in for the kernel"
    )
    parser.add_argument("--budget", type=float, default=300, help="seconds within which the run ends")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md and log.txt")
    parser.add_argument("--model", help="folder of a small model, for the displacement grid")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--records", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part = Part(args)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("WANDB_MODE", "offline")
        with part.attempt():
            PARTS[args.part](part)
        return
    args.out = args.out or Path(tempfile.mkdtemp(prefix="gpu-"))
    args.out.mkdir(parents=True, exist_ok=True)
    run_parts(args)
    print(f"\n{(args.out / 'table.md').read_text()}\n{args.out}/results.json, table.md, log.txt")


if __name__ == "__main__":
    main()
