"""Every precision of Lightning, and GradScaler's skipped steps."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from hift_lightning import HiFTStrategy
from tests.blocks_seen import BOTTOM_UP, TOP_DOWN, BlocksSeen
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_trains_every_block_in_its_dtype(precision, weights):
    seen = BlocksSeen()
    module = SmallTransformer()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer_ = trainer(precision=precision, callbacks=[seen])
    trainer_.fit(module, loader(make_batches(LAYERS)))
    assert seen.steps == TOP_DOWN
    for name, parameter in module.named_parameters():
        assert parameter.dtype == weights
        assert not torch.equal(parameter, before[name].to(weights)), name


class Overflowing(SmallTransformer):
    """Its loss is infinite at the batches named."""

    overflows_at = (2, 3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.overflows_at else loss


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("automatic", [True, False])
def test_an_overflow_skips_the_step_and_the_block_keeps_its_turn(automatic, fused):
    class Manual(Overflowing):
        automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not automatic:
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = BlocksSeen()
    module = Manual(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=fused))
    trainer_ = trainer(
        HiFTStrategy(order="bottom2up"), plugins=MixedPrecision("16-mixed", "cpu", scaler), callbacks=[seen]
    )
    assert trainer_.strategy.precision_plugin.scaler is scaler
    trainer_.fit(module, loader(make_batches(6)))

    third = BOTTOM_UP[2]
    assert seen.steps == [*BOTTOM_UP[:2], third, third, third, BOTTOM_UP[3]]
    assert trainer_.strategy.hift.updates == 4
    assert scaler.get_scale() == 2.0**8  # halved at each of the two overflows
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(p.grad is None for p in module.parameters())


def test_a_scaled_run_equals_the_unscaled_one_in_bf16_free_arithmetic():
    """With a scale of a power of two and no overflow, fp32 layers give the same updates."""

    class FullPrecision(SmallTransformer):
        def training_step(self, batch, batch_idx):
            with torch.autocast("cpu", enabled=False):
                return super().training_step(batch, batch_idx)

    scaled, plain = FullPrecision(), FullPrecision()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    trainer(plugins=plugin).fit(scaled, loader(make_batches(2 * LAYERS)))
    trainer().fit(plain, loader(make_batches(2 * LAYERS)))
    for left, right in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)
