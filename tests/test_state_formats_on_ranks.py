"""State that is held in few bits: the bits of one process for any number of ranks, strategy and exchange.

Hazards: a shard that divides a group; random bits that depend on the shard; a gathered state whose scales are
those of another shard; a checkpoint, in a file or in memory, that loses bits when strategy or ranks change.
"""

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.sharded_training import each_exchange

from hvd_adam import Adam, CheckpointManager, distribute
from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.recovery.elastic import InMemoryCheckpoint

SHAPES = ((90, 100), (300,), (2, 3, 40, 40), (7, 7), (61, 67))
OPTIONS = [
    {"state_format": "8bit"},
    {"state_format": "bfloat16"},
    {"state_format": "8bit", "master_weights": "8bit", "dtype": torch.bfloat16},
]


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        self.weights = torch.nn.ParameterList(map(torch.nn.Parameter, values))


def gradients(step, dtype):
    """Multiples of 1/8, whose mean over 2 or 4 ranks has no rounding error."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(-16, 17, shape, generator=generator).to(dtype) / 8 for shape in SHAPES]


def step_alone(model, optimizer, step):
    for p, gradient in zip(model.weights, gradients(step, model.weights[0].dtype), strict=True):
        p.grad = gradient
    optimizer.step()


def step_on_ranks(model, optimizer, step):
    optimizer.zero_grad()
    given = gradients(step, model.weights[0].dtype)
    sum((p * gradient).sum() for p, gradient in zip(model.weights, given, strict=True)).backward()
    optimizer.step()


def assert_same_bits(model, optimizer, other, alone):
    for p, q in zip(model.weights, other.weights, strict=True):
        assert torch.equal(p, q)
    found, expected = optimizer.held_state_dict()["state"], alone.held_state_dict()["state"]
    for number, entry in expected.items():
        assert found[number].keys() == entry.keys()
        for name, value in entry.items():
            assert torch.equal(found[number][name], value), (number, name)
    found, expected = optimizer.state_dict()["state"], alone.state_dict()["state"]
    assert all(torch.equal(found[i]["exp_avg"], entry["exp_avg"]) for i, entry in expected.items())


def made(options, implementation):
    options = {**options, "implementation": implementation}
    model = Model(options.pop("dtype", torch.float32))
    return model, Adam(model.parameters(), lr=1e-2, weight_decay=0.01, **options)


@on_ranks(2, 4)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_those_of_one_process(cluster, options):
    ways = [("allreduce", "fused"), ("allreduce", "foreach"), ("sharded", "fused"), ("sharded", "foreach")]
    for strategy, implementation in ways if cluster.size == 2 else ways[::2]:
        for _ in each_exchange() if strategy == "sharded" else (None,):
            other, alone = made(options, implementation)
            model, adam = made(options, implementation)
            optimizer = distribute(adam, model, strategy=strategy)
            for step in range(1, 5):
                step_alone(other, alone, step)
                step_on_ranks(model, optimizer, step)
            assert_same_bits(model, optimizer, other, alone)


def after_two_steps(options):
    """A model and its optimizer on one rank, and on all ranks with sharded state."""
    other, alone = made(options, "fused")
    model, adam = made(options, "fused")
    optimizer = distribute(adam, model, strategy="sharded")
    for step in range(1, 3):
        step_alone(other, alone, step)
        step_on_ranks(model, optimizer, step)
    return (other, alone), (model, optimizer)


@on_ranks(2)
def test_a_checkpoint_continues_exactly_with_another_strategy(cluster):
    import tempfile

    from hvd_adam.distributed.context import horovod

    options = OPTIONS[0]
    folder = horovod().broadcast_object(tempfile.mkdtemp(), 0, name="test.folder")
    (other, alone), (model, optimizer) = after_two_steps(options)
    with CheckpointManager(cluster, folder) as checkpoints:
        checkpoints.save(2, model=model, optimizer=optimizer)
        checkpoints.wait()
        for strategy in ("allreduce", "sharded"):
            again, adam = made(options, "fused")
            resumed = distribute(adam, again, strategy=strategy)
            checkpoints.restore(model=again, optimizer=resumed)
            single, whole = made(options, "fused")
            single.load_state_dict(other.state_dict())
            whole.load_state_dict(alone.held_state_dict())
            for step in range(3, 6):
                step_alone(single, whole, step)
                step_on_ranks(again, resumed, step)
            assert_same_bits(again, resumed, single, whole)
        float32, adam = made({"state_format": "float32"}, "fused")
        converted = distribute(adam, float32, strategy="sharded")
        checkpoints.restore(model=float32, optimizer=converted)
        state = converted.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(state, alone.state_dict()["state"][0]["exp_avg"])


@on_ranks(2)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_survive_the_loss_of_rank_0_in_the_memory_of_another_rank(cluster, options):
    """Rank 0 has no copy, as a rank that has taken the place of a lost one, and gets that of rank 1."""
    (other, alone), (model, optimizer) = after_two_steps(options)
    memory, held = InMemoryCheckpoint(), optimizer.held_state_dict()
    if cluster.rank == 1:
        memory.commit(TrainingState(model.state_dict(), held, None, {"step": 2}, {}, [], {}, {}))
    newest = memory.newest(cluster)
    again, adam = made(options, "fused")
    if newest is not None:
        again.load_state_dict(newest.model)
        adam.load_state_dict(newest.optimizer)
    resumed = distribute(adam, again, strategy="sharded")
    for step in range(3, 6):
        step_alone(other, alone, step)
        step_on_ranks(again, resumed, step)
    assert_same_bits(again, resumed, other, alone)


@on_ranks(2)
@pytest.mark.parametrize("options", [{"defer_averaging": True}, {"strategy": "sharded", "compression": "int4"}])
def test_amsgrad_that_a_loop_sets_is_refused_and_training_can_continue(cluster, options):
    def train(refused_step):
        model = Model()
        optimizer = distribute(Adam(model.parameters(), lr=1e-2, state_format="8bit"), model, **options)
        for step in range(4):
            optimizer.param_groups[0]["amsgrad"] = step == refused_step
            if step == refused_step:
                with pytest.raises(ValueError, match="'8bit' and amsgrad exclude each other"):
                    step_on_ranks(model, optimizer, step)
                optimizer.param_groups[0]["amsgrad"] = False
            step_on_ranks(model, optimizer, step)
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, train(2), train(None)))
