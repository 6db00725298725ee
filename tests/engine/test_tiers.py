"""Buffers of parked tensors in host memory and in files, and what happens when a file is not as it was left."""

import errno
import gc
import os
import stat
import subprocess
import sys

import pytest
import torch

from hift_lightning.engine.errors import ConfigurationError, ParkedStateError
from hift_lightning.engine.tiers import Files, HostMemory

CPU = torch.device("cpu")


@pytest.fixture(params=["memory", "files"])
def tier(request, tmp_path):
    return HostMemory() if request.param == "memory" else Files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4), (0, 3)])
def test_what_is_written_is_read(tier, dtype, shape):
    values = (torch.randn(shape) * 50).to(dtype)
    buffer = tier.allocate(values, dtype, CPU)
    buffer.write(values)
    assert torch.equal(buffer.read(), values)
    assert torch.equal(buffer.tensor, values)


def test_rows_are_written_and_read_apart(tier):
    values = torch.arange(30.0).view(10, 3)
    buffer = tier.allocate(values, torch.float32, CPU)
    for rows in (slice(6, 10), slice(0, 4), slice(4, 6)):
        buffer.write(values[rows], rows)
    assert torch.equal(buffer.read(), values)
    assert torch.equal(buffer.read(slice(3, 7)), values[3:7])


def test_a_narrower_dtype_rounds(tier):
    values = torch.randn(7, 2)
    buffer = tier.allocate(values, torch.bfloat16, CPU)
    buffer.write(values)
    assert torch.equal(buffer.read(), values.bfloat16())


def test_files_are_the_owners_alone_and_go_when_nothing_refers_to_them(tmp_path):
    tier = Files(tmp_path)
    buffer = tier.allocate(torch.zeros(8), torch.float32, CPU)
    folder = tier.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(buffer.path.stat().st_mode) == 0o600
    del tier
    gc.collect()
    assert buffer.path.exists()
    tensor = buffer.tensor
    del buffer
    gc.collect()
    assert not folder.exists()
    assert torch.equal(tensor, torch.zeros(8))  # what was handed out stays readable


def test_the_file_of_a_buffer_goes_with_it_and_the_tensor_stays(tmp_path):
    tier = Files(tmp_path)
    buffer = tier.allocate(torch.zeros(8), torch.float32, CPU)
    buffer.write(torch.arange(8.0))
    path, tensor = buffer.path, buffer.tensor
    del buffer
    gc.collect()
    assert not path.exists()
    assert torch.equal(tensor, torch.arange(8.0))
    assert tier.folder.exists()


def test_a_deleted_file_is_told_of(tmp_path):
    buffer = Files(tmp_path).allocate(torch.zeros(8), torch.float32, CPU)
    os.unlink(buffer.path)
    with pytest.raises(OSError, match="a file of parked state is gone") as error:
        buffer.read()
    assert str(buffer.path) in str(error.value)


def test_a_shortened_file_is_told_of(tmp_path):
    buffer = Files(tmp_path).allocate(torch.zeros(8), torch.float32, CPU)
    os.truncate(buffer.path, 20)
    with pytest.raises(OSError, match="a file of parked state is too short"):
        buffer.read()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere"):
        Files(tmp_path / "nowhere")


def test_a_full_disk_is_told_of_when_room_is_taken(tmp_path):
    # a limit on the size of files makes the kernel refuse room as a full disk does
    code = f"""
import resource, signal, torch
from hift_lightning.engine.tiers import Files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
tier = Files({str(tmp_path)!r})
tier.allocate(torch.zeros(100), torch.float32, torch.device("cpu"))
try:
    tier.allocate(torch.zeros(1000), torch.float32, torch.device("cpu"))
except OSError as error:
    print("told:", error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "told:" in out.stdout
    assert "no room for 4,000 bytes of parked state" in out.stdout


def test_parked_files_are_not_anonymous_memory(tmp_path):
    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    if not os.path.exists("/proc/self/status"):
        pytest.skip("RssAnon is read from /proc")
    size = 64 * 2**20
    values = torch.ones(size // 4)
    tier = Files(tmp_path)
    before = anonymous()
    buffers = [tier.allocate(values, torch.float32, CPU) for _ in range(4)]
    for buffer in buffers:
        buffer.write(values)
    assert all(buffer.tensor[-1] == 1 for buffer in buffers)
    assert anonymous() - before < size // 8


PARKS_AND_WAITS = """
import sys, time, torch
from hift_lightning.engine.tiers import Files
tier = Files(sys.argv[1])
buffer = tier.allocate(torch.zeros(8), torch.float32, torch.device("cpu"))
print("parked", flush=True)
time.sleep(100)
"""


def test_the_files_of_a_killed_process_go_when_the_next_one_parks_there_and_not_before(tmp_path):
    command = [sys.executable, "-c", PARKS_AND_WAITS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "parked\n"
        (foreign,) = tmp_path.glob("*/*.bin")
        first = Files(tmp_path)
        assert foreign.exists()
        process.kill()
    second = Files(tmp_path)
    assert not foreign.parent.exists()
    assert {first.folder, second.folder} == set(tmp_path.iterdir())


def test_a_file_that_the_disk_refuses_is_named(tmp_path, monkeypatch):
    buffer = Files(tmp_path).allocate(torch.zeros(8), torch.float32, CPU)

    def refuse(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(ParkedStateError, match=r"can be read or written no more: Input/output error.*\.bin"):
        buffer.write(torch.ones(8))
