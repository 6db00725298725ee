"""The Hydra configuration: everything in it composes, and every value is explained."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from tests.application.running import CONFIGURATION, SHARED_CONFIGURATION

GROUPS = (
    "model",
    "model/kind",
    "data",
    "optimizer",
    "scheduler",
    "strategy",
    "trainer",
    "callbacks",
    "logger",
    "experiment",
)
OPTIONS = [
    f"{group}={path.stem}"
    for group in GROUPS
    for folder in (CONFIGURATION, SHARED_CONFIGURATION)
    for path in sorted((folder / group).glob("*.yaml"))
    if group != "model/kind"  # parts of the files in `model`
]
# what an option cannot be without
FURTHER = {
    "data=sentences": ["data.path=somewhere.tsv"],
    "data=text": ["model=llama7b"],
    "data=jsonl": ["model=llama7b", "data.path=somewhere.jsonl"],
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("hift_lightning.conf", version_base="1.3"):
        return compose("train", overrides=["output_dir=/nowhere", *overrides])


def test_the_groups_are_those_of_the_folder() -> None:
    folders = {path.name for path in CONFIGURATION.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {group for group in GROUPS if "/" not in group}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option: str) -> None:
    cfg = composed(option, *FURTHER.get(option, []))
    assert OmegaConf.missing_keys(cfg) == set()
    OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    "path",
    [path for folder in (CONFIGURATION, SHARED_CONFIGURATION) for path in sorted(folder.rglob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_every_value_has_a_comment(path: Path) -> None:
    before = ""
    for line in path.read_text().splitlines():
        value = re.match(r"\s*(?:- )?(?:override /)?([\w]+): *(\S.*)$", line)
        if value and value.group(1) != "_target_":
            explained = "#" in line or before.lstrip().startswith("#") or value.group(1) in ("callbacks", "trainer")
            assert explained, f"{path}: `{line.strip()}` has no comment"
        before = line


SENTENCES, TEXTS = "hift_lightning.data.SentenceDataModule", "hift_lightning.data.TextDataModule"


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        (["model=roberta_base"], SENTENCES),
        (["model=gpt2_medium"], TEXTS),
        (["model=gpt2_medium", "data.batch_size=3"], TEXTS),
        (["experiment=llama7b_cpu"], TEXTS),
        (["experiment=llama7b_cpu", "model=minilm"], SENTENCES),
        # data named on the command line have the last word
        (["model=gpt2_medium", "data=sentences", "data.path=somewhere.tsv"], SENTENCES),
        (["data=text", "model=minilm"], TEXTS),
    ],
)
def test_a_model_brings_its_data_and_the_command_line_has_the_last_word(overrides: list[str], data: str) -> None:
    assert composed(*overrides).data._target_ == data


def test_a_model_brings_what_a_sweep_optimises() -> None:
    assert composed("model=gpt2_medium").objective == "val/perplexity"
    assert composed("model=roberta_base").objective == "val/accuracy"


@pytest.mark.parametrize("path", sorted((CONFIGURATION / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_begins_with_its_command(path: Path) -> None:
    assert f"python train.py experiment={path.stem}" in path.read_text().split("defaults:")[0]


def test_full_fine_tuning_brings_its_own_rate_and_the_command_line_has_the_last_word() -> None:
    assert composed().optimizer.lr == composed().learning_rate
    assert composed("strategy=full").optimizer.lr == 1.0e-4
    assert composed("experiment=full_comparison").optimizer.lr == 1.0e-4
    assert composed("strategy=full", "learning_rate=0.3").optimizer.lr == 0.3


def test_long_turns_are_one_for_each_block_without_momentum() -> None:
    cfg = composed("experiment=long_turns")
    assert (cfg.optimizer.lr, cfg.optimizer.betas) == (4.0e-4, [0.0, 0.999])
    assert (cfg.strategy.steps_per_block, cfg.strategy.lr_update) == ("once", "step")
    assert cfg.strategy.always_active == 1


def test_the_file_of_the_strategy_sets_nothing_else() -> None:
    cfg, without = composed(), composed("~strategy")
    del cfg.strategy
    assert cfg == without


def test_a_mistyped_key_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        composed("strategy.goup_size=2")
    assert "goup_size" in str(caught.value)
