"""
Time of a DPO step against stock TRL, and against the matrix products it cannot do without.

    python benchmarks/step.py
    python benchmarks/step.py --memory
    python benchmarks/step.py --device cuda --dtype bf16 --model llama-0.5b qwen-1.5b --shape 512 1280 4096

A step is what training runs: a batch collated, `training_step`, clipping, AdamW. Stock is `trl.DPOTrainer` with TRL's
defaults but for the precision: gradients are checkpointed, in every kind of step, unless `--no-gradient-checkpointing`
is given. `DPOShiftTrainer` is the product with its defaults, its reference
log-probabilities precomputed through a fresh cache; lambda is 1, so that losses compare, which costs what any lambda
does. `+ reference` adds to each step the scoring of its pairs by the reference, as the first epoch of the first run
pays it. The levers are stock TRL, changed in one thing:

- memory: the process keeps the memory that a step has freed (on a CPU);
- rows: padded rows, of which only those that predict a completion token are projected;
- shared: shared prompts;
- shared + cached: shared prompts, with the log-probabilities of the reference at hand.

Stock, the first lever, the others and the product run in a process each. Every kind of step has its turn on each
batch, one after the other; seconds are medians, and `times faster` is the median of the ratios on the same batch.
Before the first step, the losses of all kinds must agree to rounding.

The limit is the time of the matrix products of a step, measured at the model's shapes in memory that is at hand: every
unique token through every layer and the rows that predict a completion token through the head, forward and backward;
the layers forward once more where gradients are checkpointed, but for the last product of each, which nothing in the
backward pass needs; and all forward once more for the reference unless cached. Attention is counted at the rate of
those. `reached` is the median of its share of the time, batch by batch. The product does a little less than that: the
last layer's feed-forward is given the scored rows alone.

With `--memory` the peak of a process that takes no other steps is measured instead: its largest resident set, or what
CUDA allocated.
"""

import argparse
import contextlib
import copy
import functools
import gc
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings

import torch
import transformers
import trl
from accelerate.utils import send_to_device
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.scoring import PairLayout, enable_shared_prompt, shared_prompt_scores
from dposhift_trl.scoring.head import token_scores
from dposhift_trl.training.allocator import keep_freed_memory
from dposhift_trl.training.collator import PairCollator


LEVERS = ("rows", "shared", "shared + cached")
PRODUCT, PRODUCT_AND_REFERENCE = "DPOShiftTrainer", "DPOShiftTrainer + reference"
# Those in one group differ in the step alone, and share a process
GROUPS = (("stock",), ("memory",), LEVERS, (PRODUCT, PRODUCT_AND_REFERENCE))
KINDS = sum(GROUPS, ())
CACHED = ("shared + cached", PRODUCT)
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
    "llama-0.5b": transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=22,
        num_attention_heads=20,
        num_key_value_heads=20,
        max_position_embeddings=8192,
    ),
    "qwen-1.5b": transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
# Tokens of prompt and answer, and the standard deviation of their logarithm
SHAPES = {
    "long": (256, 64, 0.0),
    "longer": (512, 64, 0.0),
    "short": (64, 128, 0.0),
    "ragged": (45, 90, 0.8),
    "512": (448, 64, 0.0),
    "1280": (1024, 256, 0.0),
    "4096": (3584, 512, 0.0),
}
# Largest difference of two first losses, in nats: sums over an answer are rounded by its length
TOLERANCE = {"float32": 1e-4, "bf16": 0.1}
SCORED = ("log_probs", "entropy", "mean_logits", "is_top1")


class LeverTrainer(DPOTrainer):
    """Stock TRL, but for where the scores come from."""

    lever = "shared"

    def scores(self, model, inputs):
        if self.lever.startswith("shared"):
            return shared_prompt_scores(model, inputs["shared_prompt"])
        scored = inputs["completion_mask"][:, 1:].bool()
        rows = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with self.accelerator.autocast():
            hidden = model.base_model(**rows, use_cache=False).last_hidden_state[:, :-1][scored]
        head, labels = model.get_output_embeddings(), inputs["input_ids"][:, 1:][scored]
        hidden = hidden.to(torch.bfloat16) if self.args.bf16 else hidden
        outputs = SCORED[1:] if model is self.model else ()
        scores = token_scores(hidden, head.weight, head.bias, labels, outputs)
        return FusedCausalLMOutput(
            **{k: v.new_zeros(scored.shape).masked_scatter(scored, v) for k, v in scores.items()}
        )

    @torch.no_grad()
    def score_reference(self, inputs):
        reference = self.scores(self.ref_model, inputs).log_probs.sum(1).chunk(2)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.precompute_ref_logps = True
        if self.lever != "shared + cached":
            self.score_reference(inputs)
        return super().compute_loss(lambda **_: self.scores(model, inputs), inputs, *args, **kwargs)


