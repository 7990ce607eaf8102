"""Run by torchrun: two processes score runs of unlike length and must reach the gradients of one that scores both."""

import torch
import torch.distributed as dist
from pairs import BATCH, CASES, NO_DROPOUT, gradients, make_model
from torch.nn.parallel import DistributedDataParallel

from dposhift_trl.scoring import PairLayout, enable_shared_prompt, shared_prompt_scores


def main():
    dist.init_process_group("gloo")
    model = make_model("gpt2", torch.float64, **NO_DROPOUT)
    enable_shared_prompt(model)
    layouts = [PairLayout.from_batch(batch) for batch in (BATCH, CASES["both answers empty"])]
    expected = {}
    for layout in layouts:
        for name, gradient in gradients(model, shared_prompt_scores(model, layout).log_probs).items():
            expected[name] = expected.get(name, 0) + gradient / 2
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    got = gradients(wrapped, shared_prompt_scores(wrapped, layouts[dist.get_rank()]).log_probs)
    for name, gradient in expected.items():
        assert torch.allclose(got[f"module.{name}"], gradient, rtol=0, atol=1e-10), name
    if dist.get_rank() == 0:
        print("agrees")
    # The reducer must go while gloo and the interpreter still run: left to the exit, it can hang there
    del wrapped, got
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
