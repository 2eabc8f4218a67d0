"""Folders of images, read from the files and from a packed cache.

Hazards: a split or an order that depends on the file system or on where the folder is; classes of training and
test images that differ; a damaged file that ends a run of days, hangs it, is counted as a test image or is never
named; an evaluation from the cache that differs from that of the files; a cache that is stale, half written or
made twice; a full disk; a resume in the middle of an epoch that is not exact.
"""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.photos import CLASSES, write_photo, write_photos
from helpers.training_runs import checkpoint, events, succeeded, train
from PIL import Image

from hvd_adam.config import TrainConfig
from hvd_adam.data import UnreadableSample
from hvd_adam.data.host_images import HostImages
from hvd_adam.data.image_folder import packed
from hvd_adam.data.image_folder.files import decode
from hvd_adam.data.image_folder.load import MEAN, STD, load, load_packed
from hvd_adam.data.image_folder.scan import scan
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.errors import UserError
from hvd_adam.training.builders import make_loader, worker_count

CPU = torch.device("cpu")
SIZE = 14  # of which the packed images have 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def paths(files):
    return [os.fsdecode(path.item()) for path in files.paths]


def joined(batches):
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_both_layouts_are_found_in_an_order_of_their_own(tmp_path, photos):
    found = scan(photos)
    assert found.classes == CLASSES and (len(found.train), len(found.test)) == (24, 8)
    assert paths(found.train)[:7] == [*(f"cat/{number:03d}.jpg" for number in range(6)), "dog/000.jpg"]
    assert found.train.labels.tolist() == [label for label in range(4) for _ in range(6)]
    plain = write_photos(tmp_path / "plain", train=6, test=0, classes=("b", "a"))
    write_photo(plain / "a" / "more" / "x.JPEG", seed=0)
    for ignored in ("a/._000.jpg", "a/notes.txt", ".cache/a/000.jpg"):
        (plain / ignored).parent.mkdir(parents=True, exist_ok=True)
        (plain / ignored).write_text("no image")
    split = scan(plain)
    assert split.classes == ("a", "b")
    assert paths(split.test) == ["a/004.jpg", "b/004.jpg"]
    assert len(split.train) == 11 and "a/more/x.JPEG" in paths(split.train)


def test_the_fingerprint_depends_on_the_files_and_not_on_their_folder(tmp_path, photos):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    before = scan(photos).train.fingerprint()
    assert scan(copy).train.fingerprint() == before
    with open(copy / "train" / "cat" / "000.jpg", "ab") as file:
        file.write(b"more")
    assert scan(copy).train.fingerprint() != before


def without(folder, name):
    shutil.rmtree(folder / name)


