"""Collectives in pieces: swaps of two hosts give the same bits, and rows of different lengths are refused."""

import pytest
import torch
from helpers.on_ranks import launch, on_ranks
from helpers.training_runs import ROOT

from hvd_adam.distributed.collectives import pieces
from hvd_adam.distributed.collectives.pieces import start_allgather, start_alltoall
from hvd_adam.errors import JobError

HOSTS = "localhost:1,127.0.0.1:1"  # two hosts for Horovod

RESULTS = """
import sys, zlib
import torch
from hvd_adam import Adam, distribute, init
from hvd_adam.distributed.collectives import pieces

cluster = init()
torch.manual_seed(cluster.rank)
least = pieces.SWAP_BYTES
if sys.argv[1] == "without":
    pieces.SWAP_BYTES = 2**60

def bits(tensor):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())

swaps = []
start = pieces._start_swap
pieces._start_swap = lambda *arguments: swaps.append(1) or start(*arguments)
for nbytes in (least, least + 13, 2 * pieces.MESSAGE_BYTES + 1):
    rows = torch.randint(0, 256, (2, nbytes), dtype=torch.uint8)  # all words, so sums wrap around
    received, gathered = pieces.start_alltoall(rows, "a"), pieces.start_allgather(rows[0], "g")
    print(bits(received()), bits(gathered()))
values = torch.randint(0, 256, (2, 4 * least), dtype=torch.uint8).view(torch.float32)  # NaNs, too
print(bits(pieces.start_allgather(values[1], "f")()))
print(bits(pieces.start_reducescatter(torch.randn(2, least), "s")()))
for compression in ("none", "bf16", "int8"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 8))
    optimizer = distribute(Adam(model.parameters()), model, strategy="sharded", compression=compression)
    torch.manual_seed(cluster.rank)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 1024)).square().mean().backward()
        optimizer.step()
    print(compression, [bits(p.detach()) for p in model.parameters()])
print("swaps", len(swaps))
"""


@pytest.mark.multirank
def test_swapped_messages_of_two_hosts_give_the_same_bits_under_gloo():
    results, swaps = {}, {}
    for how in ("with", "without"):
        done = launch(["-c", RESULTS, how], 2, "gloo", hosts=HOSTS, env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        lines = sorted(done.stdout.splitlines())
        results[how] = [line for line in lines if "swaps" not in line]
        swaps[how] = [int(line.split()[-1]) for line in lines if "swaps" in line]
    assert results["with"] == results["without"]
    # Of the updates of three compressions, two each: the gradients and the parameters.
    assert swaps == {"with": [8 + 3 * 2 * 2] * 2, "without": [0, 0]}


@on_ranks(2, 3)
def test_rows_of_another_length_than_this_ranks_are_refused(cluster):
    rows = torch.zeros(cluster.size, 10 + cluster.rank**2, dtype=torch.uint8)
    for received in (start_alltoall(rows, "rows"), start_allgather(rows[0], "row")):
        with pytest.raises(JobError, match="different numbers of elements in row"):
            received()


@on_ranks(2, 3, "gloo")
def test_a_sum_of_two_ranks_of_one_host_is_one_message_under_gloo(cluster):
    values = torch.full((3 * pieces.ALLREDUCE_BYTES // 4,), 2.0)
    started = pieces.start_allreduce(values, "sum")
    assert len(started._pieces) == (1 if cluster.size == 2 else 3)
    started()
    assert (values == 2.0 * cluster.size).all()
