"""FLOPs of a step, and times of interleaved cycles."""

import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.step_cost.contestants import CONTESTANTS, CYCLE, Contestant

WARM_UP_CYCLES = 2


def flops_of(contestant: str) -> float:
    """GFLOP per optimizer step, averaged over a cycle."""
    with FlopCounterMode(display=False) as counter:
        CONTESTANTS[contestant](CYCLE, lambda step: None)
    return float(counter.get_total_flops()) / CYCLE / 1e9


def _take_turns(contestant: Contestant, cycles: int, threads: int, turns: Connection) -> None:
    torch.set_num_threads(threads)
    started: float | None = None

    def before_step(step: int) -> None:
        nonlocal started
        if step % CYCLE:
            return
        if started is not None:
            turns.send((time.perf_counter() - started) / CYCLE * 1000)
        if step < cycles * CYCLE:
            turns.recv()
            started = time.perf_counter()

    contestant(cycles * CYCLE, before_step)


def times_of_all(contestants: Mapping[str, Contestant], cycles: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of the mean step of each cycle, by contestant; warm-up cycles are left out."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    for name, contestant in contestants.items():
        ours, theirs = context.Pipe()
        arguments = (contestant, cycles + WARM_UP_CYCLES, threads, theirs)
        processes.append(context.Process(target=_take_turns, args=arguments))
        connections[name] = ours
        processes[-1].start()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(cycles + WARM_UP_CYCLES):
        for name, connection in connections.items():
            connection.send(None)
            times[name].append(connection.recv())
    for process in processes:
        process.join()
    return {name: values[WARM_UP_CYCLES:] for name, values in times.items()}
