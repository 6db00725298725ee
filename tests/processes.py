"""New processes for tests: they are forked from one that has imported what takes long, and has done nothing else.

`run` has several of them form one process group, as the ranks of a job do.
"""

import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

IMPORTED = ["lightning.pytorch", "transformers", "hift_lightning.train", "hift_lightning.planner", "pytest"]


def forking() -> Any:
    """The context of `multiprocessing` whose processes begin with these modules."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """The results of `function(*args)` on each of `ranks` new processes joined by gloo, by rank.

    `function` must stand in a module (it is pickled), and so must what it returns. In it, RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as `torchrun` sets them, and the process group is
    initialised already, which Lightning accepts.

    Raises:
        RankError: a rank raised (the others are ended at once), died, or ran longer than `timeout` seconds.
    """
    context = forking()
    port = free_port()
    processes, pipes = [], []
    for rank in range(ranks):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, ranks, port, sending, function, args, timeout))
        process.start()
        sending.close()
        processes.append(process)
        pipes.append(receiving)
    try:
        results = _collect(processes, pipes, time.monotonic() + timeout)
        for process in processes:
            process.join(timeout)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _collect(processes: list[Any], pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting)} did not finish in time")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                raised, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            if raised:
                # what this rank raised may only be that another is gone, whose sockets close before it has an exit code
                multiprocessing.connection.wait([processes[other].sentinel for other in waiting], 1.0)
                if dead := [other for other in waiting if processes[other].exitcode]:
                    raise RankError(f"rank {dead[0]} died, and rank {rank} raised\n{value}")
                raise RankError(f"rank {rank} raised\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, ranks: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        GROUP_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        TORCHELASTIC_RUN_ID="tests",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    failed = False
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        # by value: a pipe would hand tensors over in memory that goes with this process
        answer = pickle.dumps((False, function(*args)))
    except BaseException:
        failed = True
        answer = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
    if torch.distributed.is_initialized() and not failed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