BAD_FOLDERS = {
    "missing": (shutil.rmtree, "is not a folder"),
    "no test images": (lambda folder: without(folder, "val"), "neither val nor test"),
    "no class": (lambda folder: [without(folder, f"train/{name}") for name in CLASSES], "train has no folders"),
    "one class": (
        lambda folder: [without(folder, f"train/{name}") for name in CLASSES[1:]],
        "only one folder, 'cat'",
    ),
    "an empty class": (lambda folder: (folder / "train" / "gnu").mkdir(), "train/gnu has no images"),
    "a class without test images": (lambda folder: without(folder, "val/dog"), "train has the class 'dog'"),
    "a class without training images": (lambda folder: without(folder, "train/dog"), "val has the class 'dog'"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(case, photos, tmp_path):
    folder, (spoil, message) = tmp_path / "spoiled", BAD_FOLDERS[case]
    shutil.copytree(photos, folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        scan(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_to_a_folder_that_it_is_in_is_refused(tmp_path, photos):
    folder = tmp_path / "copy"
    shutil.copytree(photos, folder)
    (folder / "train" / "dog" / "elsewhere").symlink_to(photos / "val" / "dog")
    assert len(scan(folder).train) == 26
    (folder / "train" / "dog" / "loop").symlink_to("..")
    with pytest.raises(UserError, match=r"train/dog/loop is a link to .*/train, which it is in: remove the link$"):
        scan(folder)


def test_a_pipe_is_no_image_and_a_broken_link_is_an_unreadable_file(tmp_path, caplog):
    folder = write_photos(tmp_path / "photos")
    os.mkfifo(folder / "val" / "cat" / "fifo.png")
    (folder / "val" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [name for name in paths(scan(folder).test) if name.endswith(".png")] == ["dog/gone.png"]
    data = load(folder, image_size=SIZE)
    loader = WorkerLoader(data, CPU, unreadable=UnreadableSamples(1))
    assert len(joined(loader.test_batches(4))[0]) == 8
    assert [line.partition("val/")[2] for line in caplog.messages] == [
        "dog/gone.png (No such file or directory): the file is skipped"
    ]


def test_the_current_folder_may_be_the_folder_of_images(tmp_path, monkeypatch):
    write_photos(tmp_path, test=0)
    write_photo(tmp_path / "cat" / "more" / "x.jpg", seed=0)
    monkeypatch.chdir(tmp_path)
    found = scan(Path("."))
    assert {"cat/000.jpg", "cat/more/x.jpg"} <= {*paths(found.train)}
    assert found.train.fingerprint() == scan(tmp_path).train.fingerprint()


def test_a_folder_without_permission_is_named(photos, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refused)  # root may read everything
    with pytest.raises(UserError, match=r"cannot read .*train: Permission denied"):
        scan(photos)


def test_too_few_images_to_hold_some_out_are_refused(tmp_path):
    with pytest.raises(UserError, match="too few images to hold out"):
        scan(write_photos(tmp_path / "few", train=4, test=0))


def test_images_are_normalized_crops_of_the_given_size(photos):
    loader = WorkerLoader(load(photos, image_size=SIZE), CPU, channels_last=True)
    images, labels = joined(loader.train_batches(0, 0, global_batch_size=8))
    assert images.shape == (24, 3, SIZE, SIZE) and sorted(set(labels.tolist())) == [0, 1, 2, 3]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    values = (images * std + mean) * 255
    levels = values.round()
    assert torch.allclose(values, levels, atol=1e-3) and 0 <= levels.min() < levels.max() <= 255
    assert loader.data.summary() == "3×14×14, 4 classes, 24 training and 8 test samples"
    again = joined(loader.train_batches(0, 1, global_batch_size=8))
    assert not torch.equal(images[labels.argsort(stable=True)], again[0][again[1].argsort(stable=True)])


def test_one_class_against_the_rest(photos, tmp_path):
    for data in (
        load(photos, image_size=SIZE, positive_class="eel"),
        load_packed(photos, tmp_path, image_size=SIZE, positive_class="eel"),
    ):
        loader = WorkerLoader(data, CPU) if not hasattr(data, "crop") else DeviceLoader(data, CPU)
        assert data.classes == ("rest", "eel")
        assert joined(loader.test_batches(3))[1].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    with pytest.raises(UserError, match="no class 'cow'"):
        load(photos, positive_class="cow")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "not an image"), (b"text", "not an image"), (None, "No such")]
)
def test_a_file_that_is_no_image_is_named_with_the_reason(content, reason, tmp_path):
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableSample, match=rf"x.jpg \({reason}"):
        decode(str(path))


# The packed cache.


def pack(photos, cache, **options):
    return load_packed(photos, cache, image_size=SIZE, **options)


def test_the_cache_gives_the_test_images_of_the_files_and_crops_for_training(photos, tmp_path):
    data = pack(photos, tmp_path)
    assert isinstance(data.train_images, np.memmap) and data.train_images.shape == (24, 3, 16, 16)
    loader = DeviceLoader(data, CPU)
    from_files = joined(WorkerLoader(load(photos, image_size=SIZE), CPU).test_batches(5))
    for ours, theirs in zip(joined(loader.test_batches(5)), from_files, strict=True):
        assert torch.equal(ours, theirs)
    images, labels = joined(loader.train_batches(1, 0, global_batch_size=12))
    assert images.shape == (24, 3, SIZE, SIZE)
    parts = [list(loader.train_batches(1, 0, global_batch_size=12, rank=r, size=2, accumulate=2)) for r in (0, 1)]
    steps = [batch for step in (0, 1) for rank in parts for batch in rank[2 * step : 2 * step + 2]]
    assert torch.equal(joined(steps)[0], images) and torch.equal(joined(steps)[1], labels)
    # Every crop is a part of its image, some are flipped, and they are at different places.
    whole = DeviceLoader(pack(photos, tmp_path), CPU)._normalize(torch.from_numpy(data.train_images.copy()))
    found = [places(crop, whole[data.train_labels == label]) for crop, label in zip(images, labels, strict=True)]
    assert all(found) and {flipped for *_, flipped in found} == {True, False}
    assert len({place[:2] for place in found}) > 4
    assert loader.data.sample_shape == (3, SIZE, SIZE) and "3×14×14" in data.summary()


def test_crops_of_the_cache_are_at_their_places_and_flipped_where_asked(photos, tmp_path):
    data = pack(photos, tmp_path)
    images = HostImages(data.train_images, data.train_labels, SIZE, CPU)
    indices, top, left, flip = (
        np.array(part) for part in ([5, 0, 5, 23], [0, 1, 2, 2], [2, 0, 1, 2], [1, 0, 0, 1])
    )
    crops, labels = images.crops(indices, top, left, flip)
    for crop, index, y, x, mirrored in zip(crops, indices, top, left, flip, strict=True):
        expected = data.train_images[index][:, y : y + SIZE, x : x + SIZE]
        assert np.array_equal(crop, expected[..., ::-1] if mirrored else expected)
    assert np.array_equal(labels, data.train_labels[indices])


@pytest.mark.parametrize("size", [12, 24, 64])  # margins of 1, 1½ and 4½ pixels around the crop
def test_files_and_cache_have_the_same_center_at_odd_sizes(size, tmp_path):
    photos, height = write_photos(tmp_path / "photos", train=1), round(size * 256 / 224)
    for width in range(94, 102):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / "val" / "cat" / f"{width}.png")
    packed_data = load_packed(photos, tmp_path / "cache", image_size=size)
    from_files = load(photos, image_size=size)
    ours, _ = joined(DeviceLoader(packed_data, CPU).test_batches(4))
    theirs, _ = joined(WorkerLoader(from_files, CPU).test_batches(4))
    assert torch.equal(ours, theirs)


