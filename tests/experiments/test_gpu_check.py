"""The GPU page, tried on the simulated accelerator: the same ways in small."""

import csv
import dataclasses
import shutil
import subprocess
import sys
from concurrent.futures import Executor, Future

import pytest
import torch

from experiments import table
from experiments.gpu_check import card
from experiments.gpu_check.__main__ import main
from experiments.gpu_check.card import layers_for
from experiments.gpu_check.figures import paged, pairs
from experiments.gpu_check.memory import measure_memory
from experiments.gpu_check.paging import measure_copies, measure_paging
from experiments.gpu_check.plot import plot
from experiments.gpu_check.profiles import CONTESTANTS, COPIES, CUDA, HERE, PAGING, SIM
from experiments.gpu_check.record import Measured, Record, in_rounds, measured_or_failed, waiting_for_packages
from experiments.gpu_check.speed import measure_speed
from experiments.gpu_check.summary import WAITS, summary
from experiments.gpu_check.training import Watch, outcome_of
from tests import simulated_accelerator as sim
from tests.pages import ROOT

pytestmark = pytest.mark.skipif(sim.compiler_missing() is not None, reason=str(sim.compiler_missing()))

LAYERS = 2
LLAMA = "small LLaMA-7B"
FULL, HIFT, TOO_LARGE = (f"{LLAMA}, {cell}" for cell in ("SGDM, fp32, full", "SGDM, fp32, HiFT", "AdamW, fp32, full"))


def as_recorded(values):
    return {key: str(value) for key, value in values.items()}


@pytest.fixture(scope="module")
def memory():
    return {name: as_recorded(measure_memory(name, SIM)) for name in (FULL, HIFT, TOO_LARGE)}


@pytest.fixture(scope="module")
def paging():
    return {f"{name}, round 1": as_recorded(measure_paging(f"{name}, round 1", SIM, LAYERS)) for name in PAGING}


@pytest.fixture(scope="module")
def speed():
    names = [f"{name}, round 1" for name in ("full", "HiFT", "LoRA r16, 16-bit weights")]
    return {name: as_recorded(measure_speed(name, SIM, LAYERS)) for name in names}


class InThisProcess(Executor):
    """In place of a process of its own, which takes seconds to start."""

    def __init__(self, workers, mp_context):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture(scope="module")
def command():
    """Calls it on the simulated accelerator for some of its rows."""

    def call(folder, *words):
        main(["--device", "sim", "--folder", str(folder), "--only", "copies.csv", *words])

    with pytest.MonkeyPatch.context() as patch:
        for module in (table, card):
            patch.setattr(module, "ProcessPoolExecutor", InThisProcess)
        yield call


