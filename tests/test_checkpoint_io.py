"""Checkpoint files: never half, never without a check, and no code in them is run."""

import ast
import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.errors import ConfigurationError
from tests.comparing import assert_same

ROOT = Path(__file__).parents[1]
CHECKPOINT = {
    "state_dict": {"weight": torch.arange(1000.0), "half": torch.ones(3, dtype=torch.bfloat16)},
    "hift": {"engines": [{"masters": {"weight": torch.zeros(5)}}], "random": [torch.arange(4)]},
    "callbacks": {"best": torch.tensor(1.5)},
    "epoch": 3,
}


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def io():
    return StreamingCheckpointIO()


@pytest.fixture
def saved(io, tmp_path):
    path = tmp_path / "saved.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    return path


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain.ckpt", "würde $x.ckpt", "sub/folder/deep.ckpt"])
def test_what_is_saved_is_loaded_and_only_its_owner_may_read_it(io, name, tmp_path):
    io.save_checkpoint(CHECKPOINT, tmp_path / name)
    assert_same(io.load_checkpoint(tmp_path / name), CHECKPOINT)
    assert_same(torch.load(tmp_path / name, weights_only=True), CHECKPOINT)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_a_file_url_is_a_local_path(io, tmp_path):
    io.save_checkpoint(CHECKPOINT, f"file://{tmp_path}/saved.ckpt")
    assert_same(io.load_checkpoint(f"file://{tmp_path}/saved.ckpt"), CHECKPOINT)
    assert stat.S_IMODE((tmp_path / "saved.ckpt").stat().st_mode) == 0o600


def test_the_temporary_file_is_owner_only_beside_it_and_nobody_takes_it_for_a_checkpoint(io, tmp_path, monkeypatch):
    save, seen = torch.save, []

    def look(checkpoint, file):
        save(checkpoint, file)
        seen.extend(tmp_path.iterdir())

    monkeypatch.setattr(torch, "save", look)
    io.save_checkpoint(CHECKPOINT, tmp_path / "hpc_ckpt_1.ckpt")
    (temporary,) = seen
    assert not temporary.match("*.ckpt")
    assert temporary.suffix != ".ckpt"
    assert "ckpt" not in temporary.name
    assert temporary.name.startswith(".")


