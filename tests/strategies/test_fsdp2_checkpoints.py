"""Checkpoints of `hift_fsdp2`: both kinds hold everything, on any number of ranks, and for other strategies."""

import contextlib
import os
import pickle
import random
import re
import shutil
import signal
import stat
import time
import zlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import nn
from torch.distributed.tensor import DTensor

from hift_lightning import HiFTFSDP2Strategy, HiFTStrategy
from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.errors import ConfigurationError
from tests.comparing import assert_same
from tests.processes import RankError, run
from tests.small_transformer import LAYERS, SmallTransformer, make_batches
from tests.strategies.test_fsdp2 import MODELS, OPTIMIZERS, distance, fit, of_all_ranks, of_this_rank, whole

NOTHING = contextlib.nullcontext()
STEPS = 3  # an epoch; it ends within a cycle of four blocks


class WithDropout(SmallTransformer):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=12))
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2


MODELS["dropout"] = WithDropout

PARTS = {
    "double": ({}, {"dtype": torch.float64, "model": "loose"}),
    "dropout": ({"offload_params": True}, {"model": "dropout"}),
    "masters": (
        {"master_weights": True, "mp_policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}},
        {"model": "small", "precision": "bf16-true"},
    ),
}


def _part(folder, name, first, last, kinds, resume=None, strategy=None):
    """Train the epochs from `first` to `last` (on one process at the batch of both ranks), and save."""
    settings, arguments = PARTS[name]
    settings = dict(settings)
    batches = make_batches(2 * STEPS)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if strategy == "hift":
        settings = {key: value for key, value in settings.items() if key == "master_weights"}
        make = HiFTStrategy
    else:
        make = HiFTFSDP2Strategy
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(100 * first + rank)
    random.seed(100 * first + rank)
    module, trainer_ = fit(
        make(**settings),
        of_this_rank(batches) if ranks == 2 else of_all_ranks(batches, 2),
        devices=ranks,
        max_epochs=last,
        ckpt_path=resume and folder / resume,
        **arguments,
    )
    for kind in kinds:
        if strategy != "hift":
            trainer_.strategy._save_distributed_checkpoint = kind == "folder"
        trainer_.save_checkpoint(folder / f"{name}-{ranks}-{strategy or 'fsdp2'}-{last}.{kind}")
    return whole(module), module.losses, trainer_.strategy.hift.updates


def _save_first(folder):
    return {
        name: (
            _part(folder, name, 0, 3, ()),
            _part(folder, name, 0, 1, ("folder", "file")),
            [_part(folder, name, 1, 3, (), f"{name}-2-fsdp2-1.{kind}") for kind in ("folder", "file")],
        )
        for name in PARTS
    }


def _go_on(folder, resumes):
    return [_part(folder, name, first, last, kinds, resume) for name, first, last, kinds, resume in resumes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run(_save_first, 2, folder)


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("name", PARTS)
def test_a_resumed_run_equals_one_that_never_stopped(two_ranks, name, kind):
    for straight, _, resumed in (of_rank[name] for of_rank in two_ranks):
        weights, losses, updates = resumed[["folder", "file"].index(kind)]
        assert losses == straight[1][STEPS:]
        assert updates == straight[2] == 3 * STEPS
        assert_same(weights, straight[0])


def test_another_number_of_ranks_goes_on(folder, two_ranks):
    for kind, other in (("folder", "file"), ("file", "folder")):
        run(_go_on, 1, folder, [("double", 1, 2, (other,), f"double-2-fsdp2-1.{kind}")])
        [(weights, _, updates)] = run(_go_on, 2, folder, [("double", 2, 3, (), f"double-1-fsdp2-2.{other}")])[0]
        straight = two_ranks[0]["double"][0]
        assert distance(weights, straight[0]) < 1e-10
        assert updates == 3 * STEPS


def test_a_file_goes_on_on_one_device_and_comes_back(folder, two_ranks):
    _part(folder, "double", 1, 2, ("file",), "double-2-fsdp2-1.file", "hift")
    [(weights, _, updates)] = run(_go_on, 2, folder, [("double", 2, 3, (), "double-1-hift-2.file")])[0]
    assert distance(weights, two_ranks[0]["double"][0][0]) < 1e-10
    assert updates == 3 * STEPS


def test_only_its_owner_may_look_into_a_folder(folder, two_ranks):
    saved = [path.parent for path in folder.rglob("meta.pt")]
    assert saved
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved} == {0o700}


def test_a_folder_is_refused_on_one_device(folder, two_ranks):
    with pytest.raises(ConfigurationError, match=r"a sharded run.*with `save_distributed_checkpoint=False`"):
        _part(folder, "double", 1, 2, (), "double-2-fsdp2-1.folder", "hift")


def test_a_file_is_what_one_device_would_have_saved(folder, two_ranks):
    names = ("double-2-fsdp2-1.file", "one.ckpt")
    settings, arguments = PARTS["double"]
    _, trainer_ = fit(HiFTStrategy(**settings), of_all_ranks(make_batches(2 * STEPS), 2), max_epochs=1, **arguments)
    trainer_.save_checkpoint(folder / names[1])
    sharded, single = (torch.load(folder / name, weights_only=True) for name in names)
    assert sharded.keys() == single.keys()
    assert distance(sharded["state_dict"], single["state_dict"]) < 1e-10
    [left], [right] = sharded["optimizer_states"], single["optimizer_states"]
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for state, other in zip(left["state"].values(), right["state"].values(), strict=True):
        assert state.keys() == other.keys()
        assert distance(state, other) < 1e-10
    for key in ("epoch", "global_step", "loops", "lr_schedulers"):
        assert_same(sharded[key], single[key])


def test_a_file_goes_on_under_a_plain_trainer(folder, two_ranks):
    _, arguments = PARTS["double"]
    module, trainer_ = fit(
        "auto",
        of_all_ranks(make_batches(2 * STEPS), 2),
        max_epochs=2,
        ckpt_path=folder / "double-2-fsdp2-1.file",
        **arguments,
    )
    assert trainer_.global_step == 2 * STEPS
    saved = torch.load(folder / "double-2-fsdp2-1.file", weights_only=True)
    updated = saved["optimizer_states"][0]["state"].keys()
    steps = [state["step"].item() for _, state in sorted(trainer_.optimizers[0].state_dict()["state"].items())]
    assert steps == [STEPS + 1 if i in updated else STEPS for i in range(len(steps))]


def test_masters_are_saved_whole(folder, two_ranks):
    saved = torch.load(folder / "masters-2-fsdp2-1.file", weights_only=True)
    masters = saved["hift"]["engines"][0]["masters"]
    assert masters.keys() == saved["state_dict"].keys()
    for name, weight in saved["state_dict"].items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(masters[name].bfloat16(), weight)
    assert any((masters[name] != weight.float()).any() for name, weight in saved["state_dict"].items())


def _turns_after_a_plain_run(folder):
    batches = make_batches(LAYERS)
    _, plain = fit("auto", batches, max_epochs=1)
    plain.save_checkpoint(folder / "plain.ckpt")
    turns = []
    for name, then in (("plain.ckpt", "once.ckpt"), ("once.ckpt", "again.ckpt")):
        strategy = HiFTFSDP2Strategy(steps_per_block="once", lr_update="step")
        _, resumed = fit(strategy, batches, devices=1, max_epochs=3, ckpt_path=folder / name)
        resumed.save_checkpoint(folder / then)
        turns.append(strategy.hift.rotation.steps_per_block)
    return turns, {block.visits for block in strategy.report().blocks}


def test_once_divides_the_steps_that_a_checkpoint_made_without_hift_leaves(tmp_path):
    assert run(_turns_after_a_plain_run, 1, tmp_path) == [([2, 2], {2})]


# --- what is not loaded ---------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return print, ("code of a checkpoint has run",)


def _refused(folder, names):
    told = []
    for name in names:
        with pytest.raises(ConfigurationError) as caught:
            _part(folder, "double", 1, 2, (), name)
        told.append(str(caught.value))
    return told


def test_folders_that_run_code_or_are_not_whole_are_refused(folder, two_ranks):
    whole_one = folder / "double-2-fsdp2-1.folder"
    for name in ("code", "no-index", "cut", "no-meta"):
        shutil.copytree(whole_one, folder / name)
    (folder / "code" / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    (folder / "no-index" / ".metadata").unlink()
    for file in (folder / "cut").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (folder / "no-meta" / "meta.pt").unlink()
    told = run(_refused, 1, folder, ["code", "no-index", "cut", "no-meta"])[0]
    for sentence, pattern in zip(
        told,
        (
            "`.*code` is not whole.*`builtins.print` does not belong into the index",
            "`.*no-index` is not whole.*No such file",
            "`.*cut` is not whole: `__0_0.distcp` cannot be read .it ends at byte",
            "`.*no-meta` is no checkpoint: it has no `meta.pt`",
        ),
        strict=True,
    ):
        assert re.search(pattern, sentence), sentence


# --- runs that fail -------------------------------------------------------------------------------------------------


class Fails(SmallTransformer):
    how = ""

    def training_step(self, batch, batch_idx):
        if batch_idx == 4 and (dist.get_rank() == 1 or self.how == "together"):
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("in a batch")
        return super().training_step(batch, batch_idx)


class Killed(Fails):
    how = "killed"


class Together(Fails):
    how = "together"


MODELS |= {"fails": Fails, "killed": Killed, "together": Together}


def _fail(folder, model, every=2):
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_exception=True)
    fit(
        HiFTFSDP2Strategy(timeout=timedelta(seconds=20)),
        of_this_rank(make_batches(12)),
        model,
        devices=2,
        callbacks=[checkpoints],
        enable_checkpointing=True,
    )


def _resume_failed(folder):
    _, trainer_ = fit(
        HiFTFSDP2Strategy(), make_batches(6), devices=1, ckpt_path=folder / "step=4.ckpt", accelerator="cpu"
    )
    return trainer_.global_step


@pytest.mark.parametrize(("model", "told"), [("killed", "rank 1 died"), ("fails", "rank 1 raised(?s:.*)in a batch")])
def test_a_rank_that_fails_alone_ends_the_job_and_the_last_checkpoint_is_good(tmp_path, model, told):
    started = time.monotonic()
    with pytest.raises(RankError, match=told):
        run(_fail, 2, tmp_path, model)
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    assert run(_resume_failed, 1, tmp_path) == [6]


def test_ranks_that_fail_together_save_where_they_are(tmp_path):
    with pytest.raises(RankError, match="in a batch"):
        run(_fail, 2, tmp_path, "together", 3)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=4.ckpt"]
    assert run(_resume_failed, 1, tmp_path) == [6]


class Breaks(torch.optim.SGD):
    """Raises when it has updated one parameter, once it is armed."""

    armed = False

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(p.grad, alpha=0.1)
            if self.armed:
                raise ValueError("broken")


class InUpdate(SmallTransformer):
    def on_before_backward(self, loss):
        self.optimizers().optimizer.armed = self.trainer.global_step == 3


MODELS["in update"] = InUpdate
OPTIMIZERS["breaks"] = lambda parameters: Breaks(parameters, lr=0.1)


def _break(folder):
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_exception=True)
    with (
        pytest.raises(ValueError, match="broken") as caught,
        pytest.warns(UserWarning, match="No checkpoint is saved .*was being updated")
        if dist.get_rank() == 0
        else NOTHING,
    ):
        fit(
            HiFTFSDP2Strategy(),
            of_this_rank(make_batches(12)),
            "in update",
            "breaks",
            devices=2,
            callbacks=[checkpoints],
            enable_checkpointing=True,
        )
    return caught.value.__notes__


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="before 3.11 it is a warning")
def test_weights_that_are_updated_in_part_are_told_of_and_not_saved(tmp_path):
    for notes in run(_break, 2, tmp_path):
        assert any("the weights of embedding.weight have changed" in note for note in notes), notes
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]


