"""A Hydra project that knows nothing of HiFT: once the package is installed, `strategy=hift` composes in it.

python examples/hydra_project/main.py
python examples/hydra_project/main.py strategy=hift
python examples/hydra_project/main.py strategy=hift strategy.group_size=2 optimizer=sgd
"""

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(L.LightningModule):
    def __init__(self, optimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.network(inputs), targets)
        if self.global_step % 60 == 0 or self.global_step == self.trainer.max_steps - 1:
            print(f"step {self.global_step:3}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg: DictConfig) -> None:
    L.seed_everything(cfg.seed, verbose=False)
    inputs = torch.randn(512, 8)
    data = DataLoader(TensorDataset(inputs, inputs.norm(dim=1, keepdim=True)), batch_size=512)
    trainer = instantiate(cfg.trainer, strategy=instantiate(cfg.strategy))
    trainer.fit(Regression(instantiate(cfg.optimizer)), data)
    print(f"trained by {type(trainer.strategy).__name__}")


if __name__ == "__main__":
    main()
