"""Weights whose dimensions lie in memory in another order, beside fused kernels, which go by the memory alone."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from hift_lightning import HiFT, HiFTSettings
from hift_lightning.engine.errors import ConfigurationError

CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 2))


def trained(device, fused, settings=None):
    torch.manual_seed(0)
    model = copy.deepcopy(CONVOLUTIONS).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    inputs = torch.randn(4, 3, 8, 8).to(device, memory_format=torch.channels_last)
    engine = HiFT(model, optimizer, settings or HiFTSettings(group_size=100, offload="none"))
    with engine:
        for _ in range(3):
            model(inputs).square().mean().backward()
            optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": "folder"},
        {"offload": "folder", "update": "streamed"},
        {"parked_dtype": "float32", "update": "streamed", "window": "8KiB"},
        {"update": "fused", "window": "8KiB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_state_comes_back_in_the_order_of_its_weight(device, fused, settings, tmp_path):
    settings = {**settings, **({"offload": str(tmp_path)} if "offload" in settings else {})}
    for kind in ("cpu", device.type):
        got = trained(kind, fused, HiFTSettings(group_size=100, **settings))
        assert all(map(torch.equal, got, trained(kind, fused))), kind


@pytest.mark.parametrize("settings", [{"parked_dtype": "float32"}, {"offload": "folder"}], ids=str)
def test_state_of_a_transposed_weight_is_whole_where_it_is_parked(settings, tmp_path):
    settings = {**settings, **({"offload": str(tmp_path)} if "offload" in settings else {})}
    states = {}
    for update in ("block", "streamed"):
        torch.manual_seed(0)
        model = nn.Linear(64, 32, bias=False)
        model.weight = nn.Parameter(model.weight.detach().T.contiguous().T)
        optimizer = torch.optim.AdamW(model.parameters())
        with HiFT(model, optimizer, HiFTSettings(update=update, window="8KiB", **settings)):
            for _ in range(2):
                model(torch.arange(64.0)[None]).square().sum().backward()
                optimizer.step()
        (states[update],) = optimizer.state_dict()["state"].values()
    assert all(torch.equal(value, states["block"][key]) for key, value in states["streamed"].items())


@pytest.mark.parametrize("fused", [False, True])
def test_fused_kernels_are_given_rows_that_lie_in_memory_by_themselves(fused):
    model = nn.Linear(64, 32, bias=False)
    model.weight = nn.Parameter(model.weight.detach().T.contiguous().T)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    settings = HiFTSettings(update="streamed", parked_dtype="float32", window="8KiB")
    with HiFT(model, optimizer, settings):
        for step in range(2):
            model(torch.ones(1, 64)).sum().backward()
            refused = r"on parts of a tensor of shape \(32, 64\), whose state"  # told when there is state
            with pytest.raises(ConfigurationError, match=refused) if fused and step else contextlib.nullcontext():
                optimizer.step()
