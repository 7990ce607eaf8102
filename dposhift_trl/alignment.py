"""Do the gradients of a pair's two answers point the same way? The measure behind `per_pair_lambda`."""

from collections.abc import Mapping
from typing import Any

import torch

from .head import through_transform, vocabulary_tiles
from .shared_prompt import logit_transform


ALIGNMENT = "gradient_alignment"  # column of a data set, and key of a batch


@torch.no_grad()
def head_gradient_products(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chosen: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Inner products of the gradients of two answers' log-probabilities with respect to the head's weight.

    With the row \\( h_k \\) that predicts token \\( y_k \\), and the distribution \\( p_k \\) it predicts, the gradient
    of an answer's log-probability is \\( G = \sum_k (e_{y_k} - p_k)\,h_k^\top \\), so that

    $$ \langle G_w, G_l \rangle = \sum_{k, k'} \langle e_{y_k} - p_k,\, e_{y'_{k'}} - p'_{k'} \rangle
       \langle h_k, h'_{k'} \rangle $$

    It is the part of \\( \langle\nabla\log\pi(y_w), \nabla\log\pi(y_l)\rangle \\) in the last layer, the term by which
    DPO lowers the chosen answer while it lowers the rejected one, Section 3.3 of
    [DPO-Shift](https://huggingface.co/papers/2502.07599).

    Args:
        hidden (`torch.Tensor`):
            Hidden states that predict the chosen answer's tokens, then those that predict the rejected one's. Shape:
            `(rows, hidden_size)`.
        weight (`torch.Tensor`), bias (`torch.Tensor` or `None`):
            The head's. Shapes: `(vocab_size, hidden_size)` and `(vocab_size,)`.
        targets (`torch.Tensor`):
            The tokens. Shape: `(rows,)`.
        chosen (`int`):
            Rows of the chosen answer.
        scale (`float`, *optional*, defaults to `1.0`), softcap (`float`, *optional*):
            Factor and bound of the logits.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: \\( \langle G_w, G_l \rangle \\) and \\( \|G_w\|^2 \\). Shape: `()` each.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tiles = [hidden, weight, bias, dtype, scale, softcap]
    log_total = torch.stack([logits.logsumexp(dim=1) for _, _, logits in vocabulary_tiles(*tiles)]).logsumexp(dim=0)
    similar = torch.zeros(len(hidden), len(hidden), dtype=dtype, device=hidden.device)
    for start, tile, logits in vocabulary_tiles(*tiles):
        errors = -(logits - log_total[:, None]).exp()
        inside = ((targets >= start) & (targets < start + len(tile))).nonzero()[:, 0]
        errors[inside, targets[inside] - start] += 1
        errors = through_transform(errors, logits, scale, softcap)
        similar += errors @ errors.t()
    hidden = hidden.to(dtype)
    products = similar * (hidden @ hidden.t())
    return products[:chosen, chosen:].sum(), products[:chosen, :chosen].sum()


@torch.no_grad()
def gradient_alignment(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`head_gradient_products`] of each pair of a batch, each row read as TRL pads it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model with a linear head.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `completion_mask`, chosen rows first, as TRL collates them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Shape: `(batch_size,)` each.
    """
    ids, real, scored = batch["input_ids"], batch["attention_mask"], batch["completion_mask"][:, 1:].bool()
    hidden = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state[:, :-1]
    head, pairs = model.get_output_embeddings(), len(ids) // 2
    transform = logit_transform(model.config)
    products = []
    for chosen, rejected in zip(range(pairs), range(pairs, 2 * pairs), strict=True):
        rows = torch.cat([hidden[i][scored[i]] for i in (chosen, rejected)])
        targets = torch.cat([ids[i, 1:][scored[i]] for i in (chosen, rejected)])
        count = int(scored[chosen].sum())
        products.append(head_gradient_products(rows, head.weight, head.bias, targets, count, *transform))
    aligned, norms = zip(*products, strict=True)
    return torch.stack(aligned), torch.stack(norms)
