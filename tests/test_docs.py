"""The documentation: the site builds without a warning, and all blocks of all pages do what they say."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hydra.errors import ConfigCompositionException

from tests.application.running import TINY, run_application
from tests.comparing import assert_same
from tests.pages import ROOT, blocks_of, check_application, run_page

WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "design.md"]
MEASURED = sorted((ROOT / "experiments").rglob("*.md"))
PAGES = [page for page in [ROOT / "README.md", *WRITTEN, *MEASURED] if blocks_of(page)]
pytestmark = pytest.mark.usefixtures("registries")
VERSIONS = {"2.6", "2.13", "2.7", "2.8", "3.10", "0.18", "0.50"}

_LOADED = re.compile(r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*? (?:src|href)="([^"]+)"')

# a row of the README's table of runs
_RUN = re.compile(
    r"^\| `(?P<command>python train\.py[^`]*)` \| (?P<accuracy>.*?) "
    r"\| (?P<device>\d+) MiB \| (?:(?P<parked>\d+) MiB )?\|$",
    re.M,
)


def pages(chosen):
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


@pages([page for page in PAGES if page.name != "tutorial.md"])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pages([page for page in PAGES if page.name == "tutorial.md" or any(b.kind == "slow" for b in blocks_of(page))])
def test_blocks_that_take_minutes_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_page(page, tmp_path, slow=True)


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # on a successor of its theme
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    html = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for page in WRITTEN:
        assert page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in html
    loaded = [link for text in html.values() for link in _LOADED.findall(text)]
    assert loaded
    assert not [link for link in loaded if "//" in link]
    styles = [path.read_text() for path in tmp_path.rglob("*.css")]
    assert not [link for text in styles for link in re.findall(r"url\(['\"]?(\w+:)?//", text)]
    # arguments come from the README, tables from the experiments, and docstrings are read as Markdown
    assert "shell-style patterns on parameter names: override the layers found" in html["one-line.html"]
    assert "Tried 2,646 times" in html["experiments/faults/summary.html"]
    assert ":class:" not in html["reference/engine.html"]


def test_a_new_order_tier_or_layout_takes_fewer_than_20_lines():
    examples = [block for block in blocks_of(ROOT / "docs/extending.md") if "@register_" in block.code]
    assert len(examples) == 3
    assert all(block.code.count("\n") < 20 for block in examples)


@pages([ROOT / "README.md", *WRITTEN])
def test_figures_on_a_page_are_those_of_an_experiment(page):
    measured = {number for path in MEASURED for number in re.findall(r"\d+\.\d+", path.read_text())}
    text = _RUN.sub("", page.read_text())  # the next test looks at these
    prose = re.sub(r"```.*?```|`[^`]*`|\([^)]*\)", "", text, flags=re.S)
    assert {*re.findall(r"\d+\.\d+", prose)} <= measured | VERSIONS


@pytest.mark.slow
@pytest.mark.parametrize("run", [*_RUN.finditer((ROOT / "README.md").read_text())], ids=lambda run: run["command"])
def test_figures_beside_a_command_are_those_that_it_prints(run, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *run["command"].split()[2:], "hydra.run.dir=here"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=1200)
    numbers = json.loads((tmp_path / "here" / "metrics.json").read_text())
    accuracy, before = (re.search(rf"([\d.]+) %{word}", run["accuracy"]) for word in ("", " before"))
    assert 100 * numbers["test/accuracy"] == pytest.approx(float(accuracy[1]), abs=1)  # other machines round otherwise
    if before:
        assert 100 * numbers["test/accuracy_before"] == pytest.approx(float(before[1]), abs=0.1)
    assert int(numbers["memory/peak_device_bytes"] / 2**20) == int(run["device"])
    assert int(numbers.get("memory/parked_bytes", 0) / 2**20) == int(run["parked"] or 0)


@pages([ROOT / "docs/tutorial.md", ROOT / "docs/how-to/resume.md"])
def test_a_run_that_goes_on_as_a_page_says_equals_the_one_that_did_not_stop(page, tmp_path):
    goes_on = next(block for block in blocks_of(page) if "ckpt_path=" in block.code)
    whole, resumed = (run_tiny(tmp_path, *words[2:]) for words in goes_on.commands)
    assert whole["global_step"] == 16
    assert_same(resumed.pop("callbacks").keys(), whole.pop("callbacks").keys())  # they hold the paths of their files
    assert_same(resumed, whole)


@pytest.mark.parametrize(("scheduler", "equal"), [("linear", False), ("constant", True)])
def test_a_schedule_made_for_another_length_is_another_run(scheduler, equal, tmp_path):
    chosen = f"scheduler={scheduler}"
    whole = run_tiny(tmp_path, chosen, "trainer.max_epochs=2", "hydra.run.dir=whole")
    short = run_tiny(tmp_path, chosen, "trainer.max_epochs=1", "hydra.run.dir=short")
    longer = run_tiny(
        tmp_path, chosen, "trainer.max_epochs=2", "hydra.run.dir=longer", "ckpt_path=short/checkpoints/step-8.ckpt"
    )
    assert (short["global_step"], longer["global_step"]) == (8, 16)
    assert {group["lr"] == 0 for group in short["optimizer_states"][0]["param_groups"]} == {not equal}
    same = [torch.equal(weights, whole["state_dict"][name]) for name, weights in longer["state_dict"].items()]
    assert all(same) == equal


def run_tiny(folder, *overrides):
    """Run the application with an encoder that trains in no time, and return its newest checkpoint."""
    run = run_application(folder, *TINY, "logger=none", "evaluate=false", "objective=train/loss", *overrides)
    assert run.returncode == 0, run.stderr
    told = re.search(r"checkpoint: +(\S+)", run.stdout)
    assert told, run.stdout
    return torch.load(folder / told.group(1), weights_only=True)


def test_as_many_other_ways_are_measured_as_the_page_says():
    def others(experiment, *not_counted):
        table = (ROOT / f"experiments/{experiment}/summary.md").read_text().split("| --- |", 1)[1].split("\n\n", 1)[0]
        names = re.findall(r"^\| (?!\*\*|full AdamW)([^|]+?) \|", table, re.M)
        return {name.split(",")[0] for name in names if not name.startswith(("---", *not_counted))}

    page = (ROOT / "docs/measured.md").read_text()
    assert len(others("memory")) == 9
    assert "this project and nine other ways to train with less" in page
    assert len(others("step_cost", "rotation by hand", "published HiFT")) == 8
    assert "eight other ways to train with less and loops written by hand" in page


def test_the_versions_that_it_takes_are_those_of_the_package():
    package = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', package)[1]
    torch_ = re.search(r'"torch>=([\d.]+)"', package)[1]
    lightning = re.search(r'"lightning>=([\d.]+),<([\d.]+)"', package)
    assert (
        f"It takes Python {python} or newer, torch {torch_} or newer, and lightning {lightning[1]} or newer, up to but "
        f"not including {lightning[2]}."
    ) in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nassert 1 + 1 == 3\n```\n", AssertionError),
        ("```python\nif\n```\n", SyntaxError),
        ("```bash\nls nowhere\n```\n", AssertionError),
        ("<!-- test: parse -->\n```bash\nif ls\n```\n", AssertionError),
        ("<!-- test: parse -->\n```bash\npython train.py strategy=hift_dpd\n```\n", ConfigCompositionException),
        ("```bash\necho three\n```\n\n```text\nfour\n```\n", AssertionError),
        ("<!-- test: never -->\n```bash\nls\n```\n", ValueError),
        ("```pyhton\n1\n```\n", ValueError),
        ("1. one\n\n    ```bash\n    ls nowhere\n    ```\n", ValueError),
    ],
)
def test_what_is_wrong_on_a_page_is_found(page, error, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(error):
        run_page(path, tmp_path, slow=False)


def test_all_runs_of_a_sweep_are_composed(tmp_path):
    command = ["python", "train.py", "-m", "optimizer=adamw,sgd", "strategy.group_size=1,2,4", "seed=1"]
    assert check_application(command, tmp_path) == 6


def test_links_between_pages_hold_in_the_checkout() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *MEASURED]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text())]
    dead = [
        f"{page.relative_to(ROOT)}: {link}"
        for page, link in links
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert len(links) > 100
    assert dead == []
