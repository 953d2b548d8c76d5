"""A complete configuration from explicit settings and recipes, and the source of each value."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from absld.config.datasets import CORRUPTED
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.fields import group_of
from absld.config.parsing import parse_all
from absld.config.recipes import METHOD_RECIPES, NORM_RECIPES, RECIPES
from absld.config.settings import Config

SETTING_GROUPS = {f.name: group_of(f) for f in fields(Config)}


def resolve(explicit: Mapping[str, Any], *, schedule_of_method: bool = True) -> Config:
    """Complete a configuration: defaults, the recipes of method, data set and norm, `explicit`.

    Each overrides those before it. A data set without a recipe, such as one of a hub, has CIFAR-10's,
    which the defaults are.

    Args:
        explicit: settings from flags or a file, parsed or as text.
        schedule_of_method: False leaves out the training schedule of the method's recipe, so that
            methods can be compared with one schedule.

    Raises:
        UsageError: for an unknown name or a value of the wrong type.
    """
    explicit = parse_all(explicit, Config)
    from_method = {
        name: value
        for name, (value, _) in METHOD_RECIPES.get(explicit.get("method", "absld"), {}).items()
        if schedule_of_method or SETTING_GROUPS[name] != "Training"
    }
    recipe = RECIPES.get(explicit.get("dataset", "digits"), {})
    recipe = recipe | NORM_RECIPES[explicit.get("norm", "linf")]
    from_recipe = {name: value for name, (value, _) in recipe.items()}
    return Config(**from_method | from_recipe | explicit)


def setting_source(config: Config, name: str) -> str:
    """Return the source of a setting's value; "given" if it is neither a recipe's nor a default."""
    value = getattr(config, name)
    recipe = METHOD_RECIPES.get(config.method, {}) | RECIPES.get(config.dataset, {})
    recipe = recipe | NORM_RECIPES[config.norm]
    if name in recipe and recipe[name][0] == value:
        return recipe[name][1]
    setting = next(f for f in fields(Config) if f.name == name)
    return str(setting.metadata["source"]) if setting.default == value else "given"


def resolve_evaluation(explicit: Mapping[str, Any]) -> EvaluationConfig:
    """Complete the settings of an evaluation: corrupted images are not attacked unless that is said.

    Raises UsageError.
    """
    explicit = parse_all(explicit, EvaluationConfig)
    defaults: dict[str, Any] = {}
    if explicit.get("dataset") in CORRUPTED:
        defaults = {"attacks": "clean", "checks": False}
    return EvaluationConfig(**defaults | explicit)