def make_tokenizer(vocab_size):
    """One token a word, none of which is found inside another, as a special token of digits would be."""
    special = ("<unk>", "<eos>", "<pad>")
    vocab = {word: token for token, word in enumerate((*special, *map(str, range(len(special), vocab_size))))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def make_examples(shape, batch_size, batches, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt, answer, sigma = shape

    def words(mean, least):
        scale = math.exp(sigma * torch.randn((), generator=generator).item() - sigma**2 / 2)
        length = min(max(least, round(mean * scale)), 480) if sigma else mean
        return " ".join(map(str, torch.randint(3, vocab_size, (length,), generator=generator).tolist()))

    # TRL appends the end-of-sequence token to each answer
    return [
        {"prompt": words(prompt, 1) + " ", "chosen": words(answer - 1, 1), "rejected": words(answer - 1, 1)}
        for _ in range(batch_size * batches)
    ]


def make_trainer(kind, args, config, shape):
    """A trainer of this kind as `train` has it before the first step, on a model with random weights."""
    torch.manual_seed(0)
    with torch.device(args.device):
        model, reference = (transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)) for _ in range(2))
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.batch_size,
        "gradient_checkpointing": args.gradient_checkpointing,
        "max_length": max(1024, shape[0] + shape[1]),
        "bf16": args.dtype == "bf16",
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if kind.startswith(PRODUCT):
        trainer_class, settings = DPOShiftTrainer, DPOShiftConfig(**settings, shift_lambda=1.0)
    else:
        trainer_class, settings = LeverTrainer if kind in LEVERS else DPOTrainer, DPOConfig(**settings)
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(make_examples(shape, args.batch_size, args.steps + 1, config.vocab_size)),
        processing_class=make_tokenizer(config.vocab_size),
    )
    if kind in LEVERS:
        for each in (model, reference):
            enable_shared_prompt(each)
        trainer.data_collator = PairCollator(trainer.data_collator, shares_prompts=True)
    trainer.accelerator.free_memory()  # as `train` does
    trainer.ref_model = reference.to(args.device)  # which the product has put aside
    if args.device == "cpu" and (kind == "memory" or kind.startswith(PRODUCT)):
        keep_freed_memory()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable(settings.activation_checkpointing_kwargs)
    trainer._prepare_for_training(args.steps + 1, None, None)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    return trainer


def make_batches(trainer, args):
    """Rows of each batch, tokenized."""
    rows = list(trainer.train_dataset)
    return [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]


def make_clock(args):
    tick = time.process_time if args.cpu_time else time.perf_counter
    if args.device == "cpu":
        return tick

    def clock():
        torch.cuda.synchronize()
        return tick()

    return clock


def prepared(trainer, rows, kind):
    """The inputs of a step of this kind, on the device."""
    if kind in LEVERS:
        trainer.lever = kind
    return send_to_device(trainer.data_collator(rows), trainer.accelerator.device)


def run_step(trainer, rows, kind, clock, known):
    """Seconds of one step; `known` are the reference's log-probabilities, where they are to be at hand."""
    model = trainer.model_wrapped
    start = clock()
    inputs = prepared(trainer, rows, kind) | known
    if kind == PRODUCT_AND_REFERENCE:
        trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    trainer.training_step(model, inputs)
    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    model.zero_grad()
    return clock() - start


def seconds(function, clock, repeats=3):
    times = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times[1:])


