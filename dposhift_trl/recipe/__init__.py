"""Recipes: YAML and overrides, checked and turned into typed sections."""

from .checks import key_mistakes
from .errors import RecipeError
from .keys import RecipeKey, keys_of, recipe_keys
from .loading import build_section, load_recipe, read_values
from .sections import SECTIONS, STAGES, Recipe, RecipeModelConfig
from .yaml import changed_keys, dump_yaml, parse_yaml, read_yaml


__all__ = [
    "SECTIONS",
    "STAGES",
    "Recipe",
    "RecipeError",
    "RecipeKey",
    "RecipeModelConfig",
    "build_section",
    "changed_keys",
    "dump_yaml",
    "key_mistakes",
    "keys_of",
    "load_recipe",
    "parse_yaml",
    "read_values",
    "read_yaml",
    "recipe_keys",
]
