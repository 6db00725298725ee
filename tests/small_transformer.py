"""A small transformer classifier and its data, for the tests that need real layers but no pretrained weights."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

VOCABULARY, WIDTH, LENGTH, CLASSES = 32, 16, 6, 3
LAYERS = 4  # embeddings, two transformer layers, head


class SmallTransformer(L.LightningModule):
    """Four layers: embeddings, two transformer layers, and the head with the final norm."""

    def __init__(self, make_optimizer=None, make_scheduler=None, interval="step", depth=2):
        super().__init__()
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.make_scheduler = make_scheduler
        self.interval = interval
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        torch.random.set_rng_state(generator_state)
        self.losses, self.rates = [], []

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden).mean(1))

    def loss(self, batch):
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def make_batches(count, seed=0, size=4):
    """``count`` batches of ``(tokens (size, LENGTH), labels (size,))``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(VOCABULARY, (size, LENGTH), generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loader(batches):
    """A loader that gives the batches as they are, in their order."""
    return DataLoader(batches, batch_size=None)


def trainer(strategy="hift", **arguments):
    """A Trainer that writes nothing and shows nothing."""
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(strategy=strategy, **{**defaults, **arguments})
