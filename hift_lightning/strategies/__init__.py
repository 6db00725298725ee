"""HiFT as Lightning strategies, registered by name when this package is imported."""

from lightning.pytorch.strategies import StrategyRegistry

from hift_lightning.strategies.ddp import HiFTDDPStrategy
from hift_lightning.strategies.fsdp2 import HiFTFSDP2Strategy
from hift_lightning.strategies.hift import HiFTStrategy

for _strategy in (HiFTStrategy, HiFTDDPStrategy, HiFTFSDP2Strategy):
    # the registry raises on a second registration, as when a notebook reloads the package
    if _strategy.strategy_name not in StrategyRegistry:
        _strategy.register_strategies(StrategyRegistry)

__all__ = ["HiFTDDPStrategy", "HiFTFSDP2Strategy", "HiFTStrategy"]
