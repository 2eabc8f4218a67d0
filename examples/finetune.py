"""Fine-tunes a trained network on a new task: horovodrun -np 2 python finetune.py runs/digits.

To train the network: horovodrun -np 2 python -m hvd_adam.train --model resnet18 --output-dir runs/digits

It then learns to tell even digits from odd ones. In the first epoch only its new head is trained; after that the
whole network is, with a tenth of the learning rate for the body.

Seeds: the order of the images is the same on all ranks, and each takes its own share of it: N ranks with batch
size b train as one rank with N·b. Nothing else is random after `distribute`, which gives every rank rank 0's new
head.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from hvd_adam import Adam, distribute, guard, init
from hvd_adam.checkpoint import storage
from hvd_adam.data import StatefulDistributedSampler
from hvd_adam.models import zoo

parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path, help="run folder of hvd_adam.train, or one of its checkpoints")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=16, help="images per rank")
args = parser.parse_args()

cluster = init()
with guard(cluster):  # an error on one rank ends all ranks, with one message
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.get_default_dtype())  # (1797, 1, 8, 8)
    is_odd = torch.tensor(digits.target % 2)
    train_set = TensorDataset(images[:480], is_odd[:480])  # few labelled images
    loader = StatefulDistributedSampler(train_set, args.batch_size).loader()

    start = storage.load(args.run)  # of a file of torch.save: torch.load(file, weights_only=True)
    model = zoo.build(start["config"]["model"], sample_shape=(1, 8, 8), num_classes=10)
    model.load_state_dict(start["model"])  # before distribute, which copies rank 0's weights to all ranks
    body = list(model.parameters())[:-2]  # all but weight and bias of the head
    model.requires_grad_(False)
    torch.manual_seed(0)
    model.fc = nn.Linear(model.fc.in_features, 2)  # the head of ResNet, RegNet and ShuffleNet
    model.to(cluster.device)
    optimizer = distribute(Adam(model.fc.parameters(), lr=1e-3), model)

    for epoch in range(args.epochs):
        if epoch == 1:
            for parameter in body:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": body, "lr": 1e-4})  # on every rank
        model.train()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()  # keeps its statistics; each rank would compute others
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(cluster.device)), y.to(cluster.device))
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():  # each rank takes every N-th test image
            share = slice(1440 + cluster.rank, None, cluster.size)
            correct = (model(images[share].to(cluster.device)).argmax(1).cpu() == is_odd[share]).sum()
        # Every rank calls sum() and mean(); rank 0 prints.
        accuracy = cluster.sum(correct) / len(images[1440:])
        cluster.print(f"epoch {epoch + 1}: loss {cluster.mean(loss):.3f}, test accuracy {accuracy:.3f}")

    if cluster.is_root:
        torch.save(model.state_dict(), "finetuned.pt")
