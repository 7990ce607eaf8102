"""What a run starts from: base model, tokenizer and audited rows."""

import copy
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import SFTConfig

from ..artifacts import ArtifactError, read_mapping, whole_folder
from ..data.audit import AuditedRows, SplitAudit, audit_preferences
from ..data.chat_template import check_template, use_plain_chat_template
from ..data.config import legend as meaning_of
from ..data.demo import save_demo_model
from ..data.origin import ROW, SOURCE
from ..data.shapes import convert
from ..data.sources import load_preferences
from ..recipe import Recipe
from .errors import RunError
from .processes import say, say_wrapped


def base_model(recipe: Recipe, demo_folder: Path) -> str:
    """Name or folder of the model that the first stage starts from; the demo model is created in `demo_folder`."""
    name = str(recipe.model.model_name_or_path)
    if name != "demo":
        if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
            # Another model is loaded than the recipe names, with the consent that it gives
            try:
                start = read_mapping(Path(name) / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
            except ArtifactError as error:
                raise RunError(f"`model.model_name_or_path` {name!r} cannot be loaded: {error}") from error
            say(f"{name} is an adapter of {start}, which its {ADAPTER_CONFIG_NAME} names")
        return name
    if PartialState().is_main_process and not (demo_folder / "config.json").is_file():
        with whole_folder(demo_folder) as unfinished:
            save_demo_model(str(unfinished))
    PartialState().wait_for_everyone()
    # Absolute, since adapters store the path of their base model
    return str(demo_folder.resolve())


def load_tokenizer(recipe: Recipe, base: str) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of the base model.

    Raises:
        RunError: If there is none.
    """
    model = recipe.model
    folder = Path(base)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RunError(
            "`model.model_name_or_path` must be a Hub name or a folder with a `config.json`, got the folder "
            f"{base!r} without one. Write the folder that the model was saved to."
        )
    try:
        return AutoTokenizer.from_pretrained(
            base, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"`model.model_name_or_path` {base!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from None


def load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, AuditedRows]:
    """
    Load the rows, tokenize them, and audit them for each stage, which may truncate them differently.

    Returns:
        `dict[str, AuditedRows]`: Rows by stage; the same object for stages that truncate alike. Not yet checked, see
        [`check_rows`].

    Raises:
        DataError: If the rows cannot be read or tokenized.
        RunError: If the template or EOS token that the stage `sft` sets cannot be used.
    """
    train, evaluation = load_preferences(recipe.data, recipe.seed)
    train, changes = convert(train, tokenizer)
    if evaluation is not None:
        evaluation, eval_changes = convert(evaluation, tokenizer)
        changes += [change for change in eval_changes if change not in changes]
    if changes:
        say_wrapped(f"Rows converted: {'; '.join(changes)}.")
    if use_plain_chat_template(train, tokenizer):
        say_wrapped(
            "The tokenizer has no chat template, so the rows are written as plain text with the names of the roles "
            "(`User: ...`, `Assistant: ...`). To use another template, set `sft.chat_template_path`."
        )
    for note in check_template(train, tokenizer):
        say_wrapped(note)
    audited = audit_preferences(
        train,
        evaluation,
        recipe.data,
        as_trained(tokenizer, recipe),
        recipe.truncations.values(),
        num_proc=max(filter(None, (args.dataset_num_proc for args in recipe.stages.values())), default=None),
    )
    return {name: audited[truncation] for name, truncation in recipe.truncations.items()}


def check_rows(rows: dict[str, AuditedRows]) -> None:
    """
    Refuse rows that the audit refuses, for the last stage first.

    Raises:
        DataError: If a kind with the policy `error` occurs, or too few rows are left.
    """
    for audited in reversed(rows.values()):
        audited.check()


def as_trained(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> PreTrainedTokenizerBase:
    """
    The tokenizer with the EOS token and the chat template that the stage `sft` gives it, and which stay for `dpo`.

    A copy, since [`~trl.SFTTrainer`] has to find tokens that it adds to the model missing.

    Raises:
        RunError: If they cannot be read.
    """
    args = recipe.stages.get("sft")
    if not isinstance(args, SFTConfig) or args.eos_token is args.chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise RunError(
                f"`sft.eos_token` must be in the tokenizer's vocabulary, got {args.eos_token!r}. Remove it."
            )
        tokenizer.eos_token = args.eos_token
    path = args.chat_template_path
    try:
        if path is not None and path.endswith((".jinja", ".j2")) and Path(path).is_file():
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        elif path is not None:  # what TRL's `clone_chat_template` does to a tokenizer
            source = AutoTokenizer.from_pretrained(path)
            known = tokenizer.get_vocab()
            tokenizer.chat_template = source.get_chat_template()
            tokenizer.add_tokens(
                [token for token in source.added_tokens_decoder.values() if token.content not in known]
            )
            tokenizer.eos_token = source.eos_token
    except (OSError, ValueError) as error:
        raise RunError(f"`sft.chat_template_path` {path!r} cannot be read: {' '.join(str(error).split())}") from None
    return tokenizer


def findings(rows: dict[str, AuditedRows]) -> dict[str, SplitAudit]:
    """Audits by split for the last stage, then for earlier stages that truncate differently."""
    if not rows:
        return {}
    *earlier, last = rows
    audits = dict(rows[last].audits)
    for name in earlier:
        if rows[name] is not rows[last]:
            audits |= {f"{name} {split}": audit for split, audit in rows[name].audits.items()}
    return audits


def legend(audits: dict[str, SplitAudit]) -> str | None:
    """What the kinds found are, and the first rows of each, in one line."""
    found = [
        (kind, split, finding)
        for split, audit in audits.items()
        for kind, finding in audit.findings.items()
        if finding.count
    ]
    if not found:
        return None
    rows: dict[str, list[str]] = {}
    for kind, split, finding in found:
        more = ", ..." if finding.count > len(finding.examples) else ""
        rows.setdefault(kind, []).append(f"{split} {', '.join(map(_row_text, finding.examples))}{more}")
    places = "; ".join(f"{kind} {', '.join(texts)}" for kind, texts in rows.items())
    return f"{meaning_of(kind for kind, _, _ in found)}. Rows, counted from 0: {places}"


def _row_text(example: dict[str, Any]) -> str:
    return f"{example[ROW]}" + (f" of {example[SOURCE]}" if SOURCE in example else "")
