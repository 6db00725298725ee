"""Values that are refused before anything is built."""

import pytest

from hift_lightning.checks import check_configuration
from hift_lightning.engine.errors import ConfigurationError
from tests.application.test_configuration import composed


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
