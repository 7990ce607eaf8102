"""Where models are pushed on the Hugging Face Hub: names of repositories, one for each stage of each run."""

import hashlib
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


LONGEST_NAME = 96  # that the Hub accepts


def repo_name(name: str) -> str:
    """
    A name as the Hub accepts it. If it had to be changed, it ends in a hash of the original.

    Args:
        name (`str`):
            Name of a run and its stage.

    Returns:
        `str`: Name of a repository, without its owner.

    Example:

    ```python
    >>> repo_name("qwen_shift-dpo")
    'qwen_shift-dpo'
    >>> repo_name("lambda = 0.5-dpo")
    'lambda-0.5-dpo-637bf840'

    ```
    """
    safe = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    safe = re.sub(r"-{2,}|\.{2,}", "-", safe).strip("-.").removesuffix(".git")
    if safe == name and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - 9].strip('-.')}-{digest}".lstrip("-")


def hub_defaults(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """
    Settings of a stage that is pushed to the Hub and does not say where: its own repository, which is private.

    Args:
        name (`str`):
            Name of the run and the stage.
        settings (`dict[str, Any]`):
            Section of the stage in a recipe.
    """
    if not settings.get("push_to_hub"):
        return {}
    defaults = {"hub_model_id": repo_name(name), "hub_private_repo": True}
    return {key: value for key, value in defaults.items() if settings.get(key) is None}


def hub_id_fault(hub_model_id: str) -> str | None:
    """Why the Hub does not accept the name of a repository."""
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError as error:
        return str(error).rstrip(".")
    return None
