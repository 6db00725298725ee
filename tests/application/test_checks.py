"""Values that are refused before anything is built."""

import os
import re
import shlex
from pathlib import Path

import pytest
from lightning import LightningModule

from hift_lightning.checks import (
    check_configuration,
    check_objective,
    check_that_it_is_measured,
    check_that_the_rate_is_read,
    check_that_the_shape_is_read,
)
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.classification import ClassificationModule
from hift_lightning.models.language_modeling import LanguageModelingModule
from hift_lightning.train import choose_objective, train
from tests.application.running import CONFIGURATION
from tests.application.test_configuration import composed
from tests.pages import check_application

EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data=text"], r"learns classes of sentences.*TextDataModule.*`data=film_reviews`"),
        (["model=gpt2_medium", "data=film_reviews"], r"learns texts.*SentenceDataModule.*`data=text`"),
        (["~data"], r"`data` must be given"),
        (["model.tokenizer=null"], r"model\.tokenizer=null.*model\.tokenizer\.pretrained=/path/to/folder"),
        (["evaluate=perhaps"], r"evaluate=perhaps.*`true` or `false`"),
        (["ckpt_path=/no/such.ckpt"], r"ckpt_path=/no/such\.ckpt` does not exist"),
        (["evaluate=false", "objective=val/accuracy"], r"objective=val/accuracy.*objective=train/loss"),
        (
            ["evaluate=false", "objective=train/loss", "callbacks.checkpoint.monitor=val/loss"],
            r"callbacks\.checkpoint\.monitor=val/loss` is not measured with `evaluate=false`",
        ),
        (
            ["callbacks.checkpoint.monitor=val/accuracy"],
            r"`callbacks\.checkpoint\.mode=min` takes the lowest `val/accuracy` for the best.*checkpoint\.mode=max`",
        ),
        *(
            (
                [f"callbacks.checkpoint.monitor={monitor}", "callbacks.checkpoint.mode=max"],
                rf"takes the highest `{monitor}` for the best.*give `callbacks\.checkpoint\.mode=min`",
            )
            for monitor in ("val/loss", "val/perplexity")
        ),
        (
            [f"+callbacks.stop._target_={EARLY_STOPPING}", "+callbacks.stop.monitor=val/accuracy"],
            r"callbacks\.stop\.mode=min` takes the lowest.*give `\+callbacks\.stop\.mode=max`",
        ),
        (
            ["experiment=long_turns", "strategy=full"],
            r"`strategy` names no class.*only `strategy\.steps_per_block`.*give `strategy=hift`",
        ),
        (["trainer.max_epochs=many"], r"trainer\.max_epochs=many` is not possible"),
        (["data.num_workers=-1"], r"data\.num_workers=-1` is not possible"),
        *(
            (
                [f"trainer.{length}=0", "evaluate=false", "objective=train/loss"],
                rf"trainer\.{length}=0` trains nothing.*objective=train/loss",
            )
            for length in ("max_steps", "max_epochs", "limit_train_batches")
        ),
        *(([f"~{group}"], f"`{group}` must be given") for group in ("optimizer", "strategy", "logger", "callbacks")),
        (["model=gpt2_medium", "data=jsonl"], r"`data\.path` must be given"),
        (["seed=4294967296"], r"seed=4294967296` is not possible; give a whole number from 0 to 4294967295"),
        (["data.seed=-1"], r"data\.seed=-1` is not possible"),
        (["data.num_classes=1"], r"data\.num_classes=1` is not possible; give a whole number from 2 on"),
        (["model.network.num_classes=5"], r"num_classes=5` is another number than `data\.num_classes=2`"),
        (["trainer.val_check_interval=0"], r"val_check_interval=0` is not possible.*`evaluate=false`"),
        (["trainer.gradient_clip_val=abc"], r"trainer\.gradient_clip_val=abc` is not possible"),
        (
            ["trainer.limit_val_batches=0"],
            r"val/accuracy` is not measured with `trainer\.limit_val_batches=0`",
        ),
        (
            ["trainer.limit_test_batches=0.0", "objective=test/loss"],
            r"objective=test/loss` is not measured with `trainer\.limit_test_batches=0\.0`",
        ),
        (["trainer.gradient_clip_val=-1"], r"trainer\.gradient_clip_val=-1` is not possible; give a number from 0 on"),
        (["learning_rate=inf"], r"learning_rate=inf` is not possible"),
        (["ckpt_path=5"], r"`ckpt_path=5` is not possible; give a path"),
        (["output_dir=null"], r"`output_dir=null` is not possible; give a path"),
        *(([f"~{key}"], f"`{key}` must be given; leave `~{key}` out") for key in ("learning_rate", "evaluate", "seed")),
        (["strategy.master_weights=no"], r"`strategy\.master_weights=no` is a word here.*`true` or `false`"),
        (["callbacks.monitor.pictures=off"], r"`callbacks\.monitor\.pictures=off` is a word here"),
        (["callbacks.checkpoint.save_weights_only=Yes"], r"`callbacks\.checkpoint\.save_weights_only=Yes` is a word"),
        (["strategy.master_weights=true"], r"trainer\.precision=32-true.*bf16-true"),
        (["strategy.master_weights=true", "trainer.precision=bf16-mixed"], r"trainer\.precision=bf16-mixed"),
    ],
)
def test_what_cannot_work_is_told_with_the_remedy(overrides: list[str], named: str) -> None:
    def check() -> None:
        configuration = composed(*overrides)
        check_configuration(configuration)
        check_that_it_is_measured(configuration)

    with pytest.raises(ConfigurationError, match=named):
        check()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama7b"],
        ["model=llama7b", "model.tokenizer=null"],
        ["experiment=llama7b_cpu"],
        ["evaluate=false", "objective=train/loss"],
        ["strategy=full", "trainer.precision=bf16-true"],
        ["trainer.max_epochs=null", "trainer.max_steps=5"],
        ["trainer.max_steps=0"],
        ["strategy.master_weights=true", "trainer.precision=bf16-true"],
    ],
)
def test_what_can_work_passes(overrides: list[str]) -> None:
    check_configuration(composed(*overrides))


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/accuracy", "max"),
        ("val/loss", "min"),
        ("train/loss", "min"),
        ("val/bleu", "min"),
        ("val/bleu", "max"),
        ("val/f1", "max"),
    ],
)
def test_a_monitor_that_looks_for_the_best_passes(monitor: str, mode: str) -> None:
    check_that_it_is_measured(
        composed(
            f"callbacks.checkpoint.monitor={monitor}", f"callbacks.checkpoint.mode={mode}",
            f"+callbacks.stop={{_target_: {EARLY_STOPPING}, monitor: {monitor}, mode: {mode}}}",
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "objective"),
    [
        (["evaluate=false"], "train/loss"),
        (["evaluate=false", "model=smollm2"], "train/loss"),
        (["evaluate=false", "model.objective=steps"], "steps"),
        (["evaluate=false", "objective=val/accuracy"], "val/accuracy"),
        ([], "val/accuracy"),
        (["trainer.limit_val_batches=0"], "val/accuracy"),
    ],
)
def test_an_objective_that_nobody_has_given_is_the_training_loss_without_evaluation(
    overrides: list[str], objective: str
) -> None:
    cfg = composed(*overrides)
    choose_objective(cfg)
    assert cfg.objective == objective


