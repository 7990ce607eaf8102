"""The paper in float64, literally, sharing no code with the package."""

import math


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def delta(chosen_logratio: float, rejected_logratio: float, shift_lambda: float) -> float:
    """The bracket of Eq. 3."""
    return chosen_logratio - shift_lambda * rejected_logratio


def shifted_loss(
    loss_type: str,
    chosen_logratio: float,
    rejected_logratio: float,
    shift_lambda: float,
    *,
    beta: float,
    label_smoothing: float = 0.1,
    discopop_tau: float = 0.05,
    chosen_length: int = 1,
    rejected_length: int = 1,
) -> float:
    """Loss of one pair, with the rejected log-ratio scaled by lambda, for each loss type built on the difference."""
    z = beta * delta(chosen_logratio, rejected_logratio, shift_lambda)
    normed = chosen_logratio / chosen_length - shift_lambda * rejected_logratio / rejected_length
    eps = label_smoothing
    if loss_type == "sigmoid":
        return -log_sigmoid(z)
    if loss_type == "hinge":
        return max(0.0, 1 - z)
    if loss_type == "ipo":
        return (normed - 1 / (2 * beta)) ** 2
    if loss_type == "robust":
        return (-(1 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1 - 2 * eps)
    if loss_type == "exo_pair":
        return sigmoid(z) * (log_sigmoid(z) - math.log(1 - eps)) + sigmoid(-z) * (log_sigmoid(-z) - math.log(eps))
    if loss_type == "discopop":
        mix = sigmoid(z / discopop_tau)
        return -log_sigmoid(z) * (1 - mix) + math.exp(-z) * mix
    if loss_type == "sigmoid_norm":
        return -log_sigmoid(beta * normed)
    raise KeyError(loss_type)


def shift_schedule(name: str, progress: float, lambda_min: float, lambda_max: float) -> float:
    """Section 3.2."""
    if name == "linear_increase":
        return lambda_min + progress * (lambda_max - lambda_min)
    if name == "linear_decrease":
        return lambda_max - progress * (lambda_max - lambda_min)
    raise KeyError(name)
