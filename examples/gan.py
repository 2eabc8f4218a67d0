"""Trains a GAN on handwritten digits: horovodrun -np 2 python gan.py [--together].

Each of the two optimizers has a `distribute` of its own. By default the discriminator steps first, and the
generator learns from the new discriminator. With --together both gradients are computed before either network
changes. In both orders the generator's backward pass goes through the discriminator, which is frozen meanwhile.
Otherwise this pass would compute gradients of the discriminator too and average them over the ranks; with
--together they would be added to its own.

Seeds: all ranks draw the noise of the global batch from one seed, and each takes its own share. No two ranks have
the same noise, and N ranks with batch size b train as one rank with N·b.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hvd_adam import Adam, distribute, guard, init
from hvd_adam.data import StatefulDistributedSampler

NOISE = 16  # numbers from which an image is made

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--batch-size", type=int, default=16, help="images per rank")
parser.add_argument("--together", action="store_true", help="both backward passes before both steps")
args = parser.parse_args()


def noise() -> Tensor:
    """Draws the noise of the global batch; returns this rank's share, of shape (batch size, NOISE)."""
    drawn = torch.randn(args.batch_size * cluster.size, NOISE)
    return drawn[cluster.rank :: cluster.size].to(cluster.device)


cluster = init()
with guard(cluster):  # an error on one rank ends all ranks, with one message
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.get_default_dtype())  # (1797, 64), in [-1, 1]
    loader = StatefulDistributedSampler(images, args.batch_size).loader()
    torch.manual_seed(0)  # weights and noise: the same on all ranks
    generator = nn.Sequential(nn.Linear(NOISE, 128), nn.GELU(), nn.Linear(128, 64), nn.Tanh()).to(cluster.device)
    discriminator = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 1)).to(cluster.device)
    g_optimizer = distribute(Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999)), generator)
    d_optimizer = distribute(Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)), discriminator)

    for epoch in range(args.epochs):
        for real in loader:
            real = real.to(cluster.device)
            d_optimizer.zero_grad()
            scores = discriminator(torch.cat([real, generator(noise()).detach()]))
            is_real = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(cluster.device)
            d_loss = F.binary_cross_entropy_with_logits(scores, is_real)
            d_loss.backward()
            if not args.together:
                d_optimizer.step()

            discriminator.requires_grad_(False)
            g_optimizer.zero_grad()
            g_loss = F.softplus(-discriminator(generator(noise()))).mean()  # small where fakes are taken for real
            g_loss.backward()
            g_optimizer.step()
            discriminator.requires_grad_(True)
            if args.together:
                d_optimizer.step()
        d, g = cluster.mean([d_loss, g_loss])  # of the last batch, over the ranks
        cluster.print(f"epoch {epoch + 1}, losses: discriminator {d:.3f}, generator {g:.3f}")

    if cluster.is_root:
        with torch.no_grad():
            made = generator(torch.randn(1, NOISE).to(cluster.device)).view(8, 8)
        for row in ((made + 1) * 2.4).int().tolist():
            print("".join(" .:+#"[level] * 2 for level in row))
