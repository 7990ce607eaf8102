"""
Time of a pair as the work grows: stock TRL and the product, one factor varied at a time.

    python benchmarks/scaling.py

Steps are those of `step.py`, of `trl.DPOTrainer` and of `DPOShiftTrainer` with its reference cached, interleaved, on a
small Qwen2-like model with random weights; milliseconds a pair are medians of steps over the batch size. Around a
prompt of 128 tokens, answers of 64, 4 pairs and a vocabulary of 8192, each factor varies alone. Processes are counted
under torchrun, of one thread each, with gloo between them: each takes 4 pairs a step, so that pairs a second should
grow with their number.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys

import transformers
from step import PRODUCT, add_arguments, conditions, median_ratio, time_steps


CONFIG = transformers.Qwen2Config(
    vocab_size=8192,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
BASE = {"prompt": 128, "answer": 64, "batch": 4, "vocabulary": 8192}
FACTORS = {
    "prompt": (32, 64, 128, 256, 512),
    "answer": (16, 32, 64, 128, 256),
    "batch": (1, 2, 4, 8, 16),
    "vocabulary": (2048, 4096, 8192, 16_384, 32_768, 65_536),
}
KINDS = ("stock", PRODUCT)


def time_pairs(args, point):
    """Milliseconds a pair of each kind, and how many times faster the product is."""
    config = copy.deepcopy(CONFIG)
    config.vocab_size, args.batch_size = point["vocabulary"], point["batch"]
    times = time_steps(KINDS, args, config, (point["prompt"], point["answer"], 0.0), limit=False)[0]
    medians = [1000 * statistics.median(times[kind]) / point["batch"] for kind in KINDS]
    return *medians, median_ratio(*times.values())


def print_processes(args):
    print("\n| processes | pairs per second, stock | ours | times faster |\n| --- | --- | --- | --- |", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes in args.processes:
        child = [str(processes), __file__, "--child", "--threads", "1", "--steps", str(args.steps)]
        child += ["--device", args.device, "--dtype", args.dtype] + ["--cpu-time"] * args.cpu_time
        child += ["--no-gradient-checkpointing"] * (not args.gradient_checkpointing)
        run = subprocess.run([*command, *child], stdout=subprocess.PIPE, text=True, check=True)
        print(run.stdout.strip().splitlines()[-1], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", nargs="*", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2], help="numbers of processes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_arguments(parser)
    parser.set_defaults(steps=3, batch_size=BASE["batch"])
    args = parser.parse_args()
    if args.child:
        stock, ours, ratio = time_pairs(args, BASE)
        count = int(os.environ["WORLD_SIZE"])
        if os.environ["RANK"] == "0":
            print(f"| {count} | {1000 * count / stock:.1f} | {1000 * count / ours:.1f} | {ratio:.2f} |")
        return
    print(conditions(args))
    for factor in args.factor:
        print(f"\n| {factor} | ms per pair, stock | ours | times faster |\n| --- | --- | --- | --- |")
        for value in FACTORS[factor]:
            stock, ours, ratio = time_pairs(args, {**BASE, factor: value})
            print(f"| {value} | {stock:.1f} | {ours:.1f} | {ratio:.2f} |", flush=True)
    if args.processes:
        print_processes(args)


if __name__ == "__main__":
    main()
