"""Any Hydra application of the environment is given ``strategy=hift``, and nothing else of this package."""

import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra

from hift_lightning import HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTSettings, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError

APPLICATION = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg):
    print(cfg.strategy._target_)
    print(sorted({"torch", "lightning", "hift_lightning", "numpy"} & sys.modules.keys()))

main()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A Hydra application of somebody else's, with a group and a file of its own."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "theirs.yaml").write_text("width: 3\n")
    (tmp_path / "conf" / "main.yaml").write_text("defaults: [model: theirs, _self_]\ntrainer: {max_steps: 3}\n")
    (tmp_path / "main.py").write_text(APPLICATION)
    return tmp_path


def composed(project: Path, *overrides: str):
    with initialize_config_dir(str(project / "conf"), version_base="1.3"):
        return compose("main", list(overrides))


def options(project: Path, group: str) -> list[str]:
    with initialize_config_dir(str(project / "conf"), version_base="1.3"):
        loader: ConfigLoader = GlobalHydra.instance().config_loader()
        return loader.get_group_options(group)


@pytest.mark.parametrize(
    ("name", "strategy"), [("hift", HiFTStrategy), ("hift_ddp", HiFTDDPStrategy), ("hift_fsdp2", HiFTFSDP2Strategy)]
)
def test_a_strategy_composes_and_builds(project, name, strategy):
    built = hydra.utils.instantiate(composed(project, f"+strategy={name}", "strategy.group_size=2").strategy)
    assert type(built) is strategy
    assert built.settings == HiFTSettings(group_size=2)


def test_a_strategy_composes_at_the_place_where_a_project_keeps_it(project):
    cfg = composed(project, "+strategy@trainer.strategy=hift", "trainer.strategy.order=bottom2up")
    assert hydra.utils.instantiate(cfg.trainer.strategy).settings.order == "bottom2up"
    assert "strategy" not in cfg


def test_the_seed_is_that_of_the_project_where_it_has_one(project):
    def seed(*overrides):
        return hydra.utils.instantiate(composed(project, "+strategy=hift", *overrides).strategy).settings.seed

    assert seed() == 0
    assert seed("+seed=5", "strategy.order=random") == 5
    assert seed("+seed=null") is None
    with pytest.raises(hydra.errors.InstantiationException) as caught:
        seed("+seed=null", "strategy.order=random")
    assert isinstance(caught.value.__cause__, ConfigurationError)


def test_no_other_group_of_ours_is_seen(project):
    assert options(project, "strategy") == ["hift", "hift_ddp", "hift_fsdp2"]
    assert options(project, "model") == ["theirs"]
    for group in ("data", "optimizer", "scheduler", "trainer", "callbacks", "logger", "experiment"):
        assert options(project, group) == []


def test_a_file_of_the_project_wins(project):
    (project / "conf" / "strategy").mkdir()
    (project / "conf" / "strategy" / "hift.yaml").write_text("theirs: true\n")
    assert composed(project, "+strategy=hift").strategy == {"theirs": True}


def test_an_application_in_another_folder_imports_nothing_of_ours_but_the_plugin(project):
    run = subprocess.run(
        [sys.executable, "main.py", "+strategy=hift"], cwd=project, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.splitlines() == ["hift_lightning.strategies.hift.HiFTStrategy", "[]"], run.stderr
