"""Whether a trainer reads the tokens that both answers share once, and the preparation of its models for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.logging import get_logger

from ..scoring import enable_shared_prompt, shared_prompt_obstacle, verify_shared_prompt
from .checks import unreachable_dropout


logger = get_logger(__name__)


def prepare_shared_prompt(
    wanted: bool | str, models: list[Any], obstacle: str | None, autocast: Callable[[], AbstractContextManager[Any]]
) -> bool:
    """
    Prepare models to read shared tokens once, if that is exact, and log what was decided.

    Args:
        wanted (`bool` or `str`):
            The setting `shared_prompt`: `"auto"`, `True` or `False`.
        models (`list`):
            Policy and reference, with TRL's fused head, not wrapped for training.
        obstacle (`str`, *optional*):
            Why the run rules it out, whatever the models, as a phrase.
        autocast (`Callable`):
            Makes the context in which training runs the models, [`~accelerate.Accelerator.autocast`].

    Returns:
        `bool`: Whether shared tokens are read once.

    Raises:
        ValueError: If `wanted` is `True` and there is an obstacle.
    """
    if wanted is False:
        logger.info("shared_prompt is off, as asked: rows are scored as DPOTrainer scores them, bit for bit")
        return False
    obstacle = obstacle or next(filter(None, map(shared_prompt_obstacle, models)), None)
    if obstacle is None:
        try:
            for model in models:
                enable_shared_prompt(model)
            ways = dict.fromkeys(verify_shared_prompt(model, autocast) for model in models)
        except ValueError as error:
            obstacle = str(error)
    if obstacle is None:
        logger.info(
            "shared_prompt is on: scores agree with those of padded rows to rounding, not bit for bit; attention: "
            + ", ".join(ways)
        )
        return True
    if wanted is True:
        raise ValueError(
            f"`shared_prompt` must be auto or false for this model, got True: {obstacle}. Leave it out to read "
            "both rows of a pair."
        )
    logger.warning(f"shared_prompt is off: {obstacle}")
    return False


def draws_masks(models: list[torch.nn.Module], disable_dropout: bool) -> bool:
    """Whether dropout is on somewhere, so that each row draws a mask of its own."""
    dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for model in models for m in model.modules())
    return (dropout and not disable_dropout) or any(map(unreachable_dropout, models))
