"""Build the CPU image of docker/Dockerfile with buildah, and run commands in it.

Storage and layers are in one folder, which `remove` deletes. debootstrap makes the Debian system of the base image
once, as ~/.cache/hvd_adam/debian-*.tar. Horovod's wheel comes from the same cache if it was built for the same
distribution; otherwise it is compiled (3 minutes).
"""

from __future__ import annotations

import ast
import json
import os
import platform
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hvd_adam"
SUITE = "bookworm"
DEBOOTSTRAP = "/usr/sbin/debootstrap"
TOOLS = ("buildah", DEBOOTSTRAP, "tar", "unshare", "chroot")

# The settings of Debian's own container image: no fsync, no translations, no manuals.
SLIM = {
    "etc/apt/apt.conf.d/slim": 'Acquire::Languages "none";\n',
    "etc/dpkg/dpkg.cfg.d/slim": "force-unsafe-io\n"
    + "".join(f"path-exclude /usr/share/{name}/*\n" for name in ("doc", "info", "locale", "man")),
}


def skip_reason() -> str | None:
    """Returns the reason why this machine cannot build an image, in one line, or None if it can."""
    if os.geteuid() != 0:
        return "debootstrap and buildah's chroot isolation need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def base_system() -> Path:
    """Returns the path of a tar of a minimal Debian, which debootstrap makes if it does not exist yet."""
    tar = CACHE / f"debian-{SUITE}-minbase-{platform.machine()}.tar"
    if not tar.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="debian-") as folder:
            system = Path(folder) / "system"
            run([DEBOOTSTRAP, "--variant=minbase", SUITE, system], timeout=600)
            for litter in ("var/cache/apt", "var/lib/apt/lists"):
                shutil.rmtree(system / litter)
                (system / litter).mkdir()
            for name, text in SLIM.items():
                (system / name).write_text(text)
            run(["tar", "-C", system, "--numeric-owner", "-cf", f"{folder}/whole.tar", "."], timeout=300)
            os.replace(f"{folder}/whole.tar", tar)
    return tar


def run(command: list[object], timeout: float, **options: object) -> str:
    """Runs a command and returns its stdout; if it fails, the exception contains its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise RuntimeError(f"{shlex.join(map(str, command))[:200]} exited with {done.returncode}:\n{end}")
    return done.stdout


def pip_settings() -> dict[str, str]:
    """Returns the settings of this machine's pip, from files and environment: {"find-links": ..., "cert": ...}."""
    settings = {}
    for line in run(["python3", "-m", "pip", "config", "list"], timeout=250).splitlines():
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], ast.literal_eval(value))
    return settings


def pip_conf(settings: dict[str, str]) -> str:
    """Returns the settings that also work inside a build, as a pip.conf: indexes on the network."""
    lines = ["[global]"]
    for name in ("index-url", "extra-index-url", "trusted-host", "proxy"):
        words = [word for word in settings.get(name, "").split() if not word.startswith(("file:", "/"))]
        if words:
            lines.append(f"{name} = {' '.join(words)}")
    return "\n".join(lines) + "\n"


def build_contexts(settings: dict[str, str]) -> list[str]:
    """Returns options for the Dockerfile's optional contexts that this machine has."""
    options = []
    links = settings.get("find-links", "").split()
    if links and Path(links[0]).is_dir():
        options.append(f"--build-context=wheels={links[0]}")
    release = platform.freedesktop_os_release()
    if (CACHE / "horovod").is_dir() and release.get("VERSION_CODENAME") == SUITE:
        options.append(f"--build-context=horovod={CACHE / 'horovod'}")
    return options


# The mounts that a container has in addition to its image. $1 is the image's file system. Runs in namespaces.
MOUNT = """
set -e
for place in proc sys dev; do mount --rbind /$place "$1/$place"; done
touch "$1/etc/hosts"
mount --bind /etc/hosts "$1/etc/hosts"
"""


