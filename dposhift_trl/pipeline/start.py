"""What a stage starts from: model, tokenizer and rows, recorded so that it is not resumed with others."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import xxhash
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import extract_commit_hash

from ..artifacts import ArtifactError, read_mapping, write_whole
from ..columns import PREFERENCE_COLUMNS, ROW_INDEX, TEMPLATE_COLUMNS
from ..data.audit import AuditedRows
from ..data.errors import reading_rows
from ..data.sources import Rows
from ..reference.fingerprint import stable_hash
from .errors import RunError
from .processes import say


ADAPTER_CONFIG = "adapter_config.json"
TEXT_COLUMNS = (*PREFERENCE_COLUMNS, *TEMPLATE_COLUMNS)
STREAMED = 100  # rows of an iterable dataset that are compared
# What saving, moving, or another version of a library changes in a configuration
UNSTABLE_SETTINGS = {"_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"}

Start: TypeAlias = dict[str, str | None]  # hashes of what a stage starts from, by the names that messages use


def row_fingerprints(rows: dict[str, AuditedRows], tokenizer: PreTrainedTokenizerBase) -> dict[str, Start]:
    """
    Hash the rows of each stage after the audit, in their order, and the tokenizer with its chat template.

    Texts are hashed rather than tokens, since a template may write the date into every row.

    Args:
        rows (`dict[str, AuditedRows]`):
            Rows by stage.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, before a trainer changes it.

    Returns:
        `dict[str, Start]`: Hashes by stage and by what is hashed.
    """
    known: dict[int, str] = {}
    for audited in rows.values():
        for split in (audited.train, audited.evaluation):
            if split is not None and id(split) not in known:
                known[id(split)] = _hash_of_rows(split)
    tokens = _hash_of_tokenizer(tokenizer)
    return {
        name: {
            "tokenizer": tokens,
            "train rows": known[id(audited.train)],
            "eval rows": known.get(id(audited.evaluation)),
        }
        for name, audited in rows.items()
    }


def stage_start(model: str, base: str, revision: str | None, hashes: Start) -> Start:
    """
    What a stage starts from, on the main process.

    Args:
        model (`str`):
            Name or folder of the model to start from. An adapter that was moved is told where its base model is now.
        base (`str`), revision (`str`, *optional*):
            Name or folder, and revision, of the model that the first stage starts from.
        hashes (`Start`):
            Those of the stage from [`row_fingerprints`].

    Raises:
        RunError: If the base model of an adapter is gone.
    """
    if PartialState().is_main_process:
        _relocate_adapter(Path(model), Path(base), is_stage=model != base)
    PartialState().wait_for_everyone()
    if (recorded := _lost_base(Path(model))) is not None:
        raise RunError(
            f"`base_model_name_or_path` in {Path(model, ADAPTER_CONFIG)} must be the base model of the adapter, got "
            f"{recorded}, which does not exist. Write where it is now."
        )
    return {"model": model_fingerprint(model, revision), **hashes} if PartialState().is_main_process else {}


def model_fingerprint(model: str, revision: str | None = None) -> str:
    """
    Hash the configuration and all weights of a model, and the base model of an adapter.

    Args:
        model (`str`):
            Folder, or name on the Hub, which is identified by the commit that was downloaded.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        for name in ("config.json", ADAPTER_CONFIG, "tokenizer_config.json"):
            path = try_to_load_from_cache(model, name, revision=revision)
            if isinstance(path, str) and (commit := extract_commit_hash(path, None)) is not None:
                return commit
        return f"{model}@{revision}"
    content: dict[str, Any] = {}
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*model*.bin"))):
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
        content[path.name] = digest.hexdigest()
    for name in ("config.json", ADAPTER_CONFIG):
        with contextlib.suppress(ArtifactError):
            settings = read_mapping(folder / name)
            content[name] = {key: value for key, value in settings.items() if key not in UNSTABLE_SETTINGS}
            if name == ADAPTER_CONFIG and settings.get("base_model_name_or_path"):
                content["base"] = model_fingerprint(settings["base_model_name_or_path"], settings.get("revision"))
    return stable_hash(content)


def _lost_base(folder: Path) -> str | None:
    """The path of an adapter's base model, if nothing is there. PEFT saves it as the absolute path it had then."""
    path = folder / ADAPTER_CONFIG
    recorded = read_mapping(path).get("base_model_name_or_path") if path.is_file() else None
    return recorded if isinstance(recorded, str) and os.path.isabs(recorded) and not Path(recorded).exists() else None


def _relocate_adapter(folder: Path, base: Path, is_stage: bool) -> None:
    """Write into an adapter that a stage has saved where its base is now: the demo model beside it, or the run's."""
    if not is_stage:
        return
    recorded, path = _lost_base(folder), folder / ADAPTER_CONFIG
    found = [place for place in (folder.parent / "base", base) if (place / "config.json").is_file()]
    if recorded is not None and found:
        place = str(found[0].resolve())
        settings = {**read_mapping(path), "base_model_name_or_path": place}
        write_whole(path, json.dumps(settings, indent=2, sort_keys=True))
        say(f"{path}: the base model was moved from {recorded} to {place}")


def _hash_of_rows(rows: Rows) -> str:
    digest = xxhash.xxh3_128()
    for text in _as_text(rows):
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _as_text(rows: Rows) -> Iterator[str]:
    if isinstance(rows, Dataset):
        names = [name for name in (*TEXT_COLUMNS, ROW_INDEX) if name in rows.column_names]
        for table in rows.select_columns(names).with_format("arrow").iter(batch_size=1000):
            yield json.dumps(table.to_pydict(), sort_keys=True, default=str)
    else:
        with reading_rows():
            for row in itertools.islice(rows, STREAMED):
                texts = {name: row[name] for name in TEXT_COLUMNS if name in row}
                yield json.dumps(texts, sort_keys=True, default=str)


def _hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Each call may set truncation and padding
    model = json.loads(backend.to_str()) | {"truncation": None, "padding": None} if backend else tokenizer.get_vocab()
    return stable_hash([model, tokenizer.chat_template, tokenizer.special_tokens_map])
