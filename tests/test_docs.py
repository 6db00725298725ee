"""The documentation: the site builds without a warning, and all blocks of all pages do what they say."""

import os
import re
import subprocess
import sys

import pytest

from tests.pages import ROOT, blocks_of, run_page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.name != "design.md"]

_LOADED = re.compile(r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*? (?:src|href)="([^"]+)"')


def pages(chosen):
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


@pages([page for page in PAGES if blocks_of(page)])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pages([page for page in PAGES if any(block.kind == "slow" for block in blocks_of(page))])
def test_blocks_that_take_minutes_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path, slow=True)


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # on a successor of its theme
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    html = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    assert {path.relative_to(ROOT / "docs").with_suffix(".html") for path in WRITTEN} <= {
        path.relative_to(tmp_path) for path in html
    }
    loaded = [link for text in html.values() for link in _LOADED.findall(text)]
    assert loaded
    assert not [link for link in loaded if "//" in link]
    styles = [path.read_text() for path in tmp_path.rglob("*.css")]
    assert not [link for text in styles for link in re.findall(r"url\(([^)]*)\)", text) if link.startswith("http")]
    # the arguments come from the README, the measured tables from the experiments
    assert 'device memory that <code>"auto"</code> may take' in html[tmp_path / "one-line.html"]
    assert "Tried 2,626 times" in html[tmp_path / "experiments" / "faults" / "summary.html"]
