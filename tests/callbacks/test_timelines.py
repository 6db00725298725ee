"""The pictures of a run show its steps, and come only where they can be drawn."""

import math
import sys
from statistics import fmean

import pytest
from lightning.pytorch.loggers import CSVLogger

from hift_lightning import HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.callbacks.timelines import MOST_RECORDS, StepRecord, Timeline, block_timeline, memory_timeline
from hift_lightning.engine.errors import ConfigurationError
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

MIB = 2**20


def fitted(monitor, strategy, steps=LAYERS):
    trainer(strategy, devices=1, callbacks=[monitor]).fit(SmallTransformer(), loader(make_batches(steps)))


def steps(count, blocks, steps_per_block=1, most=MOST_RECORDS):
    """The records of a run with turns from the bottom up, and loss 1 / step."""
    timeline = Timeline(most)
    for step in range(1, count + 1):
        parked = min(step, blocks) * MIB
        nbytes = {"weights": 8 * MIB, "gradients": MIB, "optimizer_state": 2 * MIB, "parked": parked}
        timeline.add(StepRecord(step - 1, step, ((step - 1) // steps_per_block % blocks,), nbytes))
        timeline.add_loss(1 / step)
    return timeline.records


def bars_of(figure):
    """For each block, where its bars begin and end."""
    _, blocks = figure.axes
    return [
        sorted((path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in collection.get_paths())
        for collection in blocks.collections
    ]


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_run_under_hift_leaves_both_pictures_and_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fitted(HiFTMonitor(tmp_path), HiFTStrategy())
    pictures = sorted(tmp_path.iterdir())
    assert [path.name for path in pictures] == ["block_timeline.png", "memory_timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "pictures: memory_timeline.png, block_timeline.png\n" in capsys.readouterr().out


def test_a_run_without_hift_leaves_that_of_memory(tmp_path):
    fitted(HiFTMonitor(tmp_path / "made" / "here"), "auto")
    assert [path.name for path in (tmp_path / "made" / "here").iterdir()] == ["memory_timeline.png"]


@pytest.mark.parametrize("arguments", [{}, {"pictures": False}])
def test_nobody_gets_pictures_who_does_not_want_them(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    fitted(HiFTMonitor(folder=tmp_path if arguments else None, **arguments), HiFTStrategy())
    assert not list(tmp_path.iterdir())


def test_each_step_is_a_bar_of_its_block():
    bars = bars_of(block_timeline(steps(5, blocks=3), ["a", "b", "c"]))
    assert bars == [[(0.5, 1.5), (3.5, 4.5)], [(1.5, 2.5), (4.5, 5.5)], [(2.5, 3.5)]]


def test_in_a_long_run_a_column_has_the_blocks_of_some_steps_in_the_order_of_their_turns():
    figure = block_timeline(steps(6000, blocks=3), ["a", "b", "c"])
    bars = [[edge for bar in of_block for edge in bar] for of_block in bars_of(figure)]
    turn = 32 / 3
    for block, edges in enumerate(bars):
        begins = [0.5 + 32 * column + turn * block for column in range(187)]
        assert edges[:-2] == pytest.approx([edge for begin in begins for edge in (begin, begin + turn)])
        assert len(edges) // 2 == 188  # the last column is narrower
    assert figure.axes[0].get_title() == "The loss, and the blocks updated in each 32 steps, by first turn"


def test_a_column_of_less_than_a_cycle_has_the_blocks_that_were_updated_in_it():
    bars = bars_of(block_timeline(steps(4000, blocks=3, steps_per_block=500), ["a", "b", "c"]))
    assert [len(of_block) for of_block in bars] == [375, 375, 250]
    assert bars[0][124:126] == [(496.5, 500.5), (1500.5, 1504.5)]


@pytest.mark.parametrize("count", [20, 21, 4000, 4007])
def test_a_long_run_has_few_records_of_all_its_steps(count):
    records = steps(count, blocks=3, most=20)
    assert len(records) <= 20
    assert (records[0].before, records[-1].last) == (0, count)
    assert [record.last for record in records[:-1]] == [record.before for record in records[1:]]
    assert len({record.steps for record in records[:-1]}) == 1
    assert records[-1].steps <= records[0].steps
    for record in records:
        of_steps = range(record.before + 1, record.last + 1)
        assert record.loss == pytest.approx(fmean(1 / step for step in of_steps))
        assert record.blocks == tuple(dict.fromkeys((step - 1) % 3 for step in of_steps))


def test_of_joined_steps_the_bytes_are_those_of_the_one_with_the_most_on_the_device():
    def record(before, weights, gradients, parked):
        nbytes = {"weights": weights, "gradients": gradients, "optimizer_state": 0, "parked": parked}
        return StepRecord(before, before + 1, (), nbytes)

    small, large = record(0, 10, 5, 9), record(1, 8, 8, 3)
    assert small.joined(large).nbytes == large.nbytes
    assert large.joined(small).nbytes == large.nbytes


def test_losses_that_are_no_numbers_count_in_no_mean():
    timeline = Timeline()
    for step, loss in enumerate([1.0, math.nan, math.inf, 4.0]):
        timeline.add(StepRecord(step, step + 1, (0,), {}))
        timeline.add_loss(loss)
    each, mean = block_timeline(timeline.records, ["a"]).axes[0].lines
    assert list(each.get_ydata()) == pytest.approx([1, math.nan, math.nan, 4], nan_ok=True)


def test_the_loss_is_that_of_each_step_and_a_mean_over_a_cycle():
    loss = block_timeline(steps(4, blocks=2), ["a", "b"]).axes[0]
    each, mean = loss.lines
    assert list(each.get_ydata()) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert list(mean.get_ydata()) == pytest.approx([1, 3 / 4, 5 / 12, 7 / 24])


def test_bytes_of_each_role_are_stacked_and_parked_ones_apart():
    axes = memory_timeline(steps(3, blocks=2)).axes[0]
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections]
    assert tops == [8, 9, 11]
    (parked,) = axes.lines
    assert list(parked.get_ydata()) == [1, 2, 2, 2]


def test_without_matplotlib_a_message_names_the_command_that_brings_it(tmp_path, no_matplotlib, caplog):
    with caplog.at_level("INFO"):
        fitted(HiFTMonitor(tmp_path), HiFTStrategy())
    assert caplog.text.count("they come with `pip install matplotlib`") == 1
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_written_do_not_end_a_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hift_lightning.callbacks.monitor.draw", full)
    with pytest.warns(match="could not write its pictures to .*No space left on device"):
        fitted(HiFTMonitor(tmp_path), HiFTStrategy())


def test_pictures_that_are_asked_for_and_cannot_be_drawn_are_an_error(tmp_path, no_matplotlib):
    with pytest.raises(ConfigurationError, match=r"needs matplotlib, .*`pip install matplotlib`"):
        HiFTMonitor(tmp_path, pictures=True)


def test_pictures_without_a_folder_are_an_error():
    with pytest.raises(ConfigurationError, match="give `folder`"):
        HiFTMonitor(pictures=True)


class Stops(SmallTransformer):
    """Ends with an error in its fourth batch."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise self.error
        return super().training_step(batch, batch_idx)


def stopped(monitor, error, strategy="hift", **arguments):
    stopping = trainer(strategy, devices=1, callbacks=[monitor], **arguments)
    stopping.fit(Stops(error), loader(make_batches(2 * LAYERS)))


def test_after_an_error_there_is_a_table_and_there_are_pictures(tmp_path, capsys):
    error = ZeroDivisionError("in a batch")
    monitor = HiFTMonitor(tmp_path)
    with pytest.raises(ZeroDivisionError) as raised:
        stopped(monitor, error)
    assert raised.value is error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block_timeline.png", "memory_timeline.png"]
    visits = {line.split()[1]: line.split()[3] for line in capsys.readouterr().out.splitlines() if "k " in line}
    assert visits == {"layers.0": "1", "layers.1": "1"}
    assert [record.blocks for record in monitor._timeline.records] == [(3,), (2,), (1,)]
    assert all(math.isfinite(record.loss) for record in monitor._timeline.records)


def test_an_unfinished_cycle_is_logged_after_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        stopped(HiFTMonitor(), ZeroDivisionError(), logger=CSVLogger(tmp_path, name="", version=""))
    logged = (tmp_path / "metrics.csv").read_text()
    assert "hift_grad_norm/01_layers.0" in logged
    assert "hift_grad_norm/00_embeddings" not in logged


@pytest.mark.parametrize("error", [ZeroDivisionError("in a batch"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_fails_while_drawing_does_not_hide_the_error(error, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError("no room for a picture")

    monkeypatch.setattr("hift_lightning.callbacks.monitor.draw", fail)
    shown = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)  # Lightning makes it an exit
    with pytest.raises(shown) as raised:
        stopped(HiFTMonitor(tmp_path), error)
    assert error in (raised.value, raised.value.__context__)
    assert "could not show what it had measured until then: OSError('no room for a picture')" in capsys.readouterr().err


def test_nothing_is_shown_of_an_error_before_the_first_step_or_outside_of_fit(tmp_path, capsys):
    class Broken(SmallTransformer):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    monitor = HiFTMonitor(tmp_path)
    fitting = trainer(devices=1, callbacks=[monitor])
    with pytest.raises(ZeroDivisionError):
        fitting.fit(Broken(), loader(make_batches(1)))
    assert "Blocks" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

    fitting = trainer(devices=1, callbacks=[monitor])
    fitting.fit(SmallTransformer(), loader(make_batches(LAYERS)))
    assert "Blocks" in capsys.readouterr().out
    with pytest.raises(TypeError):
        fitting.test(SmallTransformer(), loader([None]))
    assert "Blocks" not in capsys.readouterr().out
