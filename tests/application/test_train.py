"""Runs of the application in processes of their own: what they leave, and how they end."""

import contextlib
import csv
import json
import math
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hift_lightning.output import alone_in
from hift_lightning.report import write_metrics
from tests.application.running import TINY, run_application, start_application

ROW_WITHOUT_TAB = "label\tsentence\n0\tfine\nno tab here\n"
CLASS_OUT_OF_RANGE = "label\tsentence\n0\tfine\n7\tfiner\n"

# overrides, and what the sentence must name: the value or its key, and a remedy where there is a short one
MISTAKES: dict[str, tuple[str, ...]] = {
    "strategy.goup_size=2": ("strategy.goup_size", "Key 'goup_size'"),
    "strategy.order=sideways": ("order='sideways'", "top2down"),
    "strategy.group_size=0": ("group_size=0", "at least 1"),
    "strategy.frozen=[nothing*]": ("nothing*", "frozen"),
    "data.path=missing.tsv": ("missing.tsv", "data.path"),
    "data.path=empty.tsv": ("empty.tsv", "empty"),
    "data.path=without_tab.tsv": ("without_tab.tsv", "line 3", "no tab here"),
    "data.path=out_of_range.tsv": ("out_of_range.tsv", "line 3", "class `7`", "data.num_classes=2"),
    "data=sentences": ("data.path",),
    "trainer.precision=99-mixed": ("trainer", "99-mixed", "32-true"),
    "trainer.max_steps=many": ("trainer.max_steps=many",),
    "+trainer.speed=1": ("trainer", "speed"),
    "learning_rate=fast": ("learning_rate=fast",),
    "experiment=adafactor learning_rate=0.1": ("learning_rate=0.1", "optimizer.lr=0.01", "give `optimizer.lr=0.1`"),
    "data.max_length=600": ("data.max_length=600", "512 positions", "give `data.max_length=512` or less"),
    "optimizer.betas=0.9": ("optimizer.betas=0.9", "`~optimizer.name`"),
    "trainer.accelerator=gpu": ("In `trainer`", "trainer.accelerator=auto"),
    "ckpt_path=null scheduler=null": ("`scheduler=null`", "scheduler=constant"),
    "strategy.offload=/no/such/folder": ("/no/such/folder", "mkdir -p /no/such/folder"),
    "strategy.frozen=embeddings": ("frozen='embeddings'", "['embeddings']"),
    "model.network.config.num_hidden_layers=2": ("model.network.config.num_hidden_layers=2", "model.pretrained=null"),
    "objective=val/accurcy": ("objective=val/accurcy", "val/accuracy"),
    "ckpt_path=.": ("ckpt_path=.", "is a folder and no checkpoint"),
    "optimizer.betas=[2,3]": ("optimizer", "2"),
    "optimizer.betas=[0.9]": ("optimizer.betas=[0.9]",),
    "trainer.check_val_every_n_epoch=1 trainer.val_check_interval=9": ("val_check_interval=9", "8 batches", "=null`"),
    "model.pretrained=somebody/no-such-model": ("somebody/no-such-model", "/path/to/folder", "model.pretrained=null"),
    "model=llama7b": ("huggyllama/llama-7b", "/path/to/folder", "model.pretrained=null"),
    "model.pretrained=/no/such/folder": ("/no/such/folder", "/path/to/folder", "model.pretrained=null"),
}


