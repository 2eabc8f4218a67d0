"""Trains a classifier of handwritten digits: horovodrun -np 2 python mine.py."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from hvd_adam import Adam, distribute, init
from hvd_adam.data import StatefulDistributedSampler

cluster = init()  # starts Horovod; holds the rank, the world size and the device of this process
digits = load_digits()  # 1,797 images of 8×8 pixels, 10 classes
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train_set = TensorDataset(images[:1440], labels[:1440])
sampler = StatefulDistributedSampler(train_set, global_batch_size=48)  # images per update, over all ranks
loader = sampler.loader()  # a DataLoader of this rank's share

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
model.to(cluster.device)
optimizer = distribute(Adam(model.parameters(), lr=3e-3), model)  # all ranks now hold rank 0's weights

for _ in range(20):
    for x, y in loader:  # a new order in every epoch
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(cluster.device)), y.to(cluster.device)).backward()
        optimizer.step()  # updates with the mean of the gradients over the ranks

if cluster.is_root:  # rank 0
    with torch.no_grad():
        predicted = model(images[1440:].to(cluster.device)).argmax(dim=1).cpu()
    accuracy = (predicted == labels[1440:]).float().mean().item()
    print(f"test accuracy {accuracy:.3f} after training on {cluster.size} rank(s)")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "mine.pt")
