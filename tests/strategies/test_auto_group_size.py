"""`HiFTStrategy(group_size="auto")` under the Trainer."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from hift_lightning import HiFT, HiFTSettings, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.planner.gpus import GIB
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

BUDGET = "2GiB"


def fit(strategy, data, **arguments):
    module = SmallTransformer()
    trainer_ = trainer(strategy, **arguments)
    trainer_.fit(module, data)
    return module, trainer_


def test_it_chooses_at_the_start_of_fit_and_trains():
    _, trainer_ = fit(HiFTStrategy(group_size="auto", memory_budget=BUDGET), loader(make_batches(3)))
    assert trainer_.strategy.settings.group_size == LAYERS
    assert trainer_.strategy.settings.memory_budget is None
    assert len(trainer_.strategy.report().blocks) == 1
    assert trainer_.global_step == 3


@pytest.mark.parametrize("own_generator", [True, False])
def test_training_sees_the_data_and_random_numbers_that_it_sees_with_a_number(own_generator):
    def run(strategy):
        torch.manual_seed(0)
        rows = list(zip(*make_batches(1, size=32)[0], strict=True))
        generator = torch.Generator().manual_seed(1) if own_generator else None
        module, _ = fit(strategy, DataLoader(rows, batch_size=4, shuffle=True, generator=generator))
        return module.losses, torch.rand(1)

    auto = run(HiFTStrategy(group_size="auto", memory_budget=BUDGET))
    number = run(HiFTStrategy(group_size=LAYERS))
    assert auto == number


def test_a_device_that_tells_no_memory_needs_a_budget():
    with pytest.raises(ConfigurationError, match=r"`cpu` does not tell how much it has; give `memory_budget`"):
        fit(HiFTStrategy(group_size="auto"), loader(make_batches(1)))


def test_by_default_the_budget_is_the_memory_of_the_device(sim_device, monkeypatch):
    module = torch.get_device_module("sim")
    monkeypatch.setattr(module, "mem_get_info", lambda device: (GIB, 2 * GIB), raising=False)
    _, trainer_ = fit(
        HiFTStrategy(group_size="auto", device="sim:0"), loader(make_batches(1)), accelerator="sim", devices=1
    )
    assert trainer_.strategy.settings.group_size == LAYERS


def test_several_loaders_that_the_user_has_combined_are_looked_at_as_training_takes_them():
    class Combined(SmallTransformer):
        def training_step(self, batch, batch_idx):
            seen.append(batch["one"])
            return super().training_step(batch["one"], batch_idx)

    seen = []
    batches = make_batches(5)
    data = CombinedLoader({"one": loader(batches[:2]), "two": loader(batches[2:])}, "min_size")
    strategy = HiFTStrategy(group_size="auto", memory_budget=BUDGET)
    trainer(strategy).fit(Combined(), data)
    assert strategy.settings.group_size == LAYERS
    assert len(seen) > 2  # planning comes first
    assert all(torch.equal(own[0], batch[0]) for own, batch in zip(seen[-2:], batches, strict=False))


def test_data_that_can_be_gone_through_once_are_refused_before_a_batch_is_lost():
    batches = iter(make_batches(2))
    with pytest.raises(ConfigurationError, match=r"an iterator that would lose it.*choose_group_size"):
        fit(HiFTStrategy(group_size="auto", memory_budget=BUDGET), batches, max_steps=1)
    assert len(list(batches)) == 2


def test_it_can_be_chosen_before_fit_with_a_batch_of_ones_own():
    batches = iter(make_batches(2))
    strategy = HiFTStrategy(group_size="auto", memory_budget=BUDGET)
    module, trainer_ = SmallTransformer(), trainer(strategy, max_steps=2)
    strategy.choose_group_size(trainer_, module, make_batches(1, size=8)[0])
    trainer_.fit(module, batches)
    assert len(module.losses) == 2


def test_a_module_of_other_shapes_is_chosen_for_anew_and_for_the_same_ones_the_choice_stays(monkeypatch):
    chosen = []
    choose = HiFTStrategy.choose_group_size
    monkeypatch.setattr(HiFTStrategy, "choose_group_size", lambda *args: (chosen.append(1), choose(*args)))
    sizes = []
    strategy = HiFTStrategy(group_size="auto", memory_budget=BUDGET)
    trainer_ = trainer(strategy)
    strategy.choose_group_size(trainer_, SmallTransformer(), make_batches(1)[0])
    for depth in (2, 2, 5):
        trainer_.fit(SmallTransformer(depth=depth), loader(make_batches(1)))
        trainer_.fit_loop.max_epochs += 1
        sizes.append((strategy.settings.group_size, len(strategy.report().blocks)))
    assert sizes == [(LAYERS, 1), (LAYERS, 1), (LAYERS + 3, 1)]
    assert len(chosen) == 2


@pytest.mark.parametrize(("name", "value"), [("accumulate_grad_batches", 2), ("gradient_clip_val", 1.0)])
def test_a_run_that_sums_or_clips_gradients_in_another_way_is_chosen_for_anew(name, value, monkeypatch):
    chosen = []
    choose = HiFTStrategy.choose_group_size
    monkeypatch.setattr(HiFTStrategy, "choose_group_size", lambda *args: (chosen.append(1), choose(*args)))
    strategy = HiFTStrategy(group_size="auto", memory_budget=BUDGET)
    _, trainer_ = fit(strategy, loader(make_batches(2)))
    for _ in range(2):
        setattr(trainer_, name, value)
        trainer_.fit_loop.max_epochs += 1
        trainer_.fit(SmallTransformer(), loader(make_batches(2)))
    assert len(chosen) == 2


def test_no_data_are_told():
    with pytest.raises(ConfigurationError, match="there is none; give training data"):
        fit(HiFTStrategy(group_size="auto", memory_budget=BUDGET), loader([]))


def test_a_plain_loop_wants_a_number():
    model = SmallTransformer()
    with pytest.raises(ConfigurationError, match=r"`group_size='auto'` is chosen by `HiFTStrategy`"):
        HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(group_size="auto"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": "all"}, r"`group_size='all'` must be an integer of at least 1, .*, or `auto`"),
        ({"group_size": 0}, r"`group_size=0` must be an integer"),
        ({"memory_budget": "24GiB"}, r"`memory_budget='24GiB'` is looked at with `group_size='auto'` alone"),
        ({"group_size": "auto", "memory_budget": "much"}, r"`memory_budget='much'` is not a number of bytes"),
    ],
)
def test_values_that_cannot_work_are_refused_at_once(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        HiFTStrategy(**arguments)
