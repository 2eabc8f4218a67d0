"""Sharded training when groups, options or dtypes change between updates.

Hazards: moments that are lost or assigned to the wrong rank when shards change; gradients that are reduced before
their bucket is complete.
"""

import copy

import horovod.torch as hvd
import torch
from helpers.on_ranks import on_ranks
from helpers.sharded_training import (
    assert_close,
    assert_same_state,
    each_exchange,
    gradients_of,
    parameter_list,
    sharded_adam,
    step_in_one_process,
    step_on_ranks,
    torch_adam,
    trained_in_one_process,
)
from helpers.small_training import everything, same_everywhere

from hvd_adam import Adam, distribute


@on_ranks(3, "mpi")
def test_an_added_group_keeps_the_moments_of_the_others(cluster):
    for way in each_exchange():
        for loads in (False, True):
            model, oracle = parameter_list(), parameter_list()
            optimizer, reference = sharded_adam(model), torch_adam(oracle)
            step_on_ranks(model, optimizer, cluster, 0, 3)
            step_in_one_process(oracle, reference, cluster.size, 0, 3)
            if loads:  # the loaded state is not sharded yet when the group is added
                optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
            extra, other = (torch.nn.Parameter(torch.ones(5, 5).double()) for _ in range(2))
            with torch.no_grad():
                extra += cluster.rank  # rank 0's value is broadcast
            optimizer.add_param_group({"params": [extra], "lr": 0.1 * (1 + cluster.rank)})
            reference.add_param_group({"params": [other], "lr": 0.1})
            model.append(extra)
            oracle.append(other)
            step_on_ranks(model, optimizer, cluster, 3, 6)
            step_in_one_process(oracle, reference, cluster.size, 3, 6)
            assert_close(model, oracle)
            assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
            assert same_everywhere(everything(model, optimizer)), (way, loads)


@on_ranks(3)
def test_an_option_enabled_between_updates_keeps_the_moments(cluster):
    for way in each_exchange():
        model = parameter_list()
        optimizer = sharded_adam(model)
        source, reference = trained_in_one_process(3, cluster.size)
        step_on_ranks(model, optimizer, cluster, 0, 3)
        for its in (optimizer, reference):
            its.param_groups[0]["amsgrad"] = True
        for state in reference.state.values():
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        step_on_ranks(model, optimizer, cluster, 3, 6)
        step_in_one_process(source, reference, cluster.size, 3, 6)
        assert_close(model, source)
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(3)
def test_a_model_converted_to_float64_between_updates_continues_to_train(cluster):
    for way in each_exchange():
        for then in ("step", "state_dict", "broadcast", "load", "load and broadcast"):
            model = parameter_list(dtype=torch.float32)
            optimizer = sharded_adam(model)
            step_on_ranks(model, optimizer, cluster, 0, 3)
            oracle = parameter_list(dtype=torch.float32)
            reference = torch_adam(oracle)
            model.double()
            oracle.load_state_dict(model.state_dict())
            oracle.double()
            state = copy.deepcopy(optimizer.state_dict())
            reference.load_state_dict(state)
            if "load" in then:
                for its in state["state"].values():
                    its["exp_avg"].add_(0.25)
                reference.load_state_dict(state)
                optimizer.load_state_dict(state)
            if "broadcast" in then:
                optimizer.broadcast()
            if then == "state_dict":
                optimizer.state_dict()
            step_on_ranks(model, optimizer, cluster, 3, 6)
            step_in_one_process(oracle, reference, cluster.size, 3, 6)
            assert_close(model, oracle)
            assert {t.dtype for t in optimizer.state_dict()["state"][0].values()} == {torch.float32, torch.float64}
            assert same_everywhere(everything(model, optimizer)), (way, then)


@on_ranks(3)
def test_buckets_merged_by_an_option_lose_no_gradient(cluster):
    for strategy in ("allreduce", "sharded"):
        model = parameter_list(((5,), (7,)), torch.bfloat16)
        groups = [{"params": [model[0]], "master_weights": True}, {"params": [model[1]]}]
        optimizer = distribute(Adam(groups), model, strategy=strategy)
        step_on_ranks(model, optimizer, cluster, 0, 1)
        optimizer.param_groups[1]["master_weights"] = True  # its moments become float32, as the other's
        optimizer.zero_grad()
        mine = gradients_of(model, 1, cluster.rank)
        for i in (1, 0):
            (model[i] * mine[i].bfloat16()).sum().backward()
            hvd.allgather_object(i)  # reductions that have been started are complete
        optimizer.synchronize()
        for i, p in enumerate(model):
            mean = sum(gradients_of(model, 1, rank)[i] for rank in range(cluster.size)) / cluster.size
            assert p.grad is not None, (strategy, i)
            # The mean is rounded to bfloat16. Before, each rank's gradient is divided and added in float32: six
            # roundings of at most 2^-24 of a term, which a mean that cancels out does not shrink with.
            largest = max(gradients_of(model, 1, rank)[i].abs().max().item() for rank in range(cluster.size))
            torch.testing.assert_close(p.grad.double(), mean, rtol=2**-7, atol=6 * 2**-24 * largest)
        optimizer.step()
