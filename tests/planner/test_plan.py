"""What `plan` refuses, and what it leaves alone."""

import lightning as L
import pytest
import torch

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.planner import plan
from tests.small_transformer import SmallTransformer, make_batches


def test_a_precision_that_cannot_be_planned_is_named():
    with pytest.raises(ConfigurationError, match=r"`precision='64-true'` cannot be planned; choose one of 32-true"):
        plan(SmallTransformer(), "hift", make_batches(1)[0], precision="64-true")


def test_a_shape_that_depends_on_values_is_told_in_a_sentence():
    class PicksRows(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[batch[:, 0] > 0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        ConfigurationError, match=r"`PicksRows` makes a tensor whose shape depends on values .* `validate_args=False`"
    ):
        plan(PicksRows(), "hift", torch.ones(3, 4))


def test_sparse_gradients_are_told_in_a_sentence():
    module = SmallTransformer()
    module.embedding.sparse = True
    with pytest.raises(ConfigurationError, match=r"A tensor is sparse, .* plan with `sparse=False`"):
        plan(module, "hift", make_batches(1)[0])
    assert plan(module, HiFTStrategy(frozen=["embedding.*"]), make_batches(1)[0]).peak_bytes > 0


def test_the_module_stays_as_it_was():
    module = SmallTransformer()
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    planned = plan(module, "hift", make_batches(1)[0])
    assert planned.numel == sum(p.numel() for p in module.parameters())
    for name, p in module.named_parameters():
        same, values, required_grad = before[name]
        assert p is same
        assert torch.equal(p, values)
        assert p.requires_grad == required_grad
    assert module._trainer is None


def test_a_number_that_is_read_does_not_stop_planning():
    class ReadsLoss(SmallTransformer):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert isinstance(loss.item(), float)
            return loss

    assert plan(ReadsLoss(), "full", make_batches(1)[0]).peak_bytes > 0


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_module_that_ends_its_training_or_goes_on_does_not_disturb_planning(hook, value):
    class Decides(SmallTransformer):
        pass

    def decide(self, *args):
        self.trainer.should_stop = value

    setattr(Decides, hook, decide)
    batch = make_batches(1)[0]
    for strategy in ("full", "hift"):
        assert plan(Decides(), strategy, batch) == plan(SmallTransformer(), strategy, batch)
