"""State dictionaries of the sharded strategy: whole, in the common format, for any strategy and number of ranks.

Hazards: state that is whole on one rank and a shard on another after loading or broadcasting; loaded state with
other tensors; a state dictionary that another optimizer, strategy or number of ranks cannot resume from.
"""

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.exchanges import scattering
from helpers.on_ranks import launch, on_ranks
from helpers.sharded_training import (
    ADAM_OPTIONS,
    ODD_SHAPES,
    assert_close,
    assert_same_state,
    each_exchange,
    parameter_list,
    sharded_adam,
    step_in_one_process,
    step_on_ranks,
    torch_adam,
    trained_in_one_process,
)
from helpers.small_training import batches, digest, everything, same_everywhere, small_model

from hvd_adam import Adam, distribute


@on_ranks(3)
def test_only_rank_0_gets_the_whole_state_to_save(cluster):
    optimizer = trained_sharded()
    whole, on_root = optimizer.state_dict(), optimizer.state_dict_on_root()
    assert (on_root is None) == (cluster.rank > 0)
    if on_root is not None:
        assert on_root["param_groups"] == whole["param_groups"]
        for number, state in whole["state"].items():
            assert all(torch.equal(value, on_root["state"][number][name]) for name, value in state.items())
    with scattering():
        assert (optimizer.state_dict_on_root() is None) == (cluster.rank > 0)


def trained_sharded():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = distribute(Adam(model.parameters()), model, strategy="sharded")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 7)).square().sum().backward()
        optimizer.step()
    return optimizer


@on_ranks(3, "mpi")
def test_pytorchs_adam_resumes_from_the_state_dict_with_the_same_updates(cluster):
    for way in each_exchange():
        for options in ({}, {"amsgrad": True}):
            model, other = parameter_list(), parameter_list()
            optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, **options})
            step_on_ranks(model, optimizer, cluster, 0, 3)
            other.load_state_dict(model.state_dict())
            plain = torch.optim.Adam(other.parameters())
            plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step_on_ranks(model, optimizer, cluster, 3, 5)
            step_in_one_process(other, plain, cluster.size, 3, 5)
            assert_close(model, other)
            assert same_everywhere(digest(plain.state_dict())), (way, options)


@on_ranks(3)
def test_a_state_dict_does_not_change_when_training_continues(cluster):
    model = parameter_list()
    optimizer = sharded_adam(model)
    step_on_ranks(model, optimizer, cluster, 0, 3)
    saved = optimizer.state_dict()
    before = digest(saved)
    step_on_ranks(model, optimizer, cluster, 3, 5)
    assert digest(saved) == before


@on_ranks(3, "mpi")
def test_a_run_that_changes_from_allreduce_to_sharded_and_back_equals_an_uninterrupted_one(cluster):
    for way in each_exchange():
        for adam in (ADAM_OPTIONS, {**ADAM_OPTIONS, "amsgrad": True, "implementation": "reference"}):
            oracle = parameter_list()
            reference = torch_adam(oracle, **{k: v for k, v in adam.items() if k != "implementation"})
            step_in_one_process(oracle, reference, cluster.size, 0, 9)
            weights = state = None
            for part, strategy in enumerate(("allreduce", "sharded", "allreduce")):
                model = parameter_list()
                optimizer = distribute(Adam(model.parameters(), **adam), model, strategy=strategy)
                if weights is not None:
                    model.load_state_dict(weights)
                    optimizer.load_state_dict(state)
                    optimizer.broadcast()
                step_on_ranks(model, optimizer, cluster, 3 * part, 3 * part + 3)
                weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            assert_close(model, oracle)
            assert_same_state(state["state"], reference.state_dict()["state"])
            assert same_everywhere(everything(model, optimizer)), way


