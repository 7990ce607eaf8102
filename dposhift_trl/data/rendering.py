"""Chat templates, rendered within bounds: they are programs, and come with the model."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase


# Per row. No template for training comes near them
MAX_SECONDS = 5.0  # of the processor
MAX_MEMORY = 2**30  # bytes
MAX_OWN_CHARACTERS = 1_000_000  # in addition to what the row contains
MAX_GROWTH = 10  # characters per character of the row, which a template may escape, indent or repeat

TICK = 0.05  # seconds of the processor between two checks


class TemplateLimitError(Exception):
    """A chat template that exceeds a bound. No row is skipped for it, since the next one would take as long."""


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], tokenize: bool = False, **kwargs: Any
) -> Any:
    """
    Apply the chat template to a conversation: text, or with `tokenize` token ids.

    Raises:
        TemplateLimitError: If the text is too long for what the conversation and `kwargs` contain.
    """
    if tokenize:
        return tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)
    if len(text) > MAX_OWN_CHARACTERS:
        content = len(json.dumps([conversation, kwargs], ensure_ascii=False, default=str))
        if len(text) > MAX_OWN_CHARACTERS + MAX_GROWTH * content:
            raise TemplateLimitError(f"renders {len(text)} characters from {content}")
    return text


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """
    Bound the time and memory of templates that are rendered inside the `with` block, where signals are available: in
    the main thread, not on Windows. A single operation such as `'x' * 10**10` is not interrupted.

    Raises:
        TemplateLimitError: Inside the block, at the first check that finds a bound exceeded.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    began, peak = time.process_time(), _peak_memory()

    def check(*_: Any) -> None:
        if time.process_time() - began > MAX_SECONDS:
            raise TemplateLimitError(f"takes more than {MAX_SECONDS:g} seconds")
        if _peak_memory() - peak > MAX_MEMORY:
            raise TemplateLimitError(f"takes more than {MAX_MEMORY / 2**30:g} GiB of memory")

    # Counts what the processor works for this process, so that a busy or suspended machine makes no difference
    before = signal.signal(signal.SIGPROF, check)
    signal.setitimer(signal.ITIMER_PROF, TICK, TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
