"""A plain stand-in for `torch.nn.attention.varlen.varlen_attn`: the same arguments, any dtype, any device."""

import math

import torch


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """
    Attention segment by segment, in the words of torch 2.13's docstring: query `i` of `q` sees the keys from
    `i + k - q - left` to `i + k - q + right` of `k`, where -1 stands for no bound.

    Raises:
        ValueError: Where the kernel has undefined results or raises.
    """
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"heads must be as many without `enable_gqa`, got {query.shape[1]} and {key.shape[1]}")
    if cu_seq_q.dtype != torch.int32 or cu_seq_k.dtype != torch.int32 or len(cu_seq_q) != len(cu_seq_k):
        raise ValueError("offsets must be of int32 and as many of queries as of keys")
    if query.stride(-1) != 1 or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise ValueError("query, key and value must be of one dtype, their last dimension contiguous")
    if not isinstance(max_q, int) or not isinstance(max_k, int):
        raise ValueError("the longest segments must be numbers that the host knows")
    starts_q, starts_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    if (starts_q[-1], starts_k[-1]) != (len(query), len(key)):
        raise ValueError("offsets must end with the last query and key")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    left, right = window_size
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    for q_from, q_to, k_from, k_to in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        q, k, v = query[q_from:q_to], key[k_from:k_to], value[k_from:k_to]
        if len(q) > max_q or len(k) > max_k:
            raise ValueError("no segment may be longer than the longest")
        ahead = torch.arange(len(k), device=q.device) - (
            torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
        )
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= (ahead > right) if right >= 0 else hidden
        hidden |= (ahead < -left) if left >= 0 else hidden
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        outputs.append(torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v))
    return torch.cat(outputs)


def varlen_attn_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """Without `enable_gqa`: heads of keys and values have to be repeated."""
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def varlen_attn_of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """Without `scale` and windows too."""
    window_size = (-1, 0) if is_causal else (-1, -1)
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)