TRAIN_HALF = """
import sys
import torch
from helpers.small_training import small_model, batches, share, train
from hvd_adam import Adam, distribute, init

action, path = sys.argv[1:]
cluster = init()
model = small_model()
optimizer = distribute(Adam(model.parameters(), lr=1e-2, amsgrad=True), model, strategy="sharded")
if action == "second half":
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
for batch in list(batches(10, 24))[slice(5) if action == "first half" else slice(5, 10)]:
    ((inputs, targets),) = share(batch, cluster)
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
if cluster.rank == 0:
    torch.save(state, path)
"""


def test_three_ranks_resume_from_the_state_of_two_like_one_process(tmp_path):
    (tmp_path / "run.py").write_text(TRAIN_HALF)
    env = {"PYTHONPATH": str(Path(__file__).parent)}
    for action, ranks in (("first half", 2), ("second half", 3)):
        done = launch([str(tmp_path / "run.py"), action, str(tmp_path / "state.pt")], ranks, "gloo", env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    oracle = small_model()
    reference = torch.optim.Adam(oracle.parameters(), lr=1e-2, amsgrad=True, foreach=False)
    for inputs, targets in batches(10, 24):
        reference.zero_grad()
        F.mse_loss(oracle(inputs), targets).backward()
        reference.step()
    for name, weight in oracle.state_dict().items():
        torch.testing.assert_close(saved["model"][name], weight, rtol=1e-12, atol=1e-12)
    assert_same_state(saved["optimizer"]["state"], reference.state_dict()["state"])


@on_ranks(3, "mpi")
def test_state_loaded_on_rank_0_only_is_broadcast_to_all(cluster):
    for way in each_exchange():
        for steps_before in (0, 2):
            source, reference = trained_in_one_process(3, cluster.size)
            model = parameter_list()
            optimizer = sharded_adam(model)
            step_on_ranks(model, optimizer, cluster, 20, 20 + steps_before)
            if cluster.rank == 0:
                optimizer.load_state_dict(reference.state_dict())
                model.load_state_dict(source.state_dict())
            optimizer.broadcast()
            assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"], 0)
            step_on_ranks(model, optimizer, cluster, 3, 6)
            step_in_one_process(source, reference, cluster.size, 3, 6)
            assert_close(model, source)
            assert same_everywhere(everything(model, optimizer)), (way, steps_before)


@on_ranks(3, "mpi")
def test_broadcast_overwrites_state_loaded_on_another_rank_with_that_of_rank_0(cluster):
    for way in each_exchange():
        source, reference = trained_in_one_process(3, cluster.size, amsgrad=True)
        model, oracle = parameter_list(), parameter_list()
        optimizer, other = sharded_adam(model), torch_adam(oracle)
        step_on_ranks(model, optimizer, cluster, 0, 2)
        step_in_one_process(oracle, other, cluster.size, 0, 2)
        before = everything(model, optimizer)
        if cluster.rank == 1:
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
        optimizer.broadcast()
        assert everything(model, optimizer) == before
        step_on_ranks(model, optimizer, cluster, 2, 5)
        step_in_one_process(oracle, other, cluster.size, 2, 5)
        assert_close(model, oracle)
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(3, "mpi")
def test_loading_on_all_ranks_works_with_and_without_broadcast(cluster):
    for way in each_exchange():
        for then in ("step", "broadcast", "state_dict", "broadcast twice"):
            source, reference = trained_in_one_process(3, cluster.size)
            model = parameter_list()
            optimizer = sharded_adam(model)
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
            if then == "state_dict":
                assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"], 0)
            for _ in range({"broadcast": 1, "broadcast twice": 2}.get(then, 0)):
                optimizer.broadcast()
            step_on_ranks(model, optimizer, cluster, 3, 6)
            step_in_one_process(source, reference, cluster.size, 3, 6)
            assert_close(model, source)
            assert same_everywhere(everything(model, optimizer)), (way, then)


@on_ranks(3)
def test_loaded_state_with_other_tensors_is_used_whichever_call_is_next(cluster):
    for loaded_on in ("rank 0", "all ranks"):
        for then in ("broadcast", "state_dict", "step")[: 1 if loaded_on == "rank 0" else 3]:
            source, reference = trained_in_one_process(3, cluster.size, amsgrad=True)
            model = parameter_list()
            optimizer = sharded_adam(model)  # without amsgrad, which the loaded groups enable
            if loaded_on == "all ranks" or cluster.rank == 0:
                optimizer.load_state_dict(reference.state_dict())
                model.load_state_dict(source.state_dict())
            if then == "broadcast":
                optimizer.broadcast()
            if then != "step":
                assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"], 0)
            step_on_ranks(model, optimizer, cluster, 3, 6)
            step_in_one_process(source, reference, cluster.size, 3, 6)
            assert_close(model, source)
            assert same_everywhere(everything(model, optimizer)), (loaded_on, then)


@on_ranks(3)
def test_a_step_without_an_update_after_loading_keeps_the_loaded_state(cluster):
    def skip(model, optimizer, scaler):
        factor = float("inf") if cluster.rank == 1 else 1.0
        scaler.scale(sum(p.sum() for p in model.parameters()) * factor).backward()
        optimizer.step()

    def use_nothing(model, optimizer, scaler):
        optimizer.step()

    def synchronize(model, optimizer, scaler):
        optimizer.synchronize()

    for idle in (skip, use_nothing, synchronize):
        for then in ("broadcast", "add a group", "state_dict"):
            source, reference = trained_in_one_process(3, cluster.size)
            model = parameter_list()
            scaler = torch.amp.GradScaler("cpu")
            optimizer = sharded_adam(model, loss_scaler=scaler)
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
            idle(model, optimizer, scaler)
            if then == "broadcast":
                optimizer.broadcast()
            elif then == "add a group":
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3).double())]})
            whole = {i: state for i, state in optimizer.state_dict()["state"].items() if i < len(ODD_SHAPES)}
            assert_same_state(whole, reference.state_dict()["state"], 0)
            optimizer.zero_grad()
            step_on_ranks(model, optimizer, cluster, 3, 5, scaler=scaler)
            step_in_one_process(source, reference, cluster.size, 3, 5)
            assert_close(model, source)
            assert same_everywhere(digest(model.state_dict())), (idle, then)


