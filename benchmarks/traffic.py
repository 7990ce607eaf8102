"""
What the operations of a decoder layer read and write in a step, counted on a CPU.

    python benchmarks/traffic.py
    python benchmarks/traffic.py --model qwen-1.5b --shape 1024/256 --operations

A GPU multiplies matrices so fast that a small model waits for the memory that its hidden states are moved through. So
stock TRL and `DPOShiftTrainer` are compared by the bytes that all dispatched operations take and return, forward and
backward, in bf16 mixed precision with checkpointed gradients. Views and allocations are not counted. Attention by
segments and fused RMSNorm, which a CPU does not have, count what they take and return, as stock's attention does; what
they move inside is not seen.

Steps of two and four pairs through two and three layers tell what one layer costs for each pair, and for each step of
any size (its weights). `limit` is what sharing prompts and a cached reference save at most:
`(2 + 2a) / (1 + 2a)` with a = answer / prompt, times 5/4 if the reference is cached.
"""

import argparse
import collections
import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from gpu import kernels, only
from gpu_steps import Bench, draw_pairs
from gpu_table import SHAPES
from step import MODELS, quiet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dposhift_trl.scoring.attention import BranchAttention, VarlenAttention
from dposhift_trl.scoring.operations import RMS_NORMS


LAYERS, PAIRS = (2, 3), (2, 4)
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}
KINDS = {  # ours, reference cached, fused RMSNorm
    "TRL": (False, False, False),
    "cached": (True, True, True),
    "scored": (True, False, True),
    "cached, own RMSNorm": (True, True, False),
}


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, by operation, and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.number: collections.Counter[str] = collections.Counter()

    def add(self, name: str, *values: Any) -> None:
        """Count an operation with these inputs and outputs."""
        tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        # An expanded tensor is as large as its memory
        self.bytes[name] += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        self.number[name] += 1

    def zeros_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros that are not counted."""
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.zeros_like(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        viewed = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name == "index_select":
            self.add(name, result, result, args[2])  # it reads what it returns
        elif not viewed and name not in ALLOCATIONS:
            self.add(name, args, kwargs, result)
        return result


class _Counted(torch.autograd.Function):
    """An operation of which nothing is known but what it takes and returns, like its first input."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, name: str, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.traffic, ctx.name = traffic, name
        ctx.save_for_backward(*inputs)
        result = traffic.zeros_like(inputs[0])
        traffic.add(name, inputs, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        grads = [ctx.traffic.zeros_like(x) for x in inputs]
        ctx.traffic.add(ctx.name + " backward", inputs, grad, grads)
        return None, None, *grads


@contextlib.contextmanager
def stand_ins(traffic: Traffic, fused: bool) -> Iterator[None]:
    """Attention by segments, and fused RMSNorm, that are counted."""

    def varlen_attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, window_size: Any, enable_gqa: bool
    ) -> Any:
        return _Counted.apply(traffic, "attention", query, key, value)

    def rms_norm(values: torch.Tensor, shape: Any, weight: torch.Tensor, epsilon: float) -> Any:
        return _Counted.apply(traffic, "fused RMSNorm", values, weight)

    with only(VarlenAttention(varlen_attn), BranchAttention()):
        if fused:
            RMS_NORMS["cpu"] = rms_norm
        else:
            del RMS_NORMS["cpu"]
        yield


def count(kind: str, model: str, shape: str, layers: int, pairs: int) -> Traffic:
    """The operations of one step."""
    ours, cached, fused = KINDS[kind]
    values = {**MODELS[model].to_dict(), "num_hidden_layers": layers, "vocab_size": 512, "layer_types": None}
    MODELS["counted"] = config = type(MODELS[model])(**values)
    part: Any = types.SimpleNamespace(args=types.SimpleNamespace(smoke=True))
    with only(kernels(smoke=True)["varlen"], BranchAttention()):
        bench = Bench(part, "counted", ours)
    trainer, traffic = bench.trainer, Traffic()
    inputs = bench.inputs(draw_pairs(SHAPES[shape], pairs, config.vocab_size), cached)
    trainer.ref_model = bench.reference
    with stand_ins(traffic, fused), traffic:
        if ours and not cached:
            trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        trainer.training_step(trainer.model_wrapped, inputs)
    bench.folder.cleanup()
    return traffic


def of_a_layer(kind: str, model: str, shape: str) -> tuple[float, float, float, collections.Counter[str]]:
    """Of one more layer: bytes per pair, bytes per step, operations, and bytes per pair by operation."""
    few, many = ([count(kind, model, shape, layers, pairs) for layers in LAYERS] for pairs in PAIRS)
    by_name = {}
    for name in many[1].bytes:
        larger, smaller = (after.bytes[name] - before.bytes[name] for before, after in (many, few))
        by_name[name] = (larger - smaller) / (PAIRS[1] - PAIRS[0])
    per_pair = sum(by_name.values())
    whole = sum(many[1].bytes.values()) - sum(many[0].bytes.values())
    number = sum(many[1].number.values()) - sum(many[0].number.values())
    return per_pair, whole - PAIRS[1] * per_pair, number, collections.Counter(by_name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-0.5b")
    parser.add_argument("--shape", choices=[n for n, s in SHAPES.items() if not s[2]], default="448/64")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), metavar="KIND")
    parser.add_argument("--operations", action="store_true", help="also list the operations that move most")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    ratio = SHAPES[args.shape][1] / SHAPES[args.shape][0]
    print("| kind | MiB per pair | MiB per step | operations | fewer bytes per pair than TRL, times | limit |")
    print("| --- | --- | --- | --- | --- | --- |")
    stock = None
    with quiet(args):
        for kind in args.kind:
            per_pair, per_step, number, by_name = of_a_layer(kind, args.model, args.shape)
            stock = per_pair if kind == "TRL" else stock
            limit = (2 + 2 * ratio) / (1 + 2 * ratio) * (1.25 if KINDS[kind][1] else 1)
            compared = "" if stock is None else f"{stock / per_pair:.2f}"
            print(
                f"| {kind} | {per_pair / 2**20:.1f} | {per_step / 2**20:.1f} | {number:.0f} | {compared} | "
                f"{'' if kind == 'TRL' else f'{limit:.2f}'} |",
                flush=True,
            )
            if args.operations:
                for name, size in by_name.most_common(12):
                    print(f"<!-- {name}: {size / 2**20:.1f} -->", flush=True)


if __name__ == "__main__":
    main()
