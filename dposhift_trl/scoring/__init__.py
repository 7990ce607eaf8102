"""
Log-probabilities of a batch of preference pairs, with every token that both answers share read once.

Nothing in here knows of a trainer or of DPO.
"""

from .attention import PREFIX
from .hooks import enable_shared_prompt, shared_prompt_scores
from .layout import PairLayout
from .support import shared_prompt_obstacle
from .verify import verify_shared_prompt


__all__ = [
    "PREFIX",
    "PairLayout",
    "enable_shared_prompt",
    "shared_prompt_obstacle",
    "shared_prompt_scores",
    "verify_shared_prompt",
]
