"""The examples run: every command that one of them names, and the notebook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = [
    command
    for path in sorted((ROOT / "examples").rglob("*.py"))
    for command in re.findall(r"python (examples/[^\n\"]+)", path.read_text())
]


def test_every_example_names_a_command():
    named = {command.split()[0] for command in COMMANDS}
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.py")}


@pytest.mark.parametrize(
    "command",
    [c if "plain_pytorch" in c or "fabric" in c else pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS],
    ids=str,
)
def test_example_runs_and_learns(command, tmp_path):
    script, *arguments = command.split()
    run = subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run.stdout)]
    assert losses[-1] < losses[0] / 4
    told = (
        "trained by SingleDeviceStrategy" if command.endswith("hydra_project/main.py") else "HiFTStrategy|3 to a cycle"
    )
    assert re.search(told, run.stdout)


@pytest.mark.slow
def test_notebook_runs_and_learns(tmp_path, monkeypatch):
    for name, value in (("HF_HUB_OFFLINE", "1"), ("IPYTHONDIR", str(tmp_path)), ("JUPYTER_RUNTIME_DIR", str(tmp_path))):
        monkeypatch.setitem(os.environ, name, value)
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is kept without them
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    before, after = (float(accuracy) for accuracy in re.findall(r"accuracy (\S+)", printed))
    assert after > before + 0.1
    assert "to a cycle" in printed
