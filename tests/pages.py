"""The fenced blocks of a page of documentation, and how they are run.

A page's Python and Bash blocks are run in their order, in one folder and with one Python namespace, in which `module`
is a small LightningModule and `batch` one of its batches. A comment above a block can say otherwise:

    <!-- test: with trainer=quick -->   the commands of the application get these arguments too
    <!-- test: slow -->                 only with `-m slow`; also `slow with ...`
    <!-- test: parse -->                not run, as it wants GPUs, another environment or files that nobody has here

Whatever it says, a block is parsed, and of each `train.py` and `plan.py` the configuration is composed and checked.
A Python block with a title, ```` ```python title="mine.py" ````, is written to that file of the folder, from which
others import. A `text` block is part of what the blocks above it have printed; lines may be broken elsewhere. Commands
on the pages of experiments, which take hours, are not run.
"""

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

from hift_lightning.checks import WITH_MASTERS, check_configuration
from hift_lightning.targets import check_targets

ROOT = Path(__file__).parent.parent
LANGUAGES = {"python", "bash", "text", "yaml", ""}
CONFIGURATIONS = {"train.py": "train", "hift-train": "train", "plan.py": "plan", "hift-plan": "plan"}

_BLOCK = re.compile(
    r"(?:^<!-- test: (?P<mark>.+) -->\n)?"
    r'^```(?P<language>[^ \n]*)(?: title="(?P<title>.+)")?\n'
    r"(?P<code>(?:.*\n)*?)^```$",
    re.M,
)
_MARK = re.compile(r"(?P<kind>slow|parse)?(?: ?with (?P<extra>.+))?")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    place: str
    language: str
    code: str
    kind: str | None = None
    title: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def commands(self) -> list[list[str]]:
        """Each command of a Bash block, in words."""
        lines = self.code.replace("\\\n", " ").splitlines()
        parts = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
        return [words for words in parts if words]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page.

    Raises:
        ValueError: a mark or a language is not known.
    """
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        place = f"{page}:{text.count(chr(10), 0, match.start('code'))}"
        mark = _MARK.fullmatch(match["mark"] or "")
        if mark is None or match["language"] not in LANGUAGES:
            raise ValueError(f"{place}: `{match['mark']}` or `{match['language']}` is not known")
        found.append(
            Block(
                place,
                match["language"],
                match["code"],
                mark["kind"],
                match["title"],
                tuple(shlex.split(mark["extra"] or "")),
            )
        )
    if text.count("```") != 2 * len(found):
        raise ValueError(f"{page}: a fence is indented, or not closed")
    return found


def check_application(words: list[str], folder: Path) -> int:
    """Compose and check the configuration of a command of the application, as it does itself before any work.

    Args:
        words: the command.
        folder: that relative paths in it mean.

    Returns:
        How many configurations it runs: one, those of a sweep, or none where it is another command.
    """
    position = _position_of_application(words)
    if position is None:
        return 0
    overrides = words[position + 1 :]
    search_path: list[str] = []
    if "--config-dir" in overrides:
        at = overrides.index("--config-dir")
        search_path = [f"hydra.searchpath=[file://{folder / overrides[at + 1]}]"]
        del overrides[at : at + 2]
    runs = _runs_of_sweep([word for word in overrides if word != "-m"]) if "-m" in overrides else [overrides]
    for run in runs:
        with initialize_config_module("hift_lightning.conf", version_base="1.3"):
            name = CONFIGURATIONS[Path(words[position]).name]
            cfg = compose(name, [f"++output_dir={folder}", *search_path, *run], return_hydra_config=False)
        cfg.ckpt_path = None  # a file that an earlier block makes, or that nobody has here
        check_configuration(cfg)
        if cfg.trainer.precision in WITH_MASTERS:
            assert OmegaConf.select(cfg, "strategy.master_weights") is not False, "it would be warned of"
        check_targets(cfg, cfg.trusted_targets)
    return len(runs)


def _runs_of_sweep(overrides: list[str]) -> list[list[str]]:
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(overrides)
    ]
    return [list(run) for run in itertools.product(*choices)]


def run_page(page: Path, folder: Path, *, slow: bool) -> None:
    """Run a page's blocks in their order.

    Args:
        page: the page.
        folder: an empty folder, which is the working directory and on Python's path; it becomes like the repository's
            root.
        slow: whether blocks that take minutes are run too.
    """
    for name in ("train.py", "plan.py", "examples"):
        (folder / name).symlink_to(ROOT / name)
    module = SmallModule()
    namespace: dict[str, Any] = {"__name__": "page", "module": module, "batch": next(iter(module.train_dataloader()))}
    printed = ""
    for block in blocks_of(page):
        of_experiment = page.is_relative_to(ROOT / "experiments")
        runs = not of_experiment and (block.kind is None or (block.kind == "slow" and slow))
        if block.language == "python":
            code = compile(block.code, block.place, "exec")
            if block.title is not None:
                (folder / block.title).write_text(block.code)
                continue
            if runs:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, namespace)
                printed += output.getvalue()
        elif block.language == "yaml":
            OmegaConf.create(block.code)
        elif block.language == "bash":
            for words in block.commands:
                check_application([*words, *_extra(block, words)], folder)
            printed += _run_bash(block, folder, *([] if runs else ["-n"]))
        elif block.language == "text":
            assert " ".join(block.code.split()) in " ".join(printed.split()), f"{block.place} is not in\n{printed}"


def _run_bash(block: Block, folder: Path, *options: str) -> str:
    script = (
        "\n".join(shlex.join([*words, *_extra(block, words)]) for words in block.commands)
        if block.extra
        else block.code
    )
    done = subprocess.run(
        ["bash", "-e", *options, "-c", script],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{block.place}\n{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _extra(block: Block, words: list[str]) -> tuple[str, ...]:
    return block.extra if _position_of_application(words) is not None else ()


def _position_of_application(words: list[str]) -> int | None:
    return next((i for i, word in enumerate(words) if Path(word).name in CONFIGURATIONS), None)


class SmallModule(L.LightningModule):
    """What a page calls `module`: a reader's own, which has its data and ends after eight batches."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"embeddings": nn.Linear(8, 16), "middle": nn.Linear(16, 16), "head": nn.Linear(16, 1)}
        self.network = nn.Sequential(OrderedDict(layers))

    def train_dataloader(self) -> Any:
        """Eight batches of noise."""
        data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Take the mean squared error."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def on_train_epoch_end(self) -> None:
        """End, where nothing else does."""
        if self.trainer.max_steps == -1:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        """AdamW, with a rate that changes at each step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
