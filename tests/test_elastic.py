"""Ranks, hosts and links are lost, and hosts are added: training continues with the same result.

Hazards: images that are used twice, never, or with another weight; a learning rate that jumps; ranks that resume
from different states; collectives with other names on new ranks; a rank that waits forever for a lost one, or is
lost while the others connect and ends them too; a failed job that exits with 0.
"""

import os

import pytest
import torch
from helpers.cluster.hosts import skip_reason
from helpers.forked_python import forked_python
from helpers.on_ranks import on_ranks
from helpers.training_runs import ROOT, checkpoint, events, one_line, train
from horovod.runner.common.util.hosts import INVALID_SLOT_INFO
from horovod.runner.http.http_server import RendezvousHandler, RendezvousServer
from recovery import SCENARIOS, run

from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.config import TrainConfig
from hvd_adam.distributed import context as clusters
from hvd_adam.distributed import rendezvous
from hvd_adam.distributed.context import horovod, restart
from hvd_adam.distributed.launch_env import LaunchInfo, detect_launcher
from hvd_adam.errors import RankError
from hvd_adam.recovery.elastic import Connections, InMemoryCheckpoint, _established

needs_hosts = pytest.mark.skipif(
    skip_reason() is not None, reason=f"no hosts in network namespaces: {skip_reason()}"
)


@needs_hosts
def test_weights_are_those_of_an_undisturbed_run_after_a_host_is_added_and_two_are_lost(tmp_path):
    argv = ["--epochs", 9]
    job, end = run(SCENARIOS["two_in_a_row"], tmp_path / "job", 1, *argv, python=forked_python())
    sizes = [event["world_size"] for event in events(job.folder / "run", "resume")]
    assert sizes[0] == 3  # shares of 64 images: 21, 21 and 22
    assert sizes[-1] == end["world_size"] == 1
    steps = [event["step"] for event in events(job.folder / "run", "step")]
    assert steps == list(range(1, end["step"] + 1))
    fixed = "--model paced:build --precision fp64 --global-batch-size 64 --log-every 1 --lr 3e-3".split()
    environ = {"PYTHONPATH": f"{job.folder}:{ROOT}", "PAUSE": "0"}
    assert train(*fixed, *argv, ranks=2, folder=tmp_path / "undisturbed", env=environ).returncode == 0
    one, other = checkpoint(job.folder / "run")["model"], checkpoint(tmp_path / "undisturbed")["model"]
    # Some 200 updates of float64 with sums in another order.
    for name, weight in one.items():
        assert (weight - other[name]).abs().max() < 1e-8, name
    lr = [
        [event["lr"] for event in events(folder, "step")]
        for folder in (job.folder / "run", tmp_path / "undisturbed")
    ]
    assert lr[0] == lr[1]


@needs_hosts
def test_an_island_that_is_lost_returns_with_the_outer_weights(tmp_path):
    argv = ["--strategy", "local", "--local-steps", 5, "--epochs", 30]
    job, end = run(SCENARIOS["rank_returns"], tmp_path / "job", 1, *argv, python=forked_python())
    lost, returned = events(job.folder / "run", "resume")[:2]
    assert (lost["world_size"], returned["world_size"], end["world_size"]) == (1, 2, 2)
    assert lost["step"] % 5 == 0  # the last meeting before the loss
    steps = [event["step"] for event in events(job.folder / "run", "step")]
    assert steps == list(range(1, end["step"] + 1))
    saved = checkpoint(job.folder / "run")
    first, second = saved["islands"]["islands"]
    assert all(torch.equal(saved["model"][name], weight) for name, weight in first["weights"].items())
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert end["test_accuracy"] > 0.9


def state(step):
    progress = {"step": step}
    return TrainingState({"w": torch.full((3,), float(step))}, {}, None, progress, {}, [], {}, {})


@on_ranks(3)
def test_rank_0_gets_the_newest_copy_of_any_rank(cluster):
    memory = InMemoryCheckpoint()
    assert memory.newest(cluster) is None
    if cluster.rank:
        memory.commit(state(10))
    if cluster.rank == 2:
        memory.commit(state(20))
    newest = memory.newest(cluster)
    assert (newest is None) == (cluster.rank > 0)
    if newest is not None:
        assert newest.progress == {"step": 20}
        assert torch.equal(newest.model["w"], torch.full((3,), 20.0))


