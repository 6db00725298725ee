"""Pinned memory takes the bytes of what is parked in it, and the user's allocator settings stay."""

import subprocess
import sys

import pytest
import torch

from hift_lightning.engine.pinned import can_pin
from hift_lightning.engine.tiers import HostMemory
from tests import simulated_accelerator as sim

MIB = 2**20
OWN = "pinned_max_cached_size_mb:64,pinned_max_round_threshold_mb:64"


def test_a_large_tensor_is_pinned_in_its_own_size(sim_device):
    # as the feed-forward matrices of LLaMA-7B, 11008 x 4096, which torch alone would give half as much again
    like = torch.empty(11008, 2048, device="meta")
    before = sim.pinned_memory_allocated()
    buffer = HostMemory().allocate(like, torch.float32, torch.device("sim"))
    assert buffer.tensor.is_pinned()
    assert like.nbytes == 86 * MIB
    assert sim.pinned_memory_allocated() - before == like.nbytes


def test_host_memory_is_pinned_whatever_the_default_device_is(sim_device):
    with torch.device("sim"):
        assert can_pin("sim")
        buffer = HostMemory().allocate(torch.empty(3), torch.float32, torch.device("sim"))
    assert buffer.tensor.device.type == "cpu"
    assert buffer.tensor.is_pinned()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", OWN),
        ("max_split_size_mb:200", f"max_split_size_mb:200,{OWN}"),
        # odd sizes must not be kept
        ("pinned_max_round_threshold_mb:1", "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"),
        ("pinned_max_cached_size_mb:1024", "pinned_max_cached_size_mb:1024"),
    ],
)
def test_what_the_user_has_set_of_the_allocator_stays(sim_device, before, after):
    program = (
        "import torch\n"
        "from hift_lightning.engine.pinned import _pin_in_own_size\n"
        "_pin_in_own_size()\n"
        "print(torch._C._accelerator_getAllocatorSettings())\n"
    )
    environment = {"PATH": "/usr/bin:/bin", **({"PYTORCH_ALLOC_CONF": before} if before else {})}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == after


def test_where_no_more_can_be_pinned_other_host_memory_is_taken(sim_device, monkeypatch):
    empty_like = torch.empty_like

    def no_pinned(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore of it")
        return empty_like(*args, **kwargs)

    assert can_pin("sim")
    monkeypatch.setattr(torch, "empty_like", no_pinned)
    with pytest.warns(
        match=r"can no longer be pinned \(CUDA error: out of memory\), so it is copied more slowly; make"
    ):
        buffer = HostMemory().allocate(torch.empty(3), torch.float32, torch.device("sim"))
    assert not buffer.tensor.is_pinned()
