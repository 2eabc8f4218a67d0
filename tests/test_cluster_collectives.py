"""`Cluster`'s own collectives: exact over ranks, one collective for a dictionary, one error when ranks differ.

Hazards: a mean of means; integers or sums that lose digits; bits that differ between ranks; a dictionary in
    another order; values of a rank without samples; modes of the caller (inference, default dtype); ranks that
    differ and hang; an error that only some ranks raise.
"""

import numpy as np
import pytest
import torch
from helpers.on_ranks import on_ranks

from hvd_adam import Adam, Cluster, distribute
from hvd_adam.distributed.collectives import reductions
from hvd_adam.distributed.context import horovod
from hvd_adam.errors import CollectiveError

SINGLE = Cluster(0, 1, 0, 1, 0, 1, torch.device("cpu"), "none")  # as without Horovod: nothing may be sent


def counted(monkeypatch, names=("allgather", "allreduce", "allgather_object")):
    """Returns a list to which the names of Horovod's collectives are appended as they are called."""
    calls = []
    for name in names:
        original = getattr(horovod(), name)
        monkeypatch.setattr(
            horovod(),
            name,
            lambda *a, _name=name, _original=original, **k: (calls.append(_name), _original(*a, **k))[1],
        )
    return calls


def values(rank):
    return {
        "loss": 0.1 * (rank + 1),
        "correct": 2**53 + rank,  # float64 would round it
        "flag": rank == 1,
        "numpy": np.float32(0.5),
        "of classes": torch.tensor([[rank, 1], [2, 3]], dtype=torch.int32),
        "half": [torch.tensor(1.0 + rank, dtype=torch.float16), (torch.zeros(0), {})],
    }


@on_ranks(3, "mpi")
def test_sums_means_and_lists_over_three_ranks(cluster):
    own = values(cluster.rank)
    if cluster.rank == 1:
        own = dict(reversed(own.items()))
    with pytest.MonkeyPatch.context() as monkeypatch, torch.inference_mode():
        torch.set_default_dtype(torch.float16)
        calls = counted(monkeypatch)
        sums = cluster.sum(own)
        means = cluster.mean(own, weight=[1, 0, 3][cluster.rank])
        gathered = cluster.gather(own)
        assert calls == ["allgather"] * 3
        torch.set_default_dtype(torch.float32)
    assert list(sums) == list(own)
    assert sums["loss"] == 0.1 + 0.2 + 0.1 * 3
    assert sums["correct"] == 3 * 2**53 + 3
    assert sums["flag"] == 1
    assert sums["of classes"].tolist() == [[3, 3], [6, 9]]
    assert sums["of classes"].dtype == torch.int64
    assert sums["half"][0].item() == 6.0
    assert sums["half"][1][0].shape == (0,)
    assert means["loss"] == pytest.approx((0.1 + 3 * 0.3) / 4, rel=1e-15)
    assert means["half"][0].dtype == torch.float64
    assert means["half"][0].item() == 2.5
    assert [item["correct"] for item in gathered] == [2**53, 2**53 + 1, 2**53 + 2]
    assert gathered[1]["flag"] is True
    assert gathered[2]["of classes"].equal(torch.tensor([[2, 1], [2, 3]], dtype=torch.int32))
    assert gathered[2]["half"][0].dtype == torch.float16
    assert isinstance(gathered[0]["half"][1], tuple)


@on_ranks(3, "mpi")
def test_means_are_exact_over_uneven_counts_whatever_a_rank_without_samples_has(cluster):
    samples = torch.arange(10, dtype=torch.float64)[: [7, 10, 0][cluster.rank]]
    mean = cluster.mean(samples.mean(), weight=len(samples))  # NaN on rank 2
    assert mean.item() == pytest.approx((21 + 45) / 17, rel=1e-15)
    assert np.isnan(cluster.mean(1.0, weight=0))


@on_ranks(3, "mpi")
def test_tensors_with_other_numbers_of_rows_and_any_dtype_are_gathered(cluster):
    for dtype in (torch.bfloat16, torch.complex64, torch.bool, torch.uint8, torch.int64):
        own = torch.ones(cluster.rank, 3, dtype=dtype)
        of_ranks = cluster.gather({"predictions": own, "name": cluster.rank})
        assert [item["predictions"].shape for item in of_ranks] == [(0, 3), (1, 3), (2, 3)]
        assert all(item["predictions"].dtype == dtype for item in of_ranks)
        assert of_ranks[2]["predictions"].equal(torch.ones(2, 3, dtype=dtype))
        assert [item["name"] for item in of_ranks] == [0, 1, 2]


