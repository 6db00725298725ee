"""State that consists of other tensors is parked as it is, and rows are cut only where state has rows."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from hift_lightning import HiFT, HiFTSettings
from hift_lightning.engine.elementwise import probe
from hift_lightning.engine.residency import Residency
from hift_lightning.engine.state_tensors import flatten_state, is_quantized, state_tensors
from tests.comparing import assert_same


class Codes(torch.Tensor):
    """An average as codes of 8 bits and their scale, as torchao and others keep it."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, values):
        scale = values.abs().amax().clamp(min=1e-12).view(1) / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["codes"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*tree_map_only(cls, lambda tensor: tensor.codes * tensor.scale, args), **(kwargs or {}))


class Momentum8bit(torch.optim.Optimizer):
    """Momentum in 8 bits, for tensors of at least so many elements."""

    def __init__(self, parameters, lr=0.1, least=64):
        super().__init__(parameters, {"lr": lr})
        self.least = least

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    average = state.get("average", torch.zeros_like(parameter)) * 0.9 + parameter.grad
                    state["average"] = Codes.of(average) if parameter.numel() >= self.least else average
                    parameter.sub_(average, alpha=group["lr"])


def train(device="cpu", optimizer=Momentum8bit, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).to(device)
    with HiFT(model, optimizer(model.parameters()), HiFTSettings(**settings)) as hift:
        for step in range(9):
            inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).to(device)
            model(inputs).square().mean().backward()
            hift.optimizer.step()
    return dict(model.state_dict()), hift


def test_state_is_taken_apart_and_put_together():
    state = {"step": 3, "average": Codes(torch.ones(4, 2, dtype=torch.int8), torch.ones(1)), "list": [torch.zeros(2)]}
    leaves, put_together = flatten_state(state)
    assert [leaf if isinstance(leaf, int) else (leaf.dtype, tuple(leaf.shape)) for leaf in leaves] == [
        3,
        (torch.int8, (4, 2)),
        (torch.float32, (1,)),
        (torch.float32, (2,)),
    ]
    again = put_together(leaves)
    assert type(again["average"]) is Codes
    assert again["average"].codes is state["average"].codes
    assert again["list"][0] is state["list"][0]
    assert sum(tensor.nbytes for tensor in state_tensors(state)) == 8 + 4 + 8
    assert is_quantized(leaves)
    assert not is_quantized([3, torch.zeros(()), torch.zeros(2, dtype=torch.bfloat16)])
    assert is_quantized([torch.zeros(2, dtype=torch.float8_e4m3fn)])


@pytest.mark.parametrize("update", ["block", "streamed"])
@pytest.mark.parametrize("place", ["memory", "files"])
def test_it_is_parked_as_it_is(any_device, place, update, tmp_path):
    offload = tmp_path if place == "files" else "cpu"
    weights, hift = train(any_device.type, offload=offload, update=update)
    expected, _ = train(any_device.type, offload="none")
    assert_same(weights, expected)
    codes, biases = 16 * 32 + 32 * 32 + 2 * 32, 32 + 32 + 2
    assert hift.residency.parked_bytes == codes + 3 * 4 + 4 * biases
    average = hift.optimizer.state[hift.model[0].weight]["average"]
    assert type(average) is Codes
    assert average.codes.device.type == "cpu"


def test_codes_and_scales_are_not_narrowed(any_device):
    optimizer = lambda parameters: Momentum8bit(parameters, least=1)  # noqa: E731
    assert_same(train(any_device.type, optimizer, parked_dtype="bfloat16")[0], train(any_device.type, optimizer)[0])


def test_loaded_codes_are_copied_and_keep_their_form(tmp_path):
    _, hift = train(offload=tmp_path)
    saved = hift.optimizer.state_dict()
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in hift.model.parameters()]
    optimizer = Momentum8bit(parameters)
    Residency(optimizer, tmp_path).load_state_dict(saved)
    for index, parameter in enumerate(parameters):
        loaded, original = optimizer.state[parameter], saved["state"][index]
        assert type(loaded["average"]) is type(original["average"])
        for tensor, other in zip(state_tensors(loaded), state_tensors(original), strict=True):
            assert torch.equal(tensor, other)
            assert tensor.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(("least", "elementwise"), [(1, False), (64, False), (4096, False), (10**6, True)])
def test_an_optimizer_that_keeps_codes_of_large_tensors_is_not_stepped_on_rows(least, elementwise):
    parameter, large = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(128, 64))
    trial = probe(Momentum8bit([parameter, large], least=least), parameter, torch.float32)
    assert trial.separate
    assert trial.elementwise is elementwise
