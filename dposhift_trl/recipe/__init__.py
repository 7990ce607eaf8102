"""Recipes: YAML and overrides, checked and turned into typed sections."""

from .errors import RecipeError
from .keys import RecipeKey, recipe_keys
from .loading import load_recipe
from .sections import SECTIONS, STAGES, Recipe, RecipeModelConfig
from .yaml import changed_keys, dump_yaml, parse_yaml, read_yaml


__all__ = [
    "SECTIONS",
    "STAGES",
    "Recipe",
    "RecipeError",
    "RecipeKey",
    "RecipeModelConfig",
    "changed_keys",
    "dump_yaml",
    "load_recipe",
    "parse_yaml",
    "read_yaml",
    "recipe_keys",
]
