"""The strategy's arguments, the engine's settings and the configuration are the same, with the same defaults."""

import dataclasses
import inspect

import hydra
import torch

from hift_lightning import HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTSettings, HiFTStrategy
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


def test_the_configuration_of_the_sharded_strategy_has_its_arguments_too():
    with hydra.initialize_config_module("hift_lightning.conf", version_base="1.3"):
        cfg = hydra.compose("train", ["strategy=hift_fsdp2", "strategy.mp_policy={param_dtype: bfloat16}"])
    strategy = hydra.utils.instantiate(cfg.strategy)
    assert strategy.settings == HiFTSettings(seed=cfg.seed)
    assert strategy._mp_policy.param_dtype == torch.bfloat16
    parameters = inspect.signature(HiFTFSDP2Strategy.__init__).parameters
    own = parameters.keys() - OF_LIGHTNING - {"data_parallel_size", "tensor_parallel_size"}  # there is no choice
    of_settings = defaults_of_settings().keys() - {"memory_budget"}  # goes with `group_size="auto"`
    assert {name for name in cfg.strategy if not name.startswith("_")} == of_settings | own
    given = {name: cfg.strategy[name] for name in own - {"mp_policy"}}
    assert given == {name: list(d) if (d := parameters[name].default) == () else d for name in given}


def test_the_configuration_of_the_data_parallel_strategy_has_its_arguments_too():
    with hydra.initialize_config_module("hift_lightning.conf", version_base="1.3"):
        cfg = hydra.compose("train", ["strategy=hift_ddp"])
    assert hydra.utils.instantiate(cfg.strategy).settings == HiFTSettings(seed=cfg.seed)
    parameters = inspect.signature(HiFTDDPStrategy.__init__).parameters
    own = parameters.keys() - OF_LIGHTNING
    assert {name for name in cfg.strategy if not name.startswith("_")} == defaults_of_settings().keys() | own
    assert all(cfg.strategy[name] == parameters[name].default for name in own)
