"""Two networks and two optimizers, stepped by hand as Lightning's documentation does it."""

import lightning as L
import torch
from torch import nn


class Adversarial(L.LightningModule):
    """A generator and a discriminator; batches are (rows x 4) of real data.

    Args:
        toggle: whether the loss of one optimizer is kept from the parameters of the other.
        accumulate: batches for one step.
        clip: the largest norm of gradients; `clip_always` clips after each batch of a step.
    """

    def __init__(self, toggle=False, accumulate=1, clip=None, clip_always=False):
        super().__init__()
        self.automatic_optimization = False
        self.toggle, self.accumulate, self.clip, self.clip_always = toggle, accumulate, clip, clip_always
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(3)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        torch.random.set_rng_state(generator_state)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)]

    def losses(self, real):
        noise = real.roll(1, -1)
        yield -self.discriminator(self.generator(noise)).mean()
        yield self.discriminator(self.generator(noise).detach()).mean() - self.discriminator(real).mean()

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        for optimizer in self.optimizers():
            if self.toggle:
                self.toggle_optimizer(optimizer)
            elif batch_idx % self.accumulate == 0:
                optimizer.zero_grad()
            self.manual_backward(next(losses) / self.accumulate)
            steps_now = (batch_idx + 1) % self.accumulate == 0
            if self.clip is not None and (steps_now or self.clip_always):
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            if steps_now:
                optimizer.step()
                optimizer.zero_grad()
            if self.toggle:
                self.untoggle_optimizer(optimizer)
