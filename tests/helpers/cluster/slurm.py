"""A real Slurm for tests, on hosts made of namespaces: its controller on "head", a node on each other host.

    with Hosts(folder, ["node1", "node2"]) as hosts, Slurm(hosts, folder / "slurm") as slurm:
        job = slurm.submit("launch/slurm.sh", "--", "--epochs", 2)
        slurm.wait_for_state(job, "COMPLETED")

Two partitions share the nodes: jobs in "high" preempt those in "low", the default, which are requeued. Needs the
tools of `hosts`, and Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from helpers.cluster import hosts as namespaces
from helpers.cluster.hosts import HEAD, Hosts

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")

# Times are seconds instead of a real cluster's minutes: a failed node is detected after 20 s, a requeued job
# starts when the credentials of its last start have expired. Messages may take long, on a busy machine.
CONFIG = """
ClusterName=tests
SlurmctldHost={head}({head_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmctldParameters=preempt_send_user_signal
KillWait=10
MessageTimeout=100
JobRequeue=1
MinJobAge=3600
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP
PartitionName=high Nodes={names} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""

# slurmd always loads a cgroup plugin; an empty hierarchy with its own name satisfies it. The nodes must not share
# PMIx's folder.
PREPARE = """
set -e
mkdir -p /run/munge /run/pmix
chmod 755 /run/munge
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=hvd_adam cgroup /sys/fs/cgroup/systemd
munged --key-file="$1/munge.key" --log-file="$1/munged_$2.log" --seed-file=/run/munge/seed
"""


def skip_reason() -> str | None:
    """Returns the reason why Slurm cannot run on this machine, in one line, or None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return namespaces.skip_reason() or (f"{', '.join(missing)} is not installed" if missing else None)


class Slurm:
    """A running Slurm, as described above.

    Args:
        hosts: the hosts on which it runs.
        folder: folder for its configuration, state and logs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        self.folder.mkdir(parents=True)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        addresses = self.hosts.addresses
        nodes = [
            f"NodeName={name} NodeAddr={addresses[name]} CPUs=4 RealMemory=4000 State=UNKNOWN"
            for name in self.hosts.names
        ]
        values = {"head": HEAD, "head_address": addresses[HEAD], "folder": self.folder}
        values |= {"nodes": "\n".join(nodes), "names": ",".join(self.hosts.names)}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\nCgroupAutomount=no\n")
        (self.folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/run/pmix\n")
        self._prepare(HEAD)
        self._run(HEAD, "slurmctld")
        for name in self.hosts.names:
            self.start(name)
        self.wait_until_idle()
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing: Slurm's processes end with the hosts."""

    def start(self, host: str) -> None:
        """Starts a node's daemons, also after the host was killed and restarted."""
        (self.folder / f"spool_{host}").mkdir(exist_ok=True)
        self._prepare(host)
        self._run(host, "slurmd", "-N", host)

    def wait_until_idle(self) -> None:
        """Waits until all nodes accept jobs."""
        for _ in range(1000):
            if self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == str(len(self.hosts.names)):
                return
            time.sleep(0.2)
        raise RuntimeError(f"Slurm's nodes are not idle: {self.run('sinfo', '-l')}; see {self.folder}")

    def run(self, *command: object) -> str:
        """Runs one of Slurm's commands and returns its output."""
        return self._run(HEAD, *command).strip()

    def submit(
        self, *arguments: object, environ: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> int:
        """Submits a job from a folder (default: the current one) and returns its number."""
        move = [] if folder is None else ["env", "-C", folder]
        return int(self._run(HEAD, *move, "sbatch", "--parsable", *arguments, environ=environ or {}))

    def state(self, job: int) -> str:
        """Returns a job's state, for example COMPLETED."""
        return self.facts(job)["JobState"]

    def facts(self, job: int) -> dict[str, str]:
        """Returns the fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for_state(self, job: int, *states: str, seconds: float = 250.0) -> str:
        """Waits until a job is in one of these states and returns it.

        Raises:
            AssertionError: the job ends in another state, or does not reach one of these in time.
        """
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert state not in ended and time.monotonic() < deadline, f"job {job} is {state}: {self.facts(job)}"
            time.sleep(0.2)
        return state

    def _prepare(self, host: str) -> None:
        self._run(host, "bash", "-c", PREPARE, "prepare", self.folder, host)

    def _run(self, host: str, *command: object, environ: Mapping[str, str] | None = None) -> str:
        done = self.hosts.run(host, list(map(str, command)), env={**self.environ, **(environ or {})})
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} on {host}: {done.stderr.strip()}")
        return done.stdout
