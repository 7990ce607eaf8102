"""Batches of pairs, models of every family that shares prompts, and the scores and gradients of their padded rows."""

import random

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head


VOCAB = 89
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "experts_implementation": "eager",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES = {
    "gpt2": {},
    "gpt2-eager": {"attn_implementation": "eager"},
    "llama": {},
    "llama-eager": {"attn_implementation": "eager"},
    "qwen2": SLIDING,
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "mistral-eager": {"sliding_window": 5, "attn_implementation": "eager"},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 5},
    "gpt_neox": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "starcoder2": {"sliding_window": 5},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, **SLIDING, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
}
# Those whose RMSNorm is PyTorch's
RMS_NORM_FAMILIES = {
    "llama", "llama-eager", "qwen2", "qwen3", "mistral", "mistral-eager", "phi3", "olmo2", "olmo3", "granite",
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss",
}  # fmt: skip


class Float64Throughout(TorchFunctionMode):
    """Keeps in float64 what the models would compute in float32 whatever their dtype: norms, rotations, softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.matmul:  # transformers before 5.20 turn positions to float32 by themselves
                return function(args[0], args[1].double())
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return function(*args, **kwargs)


def make_model(family="llama", dtype=torch.float32, outputs=("log_probs",), **overrides):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family.partition("-")[0], **{**SIZES, **FAMILIES.get(family, {}), **overrides}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    for parameter in model.parameters():  # large enough for attention to matter
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    add_fused_lm_head(model, outputs=outputs)
    return model.to(dtype).eval()


def collate(*pairs, **kwargs):
    examples = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    return DataCollatorForPreference(pad_token_id=0, **kwargs)(examples)


BATCH = collate(
    ([3, 4, 5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 2], [20, 21, 30, 31, 2]),
    ([11, 12, 13], [40, 41, 2], [50, 51, 52, 53, 54, 55, 56, 57, 2]),
    ([14], [60, 61, 62, 2], [60, 61, 62, 2]),
)
CASES = {
    "answers that part at once": collate(([3, 4, 5], [6, 7, 2], [8, 9, 10, 2])),
    "answers that part late": collate(([3, 4, 5], [6, 7, 8, 2], [6, 7, 9, 10, 2])),
    "answers that part at the last token": collate(([3, 4], [6, 7, 2], [6, 7, 9])),
    "identical answers": collate(([3, 4], [6, 7, 2], [6, 7, 2])),
    "chosen a prefix of rejected": collate(([3, 4], [6, 7], [6, 7, 8, 2])),
    "rejected a prefix of chosen": collate(([3, 4], [6, 7, 8, 2], [6, 7])),
    "empty chosen": collate(([3, 4, 5], [], [8, 9, 2])),
    "empty rejected": collate(([3, 4, 5], [6, 7, 2], [])),
    "both answers empty": collate(([3, 4, 5], [], [])),
    "an empty pair beside a full one": collate(([3, 4, 5], [], []), ([3, 4], [5, 2], [6, 2])),
    "no prompt": collate(([], [3, 4, 5], [6, 7])),
    "no prompt, answers that agree": collate(([], [3, 4, 5], [3, 4, 6])),
    "one token in all": collate(([3], [], [])),
    "answers of one token": collate(([3], [4], [5])),
    "completions cut off": collate(([3, 4, 5, 6], [7, 8], [9, 10]), max_length=4),
    "completions cut short": collate(([3, 4, 5, 6], [7, 8, 9], [7, 10, 11, 12]), max_length=6),
    "ends kept, prompts of unlike length": collate(
        ([3, 4, 5, 6], [7, 8], [9, 10, 11, 12]), max_length=5, truncation_mode="keep_end"
    ),
    "ends kept, prompts gone": collate(([3], [4, 5, 6, 7], [8, 9, 10]), max_length=3, truncation_mode="keep_end"),
    "padded to a multiple": collate(([3, 4], [5, 2], [6, 7, 2]), ([3], [5], [6]), pad_to_multiple_of=8),
    "several pairs": BATCH,
}


def mask_out(batch, row, stop):
    batch = {key: value.clone() for key, value in batch.items()}
    batch["completion_mask"][row, :stop] = 0
    return batch


CASES["completion starts among agreed tokens"] = mask_out(CASES["answers that part late"], slice(None), 5)
CASES["masks that differ among agreed tokens"] = mask_out(CASES["answers that part late"], 0, 5)
CASES["one row without completion"] = mask_out(CASES["answers that part late"], 1, 9)


def random_batch(seed):
    chance = random.Random(seed)

    def tokens(most):
        return [chance.choice((3, 4, 5)) for _ in range(chance.randint(0, most))]

    pairs = [(tokens(6), tokens(5), tokens(5)) for _ in range(chance.randint(1, 4))]
    pairs[0] = ([3], *pairs[0][1:])
    batch = collate(
        *pairs, max_length=chance.choice((None, 3, 7)), truncation_mode=chance.choice(("keep_start", "keep_end"))
    )
    if chance.random() < 0.3:
        batch = mask_out(batch, chance.randrange(len(batch["input_ids"])), chance.randint(0, 6))
    return batch


def oracle(batch):
    """For every packed token the history it sees, and every completion token's (history, label), row by row."""
    wanted, needed = {}, set()
    for row, (ids, real, scored) in enumerate(zip(*(batch[k].tolist() for k in batch), strict=True)):
        pair = row % (len(batch["input_ids"]) // 2)
        for step in range(1, sum(real)):
            if scored[step]:
                wanted[row, step - 1] = (tuple(ids[:step]), ids[step])
                needed |= {(pair, tuple(ids[: i + 1])) for i in range(step)}
    return wanted, needed


def histories(layout, window=None):
    """What the layout's lengths and spans let every packed token see, as tokens in the order of their positions."""
    ids, positions = layout.input_ids[0].tolist(), layout.position_ids[0].tolist()
    start, shared_end, branch = layout.spans.tolist()
    for i in range(len(ids)):
        seen = [j for j in range(i + 1) if start[i] <= j < shared_end[i] or j >= branch[i]]
        assert [positions[j] for j in seen] == list(range(len(seen)))
        yield tuple(ids[j] for j in seen)


def rows_scores(model, batch):
    """Separate rows, each token scored from the model's own logits, in the dtype of the model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = logits[:, :-1].log_softmax(-1)
    scored = batch["completion_mask"][:, 1:].bool()
    return {
        "log_probs": log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0].where(scored, 0),
        "entropy": -(log_probs.exp() * log_probs).sum(-1).where(scored, 0),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).where(scored, 0),
        "mean_logits": logits[:, :-1].mean(-1).where(scored, 0),
        "is_top1": (logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]) & scored,
    }


def gradients(model, log_probs):
    """Gradients of a sum in which every completion token has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, log_probs.numel(), dtype=log_probs.dtype).view(log_probs.shape)
    (log_probs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours, theirs, tolerance):
    """Equal to `tolerance`, relative to the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        largest = max(expected.abs().flatten().tolist(), default=0)
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance * (1 + largest), check_dtype=False)
