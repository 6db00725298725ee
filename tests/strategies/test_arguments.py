"""The strategy's arguments, the engine's settings and the configuration are the same, with the same defaults."""

import dataclasses
import inspect

import hydra

from hift_lightning import HiFTSettings, HiFTStrategy
from hift_lightning.strategies.blockwise import BlockwiseTraining

OF_LIGHTNING = {"self", "arguments"}


def defaults_of_settings():
    return {field.name: field.default for field in dataclasses.fields(HiFTSettings)}


def test_strategies_have_the_settings_with_their_defaults():
    parameters = inspect.signature(BlockwiseTraining.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in OF_LIGHTNING}
    assert defaults == defaults_of_settings()
    assert HiFTStrategy().settings == HiFTSettings()


def test_the_configuration_has_the_settings_with_their_defaults():
    with hydra.initialize_config_module("hift_lightning.conf", version_base="1.3"):
        node = hydra.compose("train").strategy
    given = {name: value for name, value in node.items() if not name.startswith("_") and name != "seed"}
    expected = defaults_of_settings()
    del expected["seed"]  # the run's
    assert given == expected
