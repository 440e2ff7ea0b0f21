"""All methods by name."""

from __future__ import annotations

from functools import partial

from flux2_core.config.sections import Config
from flux2_core.errors import choose
from flux2_core.train.methods import flow, preference, preservation, rollout, slider
from flux2_core.train.methods.protocol import Method

METHODS: dict[str, Method] = {
    "flow": Method(None, flow.carry, flow.terms),
    "preference": Method("preference", preference.carry, preference.terms),
    "rollout": Method(None, rollout.carry, rollout.terms),
    "slider": Method(None, slider.carry, slider.terms),
    "dop": Method("preservation", partial(preservation.carry, preservation.exchanged), preservation.terms),
    "blank": Method("preservation", partial(preservation.carry, preservation.empty), preservation.terms),
}


def of(config: Config) -> dict[str, Method]:
    """The methods of a configuration by name, in the order of their passes."""
    return {name: choose(METHODS, name, setting="method") for name in config.methods}
