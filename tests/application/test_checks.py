"""Values that are refused before anything is built."""

import re
import shlex
import warnings
from pathlib import Path

import pytest

from hift_lightning.checks import check_configuration, check_that_the_rate_is_read
from hift_lightning.engine.errors import ConfigurationError
from tests.application.running import CONFIGURATION
from tests.application.test_configuration import composed
from tests.pages import check_application


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data=text"], r"learns classes of sentences.*TextDataModule.*`data=film_reviews`"),
        (["model=gpt2_medium", "data=film_reviews"], r"learns texts.*SentenceDataModule.*`data=text`"),
        (["~data"], r"`data` must be given"),
        (["model.tokenizer=null"], r"model\.tokenizer=null.*model\.tokenizer\.pretrained=/path/to/folder"),
        (["evaluate=perhaps"], r"evaluate=perhaps.*`true` or `false`"),
        (["evaluate=false"], r"objective=val/accuracy.*objective=train/loss"),
        (["strategy.master_weights=true"], r"trainer\.precision=32-true.*bf16-true"),
        (["strategy.master_weights=true", "trainer.precision=bf16-mixed"], r"trainer\.precision=bf16-mixed"),
    ],
)
def test_what_cannot_work_is_told_with_the_remedy(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        check_configuration(composed(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama7b"],
        ["model=llama7b", "model.tokenizer=null"],
        ["experiment=llama7b_cpu"],
        ["evaluate=false", "objective=train/loss"],
        ["strategy=full", "trainer.precision=bf16-true"],
        ["strategy.master_weights=true", "trainer.precision=bf16-true"],
    ],
)
def test_what_can_work_passes(overrides: list[str]) -> None:
    check_configuration(composed(*overrides))


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


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("strategy", ["hift", "hift_ddp", "hift_fsdp2"])
def test_16_bit_weights_without_masters_are_warned_of(strategy: str, precision: str) -> None:
    overrides = [f"strategy={strategy}", f"trainer.precision={precision}"]
    with pytest.warns(
        UserWarning, match=rf"precision={precision}` without fp32 masters.*strategy\.master_weights=true"
    ):
        check_configuration(composed(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=bf16-true", "strategy.master_weights=true"],
        ["trainer.precision=bf16-true", "strategy=full"],
    ],
)
def test_nothing_is_warned_of_where_weights_or_masters_have_32_bits(overrides: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_configuration(composed(*overrides))


# a remark on a command stands two spaces behind it
COMMANDS = {
    re.sub(r"\\\n# +", "", command).partition("  ")[0]
    for path in sorted(CONFIGURATION.rglob("*.yaml"))
    for command in re.findall(r"^#   python ((?:.*\\\n)*.*)$", path.read_text(), re.M)
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_in_a_comment_composes_and_nothing_is_warned_of(command: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_application(shlex.split(command), tmp_path) > 0
