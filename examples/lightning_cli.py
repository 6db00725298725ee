"""HiFT from the command line of LightningCLI, which has all its arguments.

python examples/lightning_cli.py fit --trainer.strategy hift
python examples/lightning_cli.py fit --trainer.strategy hift_lightning.HiFTStrategy --trainer.strategy.group_size 2
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hift_lightning  # noqa: F401  (registers "hift"; a class path needs no import)


class Regression(L.LightningModule):
    def __init__(self, width: int = 64, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.network(inputs), targets)
        if self.global_step % 60 == 0 or self.global_step == self.trainer.max_steps - 1:
            print(f"step {self.global_step:3}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def on_fit_end(self):
        print(f"trained by {type(self.trainer.strategy).__name__}")


class Norms(L.LightningDataModule):
    def train_dataloader(self):
        inputs = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs.norm(dim=1, keepdim=True)), batch_size=512)


if __name__ == "__main__":
    LightningCLI(
        Regression,
        Norms,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={
            "max_steps": 300,
            "gradient_clip_val": 1.0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
    )
