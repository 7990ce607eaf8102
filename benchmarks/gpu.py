"""
What only a GPU can show, in one run of minutes: `bash benchmarks/gpu.sh`.

Parts run in this order, each in a process of its own with a time limit, so that one that fails stops no other:

1. device: card, versions, rate of bf16 matrix products, bandwidth of a copy.
2. check: the start-up check of every family, each kernel of attention against padded rows, in bf16 and float32.
3. training: losses, gradient norms and metrics of a few steps, stock TRL against `DPOShiftTrainer`.
4. tests: `pytest -m gpu`, without what needs two cards.
5. steps: seconds, tokens per second, MFU and peak memory of a step, see `gpu_steps.py`.
6. grid: displacement by lambda of a model in a folder, if `--model` names one; of the demo's with `--smoke`.

`results.json` holds all records, `table.md` what is printed last, `log.txt` what each part printed, tracebacks
included.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gpu_table import table_of


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
# Seconds at most of each part; what the last ones need is kept free for them
LIMITS = {"device": 90, "check": 100, "training": 100, "tests": 100, "steps": 400, "grid": 120}
STEPS_SHARE = 0.5
KEPT = {"steps": 5, "grid": 5}

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
    """Lets pairs attend by these kernels alone, and RMSNorm be one operation, on any device."""
    from dposhift_trl.scoring.attention import KERNELS
    from dposhift_trl.scoring.operations import RMS_NORMS

    before, norms = dict(KERNELS), dict(RMS_NORMS)
    KERNELS.update(dict.fromkeys(KERNELS, chosen))
    RMS_NORMS["cpu"] = RMS_NORMS["cuda"]
    try:
        yield
    finally:
        KERNELS.update(before)
        RMS_NORMS.clear()
        RMS_NORMS.update(norms)


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
                operations=sorted(hooks_of(model).operations),
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
    command += ["-k", "not launch_file"]  # minutes of start-up, for what one card shows little of
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


def steps(part: Part) -> None:
    """Time, memory and MFU of a step."""
    from gpu_steps import time_steps

    with only(*kernels(True).values()) if part.args.smoke else nullcontext():
        time_steps(part)


def grid(part: Part) -> None:
    """Displacement by lambda, from a model in a folder, on the built-in demo's pairs."""
    smoke, folder = part.args.smoke, part.args.model
    if not smoke and (not folder or not (Path(folder) / "config.json").is_file()):
        part.record(skipped="no folder with a model was given (--model DIR)")
        return
    from displacement import COLUMNS, settings
    from step import quiet

    from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
    from dposhift_trl.data.demo import demo_dataset, save_demo_model

    with quiet(argparse.Namespace(threads=1 if smoke else 8)), tempfile.TemporaryDirectory() as output:
        if not folder:
            folder = f"{output}/demo"
            save_demo_model(folder)
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
                part.record(
                    shift_lambda=value, metrics={n: metrics[f"eval_{n}"] for n in COLUMNS if f"eval_{n}" in metrics}
                )


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
