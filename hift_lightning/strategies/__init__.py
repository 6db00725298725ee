"""HiFT as Lightning strategies, registered by name when this package is imported."""

from lightning.pytorch.strategies import StrategyRegistry

from hift_lightning.strategies.hift import HiFTStrategy

# the registry raises on a second registration, as when a notebook reloads the package
if HiFTStrategy.strategy_name not in StrategyRegistry:
    HiFTStrategy.register_strategies(StrategyRegistry)

__all__ = ["HiFTStrategy"]
