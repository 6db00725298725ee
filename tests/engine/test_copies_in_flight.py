"""Copies that a device makes later than they are asked for are waited for.

The simulated accelerator has made them when a call returns, so what is held here is the order of the calls.
"""

import pytest
import torch
from torch import nn

from hift_lightning import HiFT, HiFTSettings
from hift_lightning.engine import update
from hift_lightning.engine.residency import Residency
from hift_lightning.engine.streams import SideStream
from hift_lightning.engine.update import WholeUpdate


def stack(width=64, depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).to("sim")


def noted(monkeypatch, calls, owner, name):
    """Note in `calls` when a method is called."""
    method = getattr(owner, name)

    def noting(self, *args, **kwargs):
        calls.append(name)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, noting)


def backward(model, hift):
    with hift._update.in_last_backward():
        model(torch.ones(2, 64, device="sim")).square().mean().backward()
    hift.after_backward()


def test_state_that_came_for_gradients_that_were_dropped_is_waited_for_before_it_is_parked(sim_device, monkeypatch):
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    calls = []
    with HiFT(model, optimizer, HiFTSettings(group_size=3)) as hift:
        assert isinstance(hift._update, WholeUpdate)
        for _ in range(2):
            backward(model, hift)
            optimizer.step()
        for name in ("page_in", "park"):
            noted(monkeypatch, calls, Residency, name)
        noted(monkeypatch, calls, SideStream, "join")
        backward(model, hift)
        assert "page_in" in calls
        optimizer.zero_grad()
        optimizer.step()
        assert calls.index("join") < calls.index("park")
        assert hift._update._prefetch._moments == []
        calls.clear()
        backward(model, hift)
        assert "page_in" in calls  # what was learned before holds


def test_where_state_does_not_fit_beside_backward_it_comes_at_the_update(sim_device, monkeypatch):
    def trained(fails):
        model = stack()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with HiFT(model, optimizer, HiFTSettings(group_size=3)) as hift:
            for step in range(4):
                with monkeypatch.context() as patch:
                    if fails and step > 1:
                        patch.setattr("hift_lightning.engine.prefetch.torch.empty_like", out_of_memory)
                    backward(model, hift)
                if step > 0:
                    assert all(map(hift.residency.is_parked, model.parameters())) == (fails or step == 1)
                optimizer.step()
        return [parameter.cpu() for parameter in model.parameters()]

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room in one piece")

    assert all(map(torch.equal, trained(fails=False), trained(fails=True)))


def test_all_pieces_go_through_one_stream(sim_device, monkeypatch):
    made = []
    monkeypatch.setattr(update, "SideStream", lambda device: made.append(device) or SideStream(device))
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with HiFT(model, optimizer, HiFTSettings(update="streamed", window="16KiB")):
        for _ in range(4):
            model(torch.ones(2, 64, device="sim")).square().mean().backward()
            optimizer.step()
    assert len(made) == 1


def test_the_window_is_waited_for_when_a_step_fails(sim_device, monkeypatch):
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with HiFT(model, optimizer, HiFTSettings(update="streamed", window="16KiB", group_size=3)):
        model(torch.ones(2, 64, device="sim")).square().mean().backward()
        optimizer.step()
        calls = []
        noted(monkeypatch, calls, SideStream, "join")

        def failing(optimizer):
            raise torch.OutOfMemoryError("none left")

        monkeypatch.setattr(update, "raw_step", failing)
        model(torch.ones(2, 64, device="sim")).square().mean().backward()
        with pytest.raises(torch.OutOfMemoryError, match="none left"):
            optimizer.step()
        assert calls == ["join"]


def test_masters_are_waited_for_before_they_are_given_out(sim_device, monkeypatch):
    calls = []
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    hift = HiFT(model, optimizer, HiFTSettings(master_weights=True))
    monkeypatch.setattr(torch.sim, "synchronize", lambda device=None: calls.append("synchronize"))
    hift.residency.keep_master(model[0].weight, model[0].weight.detach())
    calls.clear()
    hift.state_dict()
    assert calls == ["synchronize"]


@pytest.mark.parametrize(
    ("stats", "told"),
    [
        (
            {"allocated_bytes.all.current": 3, "allocated_bytes.all.peak": 5, "allocated_bytes.all.allocated": 9},
            (3, 5, 9),
        ),
        # as CUDA's caching allocator, whose blocks are larger than what was asked for
        (
            {
                f"{kind}.all.{name}": value
                for kind, values in (("allocated_bytes", (4, 8, 16)), ("requested_bytes", (3, 5, 9)))
                for name, value in zip(("current", "peak", "allocated"), values, strict=True)
            },
            (3, 5, 9),
        ),
        # as `backend:cudaMallocAsync`
        ({"allocated_bytes.all.current": 3, "allocated_bytes.all.peak": 5, "allocated_bytes.all.allocated": 0}, None),
        ({}, None),
    ],
)
def test_memory_is_told_where_all_counts_are_kept(sim_device, monkeypatch, stats, told):
    monkeypatch.setattr(torch.sim, "memory_stats", lambda device: stats)
    assert SideStream(torch.device("sim")).memory() == told