class Fails(StreamingCheckpointIO):
    def save_checkpoint(self, *arguments, **more):
        time.sleep(0.3)
        raise OSError("disk full")


def _save_beside(folder):
    strategy = HiFTFSDP2Strategy(save_distributed_checkpoint=False)
    arguments = {"enable_checkpointing": True, "plugins": [AsyncCheckpointIO(Fails())], "devices": 1, "max_steps": 1}
    with pytest.raises(OSError, match="disk full"):
        fit(strategy, make_batches(1), callbacks=[ModelCheckpoint(folder)], **arguments)
    return True


def test_an_error_of_the_last_checkpoint_that_is_written_beside_training_is_raised(tmp_path):
    assert run(_save_beside, 1, tmp_path) == [True]


def _save_over(folder):
    """Save as a folder and as a file in turn under one name, with what a killed process leaves, and after an error."""
    path = folder / "last.ckpt"
    strategy = HiFTFSDP2Strategy(save_distributed_checkpoint=True)
    _, trainer_ = fit(strategy, make_batches(1), devices=1, max_steps=1)
    trainer_.save_checkpoint(path)
    left = path.with_name(f".hift-saving-{zlib.crc32(path.name.encode()):08x}-former")
    left.mkdir()
    (left / "shard").write_bytes(b"")
    trainer_.save_checkpoint(path)
    seen = [(path / "meta.pt").is_file(), left.exists()]
    strategy._save_distributed_checkpoint = False
    good, strategy.checkpoint_io = strategy.checkpoint_io, Fails()
    with pytest.raises(OSError, match="disk full"):
        trainer_.save_checkpoint(path)
    strategy.checkpoint_io = good
    seen.append((path / "meta.pt").is_file())
    trainer_.save_checkpoint(path)
    seen.append(path.is_file())
    strategy._save_distributed_checkpoint = True
    trainer_.save_checkpoint(folder / "step-1.ckpt")
    for _ in range(2):
        path.unlink() if path.is_file() else shutil.rmtree(path)
        path.symlink_to("step-1.ckpt")
        trainer_.save_checkpoint(path)
        seen.append(not path.is_symlink() and (path / "meta.pt").is_file())
    return [*seen, sorted(each.name for each in folder.iterdir())]