def limit_of(model, batches, args, clock):
    """
    Floor of a step.

    Returns:
        `list[tuple[float, float, float]]`: For each batch, seconds of a step with the reference, seconds without, and
        the rate in FLOP/s.
    """
    if args.device == "cpu":
        keep_freed_memory()
    head = model.get_output_embeddings().weight
    matrices = [p for name, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in name]
    matrices = [
        p for p in matrices if p.shape[0] not in (model.config.vocab_size, model.config.max_position_embeddings)
    ]
    layers = model.config.num_hidden_layers
    heads = model.config.num_attention_heads
    width = heads * (getattr(model.config, "head_dim", None) or model.config.hidden_size // heads)
    kind = {"device": args.device, "dtype": torch.bfloat16 if args.dtype == "bf16" else torch.float32}
    seen_shapes, limits = {}, []

    def products(shapes):
        """Seconds of the forward products, and of the two backward ones of each."""
        times = torch.zeros(2)
        for rows, inner, outer in shapes:
            shape = max(1, rows), inner, outer
            if shape not in seen_shapes:
                x, w, y = (torch.randn(*size, **kind) for size in (shape[:2], (outer, inner), shape[::2]))
                forward = seconds(functools.partial(lambda x, w: x @ w.t(), x, w), clock)
                backward = seconds(functools.partial(lambda x, w, y: (y @ w, y.t() @ x), x, w, y), clock)
                seen_shapes[shape] = torch.tensor((forward, backward))
            times += seen_shapes[shape]
        return times

    for batch in batches:
        layout = PairLayout.from_batch(batch)
        tokens, rows = len(layout), len(layout.rows)
        in_layers, in_head = [(tokens, *sorted(p.shape)) for p in matrices], [(rows, head.shape[1], head.shape[0])]
        last_of_layers = in_layers[len(in_layers) // layers - 1 :: len(in_layers) // layers]
        layer_times, head_times, last_times = map(products, (in_layers, in_head, last_of_layers))
        rate = 6 * sum(map(math.prod, in_layers + in_head)) / (layer_times + head_times).sum()
        visible = sum(p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in rest) for p, *rest in layout.lengths)
        attention = 4 * layers * width * visible / rate
        layer_times += torch.tensor((attention, 2 * attention))
        step = layer_times.sum() + head_times.sum()
        if args.gradient_checkpointing:
            step += layer_times[0] - last_times[0]
        limits.append((float(step + layer_times[0] + head_times[0]), float(step), float(rate)))
    return limits


class Steps:
    """A trainer and its batches, on which kinds of step are taken that differ in the step alone."""

    def __init__(self, kinds, args, config, shape):
        self.kinds, self.args = kinds, args
        self.trainer = make_trainer(kinds[0], args, config, shape)
        self.batches = make_batches(self.trainer, args)
        self.clock = make_clock(args)

    def first_losses(self):
        """Loss of the first batch by each kind."""
        losses = {}
        for kind in self.kinds:
            inputs = prepared(self.trainer, self.batches[0], kind) | self.known(kind, 0)
            losses[kind] = self.trainer.compute_loss(self.trainer.model_wrapped, inputs).item()
        return losses

    def known(self, kind, number):
        """The reference's log-probabilities of a batch, for the lever that has them at hand."""
        if kind != "shared + cached":
            return {}
        inputs = prepared(self.trainer, self.batches[number], kind)
        self.trainer.score_reference(inputs)
        return {name: inputs[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}

    def seconds(self, kind, number):
        """Time of a step of this kind on this batch."""
        return run_step(self.trainer, self.batches[number], kind, self.clock, self.known(kind, number))

    def limit(self):
        """Result of [`limit_of`] over the batches that are counted."""
        batches = [self.trainer.data_collator(rows) for rows in self.batches[1:]]
        return limit_of(self.trainer.model, batches, self.args, self.clock)

    def peak_memory(self):
        """Peak memory, in GiB, of two steps in a process that has taken no other."""
        (kind,) = self.kinds
        known = {}
        if kind in CACHED:
            self.trainer.ref_model = None
            gc.collect()
        if kind == "shared + cached":
            known = dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(self.args.batch_size))
        for rows in self.batches[:2]:
            run_step(self.trainer, rows, kind, self.clock, send_to_device(known, self.trainer.accelerator.device))
        if self.args.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return torch.cuda.max_memory_allocated() / 2**30


class InProcess:
    """[`Steps`] in a process of its own, closed by `with`; its methods wait for the answer."""

    def __init__(self, kinds, args, config, shape, number=0):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=self._serve, args=(other, number, kinds, args, config, shape))
        self._process.start()
        other.close()

    def __getattr__(self, name):
        def call(*arguments):
            self._connection.send((name, arguments))
            answer = self._connection.recv()
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()
        self._process.join()

    @staticmethod
    def _serve(connection, number, kinds, args, config, shape):
        if "MASTER_PORT" in os.environ:  # under torchrun each kind has collectives of its own
            os.environ |= {
                "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1 + number),
                "TORCHELASTIC_USE_AGENT_STORE": "False",
            }
        with quiet(args), contextlib.suppress(EOFError):
            steps = Steps(kinds, args, config, shape)
            while True:
                name, arguments = connection.recv()
                try:
                    answer = getattr(steps, name)(*arguments)
                except Exception as error:  # such as memory that does not suffice
                    answer = error
                connection.send(answer)


