"""The LightningModule of the application and its schedules."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hift_lightning import schedule
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.classification import ClassificationModule
from hift_lightning.models.optimization import parameter_groups


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(features))


def batches(count: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = [{"features": torch.randn(4, generator=generator), "labels": torch.tensor(i % 2)} for i in range(4 * count)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def quiet_trainer(folder: Path, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_biases_and_norms_have_no_weight_decay() -> None:
    network = Network()
    matrices, others = parameter_groups(network.named_parameters())
    assert [id(p) for p in matrices["params"]] == [id(network.head.weight)]
    assert "weight_decay" not in matrices
    assert len(others["params"]) == 3
    assert others["weight_decay"] == 0.0


def test_the_scheduler_is_stepped_per_update_and_knows_their_number(tmp_path: Path) -> None:
    told: list[int] = []

    def scheduler(optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
        told.append(total_steps)
        return schedule.linear(optimizer, total_steps, warmup_fraction=0.0)

    module = ClassificationModule(Network(), partial(torch.optim.SGD, lr=1.0), scheduler)
    trainer = quiet_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=3)
    trainer.fit(module, batches(6))
    assert told[-1] == trainer.global_step == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_a_scheduler_for_a_run_without_end_is_refused(tmp_path: Path) -> None:
    module = ClassificationModule(Network(), partial(torch.optim.SGD, lr=1.0), schedule.linear)
    with pytest.raises(ConfigurationError, match=r"trainer\.max_epochs"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(module, batches())


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_schedule_warms_up_and_ends_where_it_should(name: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = getattr(schedule, name)(optimizer, 100, warmup_fraction=0.1)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert 0 < rates[0] < 0.2
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == 2.0
    assert rates[100] == pytest.approx(2.0 if name == "constant" else 0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_accuracy_and_loss_are_those_of_all_rows(tmp_path: Path) -> None:
    module = ClassificationModule(Network(), partial(torch.optim.SGD, lr=0.1))
    loader = batches(3)
    (result,) = quiet_trainer(tmp_path).test(module, loader, verbose=False)
    features = torch.stack([row["features"] for row in loader.dataset])  # type: ignore[attr-defined]
    labels = torch.stack([row["labels"] for row in loader.dataset])  # type: ignore[attr-defined]
    logits = module.network(features)
    assert result["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_f1_is_the_mean_over_classes_of_all_rows(tmp_path: Path) -> None:
    labels = [0] * 9 + [1] * 3
    said = [0] * 8 + [1] + [0, 1, 1]  # of class 0 8 of 9 right, and one more said; of class 1 2 of 3 right
    logits = torch.nn.functional.one_hot(torch.tensor(said)).float()
    rows = [{"input": row, "labels": torch.tensor(label)} for row, label in zip(logits, labels, strict=True)]
    module = ClassificationModule(nn.Identity(), partial(torch.optim.SGD, lr=0.1))
    (result,) = quiet_trainer(tmp_path).test(module, DataLoader(rows, batch_size=5), verbose=False)  # type: ignore[arg-type]
    assert result["test/f1"] == pytest.approx((2 * 8 / (9 + 9) + 2 * 2 / (3 + 3)) / 2)
    assert result["test/accuracy"] == pytest.approx(10 / 12)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "named"),
    [
        (partial(torch.optim.SGD, lr=-1.0), None, "optimizer.*-1.0"),
        (partial(torch.optim.SGD, lr=0.1, speed=3), None, "optimizer.*speed"),
        (partial(torch.optim.SGD, lr=0.1), partial(schedule.linear, warmup_fraction=2), "warmup_fraction=2"),
        (partial(torch.optim.SGD, lr=0.1), partial(schedule.linear, speed=3), "scheduler.*speed"),
    ],
)
def test_arguments_that_cannot_work_are_refused_when_the_module_is_built(
    optimizer: Any, scheduler: Any, named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        ClassificationModule(Network(), optimizer, scheduler)
