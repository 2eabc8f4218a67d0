"""launch/mpijob.yaml, checked against the schema of Kubernetes and the MPI operator, without a cluster.

Hazards: the API server silently drops a field that is misspelled or on the wrong level; a value has the wrong
type; the operator puts the launcher, host file or ssh keys elsewhere; pods run as another user than the image's;
GPUs, slots and workers disagree; shared memory has only 64 MB; a job is not restarted, or its pods keep GPUs after
it ends.

The schema is that of the published CRD and its Go types, as of v0.6, in github.com/kubeflow/mpi-operator:
manifests/base/kubeflow.org_mpijobs.yaml, pkg/apis/kubeflow/v2beta1/types.go; below a pod template that of the
Kubernetes API reference (core/v1). Of a pod, only the fields that such a job may use are listed: any other field
is an error here.
"""

import copy
import re
from pathlib import Path

import pytest
import yaml

from hvd_adam.arguments import parse
from hvd_adam.config import TrainConfig

ROOT = Path(__file__).parents[1]
CLAIM, JOB = yaml.safe_load_all((ROOT / "launch" / "mpijob.yaml").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


# --- a schema: a type, a set of values, a list of one schema, or the fields of an object ("!" marks required ones,
# --- "*" stands for any name)


def quantity(value):
    return isinstance(value, int) or bool(re.fullmatch(r"\d+(\.\d+)?(m|[KMGTP]i?)?", value))


def port(value):
    return value in range(1, 65536)


METADATA = {"name!": NAME.fullmatch, "namespace": str, "labels": {"*": str}, "annotations": {"*": str}}
PODS_SECURITY = {
    "runAsUser": int,
    "runAsGroup": int,
    "runAsNonRoot": bool,
    "fsGroup": int,
    "seccompProfile": {"type!": {"RuntimeDefault", "Localhost", "Unconfined"}},
}
CONTAINER = {
    "name!": NAME.fullmatch,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"name": NAME.fullmatch, "containerPort!": port, "protocol": {"TCP", "UDP", "SCTP"}}],
    "readinessProbe": {"tcpSocket": {"port!": port}, "periodSeconds": int, "initialDelaySeconds": int},
    "resources": {"requests": {"*": quantity}, "limits": {"*": quantity}},
    "securityContext": {
        "allowPrivilegeEscalation": bool,
        "capabilities": {"add": [str], "drop": [str]},
        "runAsUser": int,
    },
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
}
POD = {
    "containers!": [CONTAINER],
    "securityContext": PODS_SECURITY,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {"*": str},
    "volumes": [
        {
            "name!": NAME.fullmatch,
            "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": quantity},
            "persistentVolumeClaim": {"claimName!": NAME.fullmatch, "readOnly": bool},
        }
    ],
}
REPLICA = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": {"metadata": {"labels": {"*": str}, "annotations": {"*": str}}, "spec!": POD},
}
MPI_JOB = {
    "apiVersion!": {"kubeflow.org/v2beta1"},
    "kind!": {"MPIJob"},
    "metadata!": METADATA,
    "spec!": {
        "slotsPerWorker": int,
        "runLauncherAsWorker": bool,
        "sshAuthMountPath": str,
        "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
        "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
        "mpiReplicaSpecs!": {"Launcher!": REPLICA, "Worker": REPLICA},
        "runPolicy": {
            "cleanPodPolicy": {"All", "Running", "None"},
            "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "suspend": bool,
            "managedBy": str,
            "schedulingPolicy": {
                "minAvailable": int,
                "queue": str,
                "minResources": {"*": quantity},
                "priorityClass": str,
                "scheduleTimeoutSeconds": int,
            },
        },
    },
}
VOLUME_CLAIM = {
    "apiVersion!": {"v1"},
    "kind!": {"PersistentVolumeClaim"},
    "metadata!": METADATA,
    "spec!": {
        "accessModes!": [{"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"}],
        "resources!": {"requests!": {"storage!": quantity}},
        "storageClassName": str,
    },
}


