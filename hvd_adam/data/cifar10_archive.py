"""Downloads and unpacks CIFAR-10's archive once per host, while the other processes of that host wait.

The archive and the folder get their names only when they are complete, so a process that is killed meanwhile
leaves nothing that another could mistake for the data.
"""

import hashlib
import os
import shutil
import socket
import sys
import tarfile
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from hvd_adam.errors import UserError

FOLDER = "cifar-10-batches-py"
_READ_TIMEOUT = 30.0  # seconds without a byte after which a download has failed
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """An archive on the web.

    Attributes:
        url: its address.
        md5: its MD5 sum, in hexadecimal digits.
    """

    url: str
    md5: str

    @property
    def name(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]


OFFICIAL = Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")


def fetch(data_dir: Path, *, download: bool, archive: Archive) -> None:
    """Creates `data_dir/cifar-10-batches-py` from the archive, unless it exists.

    One process of the host does the work. The others wait for it, and fail without another attempt if it fails.

    Args:
        data_dir: the parent folder, which may have the archive already.
        download: whether to download the archive if it is missing.
        archive: to download.

    Raises:
        UserError: the folder cannot be created. The message says which file to put where.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / f".{FOLDER}.lock")
        waited = not _acquire(lock)
        try:
            if (data_dir / FOLDER).is_dir():
                return
            if waited:
                raise UserError(
                    f"another process of this host failed to put CIFAR-10 into {data_dir} (see its message): "
                    f"{_remedy(data_dir, archive)}"
                )
            _unpack(_whole_archive(data_dir, download, archive), data_dir / FOLDER)
        finally:
            lock.release()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        remedy = _remedy(data_dir, archive)
        raise UserError(f"CIFAR-10 cannot be put into {data_dir} ({error}): {remedy}") from error


def _acquire(lock: FileLock) -> bool:
    """Acquires the lock and returns whether it was free."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        lock.acquire()  # the system releases it if its holder dies
        return False
    return True


def _whole_archive(data_dir: Path, download: bool, archive: Archive) -> Path:
    path = data_dir / archive.name
    if not path.exists():
        if not download:
            remedy = _remedy(data_dir, archive)
            raise UserError(f"CIFAR-10 is not in {data_dir}, and --no-download is set: {remedy}")
        _download(archive, path)
    elif (found := _md5(path)) != archive.md5:
        raise UserError(
            f"CIFAR-10 archive {path} is damaged (MD5 {found}, expected {archive.md5}): remove it, then "
            f"download it again from {archive.url} or start again to have it downloaded"
        )
    return path


def _download(archive: Archive, path: Path) -> None:
    part = _scratch(path)
    try:
        _copy(archive.url, part)
        if (found := _md5(part)) != archive.md5:
            raise OSError(f"the download is truncated or altered: MD5 {found}, expected {archive.md5}")
        os.replace(part, path)
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(
            f"CIFAR-10 cannot be downloaded from {archive.url} ({error}): {_remedy(path.parent, archive)}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _copy(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=_READ_TIMEOUT) as response, path.open("wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        print(f"downloading {url} ({length / 1e6:.0f} MB)", file=sys.stderr, flush=True)
        with tqdm(total=length or None, unit="B", unit_scale=True, disable=None) as progress:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _unpack(path: Path, folder: Path) -> None:
    scratch = _scratch(folder)
    try:
        scratch.mkdir()
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                _extract(tar, member, scratch)
        try:
            os.replace(scratch, folder)
        except OSError:
            if not folder.is_dir():  # else another host, which may not see this lock, was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(path: Path) -> Path:
    # Unique to this process: if hosts share the folder, the lock may not work between them.
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    # Each file under its base name, so that no path in the archive can lead out of the folder.
    source = tar.extractfile(member) if member.isfile() else None
    if source is not None:
        with source, (folder / Path(member.name).name).open("wb") as file:
            shutil.copyfileobj(source, file)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remedy(data_dir: Path, archive: Archive) -> str:
    return (
        f"put {archive.name} from {archive.url} into {data_dir}, "
        f"or unpack it there so that {data_dir / FOLDER} exists"
    )
