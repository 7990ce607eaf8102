"""What can be wrong with a row before it is truncated: its messages, and the tokens that training reads."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from .messages import is_empty
from .tokens import PairTokens


NOT_ASSISTANT = ("user", "system", "developer")


class Vocabulary:
    """
    What the audit asks about token ids.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._blank: dict[int, bool] = {}

    @cached_property
    def think(self) -> tuple[int, int] | None:
        """Tokens that open and close reasoning, if they are single ones."""
        ids = self.tokenizer.get_vocab()
        opening, closing = ids.get("<think>"), ids.get("</think>")
        return None if opening is None or closing is None else (opening, closing)

    def is_blank(self, ids: Sequence[int], text: str = "") -> bool:
        """Whether tokens are only whitespace and special tokens, of which the text itself has at most BOS and EOS."""
        if not all(map(self._is_blank, ids)):
            return False
        tokens = self.tokenizer.convert_ids_to_tokens(sorted({*ids} - {self.bos, self.eos}))
        return not any(token.strip() and token in text for token in tokens)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            # An unknown word is content
            words = {self.tokenizer.unk_token_id, self.tokenizer.pad_token_id} - {self.bos, self.eos}
            text: Any = self.tokenizer.decode([token], skip_special_tokens=True)
            self._blank[token] = token not in words and not text.strip()
        return self._blank[token]

    def is_doubled(self, ids: Sequence[int]) -> bool:
        """Whether a sequence starts with two BOS tokens, or has two EOS tokens in a row."""
        if self.bos is not None and list(ids[:2]) == [self.bos, self.bos]:
            return True
        return (
            self.eos is not None
            and ids.count(self.eos) > 1
            and any(left == right == self.eos for left, right in pairwise(ids))
        )

    def has_empty_reasoning(self, ids: Sequence[int]) -> bool:
        """Whether an answer starts its reasoning and ends it without a word."""
        if self.think is None or self.think[0] not in ids:
            return False
        start = ids.index(self.think[0])
        return self.think[1] in ids[start:] and self.is_blank(ids[start + 1 : ids.index(self.think[1], start)])


def row_kinds(row: dict[str, Any], tokens: PairTokens, whole_prompt: bool, vocabulary: Vocabulary) -> list[str]:
    """
    The kinds of a well-formed row that do not depend on truncation or on other rows, the gravest first.

    Args:
        row (`dict[str, Any]`):
            Row with an explicit prompt.
        tokens ([`~data.tokens.PairTokens`]):
            Its tokens.
        whole_prompt (`bool`):
            Whether the tokenized prompt is a prefix of both tokenized answers.
        vocabulary ([`Vocabulary`]):
            What the tokens mean.
    """
    return [*_token_kinds(row, tokens, vocabulary), *_message_kinds(row)] + [
        kind
        for kind, holds in (
            ("boundary", not whole_prompt),
            ("doubled", any(vocabulary.is_doubled(tokens.prompt_ids + ids) for ids in tokens[1:])),
            ("thinking", len({vocabulary.has_empty_reasoning(ids) for ids in tokens[1:]}) == 2),
        )
        if holds
    ]


def _token_kinds(row: dict[str, Any], tokens: PairTokens, vocabulary: Vocabulary) -> Iterator[str]:
    # By its text, since some templates put a header into the answer; by its tokens, since some leave out what it says
    answers = (row["chosen"], tokens.chosen_ids), (row["rejected"], tokens.rejected_ids)
    if any(is_empty(answer) for answer, _ in answers) or any(
        vocabulary.is_blank(ids, str(answer)) for answer, ids in answers
    ):
        yield "empty"
    if tokens.chosen_ids == tokens.rejected_ids:
        yield "identical"


def _message_kinds(row: dict[str, Any]) -> Iterator[str]:
    prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
    if not isinstance(prompt, list):
        return
    if starts_with_other_prompts(*answers):
        yield "prompts"
    if any(answer[-1]["role"] == "user" for answer in answers):
        yield "user"
    if not all(_in_order([message["role"] for message in [*prompt, *answer]], len(prompt)) for answer in answers):
        yield "roles"


def starts_with_other_prompts(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> bool:
    """Whether two answers differ from the start, and one of them starts with a message that is not an answer."""
    return chosen[0] != rejected[0] and any(answer[0]["role"] in NOT_ASSISTANT for answer in (chosen, rejected))


def _in_order(roles: list[str], prompt: int) -> bool:
    """Whether instructions come first, users and the assistant take turns, and no user speaks in the answer."""
    turns = [role for role in roles if role not in ("system", "developer")]
    first = len(roles) - len(turns)
    return (
        "user" not in roles[prompt:]
        and not any(role in NOT_ASSISTANT[1:] for role in roles[first:])
        and turns[:1] == ["user"]
        and not any(left == right and left in ("user", "assistant") for left, right in pairwise(turns))
    )