def test_a_checkpoint_takes_the_place_of_one_of_the_other_kind_and_of_a_link(tmp_path):
    assert run(_save_over, 1, tmp_path) == [[True, False, True, True, True, True, ["last.ckpt", "step-1.ckpt"]]]


class TakesWeights(Callback):
    """Takes what training goes on from, and ends it."""

    def on_train_start(self, trainer, pl_module):
        masters = trainer.strategy.settings.master_weights
        weights = trainer.strategy.master_state_dict() if masters else pl_module.state_dict()
        self.weights = {n: v.full_tensor() if isinstance(v, DTensor) else v.clone() for n, v in weights.items()}
        trainer.should_stop = True


def _go_on_in_another_precision(folder, kind):
    precisions = {"fp32": ("32-true", {}), "masters": ("bf16-true", {"master_weights": True})}
    batches, found = of_this_rank(make_batches(2 * LAYERS)), {}
    for before, after in (("fp32", "masters"), ("masters", "fp32")):
        precision, settings = precisions[before]
        strategy = HiFTFSDP2Strategy(save_distributed_checkpoint=kind == "folder", **settings)
        module, trainer_ = fit(strategy, batches, devices=2, precision=precision)
        saved = strategy.master_state_dict() if settings else module.state_dict()
        saved = {n: v.full_tensor() if isinstance(v, DTensor) else v.clone() for n, v in saved.items()}
        path = folder / f"{before}.ckpt"
        trainer_.save_checkpoint(path)
        precision, settings = precisions[after]
        takes = TakesWeights()
        fit(
            HiFTFSDP2Strategy(**settings), batches, devices=2, precision=precision, max_epochs=2,
            callbacks=[takes], ckpt_path=path,
        )  # fmt: skip
        found[before] = saved, takes.weights
    return found


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_saved_in_32_bits_comes_back_in_32_bits_in_another_precision(tmp_path, kind):
    first, second = run(_go_on_in_another_precision, 2, tmp_path, kind)
    for saved, loaded in first.values():
        assert {value.dtype for value in loaded.values()} == {torch.float32}
        assert_same(loaded, saved)
    # masters are whole on the first rank alone
    assert [len(weights) for found in second.values() for weights in found] == [
        len(first["fp32"][0]),
        0,
        0,
        len(first["fp32"][0]),
    ]


def _go_on_from_averages(folder):
    batches = of_this_rank(make_batches(2 * LAYERS))
    strategy = HiFTFSDP2Strategy(master_weights=True)
    module, _ = fit(
        strategy, batches, devices=2, precision="bf16-true", max_epochs=2, ckpt_path=folder / "averages.ckpt"
    )
    return strategy.hift.updates, len(module.losses)


def test_a_run_goes_on_from_a_checkpoint_of_averaged_weights(tmp_path):
    averaging = WeightAveraging(avg_fn=lambda averaged, new, count: (averaged + new) / 2)
    _, trainer_ = fit(HiFTStrategy(), make_batches(LAYERS), callbacks=[averaging])
    trainer_.save_checkpoint(tmp_path / "averages.ckpt")
    assert "current_model_state" in torch.load(tmp_path / "averages.ckpt", weights_only=True)
    assert run(_go_on_from_averages, 2, tmp_path) == [(2 * LAYERS, LAYERS)] * 2
