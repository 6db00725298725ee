"""A small LLaMA without memory for its weights."""

import lightning as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class SmallLlama(L.LightningModule):
    def __init__(self, layers=6):
        super().__init__()
        config = LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4
        )
        with torch.device("meta"):
            self.network = LlamaForCausalLM(config)
        self.network.config.use_cache = False

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
