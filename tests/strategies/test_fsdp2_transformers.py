"""`hift_fsdp2` on models of transformers, unchanged: tied weights, checkpointed layers, dictionaries as outputs."""

import lightning as L
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from hift_lightning import HiFTFSDP2Strategy, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.export import export
from tests.processes import run
from tests.strategies.test_fsdp2 import MODELS, distance, fit, of_all_ranks, of_this_rank, whole

pytest.importorskip("transformers")


class LanguageModel(L.LightningModule):
    def __init__(self, make_optimizer, tied):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.make_optimizer = make_optimizer
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        self.network = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=tied))
        if not tied:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self.losses = []

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


MODELS |= {"tied": lambda make: LanguageModel(make, True), "checkpointed": lambda make: LanguageModel(make, False)}
LAYERS = ["network.model.layers.0", "network.model.layers.1"]
SHARDED = {
    "tied": ["", *LAYERS],  # the embedding and the head are one weight, which belongs to no module alone
    "checkpointed": ["", "network.model.embed_tokens", *LAYERS, "network.lm_head"],
}


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (2, 8), generator=generator) for _ in range(16)]


def _train():
    results = {}
    for model in SHARDED:
        module, _ = fit(HiFTFSDP2Strategy(), of_this_rank(_batches()), model, dtype=torch.float64, devices=2)
        sharded = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
        results[model] = whole(module), sharded
    return results


def test_models_of_transformers_equal_one_process():
    results = run(_train, 2)
    for model, sharded in SHARDED.items():
        batches = [torch.cat(pair) for pair in of_all_ranks([(batch,) for batch in _batches()], 2)]
        module, _ = fit(HiFTStrategy(), batches, model, dtype=torch.float64)
        assert distance(results[0][model][0], module.state_dict()) < 1e-10
        assert results[0][model][1] == sharded


def _export(folder, master_weights):
    precision = "bf16-true" if master_weights else "32-true"
    strategy = HiFTFSDP2Strategy(master_weights=master_weights, save_distributed_checkpoint=False)
    module, trainer = fit(strategy, of_this_rank(_batches()), "tied", devices=2, precision=precision)
    trainer.save_checkpoint(folder / "whole.ckpt")
    weights = strategy.master_state_dict()
    if trainer.is_global_zero:
        export(module.network, folder / "exported", weights=weights, dtype=torch.float32)
        with pytest.raises(ConfigurationError, match="The weights are sharded, and one process writes them; have all"):
            export(module.network, folder / "other")
    return len(weights)


@pytest.mark.parametrize("master_weights", [False, True])
def test_the_network_of_a_sharded_module_is_exported_by_the_first_rank(tmp_path, master_weights):
    from transformers import LlamaForCausalLM

    counts = run(_export, 2, tmp_path, master_weights)
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    (engine,) = checkpoint["hift"]["engines"]
    expected = {**checkpoint["state_dict"], **engine["masters"]}
    assert len(engine["masters"]) == (len(expected) - 1 if master_weights else 0)  # the head is the embedding
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, expected[f"network.{name}"]), name
    assert counts == [len(expected), 0]
