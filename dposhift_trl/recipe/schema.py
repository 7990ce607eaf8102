"""A JSON schema of recipes, by which editors complete keys, show what they do, and mark mistakes."""

import inspect
import json
from typing import Any, TypeAlias

import pydantic
import transformers
import trl

from .. import __version__
from ..config import TARGET_METRICS
from ..data.config import AUDIT_KINDS, AUDIT_POLICIES, KEPT_COLUMNS
from ..schedules import ADAPTIVE, LAMBDA_SCHEDULE_ALIASES, LAMBDA_SCHEDULES
from .keys import MIXTURE, REQUIRED, TOP_LEVEL, RecipeKey, recipe_keys
from .sections import SECTIONS, STAGES


JsonSchema: TypeAlias = dict[str, Any]

SCALARS = ("string", "integer", "number", "boolean")

# What is checked where the settings are, not by the type of the key
POLICY = {"type": "string", "enum": list(AUDIT_POLICIES)}
AUTO_OR_BOOL = {"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": "boolean"}]}
COLUMNS = {"propertyNames": {"enum": list(KEPT_COLUMNS)}}
NARROWER: dict[str, JsonSchema] = {
    "dpo.lambda_schedule": {
        "anyOf": [
            {"type": "string", "enum": [*LAMBDA_SCHEDULES, ADAPTIVE, *LAMBDA_SCHEDULE_ALIASES]},
            {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
        ]
    },
    "dpo.lambda_target_metric": {"enum": list(TARGET_METRICS)},
    "dpo.shared_prompt": AUTO_OR_BOOL,
    "dpo.precompute_ref_log_probs": AUTO_OR_BOOL,
    "data.audit": {
        "anyOf": [
            POLICY,
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: POLICY | {"description": kind.description} for name, kind in AUDIT_KINDS.items()},
            },
        ]
    },
    "data.columns": COLUMNS,
    f"{MIXTURE}.columns": COLUMNS,
}


def recipe_schema() -> JsonSchema:
    """
    The JSON schema of a recipe, from the same list as its checks.

    What depends on several keys at once, on the model or on the data is not in it: `--dry-run` checks that as well.
    """
    sections = {
        name: _section(name, inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]) for name, cls in SECTIONS.items()
    }
    for name in (*STAGES, "wandb"):
        sections[name]["type"] = ["object", "null"]
    sections["model"]["required"] = ["model_name_or_path"]
    top_level = _section(TOP_LEVEL, "A recipe of dposhift_trl.")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"dposhift_trl {__version__}, trl {trl.__version__}, transformers {transformers.__version__}",
        "title": "Recipe",
        **top_level,
        "properties": top_level["properties"] | sections,
        "required": ["output_dir", "model", "data"],
        "anyOf": [{"required": [name]} for name in STAGES],
    }


def schema_text() -> str:
    """The schema as the text of a file, without the last line break."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False)


def _section(name: str, description: str) -> JsonSchema:
    return {
        "description": " ".join(description.split()),
        "type": "object",
        "additionalProperties": False,
        "properties": {key.name: _property(key) for key in recipe_keys(name)},
    }


def _property(key: RecipeKey) -> JsonSchema:
    types = pydantic.TypeAdapter(key.hint).json_schema()
    definitions = types.pop("$defs", {})
    alternatives: list[JsonSchema] = []
    for part in types.get("anyOf", [types]):
        if (inlined := _inlined(part, definitions)) is not None:
            # One value for a list of one, as on TRL's command line
            single = inlined["items"] if inlined.get("items", {}).get("type") in SCALARS else inlined
            alternatives += [inlined, single]
    for part in filter(None, map(_scalar, alternatives)):
        if key.rule and part["type"] in ("integer", "number"):
            part |= key.rule.schema
        elif key.words and part["type"] == "string":
            part["enum"] = list(key.words)
    if key.dotted == MIXTURE:
        alternatives[0]["items"] = _section(MIXTURE, "A source of rows.")
    different = [part for index, part in enumerate(alternatives) if part not in alternatives[:index]]
    schema = {"anyOf": different} if len(different) > 1 else different[0]
    default = {} if key.default is REQUIRED else {"default": key.default}
    return {"description": key.help} | NARROWER.get(key.dotted, schema) | default


def _inlined(schema: JsonSchema, definitions: JsonSchema) -> JsonSchema | None:
    """A type without references and titles; `None` for a class that YAML has no value of."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
        return {"type": "string", "enum": schema["enum"]} if "enum" in schema else None
    if isinstance(schema.get("items"), dict):
        schema = schema | {"items": _inlined(schema["items"], definitions)}
    return {key: value for key, value in schema.items() if key != "title"}


def _scalar(schema: JsonSchema) -> JsonSchema | None:
    """The part of a type that numbers or words are in."""
    if schema.get("type") in SCALARS:
        return schema
    items = schema.get("items")
    return _scalar(items) if isinstance(items, dict) else None
