"""What keeps a run from saving while it loads a checkpoint to go on from, and what does not."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint

from hift_lightning import HiFT, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError, ParkedStateError
from hift_lightning.engine.residency import Residency
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_checkpoint import STEPS, fit, make_module


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("why", "error"),
    [
        ("another plan", ConfigurationError),
        ("another optimizer", ConfigurationError),
        ("Ctrl-C while it is loaded", SystemExit),
        ("Ctrl-C while training starts", SystemExit),
    ],
)
def test_a_run_that_ends_before_a_checkpoint_is_loaded_leaves_it_as_it_was(why, error, tmp_path, monkeypatch):
    def saving():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=STEPS, save_on_exception=True)

    fit(callbacks=[saving()], enable_checkpointing=True)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    strategy = HiFTStrategy(group_size=2 if why == "another plan" else 1)
    if why == "Ctrl-C while it is loaded":
        monkeypatch.setattr(Residency, "load_state_dict", stop)
    if why == "Ctrl-C while training starts":
        monkeypatch.setattr(HiFT, "start", stop)
    optimizer = "Adagrad" if why == "another optimizer" else "AdamW"
    with (
        pytest.warns(UserWarning, match=f"No checkpoint is saved .* before all of `{path}` was loaded"),
        pytest.raises(error),
    ):
        fit(strategy, 2, path, optimizer, callbacks=[saving()], enable_checkpointing=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    monkeypatch.undo()
    _, resumed = fit("hift", 2, path, callbacks=[saving()], enable_checkpointing=True)
    assert resumed.global_step == 2 * STEPS


def test_a_checkpoint_of_weights_alone_is_told_before_anything_is_loaded(tmp_path):
    _, made = fit()
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    module = make_module()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"weights.ckpt` has weights alone .* begin anew from these weights"):
        trainer("hift").fit(module, loader(make_batches(2)), ckpt_path=tmp_path / "weights.ckpt")
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    trainer("hift").validate(module, loader(make_batches(2)), ckpt_path=tmp_path / "weights.ckpt")
    assert not all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


@pytest.mark.parametrize("when", ["on_fit_start", "on_train_start", "on_train_batch_end", "after"])
def test_a_checkpoint_that_somebody_else_loads_keeps_nobody_from_saving(when, tmp_path):
    _, made = fit()
    made.save_checkpoint(tmp_path / "made.ckpt")
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    def load(trainer_, module, *_):
        for name in ("made", "weights"):
            loaded = trainer_.strategy.load_checkpoint(tmp_path / f"{name}.ckpt")
            assert loaded["state_dict"].keys() == module.state_dict().keys()

    callback = Callback()
    setattr(callback, when, load)
    module, trained = fit(callbacks=[callback, ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    assert (tmp_path / "last.ckpt").exists()
    if when == "after":
        load(trained, module)
    trained.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["hift"]["engines"][0]["updates"] == STEPS


def test_a_callback_may_save_when_a_resumed_run_starts(tmp_path):
    class Saves(Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "start.ckpt")

    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    fit(epochs=2, ckpt_path=tmp_path / "stopped.ckpt", callbacks=[Saves()])
    resumed, _ = fit(epochs=2, ckpt_path=tmp_path / "start.ckpt")
    straight, _ = fit(epochs=2)
    assert_same(resumed.state_dict(), straight.state_dict())


class Tunable(SmallTransformer):
    def __init__(self):
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr=self.lr))
        self.lr = 1e-2


class SearchesLater(LearningRateFinder):
    """At the beginning of the second epoch, as Lightning's documentation has it."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


def test_after_a_search_for_the_rate_in_the_midst_of_training_blocks_take_turns_as_before(tmp_path):
    seen = BlocksSeen()
    search = SearchesLater(num_training_steps=6, early_stop_threshold=None)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=STEPS, save_top_k=-1)
    trainer_ = trainer(max_epochs=3, callbacks=[search, seen, saving], enable_checkpointing=True)
    trainer_.fit(Tunable(), loader(make_batches(STEPS)))
    assert seen.steps[-2 * STEPS :] == (TOP_DOWN * 4)[STEPS % LAYERS :][: 2 * STEPS]
    assert trainer_.strategy.hift.updates == trainer_.global_step == 3 * STEPS
    assert torch.load(tmp_path / f"step={3 * STEPS}.ckpt", weights_only=True)["global_step"] == 3 * STEPS


def test_a_search_for_the_rate_where_a_run_goes_on_is_told(tmp_path):
    path = tmp_path / "stopped.ckpt"
    _, stopped = fit()
    stopped.save_checkpoint(path)
    goes_on = trainer(max_epochs=2, callbacks=[LearningRateFinder(num_training_steps=2)])
    with pytest.raises(ParkedStateError, match=rf"saved before all of `{path}` is loaded; .*`LearningRateFinder`"):
        goes_on.fit(Tunable(), loader(make_batches(STEPS)), ckpt_path=path)
