"""A whole configuration from the settings given, and the source of each of its values."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from absld.config.parsing import parse
from absld.config.recipes import METHOD_RECIPES, RECIPES
from absld.config.settings import Config, group

GROUPS = {f.name: group(f) for f in fields(Config)}


def resolve(given: Mapping[str, Any], *, schedule_of_method: bool = True) -> Config:
    """A whole configuration from the settings given: defaults, then the method's recipe, then the
    data set's, then `given`. Without its schedule, a method's recipe says how it computes, and
    not how long: so methods are compared.

    Raises UsageError for an unknown name or a value of the wrong type."""
    given = {name: parse(name, value, Config) for name, value in given.items()}
    brought = {
        name: value
        for name, (value, _) in METHOD_RECIPES.get(given.get("method", "absld"), {}).items()
        if schedule_of_method or GROUPS[name] != "Training"
    }
    of_dataset = {n: value for n, (value, _) in RECIPES[given.get("dataset", "digits")].items()}
    return Config(**brought | of_dataset | given)


def source(config: Config, name: str) -> str:
    """Where the value of a setting comes from."""
    recipe = RECIPES[config.dataset]
    if name in recipe and recipe[name][0] == getattr(config, name):
        return recipe[name][1]
    if is_of_method(config, name):
        return METHOD_RECIPES[config.method][name][1]
    standard = next(f for f in fields(Config) if f.name == name)
    is_default = standard.default == getattr(config, name)
    return str(standard.metadata["source"]) if is_default else "given"


def is_of_method(config: Config, name: str) -> bool:
    """Is the value of a setting that of the method's recipe?"""
    recipe = METHOD_RECIPES.get(config.method, {})
    return (
        name in recipe
        and name not in RECIPES[config.dataset]
        and recipe[name][0] == getattr(config, name)
    )
