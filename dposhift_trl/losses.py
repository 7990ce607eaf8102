"""The closed form of the DPO-Shift loss, on tensors."""

import torch
import torch.nn.functional as F


def dpo_shift_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    shift_lambda: float | torch.Tensor,
) -> torch.Tensor:
    r"""
    Per-pair DPO-Shift loss, Eq. 3 of [DPO-Shift](https://huggingface.co/papers/2502.07599).

    $$ -\log \sigma(\beta\,(\Delta_w - \lambda\,\Delta_l)), \quad \Delta = \log\pi_\theta - \log\pi_{\mathrm{ref}} $$

    With `shift_lambda=1` this is the sigmoid DPO loss. Its gradient with respect to the rejected log-probability is
    \\( -\lambda \\) times that with respect to the chosen one.

    Args:
        chosen_logratios (`torch.Tensor`):
            Policy minus reference log-probability of each chosen completion, summed over its tokens, in nats. Shape:
            `(batch_size,)`.
        rejected_logratios (`torch.Tensor`):
            The same for each rejected completion. Shape: `(batch_size,)`.
        beta (`float`):
            Inverse temperature of the implicit reward, per nat.
        shift_lambda (`float` or `torch.Tensor`):
            Factor on the rejected log-ratio, one number or one per pair. Shape: `()` or `(batch_size,)`.

    Returns:
        `torch.Tensor`: One loss per pair, in nats, not reduced. Shape: `(batch_size,)`.

    Raises:
        ValueError: If the two inputs differ in shape.

    Example:

    ```python
    >>> dpo_shift_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -4.0]), beta=0.5, shift_lambda=0.5)
    tensor([0.6931, 0.1269])

    ```
    """
    if chosen_logratios.shape != rejected_logratios.shape:
        raise ValueError(
            "`chosen_logratios` and `rejected_logratios` must have the same shape, got "
            f"{tuple(chosen_logratios.shape)} and {tuple(rejected_logratios.shape)}. Pass one log-ratio per pair."
        )
    return -F.logsigmoid(beta * (chosen_logratios - shift_lambda * rejected_logratios))


def sequence_logps(
    per_token_logps: torch.Tensor, completion_mask: torch.Tensor, ld_alpha: float | None = None
) -> torch.Tensor:
    r"""
    Log-probability of each completion in a batch of pairs, chosen completions first.

    $$ \log\pi(y) = \sum_{i \le m} \log\pi(y_i) + \alpha \sum_{i > m} \log\pi(y_i) $$

    where \\( m \\) is the length of the shorter completion of the pair and \\( \alpha \\) is `ld_alpha`, Eq. 11 of
    [LD-DPO](https://huggingface.co/papers/2409.06411). Without `ld_alpha`, it is the sum over all tokens.

    Args:
        per_token_logps (`torch.Tensor`):
            Log-probability of each token, in nats, zero outside the completions. Shape: `(2 * batch_size, seq_len)`.
        completion_mask (`torch.Tensor`):
            1 for the tokens of the completions, 0 elsewhere. Shape: `(2 * batch_size, seq_len)`.
        ld_alpha (`float`, *optional*):
            Weight of the tokens beyond the length of the shorter completion.

    Returns:
        `torch.Tensor`: Log-probabilities in nats. Shape: `(2 * batch_size,)`.

    Example:

    ```python
    >>> logps = torch.tensor([[-1.0, -2.0, -4.0], [0.0, -8.0, 0.0]])
    >>> mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
    >>> sequence_logps(logps, mask)
    tensor([-7., -8.])
    >>> sequence_logps(logps, mask, ld_alpha=0.5)
    tensor([-4., -8.])

    ```
    """
    if ld_alpha is None:
        return per_token_logps.sum(dim=1)
    position = completion_mask.cumsum(dim=1)
    shorter = torch.minimum(*completion_mask.sum(dim=1).chunk(2)).repeat(2).unsqueeze(1)
    shared = (per_token_logps * ((position > 0) & (position <= shorter))).sum(dim=1)
    tail = (per_token_logps * (position > shorter)).sum(dim=1)
    return shared + ld_alpha * tail
