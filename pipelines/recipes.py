"""Which settings a cell trains with when the user names none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from visionpeft.data.presets import preset
from visionpeft.pipelines.methods import method_name
from visionpeft.pipelines.settings import Config
from visionpeft.training import Recipe

LEARNING_RATES = {
    "linear": 1e-2, "full": 3e-5, "scratch": 1e-3, "ssf": 5e-3, "bitfit": 5e-3, "ln_tuning": 5e-3,
    "vpt": 5e-3, "lora": 2e-3, "prefix": 5e-3,
}
"""Peak learning rates of AdamW where data have no preset; chosen on validation data only. Others: `OTHERWISE`."""
OTHERWISE = 1e-3
HEAD_RATES = {"full": 30.0}
"""Multiples of it for the head: a pre-trained model wants small steps, its new head does not."""
BUNDLED = {"linear": 1e-2, "full": 5e-4, "scratch": 1e-3, "ssf": 1e-2, "lora": 5e-3}
"""The same for the bundled model and data, where a row has half a minute: few epochs at high rates."""
BUNDLED_EPOCHS = {"linear": 20}


PRESET_FAMILIES = ("vtab:", "fgvc:", "fewshot:")
NAMES = {"batch": "batch_size", "warmup": "warmup_epochs"}


@dataclass(frozen=True)
class Plan:
    """What a cell trains with."""

    recipe: Recipe
    fields: dict[str, Any]
    """Arguments of the method, before those that the user names."""
    protocol: str
    """Preprocessing, a name for visionpeft.data.preprocessing."""


def plan_for(config: Config) -> Plan:
    """The published preset where the data have one, else the default recipe; what the user named goes over it."""
    method = method_name(config.method)
    if config.data.startswith(PRESET_FAMILIES):
        plan = _preset(method, config.data)
    else:
        recipe = bundled_recipe(method) if config.data == "bundled" else default_recipe(method)
        plan = Plan(recipe, {}, "checkpoint")
    recipe = override(plan.recipe, config.given_recipe())
    return replace(plan, recipe=recipe, protocol=config.protocol or plan.protocol)


def _preset(method: str, spec: str) -> Plan:
    values = preset(method, spec)
    arguments, protocol = values.pop("fields"), values.pop("protocol")
    # SSF was trained by timm's script, which spares vectors from weight decay; the other codes spare nothing.
    recipe = Recipe(**{NAMES.get(key, key): value for key, value in values.items()}, drop_last=True,
                    schedule="epoch", decay_1d=method != "ssf")
    return Plan(recipe, arguments, protocol)


def default_recipe(method: str) -> Recipe:
    """For data without a preset: 20 epochs of AdamW in batches of 32, cosine per update after two epochs of warm-up."""
    decay = 0.05 if method in ("full", "scratch") else 1e-4
    return Recipe(lr=LEARNING_RATES.get(method, OTHERWISE), head_lr=HEAD_RATES.get(method, 1.0), weight_decay=decay,
                  epochs=20, batch_size=32, warmup_epochs=2, min_lr=0.0, schedule="update", decay_1d=False)


def bundled_recipe(method: str) -> Recipe:
    """For the bundled images: seven epochs in batches of 16, so that `make demo` takes three minutes on two cores.

    The linear probe, whose features are computed once, gets what it needs to converge.
    """
    recipe = default_recipe(method)
    return replace(recipe, lr=BUNDLED.get(method, recipe.lr), head_lr=1.0, epochs=BUNDLED_EPOCHS.get(method, 7),
                   batch_size=16, warmup_epochs=0)


def override(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """`recipe` with what the user named; the warm-up keeps its share of a changed number of epochs, rounded."""
    if "epochs" in given and "warmup_epochs" not in given:
        given = given | {"warmup_epochs": round(recipe.warmup_epochs * given["epochs"] / recipe.epochs)}
    return replace(recipe, **given)