@pytest.fixture(scope="module")
def recorded(command, tmp_path_factory):
    """The folder in which a call has left its record."""
    folder = tmp_path_factory.mktemp("recorded")
    command(folder)
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    """A copy of it."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("name", [FULL, HIFT])
def test_a_cell_that_fits_takes_what_is_planned(memory, name):
    row = memory[name]
    assert row["outcome"] == "ran"
    assert int(row["allocated"]) == pytest.approx(int(row["planned"]), rel=0.001)
    # as on a GPU, small tensors are rounded up to powers of two
    assert int(row["parked"]) <= int(row["pinned"]) <= 2 * int(row["parked"])


@pytest.mark.parametrize("name", [name for name in SIM.cells if not name.startswith(LLAMA)])
def test_a_cell_of_another_kind_of_model_runs_too(name):
    row = measure_memory(name, SIM)
    assert row["outcome"] == "ran"
    assert row["allocated"] == pytest.approx(row["planned"], rel=0.001)


def test_hift_takes_less_than_full_fine_tuning(memory):
    assert pairs(memory) == {HIFT: FULL}
    assert int(memory[HIFT]["allocated"]) < 0.6 * int(memory[FULL]["allocated"])
    assert int(memory[FULL]["parked"]) == 0 < int(memory[HIFT]["parked"])


def test_a_cell_beyond_the_cards_memory_says_where_it_ran_out(memory):
    row = memory[TOO_LARGE]
    assert int(row["planned"]) > SIM.device.total_bytes
    assert row["outcome"] == "out of memory in step 2, forward"
    assert "allocated" not in row


def test_the_state_of_each_block_is_moved_once_in_a_cycle_unless_it_stays(paging):
    numel = sum(p.numel() for p in SIM.of_depth(CONTESTANTS["HiFT"].job, LAYERS).module().parameters())
    for name, way in PAGING.items():
        row = paging[f"{name}, round 1"]
        moved = 8 * numel if way.compared else 0
        assert int(row["in_host_memory"]) == int(row["of_it_pinned"]) == moved
        assert int(row["paged_in"]) == int(row["parked"]) == moved // (LAYERS + 2)


def test_what_is_prefetched_is_not_waited_for_at_the_update(paging):
    with_it, without = (
        float(paging[f"{name}, round 1"]["page_in_ms"]) for name in ("block", "block, without prefetch")
    )
    assert with_it < without / 2


def test_a_contestant_is_timed_over_whole_cycles_after_two(speed):
    for row in speed.values():
        assert row["outcome"] == "ran"
        cycles = [float(word) for word in row["cycles_ms"].split()]
        assert len(cycles) == SIM.cycles
        assert min(cycles) <= float(row["step_ms"]) <= max(cycles)
    full, hift, lora = (int(row["allocated"]) for row in speed.values())
    assert hift < full
    assert lora < full
    assert all(row["driver"] == row["allocated"] and row["retries"] == "0" for row in speed.values())
    assert list(speed.values())[2]["package"].startswith("peft ")


@pytest.mark.parametrize(("share", "layers"), [(2.0, 4), (1.12, 4), (1.1, 2), (0.0, 2)])
def test_the_depth_is_the_first_at_which_a_tenth_of_the_card_is_left(share, layers):
    assert SIM.depths == (4, 2)
    job = SIM.of_depth(CONTESTANTS["full"].job, 4)
    peak = job.plan(job.module(), SIM.batch, SIM.length).peak_bytes
    assert layers_for(int(share * peak), SIM) == layers


@pytest.mark.parametrize(("most", "free"), [("max", 2**62), ("3000", 2300)])
def test_a_container_may_have_less_memory_than_the_machine(tmp_path, monkeypatch, most, free):
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 300\n")
    monkeypatch.setattr(card, "Path", lambda name: tmp_path / name.rpartition("/")[2])
    monkeypatch.setattr(card, "host_memory", lambda field: 2**62)
    assert card.free_host_memory() == free


def test_an_error_outside_of_a_run_ends_its_row_alone(capsys):
    def measure(name):
        raise ValueError(f"no {name}")

    assert measured_or_failed(measure, "row") == {"outcome": "failed: ValueError: no row"}
    assert "Traceback" in capsys.readouterr().err


def test_what_is_hidden_is_what_a_step_is_not_longer_by():
    def row(ms, **values):
        return {"outcome": "ran", "cycles_ms": ms, **{key: str(value) for key, value in values.items()}}

    copies = {
        "host to device, pinned": {"outcome": "ran", "bytes": "1000", "ms": "1.0"},
        "device to host, pinned": {"outcome": "ran", "bytes": "1000", "ms": "2.0"},
    }
    rounds = {
        "block, state stays on the device, round 1": row("9.0 10.0"),
        "block, state stays on the device, round 2": row("11.0"),
        "block, round 1": row("12.0 13.0", paged_in=3000, parked=1000, page_in_ms=0.5, park_ms=2.0),
        "block, round 2": row("11.0", paged_in=5000, parked=1000, page_in_ms=1.5, park_ms=2.0),
    }
    (block,) = paged(rounds, copies)
    assert block.extra_ms == 2.0
    assert (block.page_in_ms, block.park_ms) == (4.0, 2.0)
    assert block.hidden == pytest.approx(1 - 2 / 6)
    assert block.hidden_of("page_in") == 0.75
    assert block.hidden_of("park") == 0.0


def test_the_page_has_every_row_and_says_which_are_missing(memory, paging, speed, recorded):
    known = Record(SIM, recorded).load()
    assert int(known.card["layers"]) == LAYERS
    measured = Measured(known.card, known.copies, paging, speed, memory)
    page = summary(SIM, measured)
    assert page.startswith("**Not a GPU page**")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert {*SIM.cells, *PAGING, *CONTESTANTS, *COPIES} <= set(lines)
    assert "not measured yet" in lines[f"{LLAMA}, AdamW, fp32, HiFT"]
    assert "out of memory in step 2, forward" in lines[TOO_LARGE]
    assert "it needs `pip install bitsandbytes`" in lines["paged 8-bit AdamW, 16-bit weights"]
    changed = dataclasses.replace(measured, memory={HIFT: {**memory[HIFT], "outcome": "failed somewhere: KeyError: 1"}})
    assert changed.failed == [HIFT]
    assert "failed somewhere: KeyError: 1" in summary(SIM, changed)


def test_the_page_of_a_gpu_compares_the_drivers_count_with_what_a_plan_says_is_needed(tmp_path):
    gib = 2**30
    figures = {
        "outcome": "ran",
        "planned": 10 * gib,
        "allocated": 11 * gib,
        "requested": 10 * gib,
        "driver_before": gib,
    }
    # needed are 11.3 GiB
    rows = {name: as_recorded({**figures, "driver": n * gib}) for name, n in zip(CUDA.cells, (11, 12), strict=False)}
    of_card = {"device": "cuda", "card": "H100", "total": 80 * gib, "driver": 1, "cuda": 12, "host": gib, "layers": 12}
    measured = Measured(as_recorded({**of_card, **dict.fromkeys(card.PACKAGES, 1)}), {}, {}, {}, rows)
    page = summary(CUDA, measured)
    assert page.startswith("H100, 80.00 GiB; ")
    assert "off the plan's peak by +10.00% in the median" in page
    assert f"in 1 of 2; the most beyond it is +0.70 GiB ({list(rows)[1]})" in page
    plot(CUDA, measured, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.cuda
@pytest.mark.skipif(CUDA.device.missing() is not None, reason=str(CUDA.device.missing()))
def test_the_same_in_small_runs_on_cuda():
    small = dataclasses.replace(SIM, device=CUDA.device)
    row = measure_memory(HIFT, small)
    assert row["outcome"] == "ran"
    assert 0 < row["requested"] <= row["allocated"] <= row["reserved"] <= row["driver"]
    assert row["pinned"] >= row["parked"] > 0
    contestants = in_rounds(CONTESTANTS, 1)
    waiting = [name for names in waiting_for_packages(contestants).values() for name in names]
    for measured in (
        measure_copies(COPIES[0], small),
        *(measure_paging(name, small, LAYERS) for name in in_rounds(PAGING, 1)),
        *(measure_speed(name, small, LAYERS) for name in contestants if name not in waiting),
    ):
        assert measured["outcome"] == "ran"


def test_an_error_ends_its_row_and_memory_that_ran_out_is_told_apart():
    watch = Watch(SIM.device)

    def raises(error):
        raise error

    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert outcome_of(lambda: None, watch) == "ran"
    assert outcome_of(lambda: raises(torch.OutOfMemoryError("CUDA out of memory.")), watch).startswith("out of memory ")
    assert outcome_of(lambda: raises(cublas), watch).startswith("out of memory ")
    assert outcome_of(lambda: raises(ValueError("no")), watch) == "failed while the model was built: ValueError: no"


def test_the_page_in_the_repository_is_made_of_the_record():
    assert (HERE / "summary.md").read_text() == summary(CUDA, Record(CUDA, HERE).load())


def test_without_a_gpu_it_ends_in_a_sentence_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here .* run this on a machine with one .*`--device sim`"):
        main(["--folder", str(tmp_path)])
    assert (tmp_path / "summary.md").read_text() == WAITS


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_second_call_measures_nothing_again(command, folder):
    first = files_of(folder)
    assert list(first) == ["card.csv", "copies.csv", "gpu_check.png", "summary.md"]
    command(folder)
    assert files_of(folder) == first
    command(folder, HIFT)
    second = files_of(folder)
    assert {name for name in second if second[name] != first.get(name)} == {"gpu_check.png", "memory.csv", "summary.md"}


def test_a_record_of_another_card_is_not_mixed_with_this_ones(command, folder):
    of_card = folder / "card.csv"
    of_card.write_text(of_card.read_text().replace("simulated accelerator", "H100"))
    with pytest.raises(SystemExit, match="card H100 there and simulated accelerator here.* `--again`"):
        command(folder)


def test_a_row_that_failed_ends_the_command_with_how_to_go_on(command, folder):
    of_copies = folder / "copies.csv"
    of_copies.write_text(of_copies.read_text().replace("ran", "failed somewhere", 1))
    with pytest.raises(SystemExit, match="1 rows failed.*`--again --only 'host to device, pinned'`"):
        command(folder)


@pytest.mark.slow
def test_the_whole_command_each_row_by_a_process_of_its_own(tmp_path):
    words = [sys.executable, "-m", "experiments.gpu_check", "--device", "sim", "--folder", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = files_of(tmp_path)
    with (tmp_path / "speed.csv").open(newline="") as file:
        measured = [row["name"] for row in csv.DictReader(file)]
    expected = in_rounds(CONTESTANTS, SIM.rounds)
    waiting = [name for names in waiting_for_packages(expected).values() for name in names]
    assert measured == [name for name in expected if name not in waiting]
    assert "not measured yet" not in "".join(line for line in done.stdout.splitlines() if "pip install" not in line)
    subprocess.run(words, cwd=ROOT, check=True)
    assert files_of(tmp_path) == first
