"""The starter of processes tells what happened in them."""

import os
import signal
import time

import pytest
import torch

from tests.processes import RankError, run


def _sum_of_ranks(scale):
    total = torch.tensor(float(torch.distributed.get_rank()) * scale)
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), total.item()


def _tensor():
    return torch.full((1000,), float(torch.distributed.get_rank()))


def _fails_on_one_rank():
    if torch.distributed.get_rank() == 1:
        raise ValueError("not today")
    torch.distributed.barrier()


def _is_killed():
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def _sleeps():
    time.sleep(60)


def test_results_come_by_rank():
    assert run(_sum_of_ranks, 2, 10.0) == [(0, 10.0), (1, 10.0)]


def test_tensors_come_too():
    assert [tensor.sum().item() for tensor in run(_tensor, 2)] == [0.0, 1000.0]


def test_the_error_of_a_rank_comes_with_its_traceback_and_ends_the_others():
    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*_fails_on_one_rank.*not today"):
        run(_fails_on_one_rank, 2)


def test_a_killed_rank_is_an_error():
    with pytest.raises(RankError, match="rank 1 died"):
        run(_is_killed, 2)


def test_ranks_that_take_too_long_are_ended():
    with pytest.raises(RankError, match="did not finish in time"):
        run(_sleeps, 1, timeout=3.0)
