"""Sharded state with codes: every rank updates its masters, and sends the codes of their changes to all ranks.

Hazards: ranks whose parameters differ in a bit; masters that are lost when buckets change, when a loop changes its
parameters, when a job resumes, or when an update fails; parameters that change without a gradient.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.coded_gradients import (
    SHAPES,
    Weights,
    account,
    backward,
    each_code,
    mean_of_ranks,
    random_gradients,
    residuals,
    unsent,
)
from helpers.codes_oracle import Oracle
from helpers.on_ranks import launch, on_ranks
from helpers.small_training import digest, same_everywhere

from hvd_adam import Adam, distribute


def sharded(model, compression, adam=Adam, **options):
    return distribute(
        adam(model.parameters(), lr=0.01), model, strategy="sharded", compression=compression, **options
    )


def masters(optimizer):
    """Returns the whole masters by name, on every rank."""
    return dict(sorted(optimizer.error_feedback.total_state_dict()["masters"].items()))


def update(model, optimizer, cluster, seed, names=None):
    optimizer.zero_grad()
    gradients = random_gradients(model, seed, cluster.rank)
    backward(model, {name: gradients[name] for name in names or gradients})
    optimizer.step()


def trained(cluster, compression, **options):
    model = Weights(**SHAPES)
    optimizer = sharded(model, compression, **options)
    for seed in range(3):
        update(model, optimizer, cluster, seed)
    return model, optimizer


# An update.


def masters_follow_adam(cluster, compression):
    """Six updates of a weight of several blocks, whose bias is sent exactly."""
    model = Weights(weight=(60, 40), bias=(40,))
    model.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    optimizer = sharded(model, compression)
    bucket = optimizer._layout.buffers[0].layout.buckets[0]
    oracle = Oracle(compression, cluster.size, bucket.end)
    exact = [torch.nn.Parameter(p.detach().double()) for p in model.parameters()]
    reference = torch.optim.Adam(exact, lr=0.01, foreach=False)
    for seed in range(6):
        optimizer.zero_grad()
        backward(model, random_gradients(model, seed, cluster.rank))
        optimizer.synchronize()
        places = np.zeros((cluster.size, bucket.end))
        for rank in range(cluster.size):
            places[rank, :2400] = random_gradients(model, seed, rank)["weight"].view(-1)
        expected = oracle.mean(places, scatter=True)[:2400]
        step = np.abs(expected).max() / oracle.levels  # where float32 chooses the neighbouring code
        error = np.abs(model.weight.grad.view(-1).numpy() - expected)
        assert (error > 1e-5).mean() < 0.02, seed
        assert error.max() < 2 * step, seed
        mean = mean_of_ranks(model, seed, cluster.size)["bias"]
        torch.testing.assert_close(model.bias.grad, mean.float(), rtol=1e-5, atol=1e-5)
        for p, own in zip(exact, model.parameters(), strict=True):
            p.grad = own.grad.double()
        reference.step()
        before = model.weight.detach().double().view(-1).numpy()
        optimizer.step()
        master = masters(optimizer)
        assert master.keys() == {"weight"}
        for p, found in zip(exact, (master["weight"], model.bias), strict=True):
            torch.testing.assert_close(found.double(), p.data, rtol=0, atol=2e-6)  # float32's rounding, 6 times
        missing = (master["weight"] - model.weight).abs().view(-1).detach().numpy()
        allowed = oracle.rounding(master["weight"].double().view(-1).numpy() - before)
        assert missing.any()
        assert (missing <= allowed * 1.001 + 1e-6).all(), (missing - allowed).max()
        assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@each_code
def test_masters_follow_adam_and_parameters_follow_masters(cluster, compression):
    masters_follow_adam(cluster, compression)


@on_ranks(3, controller="mpi")
@each_code
def test_masters_follow_adam_and_parameters_follow_masters_under_mpi(cluster, compression):
    masters_follow_adam(cluster, compression)


@on_ranks(2)
@each_code
def test_changes_that_are_smaller_than_a_step_of_the_codes_are_not_lost(cluster, compression):
    model = Weights(weight=(60, 40))
    optimizer = sharded(model, compression)
    optimizer.param_groups[0]["eps"] = 1.0  # updates in proportion to the gradients
    gradient = torch.full((60, 40), 1e-3)
    gradient[0] = 1.0
    for _ in range(60):
        optimizer.zero_grad()
        backward(model, {"weight": gradient})
        optimizer.step()
    exact = torch.nn.Parameter(torch.zeros(60, 40))
    reference = torch.optim.Adam([exact], lr=0.01, eps=1.0)
    for _ in range(60):
        exact.grad = gradient
        reference.step()
    small = exact[1:].abs().max()
    tolerance = 0.1 if compression == "int8" else 1.0
    assert (model.weight[1:].mean() - exact[1:].mean()).abs() < tolerance * small
    torch.testing.assert_close(masters(optimizer)["weight"][1:].mean(), exact[1:].mean(), rtol=0.1, atol=0)


@on_ranks(2)
@each_code
@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_update_changes_no_bit(cluster, compression, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, optimizer = trained(cluster, compression, loss_scaler=scaler)
    before = digest(masters(optimizer), model.state_dict(), optimizer.state_dict()["state"]), residuals(optimizer)
    optimizer.zero_grad()
    gradients = random_gradients(model, 5, cluster.rank)
    if cluster.rank == 1:
        gradients["second"][0, 0] = float("nan")  # of another rank's shard
    backward(model, gradients)
    optimizer.step()
    assert optimizer.skipped
    after = digest(masters(optimizer), model.state_dict(), optimizer.state_dict()["state"]), residuals(optimizer)
    assert after == before
    update(model, optimizer, cluster, 6)
    assert same_everywhere(digest(model.state_dict()))
    assert digest(model.state_dict()) not in before


@on_ranks(2)
@each_code
@pytest.mark.parametrize("deferred", [False, True])
def test_the_norm_of_all_shards_is_clipped(cluster, compression, deferred):
    model, other = Weights(**SHAPES), Weights(**SHAPES)
    whole = sharded(other, compression, skip_nonfinite=False)
    optimizer = sharded(model, compression, max_grad_norm=0.5, defer_averaging=deferred)
    backward(other, random_gradients(model, 1, cluster.rank))
    whole.synchronize()
    norm = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
    backward(model, random_gradients(model, 1, cluster.rank))
    torch.testing.assert_close(optimizer.clip_grad_norm_(1e9), norm)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    assert same_everywhere(digest(optimizer.grad_norm, model.state_dict()))


@on_ranks(2)
def test_buckets_of_exact_parameters_have_no_codes(cluster):
    model = torch.nn.ModuleDict({"words": torch.nn.Embedding(700, 3100), "head": torch.nn.Linear(30, 40)})
    before = model["words"].weight.detach().clone()  # 8.7 MB: a bucket by itself
    optimizer = sharded(model, "int4")
    for seed in range(2):
        optimizer.zero_grad()
        rows = torch.arange(5) + 300 * cluster.rank
        (model["words"](rows).sum() * (seed + 1) + model["head"](torch.ones(2, 30)).square().sum()).backward()
        optimizer.step()
        assert same_everywhere(digest(model.state_dict()))
    changed = (model["words"].weight != before).any(dim=1)
    assert changed.nonzero().view(-1).tolist() == [*range(5), *range(300, 305)]
    assert masters(optimizer).keys() == {"head.weight"}


@on_ranks(2)
@each_code
def test_half_precision_parameters_are_sent_as_they_are(cluster, compression):
    model = Weights(weight=(60, 40), bias=(40,), more=(30, 50))
    model.more.data = model.more.data.bfloat16()
    optimizer = sharded(model, compression)
    optimizer.param_groups[0]["master_weights"] = True
    for seed in range(3):
        update(model, optimizer, cluster, seed)
        assert same_everywhere(digest(model.state_dict()))
    assert masters(optimizer).keys() == {"weight"}
    state = optimizer.state_dict()["state"][2]
    assert torch.equal(state["master_param"].bfloat16(), model.more)


class Clears(Adam):
    """Clears gradients at the end of its step, or fails there."""

    fails = False

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()
        if self.fails:
            raise RuntimeError("after the update")


@on_ranks(2)
def test_a_step_of_ones_own_may_clear_gradients_and_may_fail(cluster):
    model, other = Weights(**SHAPES), Weights(**SHAPES)
    optimizer, plain = sharded(model, "int8", adam=Clears), sharded(other, "int8")
    for seed in range(3):
        update(model, optimizer, cluster, seed)
        update(other, plain, cluster, seed)
    assert digest(model.state_dict(), masters(optimizer)) == digest(other.state_dict(), masters(plain))
    Clears.fails = True
    before = digest(model.state_dict())
    with pytest.raises(RuntimeError, match="after the update"):
        update(model, optimizer, cluster, 3)
    Clears.fails = False
    assert digest(model.state_dict()) == before  # nothing has been sent


# What loops do between updates.


@on_ranks(2)
@each_code
def test_parameters_without_a_gradient_do_not_change_and_their_masters_wait(cluster, compression):
    model, optimizer = trained(cluster, compression)
    before, known = digest(model.second), masters(optimizer)["second"]
    update(model, optimizer, cluster, 4, ["first", "third"])
    assert digest(model.second) == before
    assert torch.equal(masters(optimizer)["second"], known)
    model.second.requires_grad_(False)
    optimizer.param_groups[0]["amsgrad"] = True  # new buckets, without it
    update(model, optimizer, cluster, 5, ["first", "third"])
    assert len(optimizer._layout.buffers[0].params) == 3
    saved = optimizer.error_feedback.state_dict_on_root()
    optimizer.error_feedback.load_state_dict(None)
    assert torch.equal(masters(optimizer)["first"], model.first)
    optimizer.error_feedback.load_state_dict(saved)
    assert digest(model.second) == before
    assert torch.equal(masters(optimizer)["second"], known)
    model.second.data[0, 0] = 7.0
    model.second.requires_grad_(True)
    optimizer.param_groups[0]["lr"] = 0.0
    update(model, optimizer, cluster, 6)
    known[0, 0] = 7.0
    assert torch.equal(masters(optimizer)["second"], known)
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@each_code
def test_what_a_loop_changes_by_hand_becomes_the_master(cluster, compression):
    model, optimizer = trained(cluster, compression)
    expected, copies = masters(optimizer), {name: p.detach().clone() for name, p in model.named_parameters()}
    bound = copies["first"].abs().median().item()
    model.first.data.clamp_(-bound, bound)
    torch.nn.init.constant_(model.second, 0.25)
    for name in ("first", "second"):
        same = model.get_parameter(name) == copies[name]
        assert same.any() == (name == "first")
        assert not same.all()
        expected[name] = torch.where(same, expected[name], model.get_parameter(name)).detach()
    optimizer.param_groups[0]["lr"] = 0.0
    update(model, optimizer, cluster, 4)
    found = masters(optimizer)
    for name, master in expected.items():
        assert torch.equal(found[name], master), name
    assert same_everywhere(digest(model.state_dict()))
    if cluster.is_root:
        model.first.data.fill_(0.5)
    optimizer.broadcast()
    assert torch.equal(masters(optimizer)["first"], torch.full(SHAPES["first"], 0.5))
    update(model, optimizer, cluster, 5)
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@each_code
def test_masters_follow_added_groups_and_other_options(cluster, compression):
    model = Weights(**SHAPES)
    adam = Adam([model.first, model.bias], lr=0.01)
    optimizer = distribute(adam, model, strategy="sharded", compression=compression)
    model.second.requires_grad_(False), model.third.requires_grad_(False)
    for seed in range(3):
        update(model, optimizer, cluster, seed, ["first", "bias"])
    known = masters(optimizer)["first"]
    assert not torch.equal(known, model.first)
    model.third.requires_grad_(True)
    optimizer.add_param_group({"params": [model.third]})
    assert torch.equal(masters(optimizer)["first"], known)
    optimizer.param_groups[0]["amsgrad"] = True
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    update(model, optimizer, cluster, 4, ["first", "third"])
    assert torch.equal(masters(optimizer)["first"], known)
    assert masters(optimizer).keys() == {"first", "third"}
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@each_code
def test_ranks_that_have_left_a_join_update_their_shards(cluster, compression):
    model, optimizer = trained(cluster, compression)
    own = optimizer.error_feedback._buckets[0].worker
    before, residual = digest(model.state_dict()), own.committed.clone()
    with optimizer.join():
        for seed in range(4, 7 if cluster.rank else 4):
            update(model, optimizer, cluster, seed)
    assert digest(model.state_dict()) != before
    assert same_everywhere(digest(model.state_dict(), optimizer.state_dict()["state"], masters(optimizer)))
    assert torch.equal(own.committed, residual) == (cluster.rank == 0)


# Saving. tests/test_checkpoint_manager.py and tests/test_resume.py compare resumed runs with uninterrupted ones.


@on_ranks(2)
@each_code
def test_a_loop_that_saves_by_its_own_means_resumes_bit_for_bit(cluster, compression):
    model, optimizer = trained(cluster, compression)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state, saved = optimizer.state_dict(), optimizer.error_feedback.state_dict_on_root()
    resumed = Weights(**SHAPES)
    resumed.load_state_dict(weights)
    other = sharded(resumed, compression)
    other.load_state_dict(state)
    other.error_feedback.load_state_dict(saved)
    assert digest(masters(other)) == digest(masters(optimizer))
    for seed in range(4, 7):
        for m, o in ((model, optimizer), (resumed, other)):
            update(m, o, cluster, seed)
    assert digest(resumed.state_dict(), masters(other)) == digest(model.state_dict(), masters(optimizer))
    assert residuals(other) == residuals(optimizer)


@on_ranks(2)
@each_code
def test_without_sharding_the_masters_become_the_parameters(cluster, compression):
    books = account(cluster, compression, strategy="sharded")
    books.update(1)
    expected, missing = masters(books.optimizer), unsent(books.optimizer)
    saved = books.optimizer.error_feedback.total_state_dict()  # as elastic training commits it
    other = Weights(**SHAPES)
    other.load_state_dict(books.model.state_dict())
    optimizer = distribute(Adam(other.parameters()), other, compression="int8")
    optimizer.error_feedback.load_state_dict(saved)
    for name, master in expected.items():
        assert torch.equal(other.get_parameter(name), master), name
        torch.testing.assert_close(unsent(optimizer)[name], missing[name], rtol=0, atol=1e-6 * missing[name].max())


@on_ranks(2)
@each_code
def test_half_precision_parameters_take_over_the_masters_of_a_checkpoint(cluster, compression):
    books = account(cluster, compression, strategy="sharded")
    books.update(1)
    expected = masters(books.optimizer)
    other = Weights(**SHAPES).bfloat16()
    optimizer = sharded(other, compression)
    optimizer.error_feedback.load_state_dict(books.optimizer.error_feedback.total_state_dict())
    for name, master in expected.items():
        assert torch.equal(other.get_parameter(name), master.bfloat16()), name
    assert masters(optimizer) == {}


TRAIN_PART = """
import sys
import torch
from helpers.coded_gradients import Weights, random_gradients, backward, unsent
from hvd_adam import Adam, distribute, init

