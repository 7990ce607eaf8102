"""What a run starts from: base model, tokenizer and audited rows."""

from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from ..artifacts import ArtifactError, read_mapping, whole_folder
from ..data.audit import AuditedRows, SplitAudit, audit_preferences
from ..data.chat_template import use_plain_chat_template
from ..data.demo import save_demo_model
from ..data.sources import load_preferences
from ..recipe import Recipe
from .errors import RunError
from .processes import say


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
    Load the rows and audit them for each stage, which may truncate them differently.

    Returns:
        `dict[str, AuditedRows]`: Rows by stage; the same object for stages that truncate alike.

    Raises:
        DataError: If the rows cannot be read, or the audit refuses them.
    """
    train, evaluation = load_preferences(recipe.data, recipe.seed)
    use_plain_chat_template(train, tokenizer)
    audited = {
        truncation: audit_preferences(train, evaluation, recipe.data, tokenizer, truncation)
        for truncation in recipe.truncations.values()
    }
    return {name: audited[truncation] for name, truncation in recipe.truncations.items()}


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
