"""Trains a classifier of handwritten digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from hvd_adam import Adam, data, distribute, init

torch.manual_seed(0)
device = init().device
digits = load_digits()  # 1,797 images of 8×8 pixels, 10 classes
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train_set = TensorDataset(images[:1440], labels[:1440])
test_set = TensorDataset(images[1440:], labels[1440:])
loader = data.StatefulDistributedSampler(train_set, global_batch_size=48).loader()

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(device)
optimizer = distribute(Adam(model.parameters(), lr=3e-3), model)

for _ in range(10):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()

with torch.no_grad():
    batches = [(model(x.to(device)).cpu(), y) for x, y in DataLoader(test_set, batch_size=119)]
correct = sum(int((outputs.argmax(dim=1) == y).sum()) for outputs, y in batches)
loss = sum(float(F.cross_entropy(outputs, y)) for outputs, y in batches) / len(batches)
init().print(f"test accuracy {correct / len(test_set):.3f}, loss {loss:.5f}")
