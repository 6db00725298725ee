"""HiFT in a plain PyTorch loop, without Lightning: python examples/plain_pytorch.py"""

import torch
from torch import nn

from hift_lightning import HiFT, HiFTSettings

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
inputs = torch.randn(512, 8)
targets = inputs.prod(dim=1, keepdim=True).tanh()

with HiFT(model, optimizer, HiFTSettings(order="top2down")) as hift:
    print(hift.plan)
    scheduler = hift.delay(scheduler)  # the rate is held through a cycle
    for step in range(300):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()  # reaches the active block only
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # pages state in, updates, frees gradients, parks, and gives the next block its turn; after the step of a
        # GradScaler, which may leave it out, call `optimizer.zero_grad()` as well
        optimizer.step()
        scheduler.step()
        if step % 60 == 0 or step == 299:
            print(f"step {step:3}  loss {loss.item():.4f}  next block: {hift.block.name}  cycle {hift.cycle}")

print(hift.report())