def places(crop, images):
    """Returns the top, left and flip with which the crop is found in one of the images, or None."""
    for top in range(3):
        for left in range(3):
            parts = images[:, :, top : top + SIZE, left : left + SIZE]
            for flipped in (False, True):
                if (crop == (parts.flip(3) if flipped else parts)).flatten(1).all(1).any():
                    return top, left, flipped
    return None


def test_a_cache_is_used_again_and_a_damaged_or_stale_one_is_replaced(photos, tmp_path):
    reports = []
    pack(photos, tmp_path, progress=reports.append)
    assert any("train 0 of 24" in report for report in reports)
    (folder,) = tmp_path.glob("imagefolder-*")
    reports.clear()
    pack(photos, tmp_path, progress=reports.append)
    assert not reports
    with open(folder / "train.images", "r+b") as file:
        file.truncate(100)
    data = pack(photos, tmp_path, progress=reports.append)
    assert reports and data.train_images[-1].any()
    reports.clear()
    load_packed(photos, tmp_path, image_size=SIZE + 7, progress=reports.append)
    assert reports and len(list(tmp_path.glob("imagefolder-*"))) == 2
    assert not list(tmp_path.glob(".*.new"))


def test_damaged_files_are_left_out_of_the_cache_and_reported_at_every_use(tmp_path, caplog):
    damaged = write_photos(tmp_path / "damaged", damaged=("train/dog/003.jpg", "val/cat/001.jpg"))
    with pytest.raises(UserError, match=r"val/cat/001.jpg .*; 1 more .*--max-corrupt 2"):
        pack(damaged, tmp_path / "cache", max_unreadable=1)
    assert not list((tmp_path / "cache").glob("*imagefolder-*/train.images"))
    for _ in range(2):
        caplog.clear()
        data = pack(damaged, tmp_path / "cache", max_unreadable=2)
        assert (len(data.train_images), len(data.test_images)) == (23, 7)
        assert sum("train/dog/003.jpg" in line for line in caplog.messages) == 1
    with pytest.raises(UserError, match="--max-corrupt 1"):
        pack(damaged, tmp_path / "cache")


