"""The data modules' training loaders go on where a run stopped, batch for batch."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from hift_lightning.data import TextDataModule
from hift_lightning.data.loading import TrainingLoader
from tests.application.test_sentences import data_module as sentences
from tests.resuming import Stop, StopsAt, raise_stop
from tests.small_transformer import trainer

EPOCHS = 3


class Sees(L.LightningModule):
    """Notes the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, Any]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["input_ids"].tolist()))
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def texts(folder: Path, workers: int) -> TextDataModule:
    book = folder / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {number} says {'word ' * (number % 7)}." for number in range(150)))
    return TextDataModule(
        None, path=str(book), batch_size=4, max_length=40, cache_dir=str(folder / "cache"), num_workers=workers
    )


def data_of(kind: str, folder: Path, workers: int) -> Any:
    if kind == "texts":
        return texts(folder, workers)
    data = sentences(batch_size=4, num_workers=workers)
    data.setup("fit")
    data._tokenised["train"] = data._tokenised["train"][:70]
    return data


def fit(strategy: str, data: Any, stop_at: int | None = None, ckpt_path: Any = None, **arguments: Any) -> Any:
    module = Sees()
    callbacks = [] if stop_at is None else [StopsAt("on_train_batch_end", stop_at, raise_stop)]
    trainer_ = trainer(strategy, callbacks=callbacks, limit_val_batches=0, **{"max_epochs": EPOCHS, **arguments})
    with contextlib.suppress(Stop):
        trainer_.fit(module, data, ckpt_path=ckpt_path)
    return module.seen, trainer_


