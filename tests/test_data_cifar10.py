"""CIFAR-10's files: reading them, and fetching them once per host.

Hazards: a pickle that runs code, files written by other versions of Python and numpy, a file cut short or of
another format, a damaged archive, an archive that writes outside its folder, two processes fetching at once, a
host that is offline, a download that is cut off, a folder that looks whole and is not.
"""

import hashlib
import io
import multiprocessing
import os
import pickle
import random
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from helpers.cifar_files import CLASSES, batch, write_cifar10, write_pickle

from hvd_adam.data import cifar10, load
from hvd_adam.data.cifar10_archive import Archive
from hvd_adam.errors import UserError

# Nothing listens on port 1, so a connection is refused immediately, as on a host that is offline.
UNREACHABLE = Archive("http://127.0.0.1:1/cifar-10-python.tar.gz", "0" * 32)


@pytest.fixture
def folder(tmp_path):
    return write_cifar10(tmp_path)


def refusal_of(*arguments, **options):
    with pytest.raises(UserError) as refusal:
        cifar10.load(*arguments, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_the_images_are_those_in_the_files(folder):
    data = load("cifar10", data_dir=folder.parent, download=False)
    assert data.classes == CLASSES and data.augment
    assert data.train_images.shape == (200, 3, 32, 32) and data.test_images.shape == (40, 3, 32, 32)
    second = pickle.loads((folder / "data_batch_2").read_bytes())
    assert np.array_equal(data.train_images[40:80].reshape(40, -1), second[b"data"])
    assert data.train_labels[40:80].tolist() == second[b"labels"]


def test_a_positive_class_makes_a_binary_data_set(folder):
    data = load("cifar10", data_dir=folder.parent, positive_class="airplane")
    assert data.classes == ("rest", "airplane")
    assert data.train_labels.sum() == 20 and data.test_labels.sum() == 4


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", "CF")
def test_every_pickle_protocol_array_order_and_kind_of_label_is_read(folder, protocol, order):
    images = np.random.default_rng(0).integers(0, 256, (10, 3072)).astype(np.uint8)
    for labels in (list(range(10)), np.arange(10), list(np.arange(10, dtype=np.int16))):
        content = batch(np.array(images, order=order), labels, "test")
        write_pickle(folder / "test_batch", content, protocol)
        data = cifar10.load(folder.parent)
        assert np.array_equal(data.test_images.reshape(10, -1), images)
        assert data.test_labels.tolist() == list(range(10))


def test_a_python_2_pickle_with_the_old_module_names_is_read(folder):
    def text(value):  # as Python 2 wrote its strings
        return b"T" + len(value).to_bytes(4, "little") + value

    array = (
        # reconstruct(ndarray, (0,), "b")
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86"  # version 1, shape (1, 3072)
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + text(bytes(range(256)) * 12)
        + b"tb"
    )
    pickled = b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x07au."
    (folder / "test_batch").write_bytes(pickled)
    data = cifar10.load(folder.parent)
    assert data.test_images.tobytes() == bytes(range(256)) * 12
    assert data.test_labels.tolist() == [7]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["test_batch", "data_batch_3", "batches.meta"])