def time_steps(kinds, args, config, shape, limit=True):
    """
    Take interleaved steps of every kind.

    Returns:
        `tuple`: Seconds of each step but the first, and the first losses, each by kind; and, unless `limit` is false,
        the result of [`limit_of`].

    Raises:
        RuntimeError: If the first loss of a kind is not stock's.
    """
    groups = filter(None, ([kind for kind in group if kind in kinds] for group in GROUPS))
    times, places, losses = {kind: [] for kind in kinds}, {}, {}
    with contextlib.ExitStack() as stack:
        for number, group in enumerate(groups):
            process = stack.enter_context(InProcess(group, args, config, shape, number))
            places |= dict.fromkeys(group, process)
        for process in dict.fromkeys(places.values()):
            losses |= process.first_losses()
        tolerance = TOLERANCE[args.dtype]
        if not all(abs(loss - losses["stock"]) <= tolerance for loss in losses.values()):
            raise RuntimeError(f"The losses of the first batch differ by more than {tolerance} nats: {losses}")
        for number in range(args.steps + 1):
            for kind in kinds:
                times[kind].append(places[kind].seconds(kind, number))
        times = {kind: values[1:] for kind, values in times.items()}
        return times, losses, places["stock"].limit() if limit else None


def median_ratio(times, others):
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def measure(args, name, shape):
    times, losses, limits = time_steps(args.kind, args, MODELS[name], SHAPES[shape])
    *limits, rates = zip(*limits, strict=True)
    for kind in args.kind:
        limit = limits[kind in CACHED]
        print(
            f"| {name} | {shape} | {kind} | {statistics.median(times[kind]):.3f} | "
            f"{median_ratio(times['stock'], times[kind]):.2f} | {statistics.median(limit):.3f} | "
            f"{median_ratio(limit, times[kind]):.0%} |",
            flush=True,
        )
    first, rate = " ".join(f"{loss:.7f}" for loss in losses.values()), statistics.median(rates)
    print(f"<!-- {name}, {shape}: first losses {first}; {rate / 1e9:.0f} GFLOP/s -->", flush=True)


def measure_memory(args, name, shape):
    peaks = []
    for kind in args.kind:
        with InProcess([kind], args, MODELS[name], SHAPES[shape]) as steps:
            peaks.append(f"{steps.peak_memory():.2f}")
    print(f"| {name} | {shape} | {' | '.join(peaks)} |", flush=True)


def add_arguments(parser):
    """Arguments of every measurement of steps."""
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind, after one that is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=TOLERANCE, default="float32", help="bf16 is mixed precision, with weights in float32"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor: for a machine shared with others"
    )
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="TRL's default is on"
    )


@contextlib.contextmanager
def quiet(args):
    """Threads as asked for, no warnings or progress bars, and every file, the reference cache too, in a new folder."""
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = os.environ["DPOSHIFT_CACHE"] = folder
        yield
        tempfile.tempdir = None


def conditions(args):
    """What was measured, in one line."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    device = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    checkpointing = "with" if args.gradient_checkpointing else "without"
    clock = "processor" if args.cpu_time else "wall-clock"
    return (
        f"{versions}; {device}; {args.dtype}; {checkpointing} gradient checkpointing; medians of {args.steps}; "
        f"{clock} seconds"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["gpt2", "qwen2"])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["long", "short", "ragged"])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="kinds of step, beside stock")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    add_arguments(parser)
    args = parser.parse_args()
    args.kind = [
        kind for kind in KINDS if kind in {"stock", *args.kind} and (kind != "memory" or args.device == "cpu")
    ]
    print(f"{conditions(args)}; {args.batch_size} pairs\n")
    columns = args.kind if args.memory else ["step", "seconds", "times faster", "limit", "reached"]
    print(f"| model | shape | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}", flush=True)
    for name in args.model:
        for shape in args.shape:
            (measure_memory if args.memory else measure)(args, name, shape)


if __name__ == "__main__":
    main()
