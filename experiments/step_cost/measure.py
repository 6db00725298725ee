"""FLOPs of a step, and times of interleaved cycles."""

import multiprocessing
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.memory.task import Task
from experiments.step_cost.contestants import CONTESTANTS

WARM_UP_CYCLES = 1
"""Before them, FLOPs are counted for a cycle, so that everything has been done once."""


@dataclass
class Cost:
    """What a contestant's steps cost."""

    gflop: float
    """Of the mean step of a cycle."""
    ms: list[float] = field(default_factory=list)
    """Milliseconds of the mean step, by cycle."""


def gflop_of(contestant: str, task: Task) -> float:
    """GFLOP per optimizer step (matrix products, attention included), averaged over a cycle."""
    with FlopCounterMode(display=False) as counter:
        CONTESTANTS[contestant](task, task.cycle, lambda step: None)
    return float(counter.get_total_flops()) / task.cycle / 1e9


def _take_turns(contestant: str, task: Task, cycles: int, threads: int, turns: Connection) -> None:
    torch.set_num_threads(threads)
    started: float | None = None

    def before_step(step: int) -> None:
        nonlocal started
        if step % task.cycle:
            return
        if started is not None:
            turns.send((time.perf_counter() - started) / task.cycle * 1000)
        if step < cycles * task.cycle:
            turns.recv()
            started = time.perf_counter()

    turns.recv()
    try:
        turns.send(gflop_of(contestant, task))
        CONTESTANTS[contestant](task, cycles * task.cycle, before_step)
    except Exception as error:
        turns.send(f"{type(error).__name__}: {error}")
        raise


def costs(contestants: Collection[str], task: Task, cycles: int, threads: int) -> dict[str, Cost]:
    """What a step of each contestant costs; they take turns, a cycle each, while the others wait.

    Args:
        contestants: names among `CONTESTANTS`.
        task: the model and the batches.
        cycles: that are measured; `WARM_UP_CYCLES` come before them.
        threads: of each contestant.

    Raises:
        RuntimeError: a contestant could not train.
    """
    # processes are forked from one that has imported what takes long, and has done nothing else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "experiments.step_cost.contestants"])
    connections: dict[str, Connection] = {}
    processes = []
    for name in contestants:
        ours, theirs = context.Pipe()
        arguments = (name, task, cycles + WARM_UP_CYCLES, threads, theirs)
        process = context.Process(target=_take_turns, args=arguments, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections[name] = ours

    def turn(name: str) -> Any:
        connections[name].send(None)
        answer = connections[name].recv()
        if isinstance(answer, str):
            raise RuntimeError(f"`{name}` does not train here: {answer}")
        return answer

    found = {name: Cost(turn(name)) for name in contestants}
    for number in range(WARM_UP_CYCLES + cycles):
        for name in contestants:
            milliseconds = turn(name)
            if number >= WARM_UP_CYCLES:
                found[name].ms.append(milliseconds)
    for process in processes:
        process.join()
    return found
