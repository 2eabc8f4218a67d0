"""The sharded strategy keeps one N-th of the optimizer state on each rank.

Hazards: shards that overlap or leave gaps where counts do not divide by the number of ranks.
"""

import horovod.torch as hvd
import torch
from helpers.on_ranks import on_ranks
from helpers.sharded_training import parameter_list, sharded_adam, step_on_ranks


def state_bytes(optimizer):
    """Returns the bytes of all storages that hold this rank's state."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
    }
    return sum(storages.values())


def assert_each_rank_keeps_one_nth(cluster):
    for adam, tensors in (({}, 2), ({"amsgrad": True}, 3)):
        model = parameter_list(((300, 400), (401,), (1,), (7, 11, 13)), torch.float32)
        total = 4 * tensors * sum(p.numel() for p in model.parameters())
        optimizer = sharded_adam(model, adam=adam)
        for _ in range(2):  # before and after a step
            assert abs(state_bytes(optimizer) - total / cluster.size) < 0.01 * total / cluster.size
            step_on_ranks(model, optimizer, cluster, 0, 1)
        # No element is kept twice or not at all.
        held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert sum(hvd.allgather_object(held)) == sum(p.numel() for p in model.parameters())
        assert all(state["exp_avg"].dim() == 1 for state in optimizer.state.values())


@on_ranks(3)
def test_three_ranks_keep_a_third_of_the_state_each(cluster):
    assert_each_rank_keeps_one_nth(cluster)


@on_ranks(4, "mpi")
def test_each_rank_keeps_its_part_of_the_state_under_mpi(cluster):
    assert_each_rank_keeps_one_nth(cluster)
