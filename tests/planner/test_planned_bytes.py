"""The planner's peak against the bytes that the same run takes on the simulated accelerator."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from hift_lightning import HiFTStrategy
from hift_lightning.engine.conversion import parameters_stay_themselves
from hift_lightning.planner import plan
from tests import simulated_accelerator as sim

pytestmark = pytest.mark.skipif(sim.compiler_missing() is not None, reason=str(sim.compiler_missing()))

BATCH, LENGTH = 2, 64
SIZES = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
DECODERS = {
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=352, num_key_value_heads=2, use_cache=False),
    "gpt2": transformers.GPT2Config(vocab_size=512, n_embd=128, n_layer=4, n_head=4, n_positions=64, attn_pdrop=0.0),
    "opt": transformers.OPTConfig(
        **SIZES, ffn_dim=512, word_embed_proj_dim=128, max_position_embeddings=64, attention_dropout=0.0
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, intermediate_size=352, num_key_value_heads=2, head_dim=32),
    "gemma2": transformers.Gemma2Config(**SIZES, intermediate_size=352, num_key_value_heads=2, head_dim=32),
}


class Module(L.LightningModule):
    def __init__(self, family: str, optimizer: str = "AdamW"):
        super().__init__()
        torch.manual_seed(0)
        if family == "roberta":
            config = transformers.RobertaConfig(**SIZES, intermediate_size=512, num_labels=2)
            self.network = transformers.RobertaForSequenceClassification(config)
        else:
            self.network = transformers.AutoModelForCausalLM.from_config(DECODERS[family])
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        loss = self.network(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        arguments = {"SGD": {"lr": 1e-3, "momentum": 0.9}}.get(self.optimizer, {"lr": 1e-3})
        return getattr(torch.optim, self.optimizer)(self.parameters(), **arguments)


class ByHand(Module):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
        self.optimizers().zero_grad()


class Peak(Callback):
    """Most bytes in use on the simulated accelerator in any step from the second cycle on."""

    def __init__(self, after: int):
        self.after, self.bytes = after, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.after:
            sim.reset_peak_memory_stats()

    def on_train_end(self, trainer, pl_module):
        self.bytes = sim.max_memory_allocated()


@dataclass
class Case:
    family: str = "llama"
    optimizer: str = "AdamW"
    precision: str = "32-true"
    strategy: dict[str, Any] | None = field(default_factory=dict)
    """Arguments of `HiFTStrategy`; `None` for full fine-tuning."""
    trainer: dict[str, Any] = field(default_factory=dict)
    module: type[Module] = Module
    shape: tuple[int, int] = (BATCH, LENGTH)

    def __str__(self):
        words = [self.family, self.optimizer, self.precision]
        words += ["full"] if self.strategy is None else [f"{k}={v}" for k, v in self.strategy.items()]
        words += [] if self.shape == (BATCH, LENGTH) else [f"{self.shape[0]} x {self.shape[1]}"]
        words += ["by hand"] if self.module is ByHand else []
        return " ".join([*words, *(f"{k}={v}" for k, v in self.trainer.items())])


CASES = [
    Case(),
    Case(strategy=None),
    Case(strategy={"offload": "none"}),
    Case(strategy={"update": "streamed", "window": "64KiB"}),
    Case(strategy={"update": "fused", "window": "64KiB", "activation_checkpointing": True}),
    Case(strategy={"update": "streamed", "activation_checkpointing": True, "group_size": 2}),
    Case(precision="bf16-true", strategy={"update": "streamed", "window": "64KiB", "master_weights": True}),
    Case(precision="bf16-true", strategy={"master_weights": True}),
    Case(precision="bf16-mixed"),
    Case(precision="bf16-mixed", strategy=None),
    Case(precision="bf16-mixed", strategy={"activation_checkpointing": True}),
    Case(trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}),
    Case("gpt2", "SGD"),
    Case("opt", "Adafactor"),
    Case("qwen3", "Adagrad", strategy={"update": "streamed"}),
    Case("gemma2", "RMSprop", strategy={"order": "random"}),
    Case("roberta", strategy={"group_size": 3, "order": "bottom2up"}),
    Case(strategy={"always_active": ["network.lm_head.*"], "update": "streamed", "window": "64KiB"}),
    # where the weights are most of it, the update is where the peak is
    Case("opt", "Adafactor", shape=(1, 4)),
    Case("opt", "Adafactor", strategy=None, shape=(1, 4)),
    Case("opt", "AdamW", strategy=None, shape=(1, 4)),
    Case(strategy={"update": "streamed"}, shape=(1, 4)),
    Case(module=ByHand),
    Case(module=ByHand, strategy=None),
    Case(module=ByHand, strategy={"update": "streamed", "window": "64KiB"}),
    Case("roberta", "SGD", "16-true", strategy={"master_weights": True, "activation_checkpointing": True}),
]


def batch_of(family, shape=(BATCH, LENGTH)):
    tokens = torch.randint(3, 500, shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(shape[0], dtype=torch.long) if family == "roberta" else tokens
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_planned_peak_is_that_on_the_simulated_accelerator(case):
    module = case.module(case.family, case.optimizer)
    strategy = "full" if case.strategy is None else HiFTStrategy(**case.strategy)
    batch = batch_of(case.family, case.shape)
    planned = plan(module, strategy, batch, precision=case.precision, **case.trainer)

    sim.load()
    before = sim.memory_allocated()
    batches = case.trainer.get("accumulate_grad_batches", 1)
    cycle = len(planned.blocks) * batches
    peak = Peak(after=cycle)
    trainer = L.Trainer(
        accelerator="sim",
        devices=1,
        strategy=SingleDeviceStrategy("sim:0") if strategy == "full" else HiFTStrategy(**case.strategy),
        precision=case.precision,
        max_steps=2 * len(planned.blocks),
        callbacks=[peak],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **case.trainer,
    )
    with parameters_stay_themselves(torch.device("sim")):
        trainer.fit(module, DataLoader([batch] * (2 * cycle), batch_size=None))
    counted = peak.bytes - before
    assert planned.peak_bytes == pytest.approx(counted, rel=0.001)


def test_there_are_as_many_cases_as_the_readme_says():
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"In {len(set(map(str, CASES)))} cases of model, optimizer, precision, strategy and batch the" in readme


class ManyClasses(L.LightningModule):
    """A wide head on the mean of many tokens: below it more is allocated in backward than at the head's gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(**{**SIZES, "num_hidden_layers": 2}, intermediate_size=512)
        self.network = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(128, 8000)

    def training_step(self, batch, batch_idx):
        return self.head(self.network(input_ids=batch).last_hidden_state.mean(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("group_size", [1, 2, 100])
@pytest.mark.parametrize("lengths", [[320], [64, 320, 128]], ids=str)
def test_the_peak_of_a_run_of_many_cycles_is_the_planned_one(group_size, lengths):
    longest = torch.ones(1, max(lengths), dtype=torch.long)
    planned = plan(ManyClasses(), HiFTStrategy(group_size=group_size), longest).peak_bytes
    sim.load()
    before = sim.memory_allocated()
    sim.reset_peak_memory_stats()
    trainer = L.Trainer(
        strategy=HiFTStrategy(group_size=group_size), accelerator="sim", devices=1, max_steps=20, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = [torch.ones(1, length, dtype=torch.long) for length in lengths] * 20
    with parameters_stay_themselves(torch.device("sim")):
        trainer.fit(ManyClasses(), DataLoader(batches, batch_size=None))
    counted = sim.max_memory_allocated() - before
    assert counted <= planned * 1.001
    assert len(lengths) > 1 or counted >= planned * 0.999
