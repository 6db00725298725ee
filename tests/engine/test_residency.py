"""Residency on the CPU: nothing is copied, and the record is right. Copies are tested on a second device."""

import copy

import pytest
import torch

from hift_lightning import HiFT, HiFTSettings
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.residency import Residency


def stepped(make=torch.optim.AdamW, **arguments):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = make(parameters, lr=0.1, **arguments)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameters, optimizer


def test_on_the_cpu_parking_copies_nothing():
    (first, second), optimizer = stepped()
    residency = Residency(optimizer)
    tensors = dict(optimizer.state[first])
    residency.page_in([first])
    residency.park([first])
    assert all(optimizer.state[first][key] is value for key, value in tensors.items())
    assert residency.bytes_paged_in == residency.bytes_parked == 0


def test_bytes_and_places_are_those_of_the_state():
    (first, second), optimizer = stepped()
    residency = Residency(optimizer)
    assert residency.is_parked(first)
    assert residency.parked_bytes == 2 * 4 * (3 + 4) + 2 * 4
    residency.page_in([first])
    assert not residency.is_parked(first)
    assert residency.state_bytes(first) == 2 * 4 * 3 + 4
    assert residency.parked_bytes == 2 * 4 * 4 + 4


def test_state_built_in_a_constructor_counts_as_parked():
    parameter = torch.nn.Parameter(torch.ones(3))
    residency = Residency(torch.optim.Adagrad([parameter]))
    assert residency.is_parked(parameter)


@pytest.mark.parametrize("again", ["adopted twice", "saved and loaded"])
def test_state_that_is_parked_in_bf16_is_on_the_device_as_the_optimizer_made_it(again):
    (first, second), optimizer = stepped()
    residency = Residency(optimizer, parked_dtype="bfloat16")
    if again == "adopted twice":
        residency.adopt_state()
    else:
        (first, second), loaded = stepped()
        residency = Residency(loaded, parked_dtype="bfloat16")
        residency.load_state_dict(optimizer.state_dict())
        optimizer = loaded
    assert optimizer.state[second]["exp_avg"].dtype == torch.bfloat16
    residency.page_in([second])
    assert optimizer.state[second]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_state_built_with_16_bit_weights_steps_masters_in_fp32(offload):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.Adagrad([parameter])
    residency = Residency(optimizer, offload)
    residency.make_master_when_updated(parameter)
    residency.adopt_state()
    assert residency.load(parameter)["sum"].dtype == torch.float32


def test_offload_none_parks_nothing():
    (first, second), optimizer = stepped()
    residency = Residency(optimizer, "none")
    residency.park([first, second])
    assert residency.parked_bytes == 0


def test_a_bad_place_is_named():
    with pytest.raises(ConfigurationError, match="`offload='moon'`"):
        Residency(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "moon")
    with pytest.raises(ConfigurationError, match="`offload='/no/such'` does not exist; make it"):
        Residency(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "/no/such")
    for place in ("flies:/data", __file__):
        with pytest.raises(ConfigurationError, match=r"is no place to park optimizer state; choose one of cpu"):
            Residency(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), place)


def test_a_folder_holds_what_is_parked_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parked").mkdir()
    parameters, optimizer = stepped()
    residency = Residency(optimizer, "parked")
    monkeypatch.chdir("/")
    residency.page_in(parameters)
    residency.park(parameters)
    assert all(map(residency.is_parked, parameters))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (None, torch.bfloat16),  # as torch loads it
        (["float32"] * 4, torch.bfloat16),  # it had the dtype of its weight
        (["bfloat16", *["float32"] * 3], torch.float32),  # it had a dtype of its own
    ],
)
def test_loading_keeps_group_settings_and_a_dtype_of_its_own(dtypes, expected):
    parameters, optimizer = stepped()
    saved = optimizer.state_dict()
    others = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters]
    loaded = torch.optim.AdamW(others, lr=9.0)
    Residency(loaded).load_state_dict(saved, {} if dtypes is None else dict.fromkeys(others, dtypes))
    assert loaded.param_groups[0]["lr"] == 0.1
    before = optimizer.state[parameters[1]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert loaded.state[others[1]][name].dtype == expected
        assert torch.equal(loaded.state[others[1]][name], before[name].to(expected))
    assert loaded.state[others[1]]["step"].dtype == before["step"].dtype


def test_loading_into_other_groups_is_refused():
    _, optimizer = stepped()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="doesn't match the size"):
        Residency(other).load_state_dict(optimizer.state_dict())


def tensors_of(optimizer):
    return [leaf for state in optimizer.state.values() for leaf in state.values()]


@pytest.mark.parametrize("offload", ["cpu", "none", "files"])
def test_loaded_state_is_a_copy(offload, tmp_path):
    saved = stepped()[1].state_dict()
    _, optimizer = stepped()
    Residency(optimizer, tmp_path if offload == "files" else offload).load_state_dict(saved)
    given = {leaf.data_ptr() for state in saved["state"].values() for leaf in state.values()}
    assert not given & {leaf.data_ptr() for leaf in tensors_of(optimizer)}
    assert len(given) == len(tensors_of(optimizer)) == 6


@pytest.mark.parametrize("offload", ["cpu", "files"])
def test_loading_writes_to_the_buffers_that_are_there(offload, tmp_path):
    saved = stepped()[1].state_dict()
    _, optimizer = stepped()
    residency = Residency(optimizer, tmp_path if offload == "files" else offload)
    moments = [leaf.data_ptr() for leaf in tensors_of(optimizer) if leaf.dim() > 0]
    saved["state"][1]["exp_avg"].fill_(7.0)
    residency.load_state_dict(saved)
    assert [leaf.data_ptr() for leaf in tensors_of(optimizer) if leaf.dim() > 0] == moments
    assert torch.equal(tensors_of(optimizer)[4], torch.full((2, 2), 7.0))


def test_loading_writes_to_the_buffers_that_are_there_while_training_goes_on(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    with HiFT(model, optimizer, HiFTSettings(offload=tmp_path)) as hift:
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        moments = {leaf.data_ptr() for leaf in tensors_of(optimizer) if leaf.dim() > 0}
        hift.load_optimizer_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert {leaf.data_ptr() for leaf in tensors_of(optimizer) if leaf.dim() > 0} == moments


def test_parked_state_stays_where_loading_is_refused(tmp_path):
    (first, _), optimizer = stepped()
    residency = Residency(optimizer, tmp_path)
    with pytest.raises(ValueError, match="doesn't match the size"):
        residency.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    residency.page_in([first])
    assert torch.equal(optimizer.state[first]["step"], torch.tensor(1.0))


@pytest.mark.parametrize(("offload", "parked_dtype"), [("cpu", "bfloat16"), ("files", None)])
def test_reading_the_state_of_a_parameter_that_has_none_yet_changes_nothing(tmp_path, offload, parked_dtype):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    settings = HiFTSettings(
        update="streamed", offload=tmp_path if offload == "files" else offload, parked_dtype=parked_dtype
    )
    with HiFT(model, optimizer, settings):
        model(torch.ones(1, 3)).sum().backward()
        assert not optimizer.state[model.weight]  # a `defaultdict` has an entry then
        optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1


def test_state_that_belongs_to_no_parameter_is_loaded_too():
    _, optimizer = stepped()
    saved = optimizer.state_dict()
    saved["state"]["shared"] = {"norm": torch.ones(2)}
    Residency(optimizer).load_state_dict(saved)
    assert torch.equal(optimizer.state["shared"]["norm"], torch.ones(2))
    assert optimizer.state["shared"]["norm"] is not saved["state"]["shared"]["norm"]
