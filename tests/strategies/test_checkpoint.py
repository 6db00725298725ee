"""Checkpoints are complete, safe to load, and go both ways between HiFT and a plain Trainer."""

import gc
import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._pytree import tree_leaves

from hift_lightning import HiFT, HiFTManualMixin, HiFTSettings, HiFTStrategy
from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.errors import ConfigurationError, ParkedStateError
from tests import simulated_accelerator as sim
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

STEPS = LAYERS + 1  # an epoch ends in the middle of a cycle


def make_module(optimizer="AdamW"):
    return SmallTransformer(
        OPTIMIZERS[optimizer], lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=2 * STEPS)
    )


def fit(strategy="hift", epochs=1, ckpt_path=None, optimizer="AdamW", **arguments):
    module = make_module(optimizer)
    trainer_ = trainer(strategy, max_epochs=epochs, **arguments)
    trainer_.fit(module, loader(make_batches(STEPS)), ckpt_path=ckpt_path)
    return module, trainer_


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lr_update", ["cycle", "cycle_once", "step"])
def test_a_run_resumed_in_the_middle_of_a_cycle_equals_one_that_never_stopped(optimizer, lr_update, tmp_path):
    path = tmp_path / "stopped.ckpt"
    _, stopped = fit(HiFTStrategy(lr_update=lr_update, order="random"), optimizer=optimizer)
    stopped.save_checkpoint(path)
    resumed, resumed_trainer = fit(
        HiFTStrategy(lr_update=lr_update, order="random"), epochs=2, ckpt_path=path, optimizer=optimizer
    )
    straight, straight_trainer = fit(HiFTStrategy(lr_update=lr_update, order="random"), epochs=2, optimizer=optimizer)
    assert resumed.losses == straight.losses[STEPS:]
    assert resumed.rates == straight.rates[STEPS:]
    assert_same(resumed.state_dict(), straight.state_dict())
    assert_same(resumed_trainer.optimizers[0].state_dict(), straight_trainer.optimizers[0].state_dict())
    assert resumed_trainer.strategy.hift.updates == 2 * STEPS


def test_a_checkpoint_saved_after_fit_holds_everything_and_loads_with_weights_only(tmp_path):
    module, trainer_ = fit()
    trainer_.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert_same(saved["state_dict"], dict(module.state_dict()))
    assert len(saved["optimizer_states"][0]["state"]) == len(list(module.parameters()))
    assert saved["hift"]["engines"][0]["updates"] == STEPS
    assert saved["hift"]["engines"][0]["held_lr_steps"] == [1]


def test_a_hift_checkpoint_goes_on_in_a_plain_trainer(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "hift.ckpt")
    module, trainer_ = fit("auto", epochs=2, ckpt_path=tmp_path / "hift.ckpt")
    assert len(module.losses) == STEPS
    steps = {int(state["step"]) for state in trainer_.optimizers[0].state.values()}
    assert steps == {STEPS + 1, STEPS + 2}  # the head's block had two turns, the others one


def test_a_plain_checkpoint_goes_on_under_hift_with_its_state(tmp_path):
    _, stopped = fit("auto")
    stopped.save_checkpoint(tmp_path / "plain.ckpt")
    seen = BlocksSeen()
    _, trainer_ = fit(epochs=2, ckpt_path=tmp_path / "plain.ckpt", callbacks=[seen])
    assert seen.steps == [*TOP_DOWN, TOP_DOWN[0]]
    steps = {int(state["step"]) for state in trainer_.optimizers[0].state.values()}
    assert steps == {STEPS + 1, STEPS + 2}


