"""Trains a vision transformer of Hugging Face Transformers: horovodrun -np 2 python huggingface.py.

The model is built from a configuration, with random weights; use `from_pretrained` to fine-tune one. It reads a
handwritten digit as a sequence of 16 patches. transformers' own `Trainer` cannot be used: it distributes through
torch.distributed.

Seeds: the order of the images is the same on all ranks, and each takes its own share of it. Dropout's seed
contains the rank: no two ranks drop the same units. With --dropout 0, N ranks with batch size b train as one with
N·b.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from hvd_adam import Adam, distribute, guard, init
from hvd_adam.data import StatefulDistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=16, help="images per rank")
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--output-dir", default="huggingface")
args = parser.parse_args()

cluster = init()
with guard(cluster):  # an error on one rank ends all ranks, with one message
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.get_default_dtype())  # (1797, 1, 8, 8)
    pairs = zip(images, torch.tensor(digits.target), strict=True)
    samples = [{"pixel_values": image, "labels": label} for image, label in pairs]
    loader = StatefulDistributedSampler(samples[:1440], args.batch_size).loader()
    test_share = samples[1440 + cluster.rank :: cluster.size]  # each rank takes every N-th test image

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        num_labels=10,
    )
    torch.manual_seed(0)  # weights
    model = ViTForImageClassification(config).to(cluster.device)
    optimizer = distribute(Adam(model.parameters(), lr=2e-3), model, max_grad_norm=1.0)
    updates = args.epochs * len(loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, updates // 10, updates)
    torch.manual_seed(1 + cluster.rank)  # dropout: another one on each rank

    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**{name: values.to(cluster.device) for name, values in batch.items()}).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for batch in DataLoader(test_share, 64):
                logits = model(batch["pixel_values"].to(cluster.device)).logits
                correct += int((logits.argmax(1).cpu() == batch["labels"]).sum())
        # Every rank calls sum() and mean(); rank 0 prints.
        accuracy = cluster.sum(correct) / len(samples[1440:])
        cluster.print(f"epoch {epoch + 1}: loss {cluster.mean(loss):.3f}, test accuracy {accuracy:.3f}")

    if cluster.is_root:
        model.save_pretrained(args.output_dir)  # `ViTForImageClassification.from_pretrained` loads it