path = sys.argv[1]
cluster = init()
loaded = None
for compression in ("int8", "int4"):
    model = Weights(first=(17, 30), bias=(40,), second=(33, 20), third=(9, 70))
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model, strategy="sharded", compression=compression)
    if sys.argv[2] != "train":
        saved = torch.load(f"{path}.{compression}", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.error_feedback.load_state_dict(saved["residuals"])
    else:
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, random_gradients(model, seed, cluster.rank))
            optimizer.step()
    parts = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "residuals": optimizer.error_feedback.state_dict_on_root(),
        "unsent": unsent(optimizer),
    }
    if cluster.rank == 0:
        torch.save(parts, f"{path}.{compression}")
        torch.save(parts, f"{path}.{compression}.{sys.argv[2]}")
"""


def test_two_then_four_then_two_ranks_keep_masters_and_the_sum_of_residuals(tmp_path):
    (tmp_path / "run.py").write_text(TRAIN_PART)
    env = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    for action, ranks in (("train", 2), ("four", 4), ("two", 2)):
        done = launch([str(tmp_path / "run.py"), str(tmp_path / "state"), action], ranks, "gloo", env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    for compression in ("int8", "int4"):
        first, four, last = (
            torch.load(tmp_path / f"state.{compression}.{action}", weights_only=True)
            for action in ("train", "four", "two")
        )
        assert four["residuals"]["ranks"] == 4
        assert first["residuals"]["masters"].keys() == {"first", "second", "third"}
        for found in (four, last):
            assert digest(found["residuals"]["masters"]) == digest(first["residuals"]["masters"])
            assert digest(found["model"]) == digest(first["model"])
            for name, residual in first["unsent"].items():
                bound = 1e-6 * residual.abs().max()
                torch.testing.assert_close(found["unsent"][name], residual, rtol=0, atol=bound)