def test_a_malicious_pickle_is_refused_by_name_and_does_nothing(folder, tmp_path, where):
    trace = tmp_path / "trace"
    write_pickle(folder / where, {b"data": Malicious(trace)})
    message = refusal_of(folder.parent)
    assert where in message and "mkdir, which is refused" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut short or damaged"),
        (b"<html>not found</html>", "cut short or damaged"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({b"labels": [1]}), "no 'data'"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), "no 'labels' for its 2"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "no 'labels' for its 2"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "from 0 to 9"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}), "from 0 to 9"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}), "'f4', not of integers"),
        (pickle.dumps({b"data": np.zeros((1, 3000), np.uint8), b"labels": [1]}), "shape (samples, 3072)"),
        (pickle.dumps({b"data": np.array([[None]]), b"labels": [1]}), "not of integers"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name_with_the_reason(folder, content, reason):
    (folder / "data_batch_4").write_bytes(content)
    message = refusal_of(folder.parent)
    assert str(folder / "data_batch_4") in message and reason in message


def test_a_file_truncated_or_altered_anywhere_raises_only_user_errors(folder):
    path = folder / "test_batch"
    images = np.zeros((1, 3072), np.uint8)
    whole = pickle.dumps(batch(images, [1], "test"), 2)
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        # The first bytes hold most of the pickle's program, the middle only pixels.
        damaged[rng.choice([rng.randrange(len(whole)), rng.randrange(250)])] ^= 1 << rng.randrange(8)
        del damaged[rng.choice([len(whole), rng.randrange(1, len(whole))]) :]
        path.write_bytes(damaged)
        try:
            cifar10.load(folder.parent)
        except UserError as refusal:
            assert str(path) in str(refusal)


def test_a_missing_file_is_named(folder):
    (folder / "test_batch").unlink()
    assert f"{folder / 'test_batch'} is missing" in refusal_of(folder.parent)
    (folder / "batches.meta").unlink()
    assert f"{folder / 'batches.meta'} is missing" in refusal_of(folder.parent)


def test_a_gap_in_the_training_files_and_an_incomplete_official_set_are_refused_by_name(folder, tmp_path):
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3 is missing"):
        load("cifar10", data_dir=folder.parent)
    large = write_cifar10(tmp_path / "large", samples_per_batch=10_000, batches=1)
    with pytest.raises(UserError, match="data_batch_2 is missing"):
        load("cifar10", data_dir=large.parent)


def test_the_data_folder_may_be_the_folder_of_the_files(folder):
    assert len(load("cifar10", data_dir=folder).train_images) == len(
        load("cifar10", data_dir=folder.parent).train_images
    )


def test_a_set_with_fewer_training_files_is_read(tmp_path):
    write_cifar10(tmp_path, batches=1)
    assert len(cifar10.load(tmp_path).train_images) == 40


@pytest.fixture
def archive_bytes(tmp_path):
    folder = write_cifar10(tmp_path / "made")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return buffer.getvalue()


@pytest.fixture
def server():
    """An HTTP server with answers from the test; it counts the requests for each path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            body, length = self.server.answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.answers, served.requests = {}, []
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def offered(server, body, length=None):
    server.answers["/cifar.tar.gz"] = body, length or len(body)
    url = f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
    return Archive(url, hashlib.md5(body).hexdigest())


def test_the_archive_is_downloaded_and_unpacked(tmp_path, server, archive_bytes):
    data = cifar10.load(tmp_path / "new" / "folder", archive=offered(server, archive_bytes))
    assert np.array_equal(data.train_images, cifar10.load(tmp_path / "made").train_images)
    assert not [path for path in (tmp_path / "new" / "folder").iterdir() if "part" in path.name]


def test_an_existing_archive_is_unpacked_without_a_download(tmp_path, server, archive_bytes):
    archive = offered(server, archive_bytes)
    (tmp_path / archive.name).write_bytes(archive_bytes)
    assert len(cifar10.load(tmp_path, download=False, archive=archive).train_images) == 200
    assert server.requests == []


def test_another_host_that_has_unpacked_the_archive_meanwhile_is_no_error(
    tmp_path, server, archive_bytes, monkeypatch
):
    def slow(source, target):
        if target.name == "cifar-10-batches-py" and not target.exists():
            shutil.copytree(source, target)  # by a host whose lock this one does not see
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr("hvd_adam.data.cifar10_archive.os.replace", slow)
    assert len(cifar10.load(tmp_path, archive=offered(server, archive_bytes)).train_labels) == 200
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(f".{os.getpid()}")]


def test_a_damaged_archive_is_named_and_kept(tmp_path, archive_bytes):
    (tmp_path / UNREACHABLE.name).write_bytes(archive_bytes)
    message = refusal_of(tmp_path, archive=UNREACHABLE)
    assert f"{tmp_path / UNREACHABLE.name} is damaged" in message
    assert (tmp_path / UNREACHABLE.name).read_bytes() == archive_bytes


@pytest.mark.parametrize("missing", [1, 5000])
def test_a_download_that_is_cut_off_or_altered_leaves_nothing_behind(tmp_path, server, archive_bytes, missing):
    archive = offered(server, archive_bytes)
    server.answers["/cifar.tar.gz"] = archive_bytes[:-missing], len(archive_bytes)
    message = refusal_of(tmp_path / "new", archive=archive)
    assert archive.url in message and "put cifar.tar.gz" in message
    assert [path.name for path in (tmp_path / "new").iterdir() if "cifar.tar" in path.name] == []


def test_an_archive_cannot_write_outside_its_folder(tmp_path, server):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("../outside", str(tmp_path / "absolute")):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    refusal_of(tmp_path / "a" / "b", archive=offered(server, buffer.getvalue()))
    unpacked = tmp_path / "a" / "b" / "cifar-10-batches-py"
    assert sorted(path.name for path in unpacked.iterdir()) == ["absolute", "outside"]
    assert not (tmp_path / "a" / "b" / "outside").exists() and not (tmp_path / "absolute").exists()


def test_a_file_in_place_of_the_data_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal_of(tmp_path / "file", archive=UNREACHABLE)


def test_download_can_be_forbidden(tmp_path, server, archive_bytes):
    message = refusal_of(tmp_path / "new", download=False, archive=offered(server, archive_bytes))
    assert "--no-download" in message and "put cifar.tar.gz" in message
    assert server.requests == []


def _load_in_process(data_dir, archive, start, results):
    start.wait()
    try:
        results.put(len(cifar10.load(data_dir, archive=archive).train_images))
    except UserError as refusal:
        results.put(str(refusal))


def load_in_processes(number, data_dir, archive):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(number), context.Queue()
    arguments = (data_dir, archive, start, results)
    processes = [context.Process(target=_load_in_process, args=arguments) for _ in range(number)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=250) for _ in processes]
    for process in processes:
        process.join(timeout=250)
        assert process.exitcode == 0
    return outcomes


def test_several_processes_download_once(tmp_path, server, archive_bytes):
    assert load_in_processes(3, tmp_path / "new", offered(server, archive_bytes)) == [200, 200, 200]
    assert server.requests == ["/cifar.tar.gz"]


def test_offline_every_process_names_the_file_and_its_folder(tmp_path):
    for message in load_in_processes(2, tmp_path / "new", UNREACHABLE):
        assert f"put cifar-10-python.tar.gz from {UNREACHABLE.url} into {tmp_path / 'new'}" in message
        assert "\n" not in message