@on_ranks(2)
def test_large_sums_are_reduced_in_place_of_gathered_and_are_exact(cluster):
    size = reductions.LARGE_WORDS
    with pytest.MonkeyPatch.context() as monkeypatch, torch.inference_mode():
        calls = counted(monkeypatch)
        sums = cluster.sum({"counts": torch.full((size,), 2**53 + cluster.rank), "loss": 0.5, "x": torch.ones(3)})
        assert calls == ["allgather", "allreduce", "allreduce"]
    assert sums["counts"].eq(2**54 + 1).all()
    assert (sums["loss"], sums["x"].tolist()) == (1.0, [2.0, 2.0, 2.0])


DIFFERENT = {
    "another key": (
        "sum",
        {"a": 1.0},
        {"b": 1.0},
        r"cluster.sum\(\): value\['a'\] is a float on rank 0 and absent on",
    ),
    "another shape": (
        "mean",
        torch.ones(2),
        torch.ones(3),
        r"mean\(\): the value is a tensor \(2,\) of torch.float32",
    ),
    "another dtype": ("sum", [1], [1.0], r"sum\(\): value\[0\] is an int on rank 0 and a float on rank 1 on "),
    "other rows": ("gather", torch.ones(2, 3), torch.ones(2, 4), r"with rows \(3,\) .* on rank 0 and .* \(4,\)"),
    "an array": (
        "sum",
        {"x": {"y": 1}},
        {"x": {"y": np.ones(2)}},
        r"rank 1 on .*value\['x'\]\['y'\] is .*ndarray",
    ),
    "a text": ("gather", "a", "b", r"rank 0 on .*: the value is of type builtins.str: pass numbers, tensors"),
    "too large": ("sum", 1, 2**63, "rank 1 .* does not fit into 64 bits"),
    "a large sum": (
        "sum",
        [0, 2**62],
        [0, 2**62],
        r"sum\(\): the sum of integers over the ranks needs more than 64",
    ),
    "a large tensor": ("sum", torch.ones(1), torch.ones(1 << 17), r"\(131072,\)"),
}


@on_ranks(2)
@pytest.mark.parametrize("case", DIFFERENT)
def test_values_that_differ_are_one_error_on_every_rank(cluster, case):
    method, *of_ranks, message = DIFFERENT[case]
    with pytest.raises(CollectiveError, match=message) as raised:
        getattr(cluster, method)(of_ranks[cluster.rank])
    cluster.barrier()  # and the ranks have not parted
    assert len(set(map(bytes, cluster.gather(torch.tensor(list(str(raised.value).encode())))))) == 1


@on_ranks(2)
def test_ranks_that_call_different_methods_or_weigh_with_nonsense_all_raise(cluster):
    with pytest.raises(CollectiveError, match=r"cluster.mean\(\) on rank 0 and cluster.barrier\(\) on rank 1 on "):
        cluster.mean(1.0) if cluster.is_root else cluster.barrier()
    with pytest.raises(CollectiveError, match=r"rank 1 on .*the weight is -1"):
        cluster.mean(1.0, weight=[2, -1][cluster.rank])


@on_ranks(2)
def test_a_collective_in_the_block_of_join_is_refused(cluster):
    model = torch.nn.Linear(1, 1)
    optimizer = distribute(Adam(model.parameters()), model)
    with optimizer.join(), pytest.raises(RuntimeError, match=r"call no method of the cluster such as mean\(\)"):
        cluster.mean(1.0)


@on_ranks(2)
def test_only_rank_0_is_the_root_and_prints(cluster):
    written = []
    file = type(
        "File", (), {"write": lambda _, text: written.append(text), "flush": lambda _: written.append("flush")}
    )
    cluster.print("loss", 0.5, file=file())
    assert written == (["loss", " ", "0.5", "\n", "flush"] if cluster.rank == 0 else [])
    assert cluster.is_root == (cluster.rank == 0)


def test_one_rank_sends_nothing_and_has_the_same_types():
    own = values(0)
    assert SINGLE.mean(0.1, weight=3) == 0.1
    assert np.isnan(SINGLE.mean(1, weight=0))
    assert SINGLE.sum(own)["of classes"].dtype == torch.int64
    assert SINGLE.mean(own)["correct"] == float(2**53)
    (gathered,) = SINGLE.gather(own)
    assert gathered["of classes"].equal(own["of classes"])
    assert gathered["of classes"] is not own["of classes"]
    SINGLE.barrier()
    with pytest.raises(CollectiveError, match=r"cluster.sum\(\): the value is of type builtins.str"):
        SINGLE.sum("loss")


def test_what_is_passed_stays_what_it_is():
    own = torch.ones(2, dtype=torch.float64, requires_grad=True)
    total = SINGLE.sum(own)
    total += 1
    assert own.tolist() == [1.0, 1.0]
    assert not total.requires_grad
