"""Fixtures that give a test its device (see ``tests/devices.py``), or skip it where there is no such device."""

import os
import signal
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hift_lightning.engine.layers import LAYOUTS
from hift_lightning.engine.rotation import ORDERS
from hift_lightning.engine.tiers import TIERS
from tests.devices import DEVICES, Device

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on CUDA are left out unless `-m` names them; without a device they are then skipped with the reason.

    Once the simulated accelerator is loaded it is `torch.accelerator` for the whole process, in CUDA's place.
    """
    if "cuda" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cuda")])
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture
def sim_device() -> Iterator[Device]:
    """The simulated accelerator, for what only it can count: bytes copied, a cap to the byte."""
    yield from _device("sim")


@pytest.fixture(params=["sim", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device with memory of its own."""
    yield from _device(request.param)


@pytest.fixture(params=["cpu", "sim", CUDA])
def any_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The CPU too, which needs nothing; it keeps no count of its memory."""
    yield from _device(request.param)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """A shell lets its background jobs ignore SIGINT; here it raises KeyboardInterrupt, as in a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning lets it be ignored after a first one


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is gone after it."""
    for registry in (ORDERS, TIERS, LAYOUTS):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def _device(name: str) -> Iterator[Device]:
    device = DEVICES[name]()
    if reason := device.missing():
        pytest.skip(reason)
    with device.in_use():
        yield device