def test_resuming_with_another_plan_is_refused_and_shows_both(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    changes = {
        "group_size": (2, "4 blocks of group_size=1 .* 2 blocks of group_size=2"),
        "order": ("bottom2up", "turns `head`, `layers.1`, `layers.0`, … .* the turns `embeddings`, `layers.0`"),
        "steps_per_block": (3, "steps_per_block=1 .* steps_per_block=3"),
        "layers": (["embedding.*", "layers.*", "*"], "4 blocks .* 3 blocks"),
        "frozen": (["head.*"], r"\(only the checkpoint trains `head.bias`, `head.weight`\)"),
    }
    for setting, (value, shown) in changes.items():
        module = make_module()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        trainer_ = trainer(HiFTStrategy(**{setting: value}), max_epochs=2)
        with pytest.raises(ConfigurationError, match=f"{shown}.*resume_plan=rebuild") as failure:
            trainer_.fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "stopped.ckpt")
        assert "\n" not in str(failure.value)
        assert before.keys() == dict(module.named_parameters()).keys()
        assert not trainer_.optimizers[0].state
        assert trainer_.strategy.hift.updates == 0


def test_a_plan_is_not_rebuilt_by_a_word_that_is_none():
    with pytest.raises(ConfigurationError, match="`resume_plan='same_ish'` .* choose one of same, rebuild"):
        HiFTStrategy(resume_plan="same_ish")


