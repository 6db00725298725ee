"""Blocks that are not run while planning are planned as if they had been."""

import lightning as L
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_lightning import HiFTStrategy
from hift_lightning.planner import plan
from hift_lightning.planner.result import BlockPlan, Stretch
from hift_lightning.planner.trace import StepTrace


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=7,
            num_attention_heads=2,
            use_cache=False,
        )
        with torch.device("meta"):
            self.network = LlamaForCausalLM(config)

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"update": "streamed", "order": "random"}, {"update": "fused", "activation_checkpointing": True}],
    ids=str,
)
def test_blocks_between_the_ends_are_as_if_they_had_been_run_to_half_a_percent(arguments, monkeypatch):
    batch = torch.zeros(2, 16, dtype=torch.long, device="meta")
    some = plan(Module(), HiFTStrategy(**arguments), batch)
    monkeypatch.setattr(Stretch, "to_run", lambda self, seen: [index for index in self.indices if index not in seen])
    every = plan(Module(), HiFTStrategy(**arguments), batch)
    assert len(some.blocks) == len(every.blocks) == 9
    assert (some.peak_bytes, some.peak.name) == (every.peak_bytes, every.peak.name)
    for guessed, run in zip(some.blocks, every.blocks, strict=True):
        assert (guessed.name, guessed.numel) == (run.name, run.numel)
        assert guessed.trace.flops == run.trace.flops
        # the topmost layers, where backward begins, are a little off the line
        assert guessed.trace.phase_peaks == pytest.approx(run.trace.phase_peaks, rel=0.005)
        assert guessed.trace.peak_bytes == pytest.approx(run.trace.peak_bytes, rel=0.005)
        assert guessed.trace.bytes_after == run.trace.bytes_after
        assert (guessed.to_device_bytes, guessed.to_host_bytes) == (run.to_device_bytes, run.to_host_bytes)


def block(peak):
    return BlockPlan("", 1, StepTrace(peak_bytes=peak, phase_peaks={"forward": peak}, flops=1), 0, 0)


def run(stretch, peak_of):
    seen = {}
    while due := stretch.to_run(seen):
        assert not seen.keys() & set(due)
        seen.update({index: block(peak_of(index)) for index in due})
    return seen


def test_of_blocks_on_a_line_the_ends_and_the_middle_are_run():
    stretch = Stretch(list(range(10, 91)))
    seen = run(stretch, lambda index: 10_000 - 10 * index)
    assert sorted(seen) == [10, 50, 90]
    filled = stretch.fill(seen)
    assert [filled[index].trace.peak_bytes for index in stretch.indices] == [10_000 - 10 * i for i in stretch.indices]


@pytest.mark.parametrize("bend", [11, 30, 37, 50, 89])
def test_at_a_bend_the_blocks_around_it_are_run_and_no_more(bend):
    def peak_of(index):
        return max(10_000, 10_000 + 100 * (bend - index))

    stretch = Stretch(list(range(10, 91)))
    seen = run(stretch, peak_of)
    assert len(seen) <= 17
    filled = stretch.fill(seen)
    for index in stretch.indices:
        assert filled[index].trace.peak_bytes == pytest.approx(peak_of(index), rel=1e-3)


def test_all_blocks_of_a_short_stretch_are_run():
    assert sorted(run(Stretch([3, 4, 5, 6]), lambda index: 100)) == [3, 4, 5, 6]