def test_of_the_folder_of_a_run_the_newest_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    with pytest.raises(ConfigurationError, match=r"is a folder and no checkpoint; give the path of one"):
        check_configuration(composed(f"ckpt_path={tmp_path}"))
    for age, step in enumerate((7, 10, 9)):
        (checkpoints / f"step-{step}.ckpt").write_text("")
        os.utime(checkpoints / f"step-{step}.ckpt", (age, age))
    for folder in (tmp_path, checkpoints):
        with pytest.raises(
            ConfigurationError, match=rf"no checkpoint; give its newest, `ckpt_path={checkpoints}/step-9"
        ):
            check_configuration(composed(f"ckpt_path={folder}"))


def test_the_folder_of_a_sharded_checkpoint_passes(tmp_path: Path) -> None:
    (tmp_path / "meta.pt").write_text("")
    check_configuration(composed(f"ckpt_path={tmp_path}"))


@pytest.mark.parametrize("strategy", ["hift", "full"])
def test_it_is_refused_by_other_strategies_before_anything_is_built(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "meta.pt").write_text("")
    where = [f"ckpt_path={tmp_path}", f"output_dir={tmp_path / 'run'}", "model.pretrained=/not/looked/for"]
    cfg = composed(*where, f"strategy={strategy}")
    with pytest.raises(ConfigurationError, match=rf"`{tmp_path}` is the folder of a sharded run"):
        train(cfg)