def errors(value, schema, where=""):
    """Returns the differences between the value and the schema, as lines "path: reason"."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: not an object"]
        fields = {name.rstrip("!"): inner for name, inner in schema.items()}
        found = [f"{where}.{name[:-1]}: missing" for name in schema if name[-1] == "!" and name[:-1] not in value]
        for name, inner in value.items():
            known = fields.get(name, fields.get("*"))
            found += [f"{where}.{name}: unknown"] if known is None else errors(inner, known, f"{where}.{name}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [
            line for number, item in enumerate(value) for line in errors(item, schema[0], f"{where}[{number}]")
        ]
    if isinstance(schema, set):
        return [] if value in schema else [f"{where}: {value!r} is none of {sorted(schema)}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    return [] if schema(value) else [f"{where}: {value!r} is not valid"]


def test_both_objects_match_the_schema():
    assert errors(CLAIM, VOLUME_CLAIM, "claim") == []
    assert errors(JOB, MPI_JOB, "job") == []


def at(job, path):
    for part in path.split("."):
        job = job[int(part) if part.isdigit() else part]
    return job


WORKER = "spec.mpiReplicaSpecs.Worker.template.spec"
MISTAKES = [
    ("spec", "slotPerWorker", 8, "job.spec.slotPerWorker: unknown"),
    ("spec", "cleanPodPolicy", "Running", "job.spec.cleanPodPolicy: unknown"),  # a field of the older API
    ("spec", "waitForWorkers", True, "job.spec.waitForWorkers: unknown"),
    ("spec", "slotsPerWorker", "8", "job.spec.slotsPerWorker: '8' is no int"),
    ("spec", "slotsPerWorker", True, "job.spec.slotsPerWorker: True is no int"),
    ("spec.runPolicy", "cleanPodPolicy", "running", "'running' is none of"),
    ("spec.mpiReplicaSpecs", "worker", {}, "job.spec.mpiReplicaSpecs.worker: unknown"),
    ("spec.mpiReplicaSpecs.Worker", "restartPolicy", "Sometimes", "'Sometimes' is none of"),
    (WORKER, "shmSize", "1Gi", f"job.{WORKER}.shmSize: unknown"),
    (WORKER, "containers", {}, f"job.{WORKER}.containers: not a list"),
    (f"{WORKER}.containers.0", "args", ["--epochs", 20], "args[1]: 20 is no str"),
    (f"{WORKER}.containers.0.resources", "limits", {"nvidia.com/gpu": "eight"}, "'eight' is not valid"),
    (f"{WORKER}.volumes.0.emptyDir", "sizeLimit", "16GB", "'16GB' is not valid"),
    ("metadata", "name", "hvd_adam", "job.metadata.name: 'hvd_adam' is not valid"),
]


@pytest.mark.parametrize(("path", "field", "value", "error"), MISTAKES, ids=[error for *_, error in MISTAKES])
def test_mistake_in_the_job_is_detected(path, field, value, error):
    job = copy.deepcopy(JOB)
    at(job, path)[field] = value
    (found,) = errors(job, MPI_JOB, "job")
    assert error in found


def test_missing_required_field_is_detected():
    job = copy.deepcopy(JOB)
    del job["spec"]["mpiReplicaSpecs"]["Launcher"]
    assert errors(job, MPI_JOB, "job") == ["job.spec.mpiReplicaSpecs.Launcher: missing"]


# --- the values ---------------------------------------------------------------------------------------------

SPEC = JOB["spec"]
PODS = {name: replica["template"]["spec"] for name, replica in SPEC["mpiReplicaSpecs"].items()}
(LAUNCHER,), (WORKERS,) = PODS["Launcher"]["containers"], PODS["Worker"]["containers"]


def test_job_has_the_required_policies():
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert SPEC["mpiImplementation"] == "OpenMPI"
    # mpirun does not wait until the workers' sshd has started.
    assert SPEC["launcherCreationPolicy"] == "WaitForWorkersReady" and WORKERS["readinessProbe"]["tcpSocket"]
    # The launcher's pod keeps its log; the workers release their GPUs.
    assert SPEC["runPolicy"]["cleanPodPolicy"] == "Running" and SPEC["runPolicy"]["backoffLimit"] > 0
    policies = {name: replica["restartPolicy"] for name, replica in SPEC["mpiReplicaSpecs"].items()}
    assert policies == {"Launcher": "OnFailure", "Worker": "OnFailure"}
    assert SPEC["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1
    assert not any(
        "command" in container for container in (LAUNCHER, WORKERS)
    )  # which would replace the entry point


def test_each_gpu_has_one_rank_and_the_launcher_has_none():
    limits = WORKERS["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == SPEC["slotsPerWorker"]
    assert "nvidia.com/gpu" not in LAUNCHER["resources"]["limits"]
    assert not SPEC.get("runLauncherAsWorker")


def test_launcher_uses_the_operators_host_file_and_resumes_its_run(tmp_path):
    script, option, hostfile, separator, *arguments = LAUNCHER["args"]
    assert script == "/opt/hvd_adam/launch/mpirun.sh" and (ROOT / "launch/mpirun.sh").exists()
    assert (option, hostfile, separator) == ("--hostfile", "/etc/mpi/hostfile", "--")
    (runs,) = (mount["mountPath"] for mount in WORKERS["volumeMounts"] if mount["name"] == "runs")
    assert arguments[0] == "--output-dir" and arguments[1].startswith(f"{runs}/")
    # A configuration file that a user appends leaves the folder as it is.
    (tmp_path / "run.yaml").write_text("output_dir: null\nepochs: 3\n")
    config = parse(TrainConfig, "hvd_adam.train", [*arguments, "--config", str(tmp_path / "run.yaml")])
    assert (config.output_dir, config.epochs) == (arguments[1], 20)


def test_pods_run_as_the_images_user_and_mount_its_keys():
    user = int(re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[1])
    home = re.search(r"-m 700 (\S+/\.ssh)", DOCKERFILE)[1]
    assert SPEC["sshAuthMountPath"] == home
    for pod in PODS.values():
        security = pod["securityContext"]
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == user
        assert security["runAsNonRoot"]
    for container in (LAUNCHER, WORKERS):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert WORKERS["args"] == ["sshd"]
    ssh_port = int(re.search(r"Port (\d+)", (ROOT / "docker/ssh_config").read_text())[1])
    assert WORKERS["readinessProbe"]["tcpSocket"]["port"] == WORKERS["ports"][0]["containerPort"] == ssh_port


def test_shared_memory_and_runs_are_volumes():
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(PODS["Worker"]["volumes"])}
    mounts = {mount["mountPath"]: mount["name"] for mount in WORKERS["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/workspace/runs"]]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]  # ranks of all workers read checkpoints