class CpuImage:
    """The image, built in `folder`, with its file system unpacked.

    Attributes:
        config: the image's configuration in docker's format (Env, User, Entrypoint, Healthcheck, ...).
        layers: the tars of the layers.
        rootfs: the file system. Unlike in docker, all runs share and change it.
        secrets: the files of the build's secrets, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rootfs = folder, folder / "rootfs"
        self._buildah = ["buildah", "--root", folder / "storage", "--runroot", folder / "run"]
        try:
            self.secrets = self._write_secrets()
            self._build()
            self._unpack()
        except BaseException:
            self.remove()
            raise

    def _write_secrets(self) -> dict[str, Path]:
        self.settings = pip_settings()
        secrets = {"pip_conf": pip_conf(self.settings)}
        bundle = self.settings.get("cert") or os.environ.get("SSL_CERT_FILE")
        if bundle:
            secrets["ca_bundle"] = Path(bundle).read_text()
        # Marked, so that none of them is identical to a file of the system.
        for name, text in secrets.items():
            (self.folder / name).write_text(f"# a secret of this build\n{text}")
        return {name: self.folder / name for name in secrets}

    def _build(self) -> None:
        base = self._run("from", "scratch").strip()
        self._run("add", "--quiet", base, base_system(), "/")
        self._run("commit", "--quiet", "--rm", base, f"localhost/debian:{SUITE}")
        # The layers are written to a folder, uncompressed: reading and unpacking them there takes less than half
        # of the time that buildah needs to store them.
        self._run(
            *"build --isolation chroot --network host --format docker --disable-compression".split(),
            *("--build-arg=DEVICE=cpu", f"--build-arg=BASE_IMAGE=localhost/debian:{SUITE}"),
            *build_contexts(self.settings),
            *(f"--secret=id={name},src={path}" for name, path in self.secrets.items()),
            *("--file", ROOT / "docker" / "Dockerfile", "--tag", f"dir:{self.folder / 'image'}", ROOT),
            timeout=1200,
        )
        image = self.folder / "image"
        manifest = json.loads((image / "manifest.json").read_text())
        self.layers = [image / layer["digest"].partition(":")[2] for layer in manifest["layers"]]
        described = json.loads((image / manifest["config"]["digest"].partition(":")[2]).read_text())
        self.config, self.history = described["config"], described["history"]

    def _run(self, command: str, *arguments: object, timeout: float = 300) -> str:
        return run([*self._buildah, command, *arguments], timeout)

    def _unpack(self) -> None:
        self.rootfs.mkdir()
        for layer in self.layers:
            names = run(["tar", "--list", "--file", layer], timeout=250).splitlines()
            for name in (name for name in names if Path(name).name.startswith(".wh.")):
                self._white_out(self.rootfs / name)
            tar = ["tar", "-C", self.rootfs, "--numeric-owner", "--exclude=.wh.*", "-xpf", layer]
            run(tar, timeout=300)

    def _white_out(self, mark: Path) -> None:
        """Deletes what a whiteout file of a layer stands for: one name, or the earlier contents of its folder."""
        opaque = mark.name == ".wh..wh..opq"
        for gone in mark.parent.iterdir() if opaque else [mark.with_name(mark.name.removeprefix(".wh."))]:
            if gone.is_dir() and not gone.is_symlink():
                shutil.rmtree(gone)
            else:
                gone.unlink()

    def chroot(self, *arguments: object, user: str = "", entry_point: bool = True, **variables: str) -> list[str]:
        """Returns the command of `docker run [--user USER] IMAGE ARGUMENTS`, to run in namespaces after MOUNT.

        Args:
            arguments: the command and its arguments.
            user: the user, as for `docker run --user`.
            entry_point: with the entry point, like `docker run` and unlike `docker exec`.
            variables: additional environment variables.
        """
        user = user or f"{self.config['User']}:{self.config['User']}"
        environ = [*self.config["Env"], *(f"{name}={value}" for name, value in variables.items())]
        command = ["chroot", f"--userspec={user}", "--groups=", self.rootfs, "env", "-i"]
        home = "/home/trainer" if user.startswith(self.config["User"]) else "/"
        command += [f"--chdir={self.config['WorkingDir']}", f"HOME={home}", *environ]
        entry = self.config["Entrypoint"] if entry_point else []
        return list(map(str, [*command, *entry, *arguments]))

    def command(self, *arguments: object, **options: object) -> list[str]:
        """Returns the same command with its own namespaces, except the network's."""
        namespaces = "unshare --mount --pid --ipc --uts --fork --kill-child --mount-proc".split()
        mount = ["bash", "-c", f'{MOUNT}\nshift; exec "$@"', "mount", str(self.rootfs)]
        return [*namespaces, *mount, *self.chroot(*arguments, **options)]

    def files(self) -> Iterator[tuple[int, tarfile.TarFile, tarfile.TarInfo]]:
        """Yields every entry of every layer's tar, with the layer's number."""
        for number, layer in enumerate(self.layers):
            with tarfile.open(layer) as tar:
                for entry in tar:
                    yield number, tar, entry

    def table(self) -> str:
        """Returns a table of the layers' sizes, from the base up. buildah makes one layer of each stage."""
        sizes = [layer.stat().st_size / 1e6 for layer in self.layers]
        rows = [f"{size:7.0f} MB  layer {number}" for number, size in enumerate(sizes)]
        return "\n".join([*rows, f"{sum(sizes):7.0f} MB  total"])

    def remove(self) -> None:
        """Unmounts and deletes everything."""
        for command in (["umount", "--all"], ["rm", "--all"]):
            subprocess.run([*map(str, self._buildah), *command], capture_output=True, check=False)
        # The storage's own mount remains after its containers are gone.
        subprocess.run(["umount", self.folder / "storage" / "overlay"], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
