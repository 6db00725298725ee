"""Runs a page of the documentation as a reader would, from top to bottom.

In a page, fenced blocks mean:

- ``python title="name.py"``: a file of that name, in the folder in which the page is run
- ``python``: part of one script, in which the blocks follow each other
- ``bash``: commands
- ``text``: lines that the page's scripts and commands print, in the order of the page
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class FencedBlock:
    language: str
    title: str | None
    text: str
    line: int
    """Of its first line in the page, from 1."""


def blocks_of(page: Path) -> list[FencedBlock]:
    text = page.read_text()
    return [
        FencedBlock(fence[1], fence[2], fence[3], text.count("\n", 0, fence.start(3)) + 1)
        for fence in _FENCE.finditer(text)
    ]


def run_page(page: Path, folder: Path, timeout: float = 120) -> str:
    """Run a page's blocks in a folder, and compare what they print; returns it.

    Raises:
        AssertionError: if a block fails, or does not print what the page says.
    """
    blocks = blocks_of(page)
    for block in blocks:
        if block.title is not None:
            (folder / block.title).write_text(block.text)
    # lines of the script are those of the page, so that a traceback points there
    script = folder / f"{page.stem}_page.py"
    parts = [block for block in blocks if block.language == "python" and block.title is None]
    lines: list[str] = []
    for part in parts:
        lines += [""] * (part.line - 1 - len(lines)) + part.text.splitlines()
    script.write_text("\n".join(lines))
    printed = _run([sys.executable, str(script)], folder, timeout) if parts else ""
    for block in blocks:
        if block.language == "bash":
            printed += _run(["bash", "-euc", block.text], folder, timeout)

    position = 0
    for block in blocks:
        if block.language == "text":
            position = printed.find(block.text, position)
            assert position >= 0, f"{page.name}, line {block.line}: not printed:\n{block.text}\nbut:\n{printed}"
    return printed


def _run(command: list[str], folder: Path, timeout: float) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, f"{command[-1]}\n{run.stdout}\n{run.stderr}"
    return run.stdout