def test_a_cache_that_another_process_makes_is_waited_for(photos, tmp_path, monkeypatch):
    made = pack(photos, tmp_path)
    (folder,) = tmp_path.glob("imagefolder-*")
    hidden = folder.rename(tmp_path / "hidden")
    monkeypatch.setattr(packed, "_POLL_SECONDS", 0.01)
    reports = []

    def progress(doing):
        reports.append(doing)
        if len(reports) == 2:
            hidden.rename(folder)
            lock.release()

    lock = packed.FileLock(tmp_path / f".{folder.name}.lock", thread_local=False)
    lock.acquire()
    data = pack(photos, tmp_path, progress=progress)
    assert len(reports) == 2 and "another process" in reports[0]
    assert np.array_equal(data.train_images, made.train_images)


def test_a_file_that_changes_and_keeps_its_size_makes_the_cache_stale(tmp_path):
    photos = write_photos(tmp_path / "photos", train=2, test=1)
    bitmap = photos / "train" / "cat" / "zzz.bmp"
    Image.new("RGB", (SIZE, SIZE), "red").save(bitmap)
    before = pack(photos, tmp_path)
    Image.new("RGB", (SIZE, SIZE), "blue").save(bitmap)
    after = pack(photos, tmp_path)
    assert before.train_images[2, :, 0, 0].tolist() == [255, 0, 0]
    assert after.train_images[2, :, 0, 0].tolist() == [0, 0, 255]
    assert after.checksum == before.checksum  # hosts may have copies with other times


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: [],
        lambda manifest: manifest | {"counts": {"train": 999, "test": 8}},
        lambda manifest: manifest | {"unreadable": 3},
        lambda manifest: manifest | {"sizes": {}},
    ],
)
def test_a_cache_with_a_damaged_manifest_is_made_again(photos, tmp_path, spoil):
    pack(photos, tmp_path)
    (path,) = tmp_path.glob("imagefolder-*/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(spoil(manifest)))
    assert len(pack(photos, tmp_path).train_images) == 24
    assert json.loads(path.read_text()) == manifest


def test_a_full_disk_is_reported_and_leaves_nothing_behind(photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]).returncode:
        pytest.skip("cannot mount")
    try:
        with pytest.raises(UserError, match=r"cannot write the cache .*No space left.*GB.*--cache"):
            pack(photos, disk)
        assert not list(disk.glob("*imagefolder-*/*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_cache_that_cannot_be_made_is_refused(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache"):
        pack(photos, tmp_path / "file")


# Whole runs.

OPTIONS = f"--dataset imagefolder --image-size {SIZE} --model mlp --lr-decay constant --warmup-epochs 0".split()


def test_two_ranks_name_damaged_files_and_resume_exactly_in_the_middle_of_an_epoch(tmp_path):
    damaged = ("train/cat/001.jpg", "train/eel/004.jpg", "val/fox/001.jpg")
    photos = write_photos(tmp_path / "photos", damaged=damaged)
    options = [*OPTIONS, "--data-dir", photos, "--batch-size", 3, "--epochs", 2, "--checkpoint-every", 6]
    whole = succeeded(train(*options, "--workers", 1, ranks=2, folder=tmp_path / "whole"))
    for name in damaged:
        assert whole.stderr.count(f"{name} (image file is truncated") in (1, 2)  # by one rank, or by both
    resume = ["--resume", tmp_path / "whole" / "checkpoints" / "step-00000006", "--workers", 0]
    succeeded(train(*options, *resume, ranks=2, folder=tmp_path / "resumed"))
    (expected, ended), (resumed, _) = (
        (checkpoint(tmp_path / name), events(tmp_path / name, "end")) for name in ("whole", "resumed")
    )
    assert ended and expected["progress"]["step"] == 8
    for name, weights in expected["model"].items():
        assert torch.equal(weights, resumed["model"][name])
    assert resumed["optimizer"]["state"][0]["exp_avg"].equal(expected["optimizer"]["state"][0]["exp_avg"])
    evaluations = [events(tmp_path / name, "eval")[-1] for name in ("whole", "resumed")]
    assert [event["images"] for event in evaluations] == [7, 7]
    assert evaluations[0]["test_loss"] == evaluations[1]["test_loss"]
    done = succeeded(train("--checkpoint", tmp_path / "whole", module="hvd_adam.evaluate"))
    assert f"test samples 7 of imagefolder\ntest loss {evaluations[0]['test_loss']:.4f}" in done.stdout


def test_more_damaged_files_than_the_limit_end_both_ranks_with_one_line(tmp_path):
    damaged = [f"train/cat/{number:03d}.jpg" for number in range(6)]
    photos = write_photos(tmp_path / "photos", damaged=damaged)
    options = [*OPTIONS, "--data-dir", photos, "--max-corrupt", 0, "--workers", 0, "--batch-size", 6]
    done = train(*options, ranks=2, folder=tmp_path / "run")
    assert "Exit code: 2" in done.stderr, done.stderr  # horovodrun's own is 1
    assert done.stderr.count("error: cannot read ") == 1 and "--max-corrupt 1 or above" in done.stderr


def test_a_folder_that_cannot_be_used_ends_both_ranks_with_one_line(tmp_path):
    photos = write_photos(tmp_path / "photos", classes=("cat",))
    done = train(*OPTIONS, "--data-dir", photos, ranks=2, folder=tmp_path / "run")
    assert "Exit code: 2" in done.stderr, done.stderr
    assert done.stderr.count("only one folder, 'cat'") == 1
    assert not (tmp_path / "run").exists()


def test_workers_are_the_ranks_share_of_the_cores_less_one(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for threads, workers in ((1, 1), (8, 7), (64, 16)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert worker_count(None, None) == workers
    assert worker_count(0, None) == 0


def test_a_damaged_file_counts_once_although_mixup_reads_it_twice(tmp_path, caplog):
    photos = write_photos(tmp_path / "photos", damaged=["train/cat/001.jpg"])
    config = TrainConfig(
        dataset="imagefolder", data_dir=str(photos), image_size=SIZE, mixup=0.2, workers=0, max_corrupt=1
    )
    mixed = make_loader(config, SimpleNamespace(device=CPU, local_size=1))
    assert len(list(mixed.train_batches(0, 0, global_batch_size=8))) == 3
    assert len([line for line in caplog.messages if "cat/001.jpg" in line]) == 1


def test_the_limit_of_unreadable_samples_counts_each_once():
    unreadable = UnreadableSamples(1)
    unreadable.add(["a (cut)", "a (cut)"])
    unreadable.add(["a (cut)"])
    with pytest.raises(UserError, match=r"cannot read b"):
        unreadable.add(["b (cut)"])