def test_a_commit_copies_the_state_into_the_memory_of_the_previous_copy():
    memory, first = InMemoryCheckpoint(), state(1)
    memory.commit(first)
    first.model["w"].fill_(-1)
    assert torch.equal(memory._state.model["w"], torch.ones(3))
    place = memory._state.model["w"].data_ptr()
    memory.commit(state(2))
    assert memory._state.model["w"].data_ptr() == place
    assert torch.equal(memory._state.model["w"], torch.full((3,), 2.0))
    larger = state(3)
    larger.model = {"w": torch.zeros(5), "v": torch.ones(2)}
    memory.commit(larger)
    assert {name: tuple(value.shape) for name, value in memory._state.model.items()} == {"w": (5,), "v": (2,)}


@on_ranks(2, "elastic")
def test_horovod_restarts_with_collective_names_that_new_ranks_have_too(cluster):
    for _ in range(cluster.rank + 1):  # as many as one rank has used before, and another not
        clusters.collective_prefix()
    again = restart()
    assert (again.rank, again.size) == (cluster.rank, cluster.size)
    assert clusters.current_rank() == cluster.rank
    assert clusters.collective_prefix() == "hvd_adam.0"
    assert horovod().allreduce(torch.ones(1), op=horovod().Sum, name="again").item() == 2


@on_ranks(2, "elastic")
def test_connections_that_are_shut_down_end_for_the_other_rank(cluster):
    connections = Connections()
    with connections.record():
        restart()
    assert connections._own
    horovod().barrier()
    if cluster.rank == 0:
        connections.shut_down()
    with pytest.raises(Exception, match=r"shut down|closed"):
        for _ in range(1000):
            horovod().allreduce(torch.ones(1), name="after")
    assert not set(connections._own) & set(_established()) or cluster.rank


@pytest.fixture
def store(monkeypatch):
    """The key-value store of a real horovodrun, which gives out one place; this process is rank 0 of 2."""

    class Places(RendezvousHandler):
        def _get_value(self, scope, key):
            place = {"node1:0": b"1,3,0,1,1,3"}.get(key, INVALID_SLOT_INFO.to_response_string().encode())
            return place if scope == "rank_and_size" else super()._get_value(scope, key)

    server = RendezvousServer()
    port = server.start(Places)
    place = {"RANK": 0, "SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "CROSS_RANK": 0, "CROSS_SIZE": 2}
    place |= {"HOSTNAME": "node1", "GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))
    monkeypatch.setenv("HVD_ADAM_REPORTS_LOSSES", "1")
    yield server._httpd.cache
    server.stop()


def test_ranks_meet_once_rank_0_has_seen_all(store, monkeypatch):
    store["hvd_adam_meeting"] = {"1": b"1"}
    rendezvous.join(renew=False)
    assert set(store["hvd_adam_meeting"]) == {"0", "1", "all"}
    monkeypatch.setenv("HOROVOD_RANK", "1")
    store["hvd_adam_gone"] = {"any": b"1"}  # later: all are connecting, and so must this one
    assert rendezvous._meet()


def test_ranks_ask_for_new_places_if_a_rank_is_lost_before_all_have_met(store):
    store["hvd_adam_gone"] = {"any": b"1"}
    assert not rendezvous._meet()
    rendezvous._request_rank()
    assert detect_launcher() == LaunchInfo("horovodrun", 1, 3)


def test_a_meeting_ends_after_gloos_timeout_if_the_launcher_reports_no_losses(store, monkeypatch):
    monkeypatch.delenv("HVD_ADAM_REPORTS_LOSSES")
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "1")
    assert not rendezvous._meet()


def test_a_rank_without_a_place_or_a_launcher_ends_itself(store, monkeypatch):
    monkeypatch.setenv("HOROVOD_HOSTNAME", "node7")
    with pytest.raises(RankError, match="node7 has been taken out of the job"):
        rendezvous.join(renew=True)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "1")
    with pytest.raises(RankError, match=r"rank 0 on .* cannot reach the launcher: .*refused"):
        rendezvous.join(renew=False)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_an_elastic_run_takes_any_number_of_ranks(size):
    assert TrainConfig(elastic=True, global_batch_size=64).global_batch(size) == 64


def test_elastic_needs_an_elastic_launcher_and_the_other_way_round(tmp_path):
    assert "use launch/elastic.sh" in one_line(train("--elastic", ranks=0, folder=tmp_path, env=dict(os.environ)))
    environ = {**os.environ, "HOROVOD_ELASTIC": "1"}
    assert "add --elastic" in one_line(train(ranks=0, folder=tmp_path, env=environ))
    assert not list(tmp_path.iterdir())
