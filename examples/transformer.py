"""Trains a character-level language model: horovodrun -np 2 python transformer.py [TEXT] [--compile inductor].

Seeds: all ranks draw the positions of the global batch from one seed, and each takes its own share: N ranks with
batch size b train as one rank with N·b. Dropout's seed contains the rank: no two ranks drop the same units.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hvd_adam import Adam, distribute, guard, init
from hvd_adam.errors import UserError
from hvd_adam.schedule import LearningRateSchedule, learning_rate

CONTEXT, WIDTH, HEADS, LAYERS, ACCUMULATE = 64, 64, 4, 2, 2  # the last: micro-batches per update
parser = argparse.ArgumentParser()
parser.add_argument("text", nargs="?", type=Path, default=Path(__file__).parents[1] / "LICENSE")
parser.add_argument("--steps", type=int, default=300, help="updates")
parser.add_argument("--batch-size", type=int, default=16, help="sequences per rank and micro-batch")
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, such as inductor")
args = parser.parse_args()


class Transformer(nn.Module):
    """Predicts each next character: tokens (n, length ≤ CONTEXT) to logits (n, length, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, args.dropout, F.gelu, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.blocks(hidden, causal, is_causal=True))


cluster = init()
with guard(cluster):  # an error on one rank ends all ranks, with one message
    if not args.text.is_file() or args.text.stat().st_size <= CONTEXT:
        raise UserError(f"{args.text} is not a text of more than {CONTEXT} characters")
    characters = sorted(set(text := args.text.read_text()))
    data = torch.tensor([characters.index(character) for character in text])
    torch.manual_seed(0)  # weights
    model = Transformer(len(characters)).to(cluster.device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and norms: no weight decay
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    adam = Adam(groups, betas=(0.9, 0.95), decoupled_weight_decay=True)
    optimizer = distribute(adam, model, accumulate=ACCUMULATE, max_grad_norm=1.0)
    schedule = LearningRateSchedule(3e-3, args.steps, initial=3e-4, warmup_steps=args.steps / 10, decay="cosine")
    network = torch.compile(model, backend=args.compile) if args.compile else model
    draw = torch.Generator().manual_seed(0)  # positions: the same on all ranks
    torch.manual_seed(1 + cluster.rank)  # dropout: another one on each rank
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        for _ in range(ACCUMULATE):
            starts = torch.randint(len(data) - CONTEXT, (args.batch_size * cluster.size, 1), generator=draw)
            windows = data[starts[cluster.rank :: cluster.size] + torch.arange(CONTEXT + 1)].to(cluster.device)
            with torch.autocast(cluster.device.type, torch.bfloat16):
                loss = F.cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()  # keeps the gradients of an update that is not complete
            loss.backward()
            optimizer.step()  # updates after the last micro-batch
        if step % 50 == 0 or step == args.steps - 1:  # on every rank: all call mean(), and rank 0 prints
            cluster.print(f"update {step + 1}: loss {cluster.mean(loss):.3f}")
    if cluster.is_root:
        model.eval()
        line = data[:1].to(cluster.device)
        for _ in range(79):
            line = torch.cat([line, torch.multinomial(model(line[None, -CONTEXT:])[0, -1].softmax(0), 1)])
        print("sample:", "".join(characters[index] for index in line).replace("\n", " "))