@pytest.mark.parametrize(
    ("objective", "module", "remedy"),
    [
        (
            "val/accurcy",
            ClassificationModule,
            "train/loss, val/loss, val/accuracy, val/f1, test/loss, test/accuracy, test/f1",
        ),
        ("accuracy", ClassificationModule, "val/accuracy"),
        ("val/accuracy", LanguageModelingModule, "val/perplexity"),
        ("train/los", LanguageModelingModule, "train/loss"),
    ],
)
def test_an_objective_that_the_module_does_not_measure_is_refused(objective: str, module: type, remedy: str) -> None:
    told = rf"objective={objective}` is not measured by `{module.__name__}`; give one of .*{remedy}"
    with pytest.raises(ConfigurationError, match=told):
        check_objective(objective, module)


@pytest.mark.parametrize("objective", ["val/accuracy", "test/loss_before", "train/loss", "steps", "hift/cycles"])
def test_an_objective_that_may_be_measured_passes(objective: str) -> None:
    check_objective(objective, ClassificationModule)


def test_modules_of_ones_own_may_measure_other_things() -> None:
    class Derived(ClassificationModule):
        pass

    for module in (LightningModule, Derived):
        check_objective("val/f1", module)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adafactor", "rmsprop"])
@pytest.mark.parametrize("rate", ["learning_rate=0.5", "++learning_rate=0.5"])
def test_a_rate_of_the_command_that_the_optimizer_does_not_read_is_refused(optimizer: str, rate: str) -> None:
    overrides = [f"optimizer={optimizer}", rate]
    with pytest.raises(ConfigurationError, match=r"learning_rate=0\.5` is not read.*give `optimizer\.lr=0\.5` instead"):
        check_that_the_rate_is_read(composed(*overrides), overrides)


def test_a_rate_of_the_command_beside_one_of_the_optimizer_is_refused() -> None:
    overrides = ["learning_rate=0.5", "optimizer.lr=0.1"]
    with pytest.raises(ConfigurationError, match=r"has its own `optimizer\.lr=0\.1`"):
        check_that_the_rate_is_read(composed(*overrides), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["learning_rate=0.5"],
        ["optimizer=sgd", "optimizer.lr=0.5"],
        ["experiment=adafactor"],
        ["experiment=long_turns", "learning_rate=0.5"],
        ["strategy=full", "optimizer=sgd"],
        ["optimizer=sgd", "learning_rate=0.5", "optimizer.lr=${learning_rate}"],
    ],
)
def test_a_rate_that_is_read_or_is_not_of_the_command_passes(overrides: list[str]) -> None:
    check_that_the_rate_is_read(composed(*overrides), overrides)


@pytest.mark.parametrize("override", ["model.network.config.a=2", "+model.network.config.a=2"])
def test_a_shape_of_the_command_beside_pretrained_weights_is_refused(override: str) -> None:
    with pytest.raises(ConfigurationError, match=r"network\.config\.a=2` is read for random weights only"):
        check_that_the_shape_is_read(composed(), [override])
    check_that_the_shape_is_read(composed("model.pretrained=null"), [override, "model.pretrained=null"])


# a remark on a command stands two spaces behind it
COMMANDS = {
    re.sub(r"\\\n# +", "", command).partition("  ")[0]
    for path in sorted(CONFIGURATION.rglob("*.yaml"))
    for command in re.findall(r"^#   python ((?:.*\\\n)*.*)$", path.read_text(), re.M)
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_in_a_comment_composes(command: str, tmp_path: Path) -> None:
    assert check_application(shlex.split(command), tmp_path) > 0