def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_folder_afterwards(io, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    io.save_checkpoint(CHECKPOINT, tmp_path / "saved.ckpt")
    assert calls == ["file", "replace", "folder"]


def test_checksums_are_written_also_where_they_are_turned_off(io, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        io.save_checkpoint(CHECKPOINT, tmp_path / "saved.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    io.check(tmp_path / "saved.ckpt")


@pytest.mark.parametrize("limit", [0, 200, 5000, 70_000])
def test_a_full_disk_ends_in_a_sentence_and_the_former_file_stays(io, saved, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # beyond it the kernel refuses room, as on a full disk
    try:
        with pytest.raises(ConfigurationError) as failure:
            io.save_checkpoint({"state_dict": {"weight": torch.ones(20_000)}}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(failure.value)
    assert str(saved) in message
    assert "EFBIG: File too large" in message
    assert "the one saved there before is unharmed" in message
    assert "make room" in message
    assert "\n" not in message
    assert list(saved.parent.iterdir()) == [saved]
    assert_same(io.load_checkpoint(saved), CHECKPOINT)


def test_a_disk_that_is_really_full_ends_in_a_sentence(io, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        io.save_checkpoint(CHECKPOINT, disk / "saved.ckpt")
        with pytest.raises(ConfigurationError, match=r"could not be saved \(ENOSPC: No space left on device\)"):
            io.save_checkpoint({"state_dict": {"weight": torch.ones(100_000)}}, disk / "saved.ckpt")
        assert_same(io.load_checkpoint(disk / "saved.ckpt"), CHECKPOINT)
        assert [path.name for path in disk.iterdir()] == ["saved.ckpt"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_cannot_be_written_to_is_named(io, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "saved.ckpt", Path("/proc/saved.ckpt"), tmp_path):
        with pytest.raises(ConfigurationError, match=r"could not be saved \(E[A-Z]+: .*mend the folder") as failure:
            io.save_checkpoint(CHECKPOINT, path)
        assert f"`{path}`" in str(failure.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_read_only_folder_is_named(io, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="EACCES"):
        io.save_checkpoint(CHECKPOINT, tmp_path / "saved.ckpt")


@pytest.mark.parametrize("when", ["pickling", "writing"])
def test_ctrl_c_while_saving_stays_ctrl_c_and_the_former_file_stays(io, saved, when, monkeypatch):
    class Interrupts:
        def __reduce__(self):
            raise KeyboardInterrupt

    checkpoint = {"state_dict": {}, "other": Interrupts()}
    if when == "writing":
        save = torch.save

        class InterruptedFile:
            def __init__(self, file):
                self.file, self.writes = file, 0

            def write(self, data):
                self.writes += 1
                if self.writes == 5:
                    raise KeyboardInterrupt
                return self.file.write(data)

            def flush(self):
                self.file.flush()

        monkeypatch.setattr(torch, "save", lambda checkpoint, file: save(checkpoint, InterruptedFile(file)))
        checkpoint = CHECKPOINT
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint(checkpoint, saved)
    monkeypatch.undo()
    assert list(saved.parent.iterdir()) == [saved]
    assert_same(io.load_checkpoint(saved), CHECKPOINT)


def test_what_cannot_be_pickled_keeps_its_own_error(io, saved):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        io.save_checkpoint({"state_dict": {}, "other": lambda: None}, saved)
    assert list(saved.parent.iterdir()) == [saved]


SAVES_FOR_EVER = """
import sys, time, torch
from hift_lightning.checkpoint_io import StreamingCheckpointIO

class Waits:
    def __reduce__(self):
        print("saving", flush=True)
        time.sleep(600)

StreamingCheckpointIO().save_checkpoint({"state_dict": {}, "other": Waits()}, sys.argv[1])
"""


def test_the_leftover_of_a_killed_process_goes_at_the_next_save_and_that_of_a_living_one_stays(io, saved):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOR_EVER, str(saved)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "saving\n"
        (temporary,) = set(saved.parent.iterdir()) - {saved}
        io.save_checkpoint(CHECKPOINT, saved)
        assert temporary.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert temporary.exists()
        assert_same(io.load_checkpoint(saved), CHECKPOINT)  # harmless
        io.save_checkpoint(CHECKPOINT, saved)
        assert list(saved.parent.iterdir()) == [saved]
    finally:
        process.kill()
        process.wait()


def saves_for_ever(folder, started):
    io = StreamingCheckpointIO()
    step = io.load_checkpoint(folder / "last.ckpt")["step"] if (folder / "last.ckpt").exists() else 0
    started.set()
    while True:
        step += 1
        io.save_checkpoint(
            {"state_dict": {"weight": torch.full((16_000,), float(step))}, "step": step}, folder / "last.ckpt"
        )


def test_killed_at_100_random_moments_the_file_is_always_whole_and_nothing_piles_up(io, tmp_path):
    fork, draw, steps = multiprocessing.get_context("fork"), random.Random(0), [0]
    for _ in range(100):
        started = fork.Event()
        process = fork.Process(target=saves_for_ever, args=(tmp_path, started))
        process.start()
        assert started.wait(60)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        if (tmp_path / "last.ckpt").exists():
            loaded = io.load_checkpoint(tmp_path / "last.ckpt")
            assert torch.equal(loaded["state_dict"]["weight"], torch.full((16_000,), float(loaded["step"])))
            assert loaded["step"] >= steps[-1]
            steps.append(loaded["step"])
        assert [path.name for path in tmp_path.glob("*.ckpt")] in ([], ["last.ckpt"])
        assert len(list(tmp_path.iterdir())) <= 2
    assert steps[-1] >= 100
    io.save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_other_file_systems_are_left_to_lightning_but_load_weights_only(io, tmp_path):
    io.save_checkpoint(CHECKPOINT, "memory://runs/saved.ckpt")
    assert_same(io.load_checkpoint("memory://runs/saved.ckpt"), CHECKPOINT)
    io.save_checkpoint({"state_dict": {}, "other": Malicious(tmp_path / "ran")}, "memory://runs/bad.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        io.load_checkpoint("memory://runs/bad.ckpt")
    assert not (tmp_path / "ran").exists()
    io.remove_checkpoint("memory://runs/saved.ckpt")


def test_storage_options_are_refused_as_by_lightning(io, tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(CHECKPOINT, tmp_path / "saved.ckpt", storage_options={})


# --- loading --------------------------------------------------------------------------------------------------------


def write_another_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.txt", "text")


def write_a_repacked_checkpoint(path):
    torch.save(CHECKPOINT, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, record in records.items():
            file.writestr(name, record)


def write_records_of_nothing(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", "no pickle")
        file.writestr("archive/version", "3")


def write_another_byteorder(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/byteorder", "middle")
        file.writestr("archive/version", "3")


def write_torch_script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), path)


def write_the_old_format(path):
    torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False)


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "not whole (the file is empty)"),
    "text": (lambda path: path.write_text("no checkpoint"), "is no checkpoint: it begins with b'no c'"),
    "another zip": (write_another_zip, "is no checkpoint: it is a zip archive"),
    "repacked": (write_a_repacked_checkpoint, "is no checkpoint: it is a zip archive"),
    "records of nothing": (write_records_of_nothing, "foreign.ckpt` holds something else than tensors"),
    "TorchScript": (write_torch_script, "is no checkpoint: it is a zip archive"),
    "records of another order": (write_another_byteorder, "foreign.ckpt` cannot be loaded (Unknown endianness"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})), "is no checkpoint: it begins with"),
    "the old format": (write_the_old_format, "torch older than 1.6 must be saved anew"),
    "a folder": (lambda path: path.mkdir(), "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_ends_in_one_sentence(io, kind, tmp_path):
    write, flaw = FOREIGN[kind]
    path = tmp_path / "foreign.ckpt"
    write(path)
    with pytest.raises(ConfigurationError) as failure:
        io.load_checkpoint(path)
    assert flaw in str(failure.value)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_file_that_is_not_there_is_told_as_lightning_does(io, tmp_path):
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        io.load_checkpoint(tmp_path / "missing.ckpt")


def test_a_file_cut_short_anywhere_ends_in_one_sentence(io, saved):
    whole = saved.read_bytes()
    for length in {1, 3, 4, 30, len(whole) // 2, len(whole) - 100, len(whole) - 1}:
        saved.write_bytes(whole[:length])
        with pytest.raises(ConfigurationError, match=r"is not whole|is no checkpoint"):
            io.load_checkpoint(saved)


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_flipped_bit_is_found_or_changes_nothing_that_is_loaded(io, saved):
    """Half of the bits of the directory at the end of the file, and as many of the rest."""
    with zipfile.ZipFile(saved) as file:
        directory = 8 * file.start_dir
        marks = 8 * (directory // 8 + 38)  # of the first record: whether it is a folder
    nbits = 8 * saved.stat().st_size
    draw = random.Random(0)
    bits = draw.sample(range(directory), (nbits - directory) // 2)
    bits += draw.sample(range(directory, nbits), (nbits - directory) // 2)
    bits += range(marks, marks + 8)
    messages = []
    for bit in bits:
        flip(saved, bit)
        try:
            loaded = io.load_checkpoint(saved)
        except ConfigurationError as error:
            messages.append(str(error))
        else:
            assert_same(loaded, CHECKPOINT)
        flip(saved, bit)
    assert_same(io.load_checkpoint(saved), CHECKPOINT)
    assert len(messages) > len(bits) / 2
    assert not [message for message in messages if "\n" in message]


@pytest.mark.slow
def test_every_single_flipped_bit_is_found_or_changes_nothing_that_is_loaded(io, tmp_path):
    path = tmp_path / "small.ckpt"
    checkpoint = {"state_dict": {"weight": torch.arange(20.0)}, "callbacks": {"best": torch.tensor(1.5)}, "epoch": 3}
    io.save_checkpoint(checkpoint, path)
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        with contextlib.suppress(ConfigurationError):
            assert_same(io.load_checkpoint(path), checkpoint)
        flip(path, bit)


def test_every_flipped_bit_of_a_weight_is_found_and_the_record_is_named(io, saved):
    whole = saved.read_bytes()
    start = whole.index(CHECKPOINT["state_dict"]["weight"].numpy().tobytes())
    for bit in random.Random(0).sample(range(8 * start, 8 * (start + 4000)), 100):
        flip(saved, bit)
        torch.load(saved, weights_only=True)  # which finds nothing
        with pytest.raises(ConfigurationError, match="its record `archive/data/0` is damaged"):
            io.load_checkpoint(saved)
        flip(saved, bit)


def test_a_malicious_file_runs_no_code_and_ends_in_one_sentence(io, tmp_path):
    ran = tmp_path / "ran"
    io.save_checkpoint({"state_dict": {}, "other": Malicious(ran)}, tmp_path / "zip.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Malicious(ran)))
    torch.save({"other": Malicious(ran)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.glob("*.ckpt")):
        with pytest.raises(ConfigurationError) as failure:
            io.load_checkpoint(path)
        assert "\n" not in str(failure.value)
        if path.name == "zip.ckpt":
            assert "holds something else than tensors and primitives (`io.open`)" in str(failure.value)
            assert "`weights_only=False`" in str(failure.value)
    assert not ran.exists()


def test_objects_are_loaded_by_who_asks_for_it(io, tmp_path):
    io.save_checkpoint({"state_dict": {}, "path": ast.Module}, tmp_path / "saved.ckpt")
    with pytest.raises(ConfigurationError, match=r"`_ast.Module`|`ast.Module`"):
        io.load_checkpoint(tmp_path / "saved.ckpt", weights_only=None)
    assert io.load_checkpoint(tmp_path / "saved.ckpt", weights_only=False)["path"] is ast.Module


def mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def test_weights_and_state_are_parts_of_the_mapped_file_and_nothing_else_is(io, saved):
    loaded = io.load_checkpoint(saved)
    assert mapped(saved)
    kept = loaded["callbacks"], loaded["hift"]["random"]
    del loaded
    assert not mapped(saved)
    assert_same(kept[0], CHECKPOINT["callbacks"])
    assert torch.equal(kept[1][0], torch.arange(4))


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(io, tmp_path, monkeypatch):
    import fcntl

    lock, taken = fcntl.flock, []

    def late(descriptor, operation):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    io.save_checkpoint(CHECKPOINT, tmp_path / "saved.ckpt")
    assert len(taken) == 1
    assert_same(io.load_checkpoint(tmp_path / "saved.ckpt"), CHECKPOINT)


def test_a_file_system_without_locks_saves_too(io, tmp_path, monkeypatch):
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".hift-saving-leftover").write_bytes(b"")
    io.save_checkpoint(CHECKPOINT, tmp_path / "saved.ckpt")
    assert_same(io.load_checkpoint(tmp_path / "saved.ckpt"), CHECKPOINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hift-saving-leftover", "saved.ckpt"]
