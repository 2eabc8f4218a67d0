"""Disks that become full or read-only before or during a run. The tests mount real file systems and need root.

Hazards: a traceback instead of one line; a run that ends because a line of metrics does not fit; metrics that
are lost; an intact checkpoint that is damaged by a failed write; a failed last checkpoint that is not reported;
a folder that cannot be written to and is not refused before training starts; a file system that cannot flush
folders is refused, or a file that was not flushed counts as written.
"""

import errno
import json
import os
import re
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.training_runs import checkpoint, events, one_line, succeeded, train

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.errors import UserError
from hvd_adam.training.append_log import AppendLog

# HOOKS has lines of "PASS CODE"; the model runs the code in that training forward pass.
MODEL = '''
import os, time, torch
from pathlib import Path

HOOKS = dict(line.split(" ", 1) for line in os.environ.get("HOOKS", "").splitlines())
filler = Path(os.environ.get("FILLER", "filler"))

def fill():
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass

def wait_for_checkpoint(name):
    """Waits until the checkpoint is written and older ones are removed."""
    folder = filler.parent / "run" / "checkpoints"
    named = lambda link: (folder / link).read_text().strip() if (folder / link).exists() else None
    while named("latest") != name or not {path.name for path in folder.glob("step-*")} <= {name, named("best")}:
        time.sleep(0.01)

class Model(torch.nn.Linear):
    passes = 0

    def forward(self, images):
        if self.training:
            self.passes += 1
            exec(HOOKS.get(str(self.passes), ""))
        return super().forward(images.flatten(1))

def build(in_channels, num_classes, image_size):
    return Model(in_channels * image_size[0] * image_size[1], num_classes)
'''
STEPS = 120
OPTIONS = f"--model mine:build --epochs 3 --max-steps {STEPS} --checkpoint-every 3 --log-every 1".split()


@contextmanager
def mounted(folder, *arguments):
    """Mounts a file system on a new folder; skips the test if mounting is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_disk(folder, size):
    with mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "none"):
        yield folder


def environment(tmp_path, hooks=""):
    (tmp_path / "mine.py").write_text(MODEL)
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": paths, "HOOKS": hooks, "FILLER": str(tmp_path / "disk" / "filler")}


def error_after_warnings(done):
    """Returns the last line of stderr; all lines before it must be warnings."""
    assert done.returncode == 2, done.stdout + done.stderr
    *warnings, line = done.stderr.splitlines()
    assert all(warning.startswith("hvd_adam: warning: ") for warning in warnings), done.stderr
    return line


def test_a_full_disk_loses_only_the_checkpoints_that_do_not_fit(tmp_path):
    plain = environment(tmp_path)
    with small_disk(tmp_path / "disk", "2m") as disk:
        folder = disk / "run"
        newest = "step-00000099"
        hooks = f"10 fill()\n60 filler.unlink()\n100 wait_for_checkpoint({newest!r}); fill()"
        ended = train(*OPTIONS, "--keep", 1, folder=folder, env=environment(tmp_path, hooks))
        last = folder / "checkpoints" / f"step-{STEPS:08d}"
        line = error_after_warnings(ended)
        assert f"cannot write the checkpoint {last}" in line
        assert "No space left on device" in line
        assert f"warning: cannot write to {folder}: No space left on device; training continues" in ended.stderr
        # Metrics that did not fit were written once there was space again.
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()[:90]
        steps = [event["step"] for event in map(json.loads, lines) if event["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 60
        assert storage.load_newest(folder / "checkpoints")[1]["progress"]["step"] == 99
        assert checkpoint(folder)["progress"]["step"] == 99

        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        line = one_line(train(*OPTIONS, folder=folder, env=plain))
        assert f"cannot write to the run folder {folder} (Read-only file system)" in line
        succeeded(train("--checkpoint", folder, module="hvd_adam.evaluate", env=plain))

        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        line = one_line(train(*OPTIONS, folder=folder, env=plain))  # still full
        assert f"cannot write to the run folder {folder} (No space left on device)" in line
        (disk / "filler").unlink()
        done = succeeded(train(*OPTIONS, folder=folder, env=plain))
        assert "resuming after 99 updates" in done.stdout
        assert [event["step"] for event in events(folder, "step")] == list(range(1, STEPS + 1))
        assert events(folder)[-1]["event"] == "end"


def test_a_disk_that_becomes_read_only_is_logged_and_the_run_continues_to_its_end(tmp_path):
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(16 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(disk, "-o", "loop,errors=remount-ro", str(image)):
        listing = ["findmnt", "-no", "SOURCE", str(disk)]
        device = Path(subprocess.run(listing, capture_output=True, text=True, check=True).stdout.strip()).name
        trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel cannot inject file-system errors")
        folder = disk / "run"
        hooks = f"40 Path('{trigger}').write_text('test')"
        ended = train(*OPTIONS, folder=folder, env=environment(tmp_path, hooks))
        line = error_after_warnings(ended)
        assert f"cannot write the checkpoint {folder}/checkpoints/step-{STEPS:08d}" in line
        assert "Read-only file system" in line
        assert f"warning: cannot write to {folder}: Read-only file system; training continues" in ended.stderr
        assert f"warning: {folder}/metrics.jsonl lacks the last records: Read-only file system" in ended.stderr
        assert f"step {STEPS}/{STEPS}" in ended.stdout
    with mounted(tmp_path / "again", "-o", "loop", str(image)) as disk:
        found, state, damaged = storage.load_newest(disk / "run" / "checkpoints")
        assert (found.name, damaged) == (f"step-{state['progress']['step']:08d}", [])
        assert 36 <= state["progress"]["step"] <= 39


def test_checkpoints_that_cannot_be_written_are_refused_before_training(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(tmp_path / "unmounted")
    line = one_line(train(*OPTIONS, folder=folder, env=environment(tmp_path)))
    assert line.endswith(
        f"cannot write checkpoints to {folder}/checkpoints (No such file or directory): choose another "
        "--output-dir"
    )
    assert not (folder / "metrics.jsonl").exists()


def test_records_that_do_not_fit_are_written_later_complete_and_in_order(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        records = AppendLog(disk / "records")
        lines = [b"%05d %s\n" % (number, b"x" * 100) for number in range(900)]
        for line in lines:  # 96 kB
            records.write(line)
        assert records.error.strerror == "No space left on device"
        assert (disk / "records").stat().st_size == 65536
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        records.write(b"last\n")
        assert records.error is None
        assert (disk / "records").read_bytes() == b"".join(lines) + b"last\n"
        records.close()


def refuse_fsync(monkeypatch, number, *, folders):
    """Lets fsync of folders, or of files, fail with an error, as file systems do that cannot flush them."""
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_keeps_checkpoints_and_settings(number, tmp_path, monkeypatch):
    refuse_fsync(monkeypatch, number, folders=True)
    storage.save(tmp_path, 3, {"model": {}})
    assert storage.load(tmp_path) == {"model": {}}
    write_atomically(tmp_path / "config.yaml", "seed: 1")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1"


@pytest.mark.parametrize(("number", "folders"), [(errno.EIO, True), (errno.EINVAL, False), (errno.ENOTSUP, False)])
def test_other_failures_to_flush_are_errors(number, folders, tmp_path, monkeypatch):
    refuse_fsync(monkeypatch, number, folders=folders)
    with pytest.raises(UserError, match=re.escape(os.strerror(number))):
        storage.save(tmp_path, 3, {"model": {}})
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        write_atomically(tmp_path / "config.yaml", "seed: 1")
