"""PEFT models: adapters take turns, and the frozen host stays as it is."""

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hift_lightning import HiFTStrategy
from tests.comparing import assert_same
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import loader, trainer

LAYERS = 3


class Module(L.LightningModule):
    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            use_cache=False,
        )
        lora = LoraConfig(
            r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **arguments
        )
        self.network = get_peft_model(LlamaForCausalLM(config), lora)

    def loss(self, tokens):
        return self.network(input_ids=tokens, labels=tokens).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(32, (2, 6), generator=generator) for _ in range(2 * LAYERS + 1)]


@pytest.mark.parametrize("settings", [{}, {"update": "fused", "activation_checkpointing": True}], ids=str)
def test_adapters_of_a_layer_are_a_block_and_nothing_else_changes(settings):
    module, expected = Module(), Module()
    trainer_ = trainer(HiFTStrategy(**settings))
    trainer_.fit(module, loader(batches()))
    blocks = [list(block.parameters) for block in trainer_.strategy.hift.plan.blocks]
    assert [sorted({name.split(".")[-2:][0] for name in block}) for block in blocks] == [["default"]] * LAYERS
    assert all("lora_" in name for block in blocks for name in block)

    before = {name: weights.clone() for name, weights in expected.state_dict().items()}
    host = {name: p for name, p in expected.named_parameters() if not p.requires_grad}
    reference_loop(expected, expected.configure_optimizers(), blocks, turns_of("top2down", LAYERS), batches())
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in host)
    changed = {name for name, weights in module.state_dict().items() if not torch.equal(weights, before[name])}
    assert changed == {name for block in blocks for name in block}
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert set(trained) == {name for block in blocks for name in block}  # after training as before it


def test_modules_to_save_are_trained_as_a_block_of_their_own():
    module = Module(modules_to_save=["lm_head"])
    trainer_ = trainer("hift")
    trainer_.fit(module, loader(batches()))
    assert len(trainer_.strategy.hift.plan.blocks) == LAYERS + 1
    head = module.network.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
