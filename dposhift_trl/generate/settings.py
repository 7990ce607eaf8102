"""How answers are generated."""

from dataclasses import dataclass, fields

from ..console import one_line


MODES = ("greedy", "sampled")


class GenerateError(ValueError):
    """Answers that cannot be generated as asked for. The message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass(frozen=True)
class GenerationSettings:
    """
    How answers are generated.

    Args:
        limit (`int`, *optional*, defaults to `64`):
            Maximum number of questions. The first ones are used.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of an answer, in tokens. It is shorter if the model's positions end before.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of answers that are generated at once. Except for rounding, answers do not depend on it.
        temperature (`float`, *optional*, defaults to `0.7`):
            Temperature of the sampled answers.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sampled answers use only the most likely tokens whose probabilities add up to `top_p`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampled answers.

    Raises:
        GenerateError: If a value is out of range.
    """

    limit: int = 64
    max_new_tokens: int = 256
    batch_size: int = 8
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("limit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerateError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}. The default is {defaults[name]}."
                )
        if not 0 < self.temperature < float("inf"):
            raise GenerateError(
                f"`temperature` must be finite and above 0, got {self.temperature}. Greedy answers are always written."
            )
        if not 0 < self.top_p <= 1:
            raise GenerateError(
                f"`top_p` must be above 0 and at most 1, got {self.top_p}. Use 1.0 for the whole vocabulary."
            )
