"""What is diagnosed, on which pairs: the keys of a recipe, and the flags that are their short form."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..console import one_line
from ..data.config import DataConfig
from ..data.tokens import Truncation
from ..ranges import check_ranges
from ..recipe import RecipeError, build_section, key_mistakes, keys_of, read_values


NO_RECIPE = "diagnose"  # what messages call the settings of a command line without a recipe


class DiagnoseError(ValueError):
    """A diagnosis that is not possible as asked for. The message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass
class DiagnoseSettings:
    """
    What is diagnosed, and on which pairs.

    Args:
        policy (`str`):
            The trained model: a Hub name, a local folder, or a checkpoint, of a whole model or of a PEFT adapter.
        data ([`~data.DataConfig`]):
            The pairs, as in the section `data` of a run's recipe. Its evaluation rows are scored if it names some
            (`eval_split` or `eval_size`), otherwise all rows of `train_split`.
        reference (`str`, *optional*):
            The model that training started from. Defaults to the base model of the adapter if `policy` is one.
        output_dir (`str`, *optional*):
            Folder to write to. Defaults to a new folder in `diagnosis`.
        limit (`int`, *optional*):
            Maximum number of pairs. The first ones are scored.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of prompt and answer together; pairs that are longer are handled as `data.audit`
            says. `None` scores all tokens.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of pairs that are scored at once.
        beta (`float`, *optional*, defaults to `0.1`):
            Beta of the training, per nat. Only `rewards/*` and `dpo_loss` depend on it.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the weights: `float32`, which is exact, `bfloat16` or `float16`, which halve the memory, or
            `auto`, as they were saved.
        seed (`int`, *optional*, defaults to `42`):
            Seed for the rows that `data.eval_size` holds out, and for a mixture, unless `data.seed` is set.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run Python code that comes with a model or tokenizer.

    Raises:
        ValueError: If a value is out of range.
    """

    policy: str
    data: DataConfig
    reference: str | None = None
    output_dir: str | None = None
    limit: int | None = None
    max_length: int | None = 1024
    batch_size: int = 8
    beta: float = 0.1
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    seed: int = 42
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, example in (("limit", 500), ("batch_size", 8)):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Write for example `{name}: {example}`.")
        if self.data.streaming:
            raise ValueError(
                "`data.streaming` is not supported in a diagnosis, got True. Remove it, and set `limit` to score only "
                "the first rows."
            )

    @property
    def truncation(self) -> Truncation:
        """How pairs are truncated."""
        return Truncation(self.max_length)

    @property
    def resolved(self) -> dict[str, Any]:
        """The settings as plain values, without those of `data` that are the default."""
        defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {name: value for name, value in vars(self.data).items() if value != defaults[name]}
        return {**values, "data": data}


def load_settings(
    path: str | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> DiagnoseSettings:
    """
    Read the settings of a diagnosis and check them, before any model or dataset is loaded.

    Args:
        path (`str`, *optional*):
            YAML file, a recipe without stages.
        overrides (`Sequence[str]`, *optional*):
            Dotted keys with a value in YAML, for example `data.eval_split=test`.
        flags (`Mapping[str, Any]`, *optional*):
            Keys of the top level with their values, `data`, the path alone, and `split`, the split that is scored.
            They replace what recipe and overrides say.

    Raises:
        RecipeError: With one line per mistake.
    """
    name = path or NO_RECIPE
    values = read_values(path, overrides, name)
    flags = dict(flags or {})
    source, split = flags.pop("data", None), flags.pop("split", None)
    values |= flags
    if (source or split) and not isinstance(values.get("data"), dict):
        values["data"] = {}
    if source is not None:
        values["data"]["path"] = source
    if split is not None:
        values["data"] |= {"train_split": split, "eval_split": None, "eval_size": None}
        if values["data"].get("mixture") is None:
            values["data"].pop("seed", None)  # which chooses the rows that `eval_size` holds out
    top_level = {key: found for key, found in keys_of("", DiagnoseSettings).items() if key != "data"}
    mistakes = key_mistakes(values, top_level, ("data",), name)
    mistakes += [
        f"{name}: `{key}` is missing. Pass --{key}, or write it in a recipe."
        for key in ("policy", "data")
        if not values.get(key)
    ]
    if mistakes:
        raise RecipeError(*mistakes)
    data = build_section(DataConfig, values["data"], "data", name)
    try:
        return DiagnoseSettings(**{**values, "data": data})
    except ValueError as error:
        raise RecipeError(*(f"{name}: {line}" for line in str(error).split("\n"))) from None
