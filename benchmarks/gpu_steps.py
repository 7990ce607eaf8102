"""
Time, memory and MFU of a step on a GPU: stock TRL and `DPOShiftTrainer`, two models with random weights, five shapes.

A step is what training runs: a batch is collated, then `training_step`, clipping and AdamW, in bf16 mixed precision
with weights in float32. Kinds of step:

- TRL: `trl.DPOTrainer` with its defaults: checkpointed gradients, the reference scored in each step, SDPA, fused head.
- TRL, best: the reference precomputed, no checkpointing, batches of pairs of similar length.
- cached: `DPOShiftTrainer` with its defaults, its reference already scored.
- scored: the same while the reference is still being scored, as in a first epoch.
- by tokens: cached, with batches filled up to a number of tokens (`max_tokens_per_batch`).
- best: cached, no checkpointing, ragged batches by tokens.
- own RMSNorm: cached, each RMSNorm computed as the model does, with the first shape only.

Each kind takes its steps alone, one after the other, because two do not fit on every card together. The first kind is
timed again at the end: the two times show the drift.

Tokens per second counts the tokens of the padded rows without their padding, whatever the kind, so that ratios are
ratios of pairs per second. MFU is the arithmetic of a step without what checkpointing repeats: forward and backward,
and forward for a reference that is scored. Stock counts all tokens of its rows except padding, ours counts each unique
token once. It is given relative to the rate measured in part 1 and to the datasheet's 989 TFLOP/s (H100 SXM, H200).

Lengths of `ragged` are log-normal, with means of 512 and 128 tokens and sigma 0.8. Those of `UltraFeedback` have the
assumed means of 185 tokens per prompt and 305 per answer, with which the 6.4 kB per row of
HuggingFaceH4/ultrafeedback_binarized agree within a tenth (four prompts, two chosen answers and a rejected one, at 4.3
bytes per token), and assumed sigmas of 1.0 and 0.7. Rows end at 2048 tokens.
"""

import argparse
import copy
import gc
import math
import random
import tempfile
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import send_to_device
from datasets import Dataset
from gpu_table import BEST, BEST_STOCK, BY_TOKENS, CACHED, LONGEST, OWN_NORMS, SCORED, SHAPES, SMOKE_SHAPES, STOCK
from step import MODELS, make_tokenizer, quiet
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring.hooks import hooks_of
from dposhift_trl.scoring.operations import RMS_NORM
from dposhift_trl.training.batching import TokenBudgetSampler


if TYPE_CHECKING:
    from gpu import Part


# Pairs in a batch, in multiples of those that the shapes give
PAIRS = {"llama-0.5b": 3}


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

    lengths = [sum(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in rows]
    most = max(max(lengths), math.ceil(1.05 * sum(lengths) / batches))
    return [[rows[i] for i in batch] for batch in TokenBudgetSampler(lengths, most)]


class Bench:
    """One trainer, stock or ours, on a model with random weights, and the steps that it takes."""

    def __init__(self, part: "Part", name: str, ours: bool):

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

        if not cached and not self.ours:
            rows = [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in rows]
        return send_to_device(self.trainer.data_collator(rows), self.trainer.accelerator.device)

    def loss(self, rows: list[dict[str, Any]]) -> float:
        """Of a batch, with the reference's log-probabilities as the rows have them."""

        before, self.trainer.precompute_ref_logps = self.trainer.precompute_ref_logps, True
        try:
            with torch.no_grad():
                return self.trainer.compute_loss(self.trainer.model_wrapped, self.inputs(rows, cached=True)).item()
        finally:
            self.trainer.precompute_ref_logps = before

    def step(self, rows: list[dict[str, Any]], cached: bool) -> float:
        """Seconds of one step."""

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
                gc.collect()  # a failed step leaves its graph in a cycle
                torch.cuda.empty_cache()

    def profile(self, shape: str, rows: list[dict[str, Any]]) -> None:
        """Where the time of a step goes, into the log; how often it waits for the device."""

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

        self.trainer.accelerator.free_memory()
        del self.trainer, self.model, self.reference
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()
            self.part.record(model=self.name, gib_left=torch.cuda.memory_allocated() / 2**30)
        self.folder.cleanup()


def time_steps(part: "Part") -> None:
    """Time, memory and MFU of a step."""

    smoke = part.args.smoke
    models = ("tiny",) if smoke else ("llama-0.5b", "qwen-1.5b")
    shapes = SMOKE_SHAPES if smoke else SHAPES
    # Time of each model, and of stock within it; what is left goes to those that follow
    with quiet(argparse.Namespace(threads=1 if smoke else 8)):
        for number, name in enumerate(models):
            share = part.left * (0.42 if number < len(models) - 1 else 1.0)
            whole, part.end = part.end, time.monotonic() + share
            with part.attempt(model=name):
                steps_of_a_model(part, name, shapes)
            part.end = whole


def steps_of_a_model(part: "Part", name: str, shapes: dict[str, Any]) -> None:
    count = 3
    # So that the card, and not the host that launches its kernels, is what a step waits for
    shapes = {shape: (*lengths, size * PAIRS.get(name, 1)) for shape, (*lengths, size) in shapes.items()}
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
    batches = in_batches(rows_of(first, bench.config), shapes[first][-1])
    bench.measure(first, f"{STOCK}, again", batches, cached=False, checkpointing=True)
    bench.close()
    del bench

    part.end = end
    started = time.monotonic()
    bench = Bench(part, name, ours=True)
    trainer = bench.trainer
    attended: list[str] = []
    if trainer.shares_prompts:
        hooks = hooks_of(bench.model)
        attended = [*sorted(hooks.attended.values()), *sorted(hooks.operations.difference(hooks.refused))]
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
        if shape == first and trainer.shares_prompts:
            refused = hooks.refused
            hooks.refused = {**refused, RMS_NORM.name: "measured without"}
            bench.measure(shape, OWN_NORMS, batches, cached=True, checkpointing=True)
            hooks.refused = refused
        if sigma:
            bench.measure(shape, BY_TOKENS, by_tokens(rows, len(batches)), cached=True, checkpointing=True)
        bench.measure(
            shape, BEST, by_tokens(rows, len(batches)) if sigma else batches, cached=True, checkpointing=False
        )
    bench.bring_reference()
    for shape, (*_, size) in shapes.items():
        batches = in_batches(rows_of(shape, bench.config), size)
        bench.measure(shape, SCORED, batches, cached=False, checkpointing=True)
    bench.profile(first, in_batches(rows_of(first, bench.config), shapes[first][-1])[0])
    bench.close()
