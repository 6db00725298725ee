"""A project of somebody else's, PyTorch Forecasting, trains under ``"hift"`` as it is.

Its modules, data sets, metrics and logging are several thousand lines, written for forecasting. What is done here is
its own tutorial; the Trainer's argument ``strategy`` is what has changed.
"""

import lightning.pytorch as pl
import pytest
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data
from pytorch_forecasting.metrics import QuantileLoss
from torch.utils.data import DataLoader

import hift_lightning  # noqa: F401  (registers "hift")


@pytest.fixture(scope="module")
def data() -> tuple[TimeSeriesDataSet, DataLoader, DataLoader]:
    series = generate_ar_data(seasonality=10.0, timesteps=120, n_series=20, seed=42)
    series["kind"] = series.series.mod(3).astype(str)
    training = TimeSeriesDataSet(
        series[series.time_idx < 100],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=24,
        max_prediction_length=6,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time_idx"],
        static_categoricals=["kind"],
    )
    validation = TimeSeriesDataSet.from_dataset(training, series, min_prediction_idx=100)
    return (
        training,
        training.to_dataloader(train=True, batch_size=64),
        validation.to_dataloader(train=False, batch_size=64),
    )


@pytest.mark.slow
def test_a_forecasting_project_trains_by_one_changed_argument(data, tmp_path):
    training, train_loader, val_loader = data
    pl.seed_everything(0, verbose=False)
    model = TemporalFusionTransformer.from_dataset(
        training, learning_rate=0.01, hidden_size=8, attention_head_size=2, loss=QuantileLoss(), log_interval=0
    )
    trainer = pl.Trainer(
        strategy="hift",
        max_epochs=6,
        limit_train_batches=16,
        gradient_clip_val=0.1,
        callbacks=[pl.callbacks.EarlyStopping("val_loss"), pl.callbacks.LearningRateMonitor()],
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
    )
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = trainer.validate(model, val_loader, verbose=False)[0]["val_loss"]
    trainer.fit(model, train_loader, val_loader)
    after = trainer.validate(model, val_loader, verbose=False)[0]["val_loss"]

    assert trainer.strategy.hift.cycle >= 2
    assert after < 0.8 * before
    assert [name for name, p in model.named_parameters() if torch.equal(p, weights[name])] == []

    trained = TemporalFusionTransformer.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    trained.eval()
    model.eval()
    batch, _ = next(iter(val_loader))
    with torch.no_grad():
        assert torch.equal(trained(batch).prediction, model(batch).prediction)
