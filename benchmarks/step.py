"""
Time of a DPO step against stock TRL, and against the matrix products it cannot do without.

    python benchmarks/step.py --model gpt2 qwen2 --shape long short ragged --steps 5

Each step is scored, back-propagated and applied by AdamW, in float32 and on the CPU. Stock is the `compute_loss` of
`trl.DPOTrainer`, untouched, on a model and a reference of its own. The levers hand it scores they make otherwise:

- rows: padded rows, of which only those that predict a completion token are projected;
- shared: shared prompts;
- shared + cached: shared prompts, with the log-probabilities of the reference at hand.

Steps of stock and of the levers alternate on the same batches; times are medians. Peak memory is the largest resident
set of a process that takes no other steps. The limit is the time of the matrix products that must be done, measured at
the model's shapes: unique tokens through the layers and rows that predict a completion token through the head, forward
and backward, and forward once more for the reference unless cached; attention is counted at the rate of those.
"""

import argparse
import copy
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from dposhift_trl.head import token_scores
from dposhift_trl.shared_prompt import PairLayout, SharedPromptCollator, enable_shared_prompt, shared_prompt_scores


LEVERS = ("stock", "rows", "shared", "shared + cached")
MODELS = {
    "gpt2": transformers.GPT2Config(),
    "qwen2": transformers.Qwen2Config(
        vocab_size=32_768,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=6,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "tiny": transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}
# Tokens of prompt and answer, and the standard deviation of their logarithm
SHAPES = {"long": (256, 64, 0.0), "short": (64, 128, 0.0), "ragged": (45, 90, 0.8)}
SCORED = ("log_probs", "entropy", "mean_logits", "is_top1")


class LeverTrainer(DPOTrainer):
    """Stock TRL, but for where the scores come from."""

    lever = "shared"

    def scores(self, model, inputs):
        if self.lever.startswith("shared"):
            return shared_prompt_scores(model, inputs["shared_prompt"])
        scored = inputs["completion_mask"][:, 1:].bool()
        rows = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        hidden = model.base_model(**rows, use_cache=False).last_hidden_state[:, :-1][scored]
        head, labels = model.get_output_embeddings(), inputs["input_ids"][:, 1:][scored]
        outputs = SCORED[1:] if model is self.model else ()
        scores = token_scores(hidden, head.weight, head.bias, labels, outputs)
        return FusedCausalLMOutput(
            **{k: v.new_zeros(scored.shape).masked_scatter(scored, v) for k, v in scores.items()}
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.precompute_ref_logps = True
        if self.lever != "shared + cached" or "ref_chosen_logps" not in inputs:
            with torch.no_grad():
                reference = self.scores(self.ref_model, inputs).log_probs.sum(1).chunk(2)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
        return super().compute_loss(lambda **_: self.scores(model, inputs), inputs, *args, **kwargs)


def make_tokenizer(vocab_size):
    vocab = {str(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="1", pad_token="2", unk_token="0"
    )


def make_examples(shape, batch_size, batches, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt, answer, sigma = SHAPES[shape]

    def words(mean, least):
        scale = math.exp(sigma * torch.randn((), generator=generator).item() - sigma**2 / 2)
        length = min(max(least, round(mean * scale)), 480)
        return " ".join(map(str, torch.randint(3, vocab_size, (length,), generator=generator).tolist()))

    # TRL appends the end-of-sequence token to each answer
    return [
        {"prompt": words(prompt, 1) + " ", "chosen": words(answer - 1, 1), "rejected": words(answer - 1, 1)}
        for _ in range(batch_size * batches)
    ]


def make_trainer(lever, args, name, shape):
    torch.manual_seed(0)
    config = MODELS[name]
    model, reference = (transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)) for _ in range(2))
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        learning_rate=1e-6,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = (DPOTrainer if lever == "stock" else LeverTrainer)(
        model=model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(make_examples(shape, args.batch_size, args.steps + 1, config.vocab_size)),
        processing_class=make_tokenizer(config.vocab_size),
    )
    if lever != "stock":
        for each in (model, reference):
            enable_shared_prompt(each)
        trainer.data_collator = SharedPromptCollator(trainer.data_collator)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.create_optimizer()
    model.train()
    return trainer


def make_batches(trainer, args):
    rows = list(trainer.train_dataset)
    return [trainer.data_collator(rows[i : i + args.batch_size]) for i in range(0, len(rows), args.batch_size)]


def run_step(trainer, batch, lever, clock=time.perf_counter):
    """Seconds and loss of one step."""
    if lever != "stock":
        trainer.lever = lever
    if lever == "shared + cached" and "ref_chosen_logps" not in batch:
        trainer.compute_loss(trainer.model, batch)  # fills the references in
    inputs = trainer._prepare_inputs(batch if lever == "shared + cached" else dict(batch))
    start = clock()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return clock() - start, loss.item()


def seconds(function, clock, repeats=3):
    times = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times[1:])


def limit_of(model, batches, clock):
    """
    Floor of a step.

    Returns:
        `tuple[float, float, float]`: Seconds a step with the reference, seconds without, and the rate in FLOP/s, each
        a mean over batches.
    """
    head = model.get_output_embeddings().weight
    matrices = [p for name, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in name]
    matrices = [
        p for p in matrices if p.shape[0] not in (model.config.vocab_size, model.config.max_position_embeddings)
    ]
    layers = model.config.num_hidden_layers
    heads = model.config.num_attention_heads
    width = heads * getattr(model.config, "head_dim", model.config.hidden_size // heads)
    seen_shapes, totals = {}, torch.zeros(3)

    def product(rows, inner, outer):
        """Seconds of the forward product of a layer, and of its two backward ones."""
        rows = max(1, rows)
        if (rows, inner, outer) not in seen_shapes:
            x, w, y = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
            forward = seconds(lambda: x @ w.t(), clock)
            seen_shapes[rows, inner, outer] = forward, seconds(lambda: (y @ w, y.t() @ x), clock)
        return seen_shapes[rows, inner, outer]

    for batch in batches:
        layout = PairLayout.from_batch(batch)
        tokens, rows = len(layout), len(layout.rows)
        used = [(tokens, *sorted(p.shape)) for p in matrices] + [(rows, head.shape[1], head.shape[0])]
        forward, backward = (sum(times) for times in zip(*(product(*shape) for shape in used), strict=True))
        flops = sum(2 * math.prod(shape) for shape in used)
        rate = 3 * flops / (forward + backward)
        visible = sum(p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in rest) for p, *rest in layout.lengths)
        attention = 4 * layers * width * visible / rate
        totals += torch.tensor([2 * forward + backward + 4 * attention, forward + backward + 3 * attention, rate])
    return (totals / len(batches)).tolist()


def peak_memory(lever, args, name, shape):
    """Largest resident set, in GiB, of a process that takes two steps."""
    command = [sys.executable, __file__, "--model", name, "--shape", shape, "--child", lever, "--steps", "1"]
    command += ["--batch-size", str(args.batch_size), "--threads", str(args.threads)]
    command += ["--gradient-checkpointing"] * args.gradient_checkpointing
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure(args, name, shape):
    clock = time.process_time if args.cpu_time else time.perf_counter
    stock, ours = make_trainer("stock", args, name, shape), make_trainer("shared", args, name, shape)
    batches = {lever: make_batches(stock if lever == "stock" else ours, args) for lever in LEVERS}
    times, losses = ({lever: [] for lever in LEVERS} for _ in range(2))
    for step in range(args.steps + 1):
        for lever in LEVERS:
            elapsed, loss = run_step(stock if lever == "stock" else ours, batches[lever][step], lever, clock)
            times[lever].append(elapsed)
            losses[lever].append(loss)
    with_reference, without, rate = limit_of(stock.model, batches["stock"][1:], clock)
    limits = {lever: without if "cached" in lever else with_reference for lever in LEVERS}
    medians = {lever: statistics.median(values[1:]) for lever, values in times.items()}
    ratios = {
        lever: statistics.median(a / b for a, b in zip(times["stock"][1:], values[1:], strict=True))
        for lever, values in times.items()
    }
    for lever in LEVERS:
        memory = f"{peak_memory(lever, args, name, shape):.2f}" if args.memory else "-"
        print(
            f"| {name} | {shape} | {lever} | {medians[lever]:.3f} | {ratios[lever]:.2f} | {limits[lever]:.3f} | "
            f"{limits[lever] / medians[lever]:.0%} | {memory} |",
            flush=True,
        )
    first = " ".join(f"{values[0]:.7f}" for values in losses.values())
    print(f"<!-- {name}, {shape}: first losses {first}; {rate / 1e9:.0f} GFLOP/s -->", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["gpt2", "qwen2"])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind, after one that is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor: for a machine shared with others"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as TRL does by default")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in a process for each kind")
    parser.add_argument("--child", choices=LEVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    if args.child:
        trainer = make_trainer(args.child, args, args.model[0], args.shape[0])
        if args.child == "shared + cached":
            trainer.ref_model = None
        for batch in make_batches(trainer, args):
            if args.child == "shared + cached":
                batch["ref_chosen_logps"] = batch["ref_rejected_logps"] = torch.zeros(args.batch_size)
            run_step(trainer, batch, args.child)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers))
    clock = "processor" if args.cpu_time else "wall-clock"
    print(f"{versions}; {args.threads} threads; {args.batch_size} pairs; medians of {args.steps}; {clock} seconds\n")
    print("| model | shape | step | seconds | times faster | limit | reached | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.model:
        for shape in args.shape:
            measure(args, name, shape)


if __name__ == "__main__":
    main()