@pytest.fixture(scope="module")
def mistaken_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty.tsv").write_text("label\tsentence\n")
    (folder / "without_tab.tsv").write_text(ROW_WITHOUT_TAB)
    (folder / "out_of_range.tsv").write_text(CLASS_OUT_OF_RANGE)

    def run(mistake: str) -> subprocess.CompletedProcess[str]:
        # with the pretrained model left as it is, where the mistake is in it
        smaller = ["trainer=quick"] if mistake.startswith("model") else TINY
        return run_application(folder, *smaller, "logger=none", *mistake.split(" "))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(run, MISTAKES), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_a_sentence_that_names_it(
    mistake: str, mistaken_runs: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    run = mistaken_runs[mistake]
    assert run.returncode == 1
    assert "Traceback" not in run.stderr + run.stdout
    message = run.stderr if "goup_size" in mistake else run.stderr.strip().splitlines()[-1]
    assert [part for part in MISTAKES[mistake] if part not in message] == [], message


@pytest.mark.parametrize("strategy", ["hift", "full"])
def test_a_run_leaves_its_numbers_a_checkpoint_a_log_and_a_table(tmp_path: Path, strategy: str) -> None:
    run = run_application(tmp_path, *TINY, f"strategy={strategy}", "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "here" / "metrics.json").read_text())
    names = {
        "test/accuracy_before", "test/accuracy", "test/loss", "val/accuracy", "val/loss", "time/step_ms_mean",
        "memory/peak_device_bytes", "memory/parked_bytes", "memory/peak_rss_bytes", "steps",
    }  # fmt: skip
    assert names <= set(metrics)
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert metrics["steps"] == 8
    assert ("hift/blocks" in metrics) == (strategy == "hift")
    # the embeddings, two encoder layers, the head
    assert metrics.get("hift/blocks", 4) == 4

    (checkpoint,) = (tmp_path / "here" / "checkpoints").iterdir()
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 8
    for part in (
        "test accuracy before",
        "test accuracy after",
        "time per step",
        "peak bytes: gradients",
        checkpoint.name,
    ):
        assert part in run.stdout, run.stdout
    assert "here/metrics.json" in run.stdout

    with (tmp_path / "here" / "log" / "metrics.csv").open() as file:
        logged = set(next(csv.reader(file)))
    assert {"train/loss", "val/accuracy", "lr-AdamW/pg1"} <= logged
    watched = {"hift/block", "hift/grad_norm", "hift/lr", "hift/update_ratio", "hift_update_ratio/00_embeddings"}
    assert logged & watched == (watched if strategy == "hift" else set())

    pictures = {path.name for path in (tmp_path / "here").glob("*_timeline.png")}
    assert pictures == {"memory_timeline.png"} | ({"block_timeline.png"} if strategy == "hift" else set())
    assert ("gradient" in run.stdout.partition("peak bytes")[0]) == (strategy == "hift")  # in the table of the blocks


def test_without_evaluation_nothing_but_training_is_done(tmp_path: Path) -> None:
    only = [*TINY, "evaluate=false", "trainer.val_check_interval=2", "hydra.run.dir=here"]
    run = run_application(tmp_path, *only)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "here" / "log" / "metrics.csv").open() as file:
        logged = set(next(csv.reader(file)))
    assert "train/loss" in logged
    assert not [name for name in logged if name.startswith(("val/", "test/"))]


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Press Ctrl-C, and again when nothing happens: Python loses the first where it comes in a destructor."""
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=25)
    return process.communicate(timeout=25)


def test_ctrl_c_ends_with_a_sentence_that_tells_the_checkpoint(tmp_path: Path) -> None:
    endless = ["trainer.max_epochs=10000", "hydra.run.dir=here"]
    process = start_application(tmp_path, *TINY, *endless)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not list((tmp_path / "here").glob("checkpoints/*.ckpt")):
            time.sleep(0.1)
        output, errors = interrupt(process)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Traceback" not in errors
    told = re.search(r"the last checkpoint is (\S+);", errors)
    assert told, output + errors
    assert torch.load(told.group(1), weights_only=True)["global_step"] > 0


def test_a_run_in_the_folder_of_another_tells_of_its_own_checkpoints(tmp_path: Path) -> None:
    here = [*TINY, "logger=none", "hydra.run.dir='[here]'"]
    first = run_application(tmp_path, *here, "trainer.max_steps=2")
    assert "checkpoint:  [here]/checkpoints/step-2.ckpt" in first.stdout, first.stderr
    nothing_saved = ["callbacks.checkpoint=null", "trainer.enable_checkpointing=false"]
    second = run_application(tmp_path, *here, *nothing_saved, "trainer.max_steps=1")
    assert "checkpoint:  none" in second.stdout, second.stderr
    diverged = ["learning_rate=1.0e+38", "strategy.lr_update=step", "scheduler=constant"]
    third = run_application(tmp_path, *here, *diverged)
    assert "no checkpoint had been saved yet" in third.stderr.lower()


def test_a_run_of_a_sweep_that_fails_is_told_of_and_the_others_go_on(tmp_path: Path) -> None:
    def sweep(*overrides: str) -> subprocess.CompletedProcess[str]:
        return run_application(
            tmp_path, "-m", *TINY, "logger=none", "trainer.limit_train_batches=1", "hydra.sweep.dir=swept",
            "hydra.job.chdir=true", *overrides,
        )  # fmt: skip

    first = sweep("seed=1,2,3", "strategy.frozen=[network.head.*],null")
    assert first.returncode == 0, first.stderr
    assert "[network.head.*]" in first.stdout
    run = sweep("seed=4,5,6", "learning_rate=-1,1.0e-4")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.count("`learning_rate=-1` is not possible") == 3 + 1  # Hydra tells the first one again
    with (tmp_path / "swept" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["learning_rate"]) for row in rows] == [(seed, "0.0001") for seed in "456"]
    assert "memory/peak_rss_bytes" not in rows[0]  # of the process, and so of the largest run before it
    assert "sweep.png" in run.stdout


def test_a_sweep_leaves_one_table_and_one_picture(tmp_path: Path) -> None:
    run = run_application(
        tmp_path, "-m", *TINY, "strategy.group_size=1,2", "logger=none", "trainer.limit_train_batches=4",
        "hydra.sweep.dir=swept",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    with (tmp_path / "swept" / "sweep.csv").open() as file:
        one, two = csv.DictReader(file)
    assert (one["strategy.group_size"], two["strategy.group_size"]) == ("1", "2")
    assert float(one["hift/blocks"]) == 4
    assert float(two["hift/blocks"]) == 2
    assert float(one["memory/peak_device_bytes"]) < float(two["memory/peak_device_bytes"])
    assert (tmp_path / "swept" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "sweep.csv" in run.stdout


def test_an_output_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        run = run_application(tmp_path, *TINY, "hydra.run.dir=.")
    assert run.returncode == 1
    told = run.stderr.strip().splitlines()[-1]
    assert told.startswith(f"Another run, process {os.getpid()}, writes to `output_dir=")
    assert "hydra.run.dir=..." in told
    with alone_in(tmp_path):  # nothing is left of it
        pass
    assert not [path for path in tmp_path.iterdir() if path.name == ".running"]


def test_fused_with_clipping_by_norm_is_told_before_the_test(tmp_path: Path) -> None:
    run = run_application(tmp_path, *TINY, "strategy.update=fused")
    assert run.returncode == 1
    assert "clips by norm" in run.stderr
    assert "or not at all (`gradient_clip_val=None`)" in run.stderr
    assert "Testing" not in run.stdout


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    path = write_metrics({"test/accuracy": 0.5, "train/loss": math.nan}, tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"test/accuracy": 0.5, "train/loss": None}


@pytest.mark.parametrize("content", [b"nonsense", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_told_before_the_test_and_not_named_as_a_way_on(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "some.ckpt").write_bytes(content)
    run = run_application(tmp_path, *TINY, "ckpt_path=some.ckpt")
    assert run.returncode == 1
    assert re.search(r"`some\.ckpt` is no(t whole| checkpoint)", run.stderr)
    assert "Traceback" not in run.stderr
    assert "go on with" not in run.stderr
    assert "Testing" not in run.stdout


def test_a_checkpoint_of_another_model_is_told_before_the_test(tmp_path: Path) -> None:
    run = run_application(tmp_path, *TINY, "evaluate=false", "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    (path,) = (tmp_path / "here" / "checkpoints").iterdir()
    wider = [option.replace("hidden_size=32", "hidden_size=64") for option in TINY]
    refused = run_application(tmp_path, *wider, f"ckpt_path={path}", "hydra.run.dir=again")
    assert refused.returncode == 1
    assert "The checkpoint's weights do not fit `ClassificationModule`: `network.body.embeddings" in refused.stderr
    assert "(30522, 32) in it and (30522, 64) in the model" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "Testing" not in refused.stdout
    torch.save(torch.load(path, weights_only=True)["state_dict"], tmp_path / "weights.pt")
    refused = run_application(tmp_path, *TINY, "ckpt_path=weights.pt", "hydra.run.dir=again")
    assert "`weights.pt` is no checkpoint of a Trainer: it has no `state_dict`; give" in refused.stderr
    assert "Testing" not in refused.stdout


def test_where_there_are_no_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("hift_lightning.output.fcntl.flock", unsupported)
    with pytest.warns(match=r"cannot be locked \(Operation not supported\)"), alone_in(tmp_path):
        pass
