"""HiFT in a loop of Lightning Fabric: python examples/fabric.py"""

import lightning as L
import torch
from torch import nn

from hift_lightning import HiFT, HiFTSettings

fabric = L.Fabric(accelerator="auto", devices=1, precision="32-true")
fabric.seed_everything(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
fabric_model, fabric_optimizer = fabric.setup(model, optimizer)
inputs = torch.randn(512, 8, device=fabric.device)
targets = inputs.norm(dim=1, keepdim=True)

# the engine takes what Fabric has wrapped, once it is on its device
with HiFT(model, optimizer, HiFTSettings(group_size=1)) as hift:
    for step in range(300):
        loss = nn.functional.mse_loss(fabric_model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(fabric_model, fabric_optimizer, max_norm=1.0)
        fabric_optimizer.step()  # frees gradients; with precision="16-mixed" call `zero_grad()` after it as well
        if step % 60 == 0 or step == 299:
            fabric.print(f"step {step:3}  loss {loss.item():.4f}  next block: {hift.block.name}  cycle {hift.cycle}")

fabric.print(hift.report())
