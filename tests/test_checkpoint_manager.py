"""`CheckpointManager`: a loop of one's own that is stopped and resumed ends where it would have ended.

Hazards: state that one rank restores and another does not; random generators that differ afterwards; a
    checkpoint that cannot be loaded again, or raises when it is written; an error of rank 0 that the others wait
    for; a damaged checkpoint that stops the resume; other names, other ranks, other models.
"""

import logging
import random
import tempfile
from collections import Counter, defaultdict, namedtuple
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.on_ranks import on_ranks

from hvd_adam import Adam, CheckpointManager, Cluster, distribute
from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.loadable import loadable
from hvd_adam.errors import CollectiveError, UserError
from hvd_adam.log import logger

SINGLE = Cluster(0, 1, 0, 1, 0, 1, torch.device("cpu"), "none")


def shared_folder(cluster):
    """Returns a new folder, the same on all ranks."""
    own = tempfile.mkdtemp() if cluster.is_root else ""
    name = cluster.gather(torch.tensor(list(own.encode()), dtype=torch.uint8))[0]
    return Path(bytes(name.tolist()).decode())


class Training:
    """A loop that draws from every random generator."""

    def __init__(self, cluster, strategy, restore_first, folder, compression="none"):
        torch.manual_seed(cluster.rank + 100)
        random.seed(cluster.rank), np.random.seed(cluster.rank)
        self.cluster = cluster
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))
        self.manager = CheckpointManager(cluster, folder, keep=2)
        self.optimizer = Adam(self.model.parameters(), lr=0.01, weight_decay=cluster.rank)  # until distribute()
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 3, 3, 5], 0.5)
        self.sampler = Counted()
        self.saved = self.restore() if restore_first else None
        self.optimizer = distribute(self.optimizer, self.model, strategy=strategy, compression=compression)
        if not restore_first:
            self.saved = self.restore()

    def parts(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": None}
        return parts | {"sampler": self.sampler}

    def restore(self):
        return self.manager.restore(**self.parts())

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            inputs = torch.randn(4, 6) * random.gauss(1, 1) + np.random.standard_normal()
            self.model(inputs).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.sampler.count += 1

    def save(self, step):
        self.manager.save(step, extra={"best": np.float32(0.5), "names": ["a"]}, **self.parts())

    def state(self):
        draws = [torch.rand(()).item(), random.random(), np.random.rand()]
        optimizer = self.optimizer.state_dict()
        rates = [group["lr"] for group in optimizer["param_groups"]]
        return [self.model.state_dict(), optimizer["state"], rates, self.scheduler.state_dict(), draws]


class Counted:
    """A sampler, for instance."""

    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


@on_ranks(3, "mpi")
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
@pytest.mark.parametrize("restore_first", [False, True])
def test_a_resumed_loop_ends_bit_for_bit_where_an_uninterrupted_one_does(cluster, strategy, restore_first):
    folder = shared_folder(cluster)
    whole = Training(cluster, strategy, restore_first, folder)
    assert whole.saved is None
    whole.run(4)
    whole.save(4)
    whole.manager.close()
    whole.run(3)
    expected = whole.state()
    resumed = Training(cluster, strategy, restore_first, folder)
    assert resumed.saved == {"step": 4, "best": 0.5, "names": ["a"]}
    assert type(resumed.saved["best"]) is float
    assert resumed.sampler.count == 4
    assert type(resumed.scheduler.milestones) is Counter
    resumed.run(3)
    assert same(resumed.state(), expected)
    if cluster.is_root:
        loaded = torch.load(folder / "step-00000004" / "state.pt", weights_only=True)
        torch.optim.Adam(resumed.model.parameters()).load_state_dict(loaded["optimizer"])


@on_ranks(3, "mpi")
@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_residuals_of_all_ranks_are_saved_and_resume_bit_for_bit(cluster, strategy, compression):
    folder = shared_folder(cluster)
    whole = Training(cluster, strategy, False, folder, compression)
    whole.run(4)
    whole.save(4)
    whole.manager.close()
    expected = whole.optimizer.error_feedback.state_dict_on_root()
    whole.run(3)
    final = whole.state()
    resumed = Training(cluster, strategy, False, folder, compression)
    found = resumed.optimizer.error_feedback.state_dict_on_root()
    resumed.run(3)
    assert same(resumed.state(), final)
    if cluster.is_root:
        assert same(found, expected)
        loaded = torch.load(folder / "step-00000004" / "state.pt", weights_only=True)
        saved = loaded["gradient_residuals"]["optimizer"]
        assert same(saved, expected)
        assert saved["buckets"][0]["worker"].any()
        assert saved["buckets"][0]["server"].any() == (strategy == "allreduce")
        assert len(saved["masters"]) == (0 if strategy == "allreduce" else 2)
        torch.optim.Adam(resumed.model.parameters()).load_state_dict(loaded["optimizer"])


@on_ranks(3, "mpi")
def test_residuals_that_get_lost_are_reported(cluster):
    folder = shared_folder(cluster)
    training = Training(cluster, "allreduce", False, folder, "int8")
    training.run(1)
    training.save(1)
    training.manager.close()
    for restore_first, compression, message in (
        (False, "none", "has residuals of compression int8, which this compression does not use"),
        (True, "int8", "has residuals of optimizer, which get lost: restore it after distribute()"),
    ):
        found = []
        handler = logging.Handler()
        handler.emit = lambda record, found=found: found.append(record.getMessage())
        logger.addHandler(handler)
        Training(cluster, "allreduce", restore_first, folder, compression)
        logger.removeHandler(handler)
        assert any(message in text for text in found) == cluster.is_root, found


@on_ranks(3, "mpi")
def test_random_generators_of_every_rank_continue_and_are_left_alone_with_other_ranks(cluster):
    folder = shared_folder(cluster)
    training = Training(cluster, "allreduce", False, folder)
    random.gauss(0, 1)  # has a second number in store
    np.random.standard_normal()
    training.save(1)
    training.manager.close()

    def draws():
        return [torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.standard_normal(2).tolist()]

    expected = draws()
    assert training.manager.restore() == {"step": 1, "best": 0.5, "names": ["a"]}
    assert draws() == expected
    assert len(set(map(str, cluster.gather(expected)))) == 3
    if cluster.is_root:
        state = storage.load(folder)
        storage.save(folder, 2, state | {"random_states": state["random_states"][:2]})
    before = torch.get_rng_state()
    assert training.manager.restore(model=training.model)["step"] == 2
    assert torch.equal(torch.get_rng_state(), before)


@on_ranks(2)
def test_errors_of_one_rank_are_raised_on_every_rank_and_nothing_is_written(cluster):
    folder = shared_folder(cluster)
    model = torch.nn.Linear(2, 2)
    manager = CheckpointManager(cluster, folder)
    extra = {"note": {"when": Path("x")}} if cluster.is_root else {}
    with pytest.raises(CollectiveError, match=r"extra\.note\.when cannot be saved: .*Path again; convert it"):
        manager.save(1, model=model, extra=extra)
    with pytest.raises(CollectiveError, match="step 1 on one rank and 2 on another"):
        manager.save(1 + cluster.rank, model=model)
    with pytest.raises(CollectiveError, match=r"save\(\): value\['parts'\]\['other'\] is absent on rank 0"):
        manager.save(1, model=model, **({"other": model} if cluster.rank else {}))
    with pytest.raises(CollectiveError, match=r"rank 1 .*model has no state_dict\(\) \(it is a builtins.int\)"):
        manager.save(1, model=7 if cluster.rank else model)
    assert manager.restore(model=model) is None
    cluster.barrier()
    if cluster.is_root:
        folder.rmdir()
        folder.write_text("")  # a file: the write fails on rank 0
    manager.save(1, model=model)
    with pytest.raises(CollectiveError, match="cannot write the checkpoint"):
        manager.wait()
    if cluster.is_root:
        folder.unlink()
    manager.save(2, model=model)
    manager.wait()
    with pytest.raises(CollectiveError, match="has no ema, but model: restore only"):
        manager.restore(model=model, ema=model)
    with pytest.raises(CollectiveError, match=r"another model or data set: bias is \(2,\) in it and \(3,\)"):
        manager.restore(model=torch.nn.Linear(2, 3))
    with pytest.raises(CollectiveError, match=r"model of checkpoint \S+ does not fit: "):
        manager.restore(model=Adam(model.parameters()))
    manager.close()


class Versioned(torch.nn.Module):
    """A module with a format that has changed, and with state that is no tensor."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(3)), 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] *= 10  # the first version had another unit
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


@on_ranks(2)
@pytest.mark.parametrize("restore_first", [True, False])
def test_versions_and_extra_state_of_modules_come_back_on_every_rank(cluster, restore_first):
    folder = shared_folder(cluster)
    model = Versioned()
    model.calls = 7 if cluster.is_root else 3
    optimizer = distribute(Adam(model.parameters()), model)
    assert model.calls == 7  # as parameters and buffers
    with CheckpointManager(cluster, folder) as checkpoints:
        checkpoints.save(1, model=model, optimizer=optimizer)
    model = Versioned()
    optimizer = Adam(model.parameters())
    if not restore_first:
        optimizer = distribute(optimizer, model)
    CheckpointManager(cluster, folder).restore(model=model, optimizer=optimizer)
    assert model.weight.tolist() == [1.0] * 3 and model.calls == 7


class Broken(torch.nn.Module):
    def state_dict(self):
        raise RuntimeError("no state today")


@on_ranks(2)
def test_a_state_that_cannot_be_made_and_a_closed_manager_are_refused_on_every_rank(cluster):
    checkpoints = CheckpointManager(cluster, shared_folder(cluster))
    with pytest.raises(UserError, match=r"broken\.state_dict\(\) has failed: no state today"):
        checkpoints.save(1, broken=Broken())
    checkpoints.close()
    with pytest.raises(UserError, match=r"save\(\) of step 2 after close\(\)"):
        checkpoints.save(2, model=torch.nn.Linear(1, 1))


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_restored(tmp_path, caplog):
    model = torch.nn.Linear(2, 2)
    with CheckpointManager(SINGLE, tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, model=model)
    (tmp_path / "step-00000002" / "state.pt").write_bytes(b"")
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.old")  # killed while it was replaced
    with caplog.at_level(logging.WARNING), CheckpointManager(SINGLE, str(tmp_path)) as manager:
        assert manager.restore(model=torch.nn.Linear(2, 2)) == {"step": 1}
    assert "step-00000002 is damaged" in caplog.text


def test_later_checkpoints_of_an_earlier_training_are_reported_once(tmp_path, caplog):
    model = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        for steps in ((400, 500), (100, 200)):  # the second training does not restore
            with CheckpointManager(SINGLE, tmp_path) as manager:
                for step in steps:
                    manager.save(step, model=model)
    (record,) = caplog.records
    assert "step-00000500, of a later step than this one (100): restore() takes it" in record.message


@pytest.mark.parametrize("keep", [0, 1.5, "2", None])
def test_keep_must_be_a_whole_number_above_0(keep, tmp_path):
    with pytest.raises(UserError, match=r"keep is .* whole number of at least 1"):
        CheckpointManager(SINGLE, tmp_path, keep=keep)


@pytest.mark.parametrize("extra", [[1], "x", {"step": 3}])
def test_extra_is_a_dictionary_without_step(extra, tmp_path):
    with (
        CheckpointManager(SINGLE, tmp_path) as manager,
        pytest.raises(UserError, match="without the key 'step"),
    ):
        manager.save(1, extra=extra)


@pytest.mark.parametrize("step", [-1, 2.0, None])
def test_step_must_be_a_whole_number(step, tmp_path):
    with CheckpointManager(SINGLE, tmp_path) as manager, pytest.raises(UserError, match=r"step is .* at least 0"):
        manager.save(step)


class Own:
    pass


class Level(IntEnum):
    LOW = 1


Pair = namedtuple("Pair", "a b")

PLAIN = {
    "none": None,
    "numbers": [True, 2**70, 0.1, 1j],
    "texts": ("ä", b"\0"),
    "set": {1, 2},
    "counter": Counter([3, 3, 5]),
    3: {(1, "x"): torch.ones(2, dtype=torch.bfloat16), None: torch.Size([2])},
    "types": [torch.float16, torch.device("cpu")],
    "parameter": torch.nn.Parameter(torch.ones(1)),
}
CONVERTED = {
    "float64": (np.float64(0.1), 0.1),
    "str_": (np.str_("x"), "x"),
    "bool_": ([np.bool_(True)], [True]),
    "int8": ((np.int8(-3),), (-3,)),
    "key": ({np.int64(2): 1}, {2: 1}),
    "defaultdict": (defaultdict(list, a=[1]), {"a": [1]}),
}
REFUSED = {
    "array": (np.ones(2), r"key cannot be saved: .*numpy.ndarray again; convert it by torch.from_numpy\(\)"),
    "path": ({"a": [Path("x")]}, r"key\.a\.0 cannot be saved: .*Path again; convert it by str\(\)"),
    "own": ([Own()], r"key\.0 cannot be saved: .*Own again; save numbers, strings, tensors, or its state_dict"),
    "function": ({"f": lambda x: x}, r"key\.f cannot be saved: .*builtins.function again"),
    "enum": (Level.LOW, r"Level again; save its \.value"),
    "named tuple": (Pair(1, 2), r"Pair again; convert it by tuple\(\)"),
    "key": ({"a": {Path("x"): 1}}, r"a key of key\.a cannot be saved"),
    "date": (np.datetime64("2026-01-01"), r"datetime.date again"),
}


def test_what_is_allowed_comes_back_the_same_from_disk(tmp_path):
    with CheckpointManager(SINGLE, tmp_path) as manager:
        manager.save(1, extra=PLAIN | {name: value for name, (value, _) in CONVERTED.items()})
    loaded = storage.load(tmp_path)["extra"]
    for key, value in (PLAIN | {name: value for name, (_, value) in CONVERTED.items()}).items():
        assert same([loaded[key]], [value]), key
        assert type(loaded[key]) is type(value) or key == "parameter", key


@pytest.mark.parametrize("case", REFUSED)
def test_what_plain_pytorch_could_not_load_is_refused_by_its_key(case, tmp_path):
    value, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        loadable({"key": value})
    with pytest.raises(UserError, match="cannot be saved"):
        storage.save(tmp_path, 1, {"key": value})
    assert not list(tmp_path.iterdir())


def test_a_container_that_contains_itself_is_refused():
    own = []
    own.append(own)
    with pytest.raises(UserError, match="contains itself"):
        loadable({"own": own})
