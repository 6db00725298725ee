"""What belongs to the engines of FSDP1 and DeepSpeed is refused with the remedy."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from hift_lightning import HiFTManualMixin, HiFTStrategy
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer

PLUGINS = {"DeepSpeed": DeepSpeedPrecision("bf16-true"), "FSDP": FSDPPrecision("bf16-mixed")}


@pytest.mark.parametrize("engine", PLUGINS)
def test_a_precision_plugin_of_another_engine_is_refused_before_training(engine):
    plugin = PLUGINS[engine]
    remedy = (
        rf"belongs to `{engine}Strategy`; leave the plugin out and give `Trainer\(precision='{plugin.precision}'\)`"
    )
    with pytest.raises(MisconfigurationException, match=remedy):
        trainer(HiFTStrategy(precision_plugin=plugin)).fit(SmallTransformer(), loader(make_batches(1)))
    with pytest.raises(MisconfigurationException, match=remedy):
        trainer(HiFTStrategy(precision_plugin=plugin)).validate(SmallTransformer(), loader(make_batches(1)))


class DeepSpeedEngine(nn.Module):
    """Stands for the class of that name, which is a module around the user's."""

    def __init__(self, module):
        super().__init__()
        self.module = module


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def test_a_part_in_an_engine_of_deepspeed_is_refused_before_training():
    module = SmallTransformer()
    module.head = DeepSpeedEngine(module.head)
    with pytest.raises(MisconfigurationException, match="`SmallTransformer.head` is wrapped in `DeepSpeedEngine`"):
        trainer(HiFTStrategy()).fit(module, loader(make_batches(1)))


def test_the_mixin_is_refused_under_deepspeed():
    class Manual(HiFTManualMixin, SmallTransformer):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            strategy = self.trainer.strategy
            own = type(strategy)
            strategy.__class__ = DeepSpeedStrategy  # one cannot be built without a GPU
            try:
                self.hift_step(super().training_step(batch, batch_idx))
            finally:
                strategy.__class__ = own

    with pytest.raises(MisconfigurationException, match="under `DeepSpeedStrategy`.*use `strategy='hift_ddp'` or"):
        trainer("auto").fit(Manual(), loader(make_batches(1)))
