"""The limit of a collective, and Horovod started a second time, in scripts that only call `init`.

Hazards: ranks that wait for ever with Gloo; a job that ends although each wait was short, or while a watchdog
decides; two reports; ranks with different limits; a limit that cannot be changed.
"""

import os
import re

import pytest
from helpers.on_ranks import launch, on_ranks
from helpers.training_runs import ROOT

from hvd_adam.errors import UserError
from hvd_adam.recovery import collective_timeout
from hvd_adam.recovery.collective_timeout import LIMIT, limit_seconds
from hvd_adam.recovery.stall_report import oldest_wait

SCRIPT = """
import sys, time
import torch, horovod.torch as hvd
from hvd_adam import Adam, distribute, guard, init

cluster, case = init(), sys.argv[1]
model = torch.nn.Linear(2, 2)
optimizer = distribute(Adam(model.parameters()), model)
if case == "uneven accumulation":
    for _ in range(3 - cluster.rank):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    hvd.allreduce(torch.ones(1), name="metric")
for _ in range(12):  # rank 1 waits most of the time, and for longer than the limit in all
    time.sleep(0.5 * (cluster.rank == 0))
    hvd.allreduce(torch.ones(1), name="metric")
with guard(cluster, stall_timeout=250):
    time.sleep(6 * (cluster.rank == 0))
    hvd.barrier()
time.sleep(6 * (cluster.rank == 0))
hvd.join()
print("rank", cluster.rank, "has ended")
"""


def run(code, *argv, controller="gloo", **environ):
    environ = {"PYTHONPATH": str(ROOT), **environ}
    return launch(["-c", code, *argv], 2, controller, env=environ)


def test_ranks_that_wait_for_different_collectives_end_the_job_with_one_report():
    done = run(SCRIPT, "uneven accumulation", **{LIMIT: "4"})
    assert done.returncode != 0
    (line,) = re.findall(r"hvd_adam: error: .*", done.stderr)
    expected = r"a collective has not ended for 4 s: rank 1 on \S+ behind; rank 0 on \S+ waiting for hvd_adam\.\d"
    assert re.search(expected, line)
    assert f"set {LIMIT} to more seconds, or to 0 for no limit" in line
    assert done.stderr.count("waiting for metric") == 1
    assert "has ended" not in done.stdout


def test_short_waits_joins_and_waits_under_a_watchdog_do_not_end_the_job():
    done = run(SCRIPT, "uneven work", **{LIMIT: "4"})
    assert done.returncode == 0, done.stderr
    assert "hvd_adam: error" not in done.stderr
    assert done.stdout.count("has ended") == 2


@on_ranks(2, **{LIMIT: "0"})
def test_zero_is_no_limit(cluster):
    assert collective_timeout._limited == (cluster, None)


@on_ranks(2)
def test_the_limit_is_600_seconds_and_rank_0s_with_gloo(cluster):
    watched, watch = collective_timeout._limited
    assert watched is cluster
    assert watch.limit() == 600.0
    os.environ[LIMIT] = str(70 + cluster.rank)
    collective_timeout._limit_collectives(cluster)
    assert collective_timeout._limited[1].limit() == 70.0
    assert not watch._thread.is_alive()


@on_ranks(2, "mpi")
def test_with_mpi_horovod_has_the_limit(cluster):
    assert collective_timeout._limited == (cluster, None)
    assert os.environ[LIMIT] == "600"


def test_the_limit_is_read_as_horovod_reads_it(monkeypatch):
    for value, seconds in (("7", 7.0), ("0", 0.0), ("", 0.0)):
        monkeypatch.setenv(LIMIT, value)
        assert limit_seconds() == seconds
    monkeypatch.setenv(LIMIT, "ten")
    with pytest.raises(UserError, match=rf"{LIMIT} is 'ten': use seconds, or 0"):
        limit_seconds()
    monkeypatch.setenv(LIMIT, "7")
    monkeypatch.setenv("HOROVOD_STALL_CHECK_DISABLE", "1")
    assert limit_seconds() == 0.0


def test_the_oldest_wait_of_all_threads_counts_and_joins_do_not():
    space = {"__name__": "horovod.torch.mpi_ops"}
    source = "import sys\ndef synchronize(handle): return sys._getframe()\ndef join(): return synchronize(3)\n"
    exec(source + "def poll(handle): return sys._getframe()", space)
    frames = [space["synchronize"](7), space["synchronize"](5), space["join"](), space["poll"](1)]
    assert oldest_wait(frames) == 5
    assert oldest_wait(frames[2:]) is None


RESTART = """
import horovod.torch as hvd, torch
from hvd_adam import Adam, distribute, init

first = init()
model = torch.nn.Linear(2, 2)
optimizer = distribute(Adam(model.parameters()), model)
hvd.shutdown()
try:
    distribute(Adam(model.parameters()), model)
except ValueError as error:
    print(error)
second = init()
assert second is not first and second == first and init() is second
optimizer.zero_grad()
model(torch.full((1, 2), 1.0 + second.rank)).sum().backward()
print("gradient", model.weight.grad[0, 0].item())
"""


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_init_after_a_shutdown_starts_horovod_again_with_gloo_and_is_refused_with_mpi(controller):
    done = run(RESTART, controller=controller)
    assert done.stdout.count("call hvd_adam.init() before distribute()") == 2
    if controller == "gloo":
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("gradient 1.5") == 2
    else:
        assert done.returncode != 0
        assert "hvd.shutdown() has ended MPI, which cannot start again in the same process" in done.stderr