@on_ranks(4, "mpi")
def test_four_ranks_load_and_continue_like_one_process(cluster):
    for way in each_exchange():
        source, reference = trained_in_one_process(3, cluster.size, amsgrad=True)
        model = parameter_list()
        optimizer = sharded_adam(model, adam={**ADAM_OPTIONS, "amsgrad": True}, max_grad_norm=0.5, accumulate=2)
        if cluster.rank == 0:
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
        optimizer.broadcast()
        step_on_ranks(model, optimizer, cluster, 3, 6, micro_batches=2)
        step_in_one_process(source, reference, 2 * cluster.size, 3, 6, clip=0.5)
        assert_close(model, source)
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
        assert same_everywhere(everything(model, optimizer)), way


def test_a_checkpoint_of_a_sharded_run_loads_on_one_rank_and_in_pytorch(tmp_path):
    folder = tmp_path / "run"
    run = ["--epochs", "1", "--log-every", "5", "--max-grad-norm", "1", "--output-dir", str(folder)]
    done = launch(["-m", "hvd_adam.train", "--strategy", "sharded", *run], 2, "gloo")
    assert done.returncode == 0, done.stdout + done.stderr
    end = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["test_accuracy"] > 0.5

    done = launch(["-m", "hvd_adam.evaluate", "--checkpoint", str(folder), "--json"], 0, "gloo")
    assert json.loads(done.stdout)["test_accuracy"] == end["test_accuracy"], done.stderr

    latest = (folder / "checkpoints" / "latest").read_text().strip()
    state = torch.load(folder / "checkpoints" / latest / "state.pt", weights_only=True)
    weights = torch.nn.ParameterList(list(state["model"].values()))
    optimizer = torch.optim.Adam(weights.parameters())
    optimizer.load_state_dict(state["optimizer"])
    for p in weights.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["step"].item() == state["progress"]["step"] == 22
        assert torch.all(optimizer.state[p]["exp_avg_sq"] >= 0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
