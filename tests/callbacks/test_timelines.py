"""The pictures of a run show its steps, and come only where they can be drawn."""

import sys

import pytest

from hift_lightning import HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.callbacks.timelines import StepRecord, block_timeline, memory_timeline
from hift_lightning.engine.errors import ConfigurationError
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

MIB = 2**20


def fitted(monitor, strategy, steps=LAYERS):
    trainer(strategy, devices=1, callbacks=[monitor]).fit(SmallTransformer(), loader(make_batches(steps)))


def steps(count, blocks):
    return [
        StepRecord(
            step,
            (step - 1) % blocks,
            {"weights": 8 * MIB, "gradients": MIB, "optimizer_state": 2 * MIB, "parked": min(step, blocks) * MIB},
            1.0 / step,
        )
        for step in range(1, count + 1)
    ]


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


def test_in_a_long_run_a_bar_is_whole_cycles():
    figure = block_timeline(steps(6000, blocks=3), ["a", "b", "c"])
    for bars in bars_of(figure):
        assert len(bars) == 1000
        assert bars[0] == (0.5, 6.5)
    assert figure.axes[0].get_title() == "The loss, and the blocks that were updated in each 6 steps"


def test_the_loss_is_that_of_each_step_and_a_mean_over_a_cycle():
    loss = block_timeline(steps(4, blocks=2), ["a", "b"]).axes[0]
    each, mean = loss.lines
    assert list(each.get_ydata()) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert list(mean.get_ydata()) == pytest.approx([1, 3 / 4, 5 / 12, 7 / 24])


def test_bytes_of_each_role_are_stacked_and_parked_ones_apart():
    axes = memory_timeline(steps(3, blocks=2), "block").axes[0]
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections]
    assert tops == [8, 9, 11]
    (parked,) = axes.lines
    assert list(parked.get_ydata()) == [1, 2, 2, 2]


@pytest.mark.parametrize(("update", "told"), [("block", False), ("streamed", True), ("fused", True)])
def test_the_picture_tells_what_is_not_counted(update, told):
    title = memory_timeline(steps(3, blocks=2), update).axes[0].get_title()
    assert (f"what update={update} has on the device inside a step" in title) == told


def test_without_matplotlib_a_message_names_the_extra(tmp_path, no_matplotlib, caplog):
    with caplog.at_level("INFO"):
        fitted(HiFTMonitor(tmp_path), HiFTStrategy())
    assert caplog.text.count("they come with `pip install 'hift-lightning[plots]'`") == 1
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_asked_for_and_cannot_be_drawn_are_an_error(tmp_path, no_matplotlib):
    with pytest.raises(ConfigurationError, match=r"needs matplotlib, .*'hift-lightning\[plots\]'"):
        HiFTMonitor(tmp_path, pictures=True)


def test_pictures_without_a_folder_are_an_error():
    with pytest.raises(ConfigurationError, match="give `folder`"):
        HiFTMonitor(pictures=True)
