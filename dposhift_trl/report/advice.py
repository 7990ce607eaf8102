"""What to try, given lambda and how far the chosen answers fell."""

import math
from collections.abc import Sequence

from ..schedules import LambdaPlan, lambda_path


# The lowest `lambda_min` of the paper's schedules. Its fixed lambdas end at 0.5, where the margin had fallen by half.
LOW_LAMBDA = 0.75


def path_of_lambda(plan: LambdaPlan, logged: Sequence[float]) -> list[float]:
    """
    Values that summarize how lambda changed, as [`~schedules.lambda_path`] gives them.

    They start where the settings start, even if the first evaluation came later. They end with the last logged value,
    since training may have stopped before the end of the schedule.

    Args:
        plan ([`LambdaPlan`]):
            What the settings say about lambda.
        logged (`Sequence[float]`):
            Every lambda that was logged, in the order of steps.

    Returns:
        `list[float]`: One to three values, none if lambda is unknown.
    """
    if plan.start is None or plan.end is None:
        return lambda_path(logged[0], logged[-1], logged) if logged else []
    if not logged or math.isclose(logged[-1], plan.end, rel_tol=1e-3):
        return lambda_path(plan.start, plan.end, plan.range)
    return lambda_path(plan.start, logged[-1], logged)


def what_to_try(lambdas: Sequence[float], plan: LambdaPlan) -> str:
    """
    Advice for a run whose chosen answers fell.

    Args:
        lambdas (`Sequence[float]`):
            How lambda changed, from [`path_of_lambda`].
        plan ([`LambdaPlan`]):
            What the settings say about lambda.
    """
    if plan.adaptive:
        return _what_to_try_adaptive(lambdas, plan)
    if not lambdas:
        return (
            "Which lambda the model was trained with is unknown. If it was trained with DPO, train it with DPO-Shift "
            f"instead: try `shift_lambda: 0.95`, then lower, {_SAME_PAIRS}"
        )
    low = min(lambdas)
    if len(lambdas) > 1:
        change = f"Lambda went from {' to '.join(f'{value:.3g}' for value in lambdas)}"
        if low < LOW_LAMBDA:
            return f"{change}, so it was already low in part: {_SMALLER_STEPS}"
        return f"{change}. Try a fixed lambda of {low:.3g}, {_SAME_PAIRS}"
    if low >= 1:
        description = "With lambda 1 this is DPO." if low == 1 else f"Lambda {low:.3g} is above 1, the lambda of DPO."
        return f"{description} Try `shift_lambda: 0.95`, then lower, {_SAME_PAIRS}"
    if low <= LOW_LAMBDA:
        return f"Lambda, {low:.3g}, is already low: {_SMALLER_STEPS}"
    return f"Lambda was {low:.3g}. Try a lower one in small steps, {_SAME_PAIRS}"


def _what_to_try_adaptive(lambdas: Sequence[float], plan: LambdaPlan) -> str:
    if not lambdas:
        return "Lambda was not logged, so it is unknown whether the controller had room to lower it."
    end, share = lambdas[-1], plan.metric == "displacement/chosen_fell"
    held = "share of chosen answers that fell" if share else "mean chosen log-ratio"
    if end <= 1.01 * plan.low:
        bound = f"Lambda ended at its lower bound, {plan.low:.3g}, so the controller had no room left"
        if plan.low <= LOW_LAMBDA:
            return f"{bound}. That bound is already low: {_SMALLER_STEPS}"
        return f"{bound}. Try a lower `lambda_min`, {_SAME_PAIRS}"
    return (
        f"Lambda ended at {end:.3g}, above its lower bound, {plan.low:.3g}: the controller holds the {held} of the "
        f"training pairs at {plan.target:.3g}, and evaluation pairs may differ, above all after several epochs or if "
        "rows share their answers. Try a "
        f"{'lower' if share else 'higher'} `lambda_target`, {_SAME_PAIRS}"
    )


_SAME_PAIRS = "and compare margin and accuracy on the same pairs: a lower lambda can reduce both."
_SMALLER_STEPS = (
    "a lower one can cost margin (in the paper, the margin fell from .58 to .24 at lambda 0.5). Try a smaller "
    "learning rate or fewer steps, which move the policy less, and compare."
)