@pytest.mark.parametrize("strategy", ["auto", "hift"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["sentences", "texts"])
def test_resumed_again_and_again_a_run_sees_the_batches_of_one_that_never_stopped(
    kind: str, workers: int, strategy: str, tmp_path: Path
) -> None:
    whole, _ = fit(strategy, data_of(kind, tmp_path, workers), accumulate_grad_batches=2)
    assert len(whole) % EPOCHS == 0
    seen: list[Any] = []
    path = None
    epoch = len(whole) // EPOCHS
    for stop_at in (4, 2, epoch, 6):  # in the first epoch, in it again, in the next, in that again
        part, stopped = fit(strategy, data_of(kind, tmp_path, workers), stop_at, path, accumulate_grad_batches=2)
        path = tmp_path / f"{len(seen)}.ckpt"
        stopped.save_checkpoint(path)
        seen += part
    seen += fit(strategy, data_of(kind, tmp_path, workers), None, path, accumulate_grad_batches=2)[0]
    assert seen == whole
    orders = [[batch for number, batch in whole if number == e] for e in range(EPOCHS)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("strategy", ["auto", "hift"])
@pytest.mark.parametrize("workers", [0, 2])
def test_from_the_end_of_an_epoch_it_goes_on_with_the_next_order(workers: int, strategy: str, tmp_path: Path) -> None:
    whole, _ = fit(strategy, data_of("texts", tmp_path, workers))
    part, stopped = fit(strategy, data_of("texts", tmp_path, workers), max_epochs=2)
    stopped.save_checkpoint(tmp_path / "end.ckpt")
    rest, _ = fit(strategy, data_of("texts", tmp_path, workers), ckpt_path=tmp_path / "end.ckpt")
    assert part + rest == whole


class Draws(Sees):
    """Notes a number that is drawn in each step, as dropout draws."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, torch.rand(1).item()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None: ...

    test_step = validation_step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["sentences", "texts"])
def test_training_draws_the_same_however_often_it_is_evaluated(kind: str, workers: int, tmp_path: Path) -> None:
    def drawn(evaluated_before: bool, **arguments: Any) -> list[tuple[int, Any]]:
        L.seed_everything(1, verbose=False)
        module, data = Draws(), data_of(kind, tmp_path, workers)
        trainer_ = trainer("hift", max_steps=4, **arguments)
        if evaluated_before:
            trainer_.test(module, data)
        trainer_.fit(module, data)
        return module.seen

    never = drawn(evaluated_before=False, limit_val_batches=0)
    assert len(never) == 4
    assert drawn(evaluated_before=True, val_check_interval=2, limit_val_batches=1) == never


def rows(workers: int = 0, of: int = 40) -> TrainingLoader:
    data = list(range(of))
    generator = torch.Generator()
    batches = BatchSampler(RandomSampler(data, generator=generator), 4, drop_last=False)
    return TrainingLoader(data, batches, generator, 5, num_workers=workers)  # type: ignore[arg-type]


def test_batches_that_workers_have_prepared_are_not_counted() -> None:
    loader = rows(workers=2)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    assert loader.state_dict() == {"epoch": 0, "batches": 3, "of": len(loader), "seed": 5}


def test_a_state_from_within_an_epoch_of_other_batches_is_warned_of() -> None:
    loader = rows()
    with pytest.warns(match=f"from batch 3 of an epoch of 5, .* make {len(loader)} now"):
        loader.load_state_dict({"epoch": 1, "batches": 3, "of": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batches in (0, 5):  # the beginning and the end of an epoch
            loader.load_state_dict({"epoch": 1, "batches": batches, "of": 5})


def test_a_state_from_within_an_epoch_of_another_order_is_warned_of() -> None:
    loader = rows()
    with pytest.warns(match="an epoch whose order was made with seed 7, and that of this run is 5"):
        loader.load_state_dict({"epoch": 1, "batches": 3, "of": len(loader), "seed": 7})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_state_dict({"epoch": 1, "batches": 0, "of": len(loader), "seed": 7})


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
def test_the_state_goes_on_with_another_number_of_workers(workers: tuple[int, int]) -> None:
    whole = [batch.tolist() for batch in rows()]
    first, second = map(rows, workers)
    batches = iter(first)
    seen = [next(batches).tolist() for _ in range(4)]
    second.load_state_dict(first.state_dict())
    seen += [batch.tolist() for batch in second]
    assert seen == whole


class SeesTensors(Sees):
    """Notes batches that are tensors."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        self.seen.append((self.current_epoch, batch.tolist()))
        return self.layer(torch.ones(1)).sum()


class SeesBoth(Sees):
    """Notes the batches of two loaders, of which the second has none where it is over."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        seen = [None if each is None else each.tolist() for each in batch.values()]
        self.seen.append((self.current_epoch, seen, torch.rand(1).item()))
        return self.layer(torch.ones(1)).sum()


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("shorter", [12, 28])  # 3 and 7 batches beside 10
def test_beside_a_longer_loader_it_goes_on_where_it_was(shorter: int, mode: Any, tmp_path: Path) -> None:
    def part(stop_at: int | None, ckpt_path: Path | None = None) -> list[Any]:
        callbacks = [] if stop_at is None else [StopsAt("on_train_batch_end", stop_at, raise_stop)]
        trainer_ = trainer("hift", callbacks=callbacks, max_epochs=2)
        torch.manual_seed(1 if ckpt_path is None else 2)
        module = SeesBoth()
        with contextlib.suppress(Stop):
            trainer_.fit(
                module, CombinedLoader({"longer": rows(), "shorter": rows(of=shorter)}, mode), ckpt_path=ckpt_path
            )
        trainer_.save_checkpoint(tmp_path / "last.ckpt")
        return module.seen

    whole = part(None)
    assert len(whole) == 2 * (shorter // 4 if mode == "min_size" else 10)
    for first in range(1, len(whole) - 2):
        seen = part(first) + part(2, tmp_path / "last.ckpt") + part(None, tmp_path / "last.ckpt")
        assert seen == whole


def test_used_by_a_trainer_and_then_in_a_plain_loop_it_goes_on_with_the_next_pass() -> None:
    first, second = rows(), rows()
    trainer("hift", max_epochs=1).fit(SeesTensors(), first)
    for _ in range(2):
        assert len(list(first)) == len(first)
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == [batch.tolist() for batch in first]


class Augmented(torch.utils.data.Dataset[torch.Tensor]):
    """Draws random numbers for each row."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())


@pytest.mark.parametrize("stop_at", [3, 10, 13])
def test_random_numbers_that_a_data_set_draws_go_on_too(stop_at: int, tmp_path: Path) -> None:
    def augmented() -> TrainingLoader:
        generator = torch.Generator()
        batches = BatchSampler(RandomSampler(range(40), generator=generator), 4, drop_last=False)
        return TrainingLoader(Augmented(), batches, generator, 5)

    def fit(save_at: int | None, ckpt_path: Path | None = None) -> list[Any]:
        torch.manual_seed(1 if ckpt_path is None else 2)
        path = tmp_path / "saved.ckpt"
        saves = [] if save_at is None else [StopsAt("on_train_batch_end", save_at, lambda t: t.save_checkpoint(path))]
        module = SeesTensors()
        trainer("hift", callbacks=saves, max_epochs=2).fit(module, augmented(), ckpt_path=ckpt_path)
        return module.seen

    whole = fit(stop_at)
    assert fit(None, tmp_path / "saved.ckpt") == whole[stop_at:]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    straight = rows()
    passes = [[batch.tolist() for batch in straight] for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    sought = rows()
    sought.batch_sampler.set_epoch(2)
    assert [batch.tolist() for batch in sought] == passes[2]


def test_a_pass_that_was_left_begins_anew() -> None:
    loader = rows()
    first = next(iter(loader)).tolist()
    assert next(iter(loader)).tolist() == first


def test_a_resumed_pass_draws_no_random_number_of_the_process() -> None:
    loader = rows()
    loader.load_state_dict({"epoch": 0, "batches": 2})
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_ranks_take_turns_and_another_number_of_them_goes_on_with_what_is_left(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_rank(rank: int, ranks: int) -> TrainingLoader:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return rows()

    whole = [batch.tolist() for batch in of_rank(0, 1)]
    first = []
    for rank in range(before):
        loader = of_rank(rank, before)
        assert len(loader) == -(-len(whole) // before)
        batches = iter(loader)
        first.append([next(batches).tolist() for _ in range(3)])
        state = loader.state_dict()
    assert [batch for turn in zip(*first, strict=True) for batch in turn] == whole[: 3 * before]
    rest = []
    for rank in range(after):
        loader = of_rank(rank, after)
        loader.load_state_dict(state)
        rest.append([batch.tolist() for batch in loader])
    turns = [batch for turn in zip(*rest, strict=True) for batch in turn]
    left = whole[3 * before :]
    assert turns == [*left, *whole][: -(-len(left) // after) * after]
