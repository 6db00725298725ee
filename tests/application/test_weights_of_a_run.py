"""Where and in which dtype a run builds its weights."""

import copy
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from hift_lightning.models import causal_lm
from hift_lightning.train import build_network, train
from tests import simulated_accelerator as sim
from tests.application.test_configuration import composed
from tests.application.test_pretrained_weights import saved
from tests.devices import Device

SMALL = [
    "model=llama7b",
    "model.network.config.vocab_size=300",
    "model.network.config.hidden_size=64",
    "model.network.config.intermediate_size=128",
    "model.network.config.num_hidden_layers=2",
    "model.network.config.num_attention_heads=2",
    "model.network.config.num_key_value_heads=2",
    "trainer.accelerator=cpu",
    "logger=none",
]


def trainer_of(cfg: DictConfig) -> L.Trainer:
    return instantiate(cfg.trainer, strategy=instantiate(cfg.strategy), logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_random_weights_are_made_on_the_device_in_the_dtype_of_the_training(
    sim_device: Device, precision: str, dtype: torch.dtype, masters: bool
) -> None:
    cfg = composed(
        *SMALL, "model.pretrained=null", "trainer.accelerator=sim", f"trainer.precision={precision}",
        f"strategy.master_weights={masters}",
    )  # fmt: skip
    trainer = trainer_of(cfg)
    before = sim_device.allocated()
    sim_device.reset_peak()
    sim.reset_copy_counters()
    network = build_network(cfg, trainer, None)

    weights = list(network.parameters())
    assert {weight.device.type for weight in weights} == {"sim"}
    assert {weight.dtype for weight in weights} == {dtype}
    assert all(weight.std() > 0 for weight in weights if weight.dim() > 1)
    # nothing came from the host, and nothing else than weights and the frequencies of positions was on the device
    assert sim.host_to_device_bytes() == 0
    bytes_of_model = sim_device.bytes_of([*weights, *network.buffers()])
    assert sim_device.allocated() - before == bytes_of_model
    assert sim_device.peak() - before < 1.5 * bytes_of_model


class Masters(L.Callback):
    """Keeps weights and masters as they are before the first step."""

    weights: ClassVar[dict[str, torch.Tensor]] = {}
    masters: ClassVar[dict[str, torch.Tensor | None]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.network.named_parameters():
            self.weights[name] = parameter.detach().clone()
            self.masters[name] = copy.deepcopy(trainer.strategy.hift.residency.master(parameter))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_masters_are_what_the_files_hold_although_a_test_has_rounded_the_weights(
    tmp_path: Path, stored: torch.dtype
) -> None:
    saved(tmp_path / "model", stored)
    train(
        composed(
            *SMALL, f"model.pretrained={tmp_path / 'model'}", "model.tokenizer=null", "trainer=quick",
            "trainer.accelerator=cpu", "trainer.precision=bf16-true", "strategy.master_weights=true",
            "trainer.max_steps=1", f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}",
            "callbacks.progress_bar=null", "trainer.enable_progress_bar=false", "callbacks.checkpoint=null",
            f"+callbacks.masters._target_={__name__}.Masters",
        )
    )  # fmt: skip
    in_files = causal_lm(None, str(tmp_path / "model"), {}).state_dict()
    assert in_files.keys() == Masters.masters.keys()
    for name, weight in in_files.items():
        assert torch.equal(Masters.weights[name], weight.bfloat16())
        if stored == torch.bfloat16:  # there is no more than the weights; masters are made when they are updated
            assert Masters.masters[name] is None
        else:
            assert torch.equal(Masters.masters[name], weight.float())