@pytest.mark.parametrize(
    "changed",
    [
        {"group_size": 2},
        {"order": "bottom2up"},
        {"steps_per_block": 2},
        {"frozen": ["head.*"]},
        {"layers": ["layers.*", "*"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_rebuilt_plan_takes_everything_but_the_place_in_the_rotation(changed, tmp_path, caplog):
    saved_module, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            engine = trainer.strategy.hift
            assert engine.updates == 0
            assert engine.block == engine.plan.blocks[engine.rotation.turns[0]]
            assert_same(dict(pl_module.state_dict()), dict(saved_module.state_dict()))
            assert_same(trainer.optimizers[0].state_dict(), stopped.optimizers[0].state_dict())
            assert trainer.global_step == STEPS

    seen = BlocksSeen()
    strategy = HiFTStrategy(resume_plan="rebuild", **changed)
    _, trainer_ = fit(strategy, epochs=2, ckpt_path=tmp_path / "stopped.ckpt", callbacks=[seen, Look()])
    assert strategy.hift.updates == STEPS
    assert len(seen.steps) == STEPS
    told = [record.message for record in caplog.records if "resume_plan=rebuild" in record.message]
    assert told == [
        f"HiFT: the checkpoint was made with another plan, after {STEPS} updates; with `resume_plan=rebuild` its "
        "weights, masters and optimizer state carry over, and the rotation begins with block "
        f"`{strategy.hift.plan.blocks[strategy.hift.rotation.turns[0]].name}`."
    ]


@pytest.mark.parametrize(("turn", "missed"), [(2, 1), ("once", 0), (1, 0)])
def test_blocks_that_the_steps_left_do_not_reach_are_told_of(turn, missed, tmp_path, recwarn):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    recwarn.clear()
    strategy = HiFTStrategy(resume_plan="rebuild", order="bottom2up", steps_per_block=turn, lr_update="step")
    fit(strategy, epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    told = [str(each.message) for each in recwarn if "will not be trained" in str(each.message)]
    cycle = 2 * LAYERS
    assert told == [
        f"HiFT: {STEPS} optimizer steps are left and one cycle takes {cycle}, so {missed} of the {LAYERS} blocks will "
        "not be trained; train for longer, or use a larger `group_size` or a smaller `steps_per_block`."
    ] * bool(missed)


def test_held_scheduler_steps_are_passed_on_at_the_end_of_the_rebuilt_cycle(tmp_path):
    stopped_module, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    assert stopped.strategy.lr_scheduler_configs[0].scheduler.held_steps == 1
    rebuilt, _ = fit(HiFTStrategy(resume_plan="rebuild", group_size=2), epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    straight = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(straight, 1.0, 0.1, total_iters=2 * STEPS)
    shares = []
    for _ in range(2 * STEPS):
        shares.append(straight.param_groups[0]["lr"])
        straight.step()
        schedule.step()
    lr = stopped_module.rates[0]
    # four steps passed on and one held; after the new cycle of two steps, the held one and these two
    expected = [shares[4], shares[4], shares[7], shares[7], shares[9]]
    assert rebuilt.rates == pytest.approx([lr * share for share in expected])


def test_an_unchanged_plan_goes_on_as_it_was_with_rebuild_too(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, resumed_trainer = fit(HiFTStrategy(resume_plan="rebuild"), epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    straight, _ = fit(epochs=2)
    assert resumed.losses == straight.losses[STEPS:]
    assert resumed_trainer.strategy.hift.updates == 2 * STEPS


def test_masters_carry_over_to_a_rebuilt_plan(tmp_path):
    arguments = {"precision": "bf16-true"}
    _, stopped = fit(HiFTStrategy(master_weights=True), **arguments)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    masters = stopped.strategy.hift.state_dict()["masters"]

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            assert_same(trainer.strategy.hift.state_dict()["masters"], masters)

    strategy = HiFTStrategy(master_weights=True, resume_plan="rebuild", group_size=2)
    fit(strategy, epochs=2, ckpt_path=tmp_path / "stopped.ckpt", callbacks=[Look()], **arguments)
    assert strategy.hift.updates == STEPS


# --- a checkpoint of something else -----------------------------------------------------------------------------------


class WiderTransformer(SmallTransformer):
    """Another number of classes, one layer more, and no final norm."""

    def __init__(self):
        super().__init__(depth=3)
        self.head = torch.nn.Linear(16, 7)
        self.norm = torch.nn.Identity()


@pytest.mark.parametrize("made_by", ["hift", "auto"])
def test_a_checkpoint_of_another_model_is_refused_before_a_weight_is_touched(made_by, tmp_path):
    _, stopped = fit(made_by)
    stopped.save_checkpoint(tmp_path / "other.ckpt")
    module = WiderTransformer()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(ConfigurationError) as failure:
        trainer(max_epochs=2).fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "other.ckpt")
    assert str(failure.value) == (
        "The checkpoint's weights do not fit `WiderTransformer`: it has `norm.bias`, `norm.weight` and it lacks "
        "`layers.2.linear1.bias`, `layers.2.linear1.weight`, `layers.2.linear2.bias` and 9 more; "
        "`head.weight` is (3, 16) in it and (7, 16) in the model, `head.bias` is (3,) in it and (7,) in the model; "
        "take the model that it was made with."
    )
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_module_that_takes_other_names_in_its_own_way_is_let(tmp_path):
    class Renaming(SmallTransformer):
        def __init__(self):
            super().__init__(OPTIMIZERS["AdamW"])
            self.register_load_state_dict_pre_hook(self.rename)

        @staticmethod
        def rename(module, state_dict, *args):
            if "old.weight" in state_dict:
                state_dict["head.weight"] = state_dict.pop("old.weight")

    stopped_module, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    checkpoint["state_dict"]["old.weight"] = checkpoint["state_dict"].pop("head.weight")
    torch.save(checkpoint, tmp_path / "old.ckpt")
    module = Renaming()
    trainer(max_steps=STEPS).fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "old.ckpt")
    assert_same(dict(module.state_dict()), dict(stopped_module.state_dict()))


def test_a_module_that_is_not_strict_takes_what_fits(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    del checkpoint["state_dict"]["head.bias"]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    module = make_module()
    module.strict_loading = False
    trainer(max_steps=STEPS).fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "less.ckpt")
    with pytest.raises(ConfigurationError, match="it lacks `head.bias`"):
        fit(ckpt_path=tmp_path / "less.ckpt")


@pytest.mark.parametrize("made_by", ["hift", "auto"])
@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        ("SGD with momentum", "not one of `SGD`: it has `amsgrad`, `betas`, .* and lacks `dampening`, `momentum`"),
        ("Adagrad", "not one of `Adagrad`: it has .* and lacks"),
        ("Adafactor", "not one of `Adafactor`: it has .* and lacks"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused_before_it_is_touched(made_by, optimizer, named, tmp_path):
    _, stopped = fit(made_by)
    stopped.save_checkpoint(tmp_path / "other.ckpt")
    strategy = HiFTStrategy()
    with pytest.raises(ConfigurationError, match=named):
        fit(strategy, epochs=2, ckpt_path=tmp_path / "other.ckpt", optimizer=optimizer)
    fresh = OPTIMIZERS[optimizer](make_module().parameters())
    assert strategy.optimizers[0].param_groups[0].keys() - {"initial_lr"} == fresh.param_groups[0].keys()
    assert strategy.hift.updates == 0
    moments = [s for state in strategy.optimizers[0].state.values() for s in state.values() if s.dim() > 0]
    assert not any(moment.any() for moment in moments)


@pytest.mark.parametrize("made_by", ["hift", "auto"])
def test_a_checkpoint_with_other_param_groups_is_refused(made_by, tmp_path):
    _, stopped = fit(made_by)
    stopped.save_checkpoint(tmp_path / "one.ckpt")

    def two_groups(parameters):
        parameters = list(parameters)
        return torch.optim.AdamW([{"params": parameters[::2]}, {"params": parameters[1::2]}])

    module = SmallTransformer(two_groups, make_module().make_scheduler)
    named = {
        "hift": "the same parameters in another order or other param groups",
        "auto": "groups of 29 .* of 15 and 14",
    }
    with pytest.raises(ConfigurationError, match=named[made_by]):
        trainer(max_epochs=2).fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "one.ckpt")


def test_a_checkpoint_whose_optimizer_had_fewer_parameters_names_them(tmp_path):
    def without_head(module):
        return torch.optim.AdamW([p for name, p in module.named_parameters() if not name.startswith("head")])

    class WithoutHead(SmallTransformer):
        def configure_optimizers(self):
            return without_head(self)

    stopped = trainer()
    with pytest.warns(UserWarning, match="are in no param group"):
        stopped.fit(WithoutHead(), loader(make_batches(STEPS)))
    stopped.save_checkpoint(tmp_path / "fewer.ckpt")
    with pytest.raises(ConfigurationError, match="it lacks `head.bias`, `head.weight`; resume"):
        trainer(max_epochs=2).fit(SmallTransformer(), loader(make_batches(STEPS)), ckpt_path=tmp_path / "fewer.ckpt")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_like_optimizer_with_other_hyperparameters_is_no_other_optimizer(optimizer, tmp_path):
    """Another schedule too, and hyperparameters that only another version of torch knows."""
    _, stopped = fit(optimizer=optimizer)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    torch.save(checkpoint, tmp_path / "older.ckpt")
    module = SmallTransformer(OPTIMIZERS[optimizer])
    trainer(max_epochs=2).fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "older.ckpt")
    assert len(module.losses) == STEPS


def test_another_number_of_optimizers_is_told(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    checkpoint["optimizer_states"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(ConfigurationError, match="was made with 2 optimizers and this run has 1"):
        fit(epochs=2, ckpt_path=tmp_path / "two.ckpt")


class BeginsWithANewOptimizer(SmallTransformer):
    def on_load_checkpoint(self, checkpoint):
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []


@pytest.mark.parametrize("made_by", ["auto", "hift"])
def test_a_module_may_begin_with_a_new_optimizer_and_schedule(made_by, tmp_path):
    _, stopped = fit(made_by)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    module = BeginsWithANewOptimizer(
        OPTIMIZERS["SGD with momentum"], lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)
    )
    seen = BlocksSeen()
    resumed = trainer(max_epochs=2, callbacks=[seen])
    resumed.fit(module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "stopped.ckpt")
    in_first_cycle = -STEPS % LAYERS if made_by == "hift" else LAYERS
    assert seen.steps == (TOP_DOWN * 3)[LAYERS - in_first_cycle :][:STEPS]
    assert resumed.global_step == 2 * STEPS
    # the step that the checkpoint's schedule held is not one of this schedule
    second_rate = 1e-1 * 0.5**in_first_cycle
    assert module.rates == pytest.approx([1e-1] * in_first_cycle + [second_rate] * (STEPS - in_first_cycle))


def test_a_file_of_torch_save_that_is_no_checkpoint_of_a_trainer_is_told(tmp_path):
    torch.save(make_module().state_dict(), tmp_path / "weights.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for name in ("weights.pt", "tensor.pt"):
        with pytest.raises(ConfigurationError, match=f"{name}` is no checkpoint of a Trainer: it has no `state_dict`"):
            fit(ckpt_path=tmp_path / name)


# --- which CheckpointIO, and what it is asked for ---------------------------------------------------------------------


class Noted(TorchCheckpointIO):
    def __init__(self):
        self.asked = []

    def load_checkpoint(self, path, *args, **kwargs):
        self.asked.append(kwargs)
        return super().load_checkpoint(path, *args, **kwargs)


@pytest.mark.parametrize("given", ["to the strategy", "to the Trainer"])
def test_a_users_own_checkpoint_io_stays_and_is_asked_for_weights_only(given, tmp_path):
    mine = Noted()

    def arguments():
        if given == "to the strategy":
            return {"strategy": HiFTStrategy(checkpoint_io=mine)}
        return {"strategy": HiFTStrategy(), "plugins": [mine]}

    _, stopped = fit(**arguments())
    assert stopped.strategy.checkpoint_io is mine
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    fit(epochs=2, ckpt_path=tmp_path / "stopped.ckpt", **arguments())
    assert mine.asked == [{"weights_only": True}]


def test_ours_is_the_default_also_by_name_and_inside_one_that_saves_in_the_background(tmp_path):
    assert isinstance(trainer(HiFTStrategy()).strategy.checkpoint_io, StreamingCheckpointIO)
    assert isinstance(trainer("hift").strategy.checkpoint_io, StreamingCheckpointIO)
    _, stopped = fit(plugins=[AsyncCheckpointIO()])
    assert isinstance(stopped.strategy.checkpoint_io.checkpoint_io, StreamingCheckpointIO)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    stopped.strategy.checkpoint_io.teardown()
    resumed, _ = fit(epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    straight, _ = fit(epochs=2)
    assert resumed.losses == straight.losses[STEPS:]


class MakesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_a_malicious_checkpoint_runs_no_code(call, tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "good.ckpt")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = MakesAFile(str(tmp_path / "ran"))
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigurationError, match="could run code"):
        getattr(trainer(max_epochs=2), call)(
            make_module(), loader(make_batches(STEPS)), ckpt_path=tmp_path / "bad.ckpt"
        )
    assert not (tmp_path / "ran").exists()


def test_who_trusts_a_checkpoint_may_say_so(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "good.ckpt")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    checkpoint["mine"] = MakesAFile(str(tmp_path / "ran"))
    torch.save(checkpoint, tmp_path / "objects.ckpt")
    module = make_module()
    trainer(max_epochs=2).fit(
        module, loader(make_batches(STEPS)), ckpt_path=tmp_path / "objects.ckpt", weights_only=False
    )
    assert len(module.losses) == STEPS
    assert (tmp_path / "ran").exists()


def test_a_full_disk_while_saving_stops_the_run_and_the_former_checkpoint_goes_on_exactly(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillsDisk(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == STEPS - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, filename="{step}", save_on_exception=True)
    try:
        with pytest.raises(ConfigurationError, match=r"`.*ckpt` could not be saved \(EFBIG: File too large\)"):
            fit(callbacks=[FillsDisk(), keep], enable_checkpointing=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (former,) = tmp_path.iterdir()
    assert torch.load(former, weights_only=True)["global_step"] == STEPS - 1
    resumed, straight = make_module(), make_module()
    batches = make_batches(STEPS)
    # Lightning takes the rest of an epoch from the loader's beginning
    trainer().fit(resumed, loader(batches[STEPS - 1 :] + batches[: STEPS - 1]), ckpt_path=former)
    trainer().fit(straight, loader(batches))
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


# --- what stays of it, and where it goes ------------------------------------------------------------------------------


class Maps(Callback):
    """Whether a file is mapped into this process when training begins."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, pl_module):
        self.mapped = str(self.path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("offload", ["cpu", "none", "files"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad", "Adafactor"])
def test_the_checkpoint_is_not_mapped_any_more_when_training_begins(offload, optimizer, tmp_path):
    def strategy():
        return HiFTStrategy(offload=tmp_path if offload == "files" else offload, master_weights=True)

    arguments = {"optimizer": optimizer, "precision": "bf16-true", "enable_checkpointing": True}
    keep = ModelCheckpoint(tmp_path, monitor="loss", every_n_train_steps=2)
    _, stopped = fit(strategy(), callbacks=[keep, LogsLoss()], **arguments)
    path = tmp_path / "stopped.ckpt"
    stopped.save_checkpoint(path)
    maps = Maps(path)
    keep = ModelCheckpoint(tmp_path, monitor="loss", every_n_train_steps=2)
    fit(strategy(), epochs=2, ckpt_path=path, callbacks=[maps, keep, LogsLoss()], **arguments)
    assert not maps.mapped
    assert torch.is_tensor(keep.best_model_score)


class LogsLoss(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("loss", outputs["loss"])


def test_what_a_plain_loop_loads_is_copied():
    model = SmallTransformer().bfloat16()
    hift = HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(master_weights=True))
    with hift:
        for batch in make_batches(LAYERS):
            model.loss(batch).backward()
            hift.optimizer.step()
    position, state = hift.state_dict(), hift.optimizer.state_dict()
    other = SmallTransformer().bfloat16()
    loaded = HiFT(other, torch.optim.AdamW(other.parameters()), HiFTSettings(master_weights=True))
    loaded.load_optimizer_state_dict(state)
    loaded.load_state_dict(position)
    given = {leaf.data_ptr() for leaf in tree_leaves([position, state]) if torch.is_tensor(leaf)}
    kept = {
        leaf.data_ptr()
        for leaf in tree_leaves([loaded.state_dict(), loaded.optimizer.state_dict()])
        if torch.is_tensor(leaf)
    }
    assert len(given) == len(kept) == 4 * len(list(model.parameters()))
    assert not given & kept
    assert_same(loaded.state_dict(), position)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("offload", ["cpu", "files"])
@pytest.mark.parametrize("made_by", ["hift", "auto"])
def test_loading_puts_no_parked_state_on_the_device(sim_device, masters, offload, made_by, tmp_path):
    arguments = {"precision": "bf16-true" if masters else "32-true", "accelerator": "sim", "devices": 1}
    first = HiFTStrategy(master_weights=masters) if made_by == "hift" else SingleDeviceStrategy("sim:0")
    module, stopped = fit(first, **arguments)
    path = tmp_path / "stopped.ckpt"
    stopped.save_checkpoint(path)
    weights = sim_device.bytes_of(module.parameters())
    del module, stopped, first
    gc.collect()

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            self.before = sim_device.allocated()
            sim_device.reset_peak()
            sim.reset_copy_counters()

        def on_train_start(self, trainer, pl_module):
            self.copied = sim.host_to_device_bytes()
            self.peak = sim_device.peak() - self.before

    look = Look()
    strategy = HiFTStrategy(master_weights=masters, offload=tmp_path if offload == "files" else "cpu")
    resumed, _ = fit(strategy, epochs=2, ckpt_path=path, callbacks=[look], **arguments)
    assert len(resumed.losses) == STEPS
    few = 32  # bytes, for a number or two of Lightning's own; a layer's moments have thousands
    assert weights <= look.copied <= weights + few
    assert weights <= look.peak <= weights + few


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD with momentum", "Adagrad", "Adafactor"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_resumed_run_on_a_device_equals_one_that_never_stopped(any_device, offload, optimizer, tmp_path):
    arguments = {"accelerator": any_device.type, "devices": 1, "optimizer": optimizer}
    _, stopped = fit(HiFTStrategy(offload=offload), **arguments)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, resumed_trainer = fit(
        HiFTStrategy(offload=offload), epochs=2, ckpt_path=tmp_path / "stopped.ckpt", **arguments
    )
    straight, straight_trainer = fit(HiFTStrategy(offload=offload), epochs=2, **arguments)
    assert resumed.losses == straight.losses[STEPS:]
    assert_same(resumed_trainer.optimizers[0].state_dict(), straight_trainer.optimizers[0].state_dict())


# --- both ways between HiFT and a plain Trainer -----------------------------------------------------------------------


class Scaled(SmallTransformer):
    """With a parameter without dimensions, as CLIP's temperature is."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens):
        return super().forward(tokens) * self.scale


@pytest.mark.parametrize(
    ("offload", "update"), [("none", "block"), ("cpu", "block"), ("cpu", "streamed"), ("files", "fused")]
)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD with momentum", "Adagrad", "Adafactor"])
def test_moments_of_a_parameter_without_dimensions_go_to_its_device(any_device, optimizer, offload, update, tmp_path):
    def run(epochs, ckpt_path=None):
        module = Scaled(OPTIMIZERS[optimizer])
        (tmp_path / "state").mkdir(exist_ok=True)
        strategy = HiFTStrategy(update=update, offload=tmp_path / "state" if offload == "files" else offload)
        trainer_ = trainer(strategy, max_epochs=epochs, accelerator=any_device.type, devices=1)
        trainer_.fit(module, loader(make_batches(STEPS)), ckpt_path=ckpt_path)
        return module, trainer_

    straight, _ = run(2)
    _, stopped = run(1)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = run(2, tmp_path / "stopped.ckpt")
    assert resumed.scale.item() != 2.0
    assert_same(straight.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_streamed_run_resumes_with_state_of_any_shape(optimizer, tmp_path):
    def strategy():
        return HiFTStrategy(update="streamed", offload=tmp_path)

    _, stopped = fit(strategy(), optimizer=optimizer)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = fit(strategy(), epochs=2, ckpt_path=tmp_path / "stopped.ckpt", optimizer=optimizer)
    straight, _ = fit(strategy(), epochs=2, optimizer=optimizer)
    assert resumed.losses == straight.losses[STEPS:]


PRECISIONS = {"32-true": {}, "bf16-mixed": {}, "bf16-true": {}, "64-true": {}, "masters": {"master_weights": True}}


def settings_of(kind, offload, parked_dtype, folder):
    return {
        **PRECISIONS[kind],
        "offload": folder if offload == "files" else offload,
        "parked_dtype": parked_dtype,
    }


@pytest.mark.parametrize(
    ("kind", "offload", "parked_dtype"),
    [
        *((kind, "cpu", None) for kind in PRECISIONS),
        *((kind, "cpu", "bfloat16") for kind in ("32-true", "masters")),
        *((kind, "files", None) for kind in ("32-true", "masters")),
    ],
)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD with momentum", "Adafactor"])
def test_both_directions_go_on_with_all_state(kind, offload, parked_dtype, optimizer, tmp_path):
    arguments = {"optimizer": optimizer, "precision": "bf16-true" if kind == "masters" else kind}
    settings = settings_of(kind, offload, parked_dtype, tmp_path)

    class Look(Callback):
        """The weights and state that training goes on from are those of the checkpoint."""

        def on_train_start(self, trainer, pl_module):
            saved = torch.load(self.path, weights_only=True)
            weights = saved["state_dict"]
            if not isinstance(trainer.strategy, HiFTStrategy):  # Lightning loads weights before it makes them double
                weights = {name: w.float().to(w.dtype) for name, w in weights.items()}
            assert_same(dict(pl_module.state_dict()), weights)
            state = saved["optimizer_states"][0]["state"]
            loaded = trainer.optimizers[0].state_dict()["state"]
            assert loaded.keys() == state.keys()
            for n in state:
                for key, value in state[n].items():
                    assert torch.allclose(loaded[n][key].double(), value.double(), rtol=2**-8), key

    look = Look()
    for first, second in [("auto", HiFTStrategy(**settings)), (HiFTStrategy(**settings), "auto")]:
        stopped_module, stopped = fit(first, **arguments)
        look.path = tmp_path / "stopped.ckpt"
        stopped.save_checkpoint(look.path)
        resumed, _ = fit(second, epochs=4, ckpt_path=look.path, callbacks=[look], **arguments)
        assert len(resumed.losses) == 3 * STEPS
        assert sum(resumed.losses[-STEPS:]) < sum(stopped_module.losses)


RUNS = [
    ("32-true", {}), ("bf16-true", {}), ("bf16-true", {"master_weights": True}), ("64-true", {}),
    ("32-true", {"parked_dtype": "bfloat16"}), ("bf16-true", {"parked_dtype": "float32"}),
    ("bf16-true", {"master_weights": True, "parked_dtype": "bfloat16"}),
]  # fmt: skip


@pytest.mark.parametrize("after", RUNS, ids=str)
@pytest.mark.parametrize("before", RUNS, ids=str)
def test_a_run_goes_on_in_another_precision(before, after, tmp_path):
    _, stopped = fit(HiFTStrategy(**before[1]), precision=before[0])
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    strategy = HiFTStrategy(**after[1])
    resumed, _ = fit(strategy, epochs=2, ckpt_path=tmp_path / "stopped.ckpt", precision=after[0])
    assert len(resumed.losses) == STEPS
    seen = torch.float32 if "master_weights" in after[1] else next(resumed.parameters()).dtype
    for parameter in resumed.parameters():
        assert {state.dtype for state in strategy.hift.residency.load(parameter).values() if state.dim()} == {seen}


@pytest.mark.parametrize("kind", ["32-true", "masters"])
def test_moments_parked_narrow_go_on_in_a_run_that_parks_them_as_they_are(kind, tmp_path):
    arguments = {"precision": "bf16-true" if kind == "masters" else kind}
    _, stopped = fit(HiFTStrategy(parked_dtype="bfloat16", **PRECISIONS[kind]), **arguments)
    stopped.save_checkpoint(tmp_path / "narrow.ckpt")
    _, resumed = fit(HiFTStrategy(**PRECISIONS[kind]), epochs=2, ckpt_path=tmp_path / "narrow.ckpt", **arguments)
    moments = [s["exp_avg"].dtype for s in resumed.optimizers[0].state.values()]
    assert set(moments) == {torch.float32}


@pytest.mark.parametrize(
    ("optimizer", "kind", "offload"),
    [
        *(("AdamW", kind, offload) for kind in PRECISIONS for offload in ("none", "cpu", "files")),
        *((optimizer, "32-true", "cpu") for optimizer in OPTIMIZERS),
        *((optimizer, "masters", "files") for optimizer in OPTIMIZERS),
    ],
)
def test_every_checkpoint_is_read_with_weights_only(kind, offload, optimizer, tmp_path):
    settings = settings_of(kind, offload, None, tmp_path)
    _, stopped = fit(
        HiFTStrategy(**settings), optimizer=optimizer, precision="bf16-true" if kind == "masters" else kind
    )
    stopped.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert_same(saved["optimizer_states"][0], stopped.optimizers[0].state_dict())
    assert_same(saved["hift"]["engines"][0], stopped.strategy.hift.state_dict())


def test_a_checkpoint_within_a_batch_after_its_update_is_refused_and_its_weights_alone_are_saved(tmp_path):
    class Saves(HiFTManualMixin, SmallTransformer):
        def __init__(self, weights_only):
            super().__init__()
            self.automatic_optimization, self.weights_only = False, weights_only

        def training_step(self, batch, batch_idx):
            self.hift_step(self.loss(batch))
            self.trainer.save_checkpoint(tmp_path / "within.ckpt", weights_only=self.weights_only)

    with pytest.raises(ParkedStateError, match=r"save it in `on_train_batch_end`, or with `weights_only=True`"):
        trainer("hift").fit(Saves(weights_only=False), loader(make_batches(2)))
    module = Saves(weights_only=True)
    trainer("hift").fit(module, loader(make_batches(2)))
    saved = torch.load(tmp_path / "within.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], weight) for name, weight in module.state_dict().items())
