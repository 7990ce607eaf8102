"""Recipes as YAML: files and overrides, and plain values as text."""

import difflib
import io
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import SafeRepresenter

from ..data.formats import format_of
from .errors import RecipeError


MAX_NODES = 20_000  # far above any recipe, far below what nested YAML aliases can expand to
MAX_DEPTH = 50  # far below Python's recursion limit


class _Representer(SafeRepresenter):
    """Writes text so that it is read back unchanged: line breaks and zero-width characters need double quotes."""

    def represent_str(self, data: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def dump_yaml(values: dict[str, Any]) -> str:
    """Format plain values as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.width = sys.maxsize  # folded lines are not always read back unchanged
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2, in which `1e-6` is a number and `no` is a string."""
    return YAML(typ="safe", pure=True).load(text)


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys that differ between two resolved recipes."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    keys = sorted({*old, *new}, key=str)
    absent = object()
    return [
        change
        for key in keys
        for change in changed_keys(old.get(key, absent), new.get(key, absent), f"{prefix}.{key}".lstrip("."))
    ]


def read_yaml(path: str) -> dict[str, Any]:
    """
    Read a YAML file that contains a mapping.

    Raises:
        RecipeError: If there is no such file, or it contains anything else.
    """
    if format_of(Path(path)) is not None and Path(path).suffix != ".json" and Path(path).is_file():
        raise RecipeError(f"{path}: must be a YAML file, got a file of rows.{_where_rows_go(path)}")
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: file not found.{_nearest_file(path)}") from None
    except YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply.") from None
    except Exception as error:  # the YAML library does not check some conversions
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"a {type(values).__name__}"
        raise RecipeError(f"{path}: must contain a mapping of sections, got {found}.{_where_rows_go(path)}")
    check_size(values, path)
    return _unshared(values)


def _unshared(values: Any) -> Any:
    """A copy without shared values, so that an override of one section does not change an alias of it."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _where_rows_go(path: str) -> str:
    """What to do with a file of rows, if the file is named like one."""
    return "" if format_of(Path(path)) is None else f" For rows, write `data.path: {path}` in a recipe."


def _nearest_file(path: str) -> str:
    names = [entry.name for entry in Path(path).parent.glob("*.y*ml")]
    nearest = difflib.get_close_matches(Path(path).name, names, n=1)
    return f" Did you mean `{Path(path).parent / nearest[0]}`?" if nearest else ""


def check_size(values: Any, path: str) -> None:
    """
    Check the number of values and their depth.

    Raises:
        RecipeError: If there are more than in any recipe, as nested aliases expand to.
    """
    stack, count, deepest = [(values, 0)], 0, 0
    while stack:
        value, depth = stack.pop()
        count, deepest = count + 1, max(deepest, depth)
        if count > MAX_NODES:
            raise RecipeError(f"{path}: must not contain more than {MAX_NODES} values with aliases expanded.")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        stack.extend((item, depth + 1) for item in inner)
    if deepest > MAX_DEPTH:
        raise RecipeError(f"{path}: nested too deeply.")


def apply_override(values: dict[str, Any], override: str, path: str) -> None:
    """
    Set the value of a dotted key, in sections that are made where they are missing.

    Raises:
        RecipeError: If the override is not of the form `key=value`, or sets a key in what is no section.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"{path}: overrides must have the form key=value, got {override!r}. Write for example "
            "`dpo.shift_lambda=0.9`."
        )
    try:
        value = parse_yaml(text) if text else None
    except Exception as error:  # the YAML library does not check some conversions
        quotes = " Put it in quotes, so that the shell passes it whole." if text.lstrip()[:1] in ("{", "[") else ""
        raise RecipeError(
            f"{path}: the value of the override {override!r} is not valid YAML: {error}.{quotes}"
        ) from None
    node = values
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise RecipeError(f"{path}: the override {override!r} sets a key in `{part}`, which is not a mapping.")
    node[parts[-1]] = value
