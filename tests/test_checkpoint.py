"""Checkpoints are complete or absent, whatever happens to their files.

Hazards: a damaged checkpoint that is loaded, or hides an intact one; `latest` or `best` that name a path
elsewhere; a checkpoint that is lost while it is replaced; a failed write that is not reported, or damages
earlier checkpoints; files of killed processes that accumulate; files of the user that are removed, or count as
checkpoints; the newest checkpoint removed as an old one.
"""

import errno
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.training_runs import one_line, succeeded, train

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import Progress, TrainingState, naming_part
from hvd_adam.checkpoint.writer import CheckpointWriter
from hvd_adam.errors import UserError
from hvd_adam.training.run_dir import holds_run


def save_steps(folder, *steps):
    for step in steps:
        storage.save(folder, step, {"model": {"weight": torch.full((1000,), float(step))}})


def cut(length):
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << place % 8
        path.write_bytes(content)

    return damage


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("nothing")


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "garbage": lambda path: path.write_bytes(b"\xff\xfe" * 100),
    "the older one's": lambda path: shutil.copy(path.parents[1] / "step-00000001" / path.name, path),
    "a folder": replace_by_folder,
    "a link to nothing": link_to_nothing,
    **{f"cut to {length}": cut(length) for length in (1, 100, 250, -1)},
    **{f"bit flipped at {place}": flip(place) for place in [-1, *range(0, 5000, 293)]},
}


@pytest.mark.parametrize("part", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_detected_and_the_newest_intact_checkpoint_is_loaded(part, damage, tmp_path):
    save_steps(tmp_path, 1, 20)
    newest = tmp_path / "step-00000020"
    DAMAGES[damage](newest / part)
    if (part, damage) == ("manifest.json", "the older one's"):
        assert "state.pt does not match its checksum" in refused(newest)
    for place in (newest, newest / "state.pt", tmp_path, tmp_path / "latest"):
        assert "step-00000020" in refused(place) or "no checkpoint in" in refused(place)
    found, state, damaged = storage.load_newest(tmp_path)
    assert found.name == "step-00000001"
    assert torch.equal(state["model"]["weight"], torch.ones(1000))
    assert len(damaged) == 1
    assert str(newest) in damaged[0]


def refused(path):
    with pytest.raises(UserError) as error:
        storage.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_change_of_any_byte_of_the_manifest_is_detected(tmp_path):
    save_steps(tmp_path, 3)
    manifest = tmp_path / "step-00000003" / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        manifest.write_bytes(content)
        flip(place)(manifest)
        refused(tmp_path)


def test_a_state_that_is_not_a_dictionary_of_pytorch_is_refused_although_its_checksum_fits(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    states = [b"", b"text", b"\x80\x02]q\x00.", torch.ones(3), [1, 2]]
    for step, state in enumerate(states, start=2):
        write = (lambda _, file, s=state: file.write(s)) if isinstance(state, bytes) else real_save(state)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", write)
            storage.save(tmp_path, step, {})
        assert "cannot be read" in refused(tmp_path / f"step-{step:08d}")
    found, _, damaged = storage.load_newest(tmp_path)
    assert found.name == "step-00000001" and len(damaged) == len(states)


def real_save(value, save=torch.save):
    return lambda _, file: save(value, file)


def whole_state():
    progress = {"step": 1, "epoch": 1, "global_batch_size": 8}
    parts = {"progress": progress, "schedule": {"initial": 0.0, "peak": 1}, "ranks": [{"loss": [0.0, 0]}]}
    return {"model": {}, "optimizer": {}, "loss_scaler": None, "config": {}, "data": {}, **parts}


PARTS = whole_state()


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        *((part, torch.ones(2), f"{part} is of type Tensor, not dict") for part in PARTS if part != "ranks"),
        *((part, [1], f"{part} is of type list, not dict") for part in ("ema", "residuals", "islands")),
        ("model", None, "model is of type NoneType, not dict"),
        ("ranks", {}, "ranks is of type dict, not list"),
        ("ranks", [{}, 3], "the state of rank 1 is of type int, not dict"),
        ("progress", {"step": "1"}, "progress.step is of type str, not int"),
        ("schedule", {"initial": 0.0}, "schedule.peak is of type NoneType, not float"),
        *(
            ("progress", PARTS["progress"] | {name: "x"}, f"progress.{name} is of type str, not {kind}")
            for name, kind in (
                ("epoch_done", "bool"),
                ("skipped", "int"),
                ("best_loss", "float"),
                ("noise", "list"),
            )
        ),
    ],
)
def test_a_part_of_a_wrong_type_is_refused_by_its_name(part, value, words):
    TrainingState.from_dict(PARTS, "here")
    with pytest.raises(UserError) as error:
        TrainingState.from_dict(PARTS | {part: value}, "here")
    assert str(error.value) == f"checkpoint here cannot be resumed: {words}"


POINTERS = [
    b"",
    b"\n",
    b"step-00000020x",
    b"step-00000007",
    b"\xff\0\xff",
    b"../elsewhere/step-00000020",
    b"..",
    b"/",
]


@pytest.mark.parametrize("name", ["latest", "best"])
@pytest.mark.parametrize("text", POINTERS)
def test_a_pointer_names_a_checkpoint_in_its_folder_or_is_refused_and_resume_needs_none(name, text, tmp_path):
    save_steps(tmp_path / "elsewhere", 20)
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1, 20)
    (folder / "best").write_text("step-00000001\n")
    assert storage.load(folder / name)["model"]["weight"][0] == (20 if name == "latest" else 1)
    (folder / name).write_bytes(text)
    for place in [folder / name, *((folder, tmp_path) if name == "latest" else ())]:
        assert str(folder) in refused(place)
    assert storage.load_newest(folder)[0].name == "step-00000020"
    writer = CheckpointWriter(folder, keep=2)
    writer.save(21, {"model": 21})
    assert writer.result(wait=True) == storage.load_newest(folder)[0]
    assert (folder / "latest").read_text() == "step-00000021\n"
    (folder / name).unlink()
    assert "no checkpoint in" in refused(folder / name)


def test_a_checkpoint_is_not_lost_while_it_is_replaced(tmp_path):
    save_steps(tmp_path, 1, 20)
    (tmp_path / "step-00000020").rename(tmp_path / ".step-00000020.old")
    (tmp_path / ".step-00000020.123").mkdir()
    assert storage.load_newest(tmp_path)[0].name == "step-00000020"
    CheckpointWriter(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000020", "latest"}


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    (tmp_path / ".step-00000007.123").mkdir()  # of a killed process
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in range(1, 7):
        writer.save(step, {"model": step}, best=step == 2)
        assert writer.result(wait=True).name == f"step-{step:08d}"
        assert writer.result(wait=True) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000002",
        "step-00000005",
        "step-00000006",
        "latest",
        "best",
    }
    assert (tmp_path / "best").read_text() == "step-00000002\n"
    assert storage.load_newest(tmp_path)[0].name == "step-00000006"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(writer, *steps, best=False):
    for step in steps:
        writer.save(step, {"model": step}, best=best)
        writer.result(wait=True)


def test_only_temporary_files_of_checkpoints_are_removed(tmp_path):
    save_steps(tmp_path, 7)
    own = [".git", ".env", ".step-notes", ".step-00000007.bak", ".latest", "step-00000007.old"]
    for name in (*own, ".step-00000007.old", ".step-00000007.123", ".step-123456789.4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    for name in (".latest.new", ".best.new"):
        (tmp_path / name).write_text("step-00000007\n")
    CheckpointWriter(tmp_path, keep=1)
    assert names(tmp_path) == sorted([*own, "latest", "step-00000007"])
    assert all((tmp_path / name / "file").read_text() == "content" for name in own)


def refuse(monkeypatch, owner, function, refused):
    """Lets a function raise PermissionError for the paths for which `refused` is true."""
    unpatched = getattr(owner, function)

    def patched(path, *arguments, ignore_errors=False, **options):
        if not refused(Path(str(path)), *arguments):  # a descriptor, too
            return unpatched(path, *arguments, **({"ignore_errors": True} if ignore_errors else {}), **options)
        if not ignore_errors:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(owner, function, patched)


def test_a_temporary_file_that_cannot_be_removed_is_reported(tmp_path, monkeypatch, caplog):
    draft = tmp_path / ".step-00000007.123"
    draft.mkdir()
    refuse(monkeypatch, shutil, "rmtree", lambda path: path == draft)
    with caplog.at_level(logging.WARNING):
        write(CheckpointWriter(tmp_path, keep=1), 7)
    assert f"cannot remove {draft}, left by a killed job: " in caplog.text and "denied" in caplog.text
    assert storage.load_newest(tmp_path)[0] == tmp_path / "step-00000007"


@pytest.mark.parametrize("keep", [1, 3])
def test_only_folders_with_the_exact_name_are_checkpoints(keep, tmp_path):
    own = ["step-00000100-good", "step-9", "step-00000100.tar.gz", "step-00000999"]
    for name in own[:2]:
        save_steps(tmp_path / "checkpoints", 100)
        (tmp_path / "checkpoints" / "step-00000100").rename(tmp_path / "checkpoints" / name)
    for name in own[2:]:
        (tmp_path / "checkpoints" / name).write_text("")
    assert storage.load_newest(tmp_path / "checkpoints") == (None, {}, [])
    assert not holds_run(tmp_path)
    write(CheckpointWriter(tmp_path / "checkpoints", keep), 99_999_999, 100_000_000)
    found = ["step-100000000", "step-99999999"][:keep]
    assert [path.name for path in storage.newest_first(tmp_path / "checkpoints")] == found
    assert names(tmp_path / "checkpoints") == sorted([*own, *found, "latest"])
    assert storage.load_newest(tmp_path / "checkpoints")[1] == {"model": 100_000_000}
    assert holds_run(tmp_path)


def test_a_damaged_newer_checkpoint_pushes_out_no_intact_one(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1)
    write(writer, 400, best=True)
    write(writer, 500)
    (tmp_path / "step-00000500" / "state.pt").write_bytes(b"damaged")
    writer = CheckpointWriter(tmp_path, keep=1)  # resumes from 400
    write(writer, 425, 450)
    assert names(tmp_path) == ["best", "latest", "step-00000400", "step-00000450", "step-00000500"]
    assert storage.load_newest(tmp_path)[0].name == storage.resolve(tmp_path).name == "step-00000450"
    write(writer, 550)
    assert names(tmp_path) == ["best", "latest", "step-00000400", "step-00000550"]


def test_checkpoints_of_an_earlier_run_stay_until_training_has_passed_their_steps(tmp_path):
    save_steps(tmp_path, 800, 900)
    writer = CheckpointWriter(tmp_path, keep=2)
    write(writer, 100, 200, 300)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (200, 300, 800, 900))]
    write(writer, 850)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (800, 850, 900))]


def test_a_replacement_that_fails_puts_the_older_checkpoint_back(tmp_path, monkeypatch):
    storage.save(tmp_path, 7, {"version": 1})
    with monkeypatch.context() as patches:
        refuse(patches, Path, "rename", lambda path, to: to.name == "step-00000007" and path.suffix != ".old")
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*denied"):
            storage.save(tmp_path, 7, {"version": 2})
    assert storage.load(tmp_path) == {"version": 1}
    storage.save(tmp_path, 7, {"version": 3})
    assert storage.load(tmp_path) == {"version": 3}
    assert names(tmp_path) == ["latest", "step-00000007"]


def test_a_replaced_checkpoint_that_cannot_be_removed_does_not_stop_later_replacements(tmp_path, monkeypatch):
    with monkeypatch.context() as patches:
        refuse(patches, shutil, "rmtree", lambda path: path.suffix == ".old")
        for version in range(4):
            storage.save(tmp_path, 7, {"version": version})
            assert storage.load(tmp_path) == {"version": version}
    shutil.rmtree(tmp_path / "step-00000007")
    assert storage.load_newest(tmp_path)[0] is None  # a partly removed backup never gets its name back
    CheckpointWriter(tmp_path, keep=1)
    assert names(tmp_path) == ["latest"]


def test_a_file_with_the_name_of_a_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "step-00000007").write_text("of the user")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        storage.save(tmp_path, 7, {})
    assert (tmp_path / "step-00000007").read_text() == "of the user"


def test_an_error_without_text_is_reported_by_its_type(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError

    monkeypatch.setattr(storage, "_write", failing)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: OSError\(\); check the disk"):
        storage.save(tmp_path, 7, {})


def test_a_best_that_cannot_be_written_is_reported_as_such(tmp_path):
    (tmp_path / "best").mkdir()
    writer = CheckpointWriter(tmp_path, keep=1)
    with pytest.raises(UserError, match=r"step-00000001 is written, but cannot be marked as the best: .*best"):
        write(writer, 1, best=True)
    assert storage.load(tmp_path) == {"model": 1}


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save_steps(folder, 7)
    writer = CheckpointWriter(folder, keep=1)
    for function in ("listdir", "scandir"):
        refuse(monkeypatch, os, function, lambda path: path == folder)
    for read in (storage.newest_first, storage.load_newest):
        with pytest.raises(OSError, match="denied"):
            read(folder)
    with pytest.raises(UserError, match=rf"cannot use the folder {folder}: .*denied"):
        CheckpointWriter(folder, keep=1)
    with pytest.raises(UserError, match=rf"cannot read the run folder {tmp_path} \(.*denied"):
        holds_run(tmp_path)
    with pytest.raises(UserError, match="cannot remove old checkpoints"):
        write(writer, 8)


def test_a_failed_write_is_reported_and_the_next_one_succeeds(tmp_path):
    writer = CheckpointWriter(tmp_path / "run", keep=2)
    (tmp_path / "run").write_text("")
    writer.save(1, {"model": 1})
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        writer.result(wait=True)
    (tmp_path / "run").unlink()
    writer.save(2, {"model": 2})
    assert writer.result(wait=True).name == "step-00000002"


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(143)])
def test_what_a_signal_raises_during_a_write_is_not_reported_as_a_failed_write(raised, tmp_path, monkeypatch):
    def interrupted(*_):
        raise raised

    storage.save(tmp_path, 1, {"weight": torch.ones(3)})
    with monkeypatch.context() as patches:
        patches.setattr(storage.HashingFile, "write", interrupted)
        with pytest.raises(type(raised)):
            storage.save(tmp_path, 2, {"weight": torch.ones(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_an_exception_that_is_handled_while_a_checkpoint_is_written_does_not_hide_an_error(tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("this archive")

    monkeypatch.setattr(torch, "save", failing)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(UserError, match="this archive"):
            storage.save(tmp_path, 2, {"weight": torch.ones(3)})


def test_save_copies_the_state_and_reports_a_failure_of_the_previous_write(tmp_path):
    weight = torch.ones(3)
    writer = CheckpointWriter(tmp_path / "run", keep=2)
    writer.save(1, {"weight": weight})
    weight.zero_()
    assert torch.equal(storage.load(writer.result(wait=True))["weight"], torch.ones(3))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    writer.save(2, {"weight": weight})
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        writer.save(3, {"weight": weight})


def test_a_writer_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = CheckpointWriter(None, keep=2)
    writer.save(1, {"weight": 1})
    assert writer.result(wait=True) is None
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_best_evaluation_has_the_highest_accuracy_and_of_equal_ones_the_lowest_loss():
    progress = Progress()
    evaluations = ((0.5, 1.0), (0.5, 2.0), (0.5, 0.9), (0.5, math.nan), (0.6, math.nan), (0.6, 0.5), (0.5, 0.1))
    assert [progress.is_best(*each) for each in evaluations] == [True, False, True, False, True, True, False]
    without_accuracy = Progress()
    losses = (math.nan, 2.0, 2.0, 1.0)
    assert [without_accuracy.is_best(None, loss) for loss in losses] == [False, True, False, True]


@pytest.mark.parametrize("error", [KeyError("param_groups"), TypeError("a\n b"), RuntimeError("size")])
def test_a_part_that_cannot_be_loaded_is_named_in_one_line(error):
    with pytest.raises(UserError) as got, naming_part("the model", "here"):
        raise error
    assert str(got.value).startswith("checkpoint here cannot be resumed: the model in it cannot be loaded (")
    assert "\n" not in str(got.value)
    with pytest.raises(UserError, match=r"^as it is$"), naming_part("the model", "here"):
        raise UserError("as it is")


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("model", 3), torch.ones(1), "of another model or data set: 3 is"),
        (("optimizer", "state"), [1], "the optimizer in it cannot be loaded"),
        (("optimizer", "state", 0, "exp_avg"), "x", "the optimizer in it cannot be loaded"),
        (("ranks", 0, "cpu"), torch.ones(3), "the state of a rank in it cannot be loaded"),
        (("ema",), {}, "the moving average in it cannot be loaded"),
    ],
)
def test_a_run_whose_checkpoint_holds_wrong_values_is_refused_in_one_line(place, value, named, tmp_path):
    options = [
        "--dataset",
        "synthetic",
        "--synthetic-samples",
        64,
        "--model",
        "mlp",
        "--ema",
        0.9,
        "--device",
        "cpu",
    ]
    succeeded(train(*options, "--epochs", 1, folder=tmp_path))
    entry = state = storage.load(tmp_path)
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    saved = storage.save(tmp_path / "checkpoints", state["progress"]["step"], state)
    weights = (saved / "state.pt").read_bytes()
    assert named in one_line(train(*options, "--epochs", 2, folder=tmp_path))
    assert (saved / "state.pt").read_bytes() == weights
    assert [path.name for path in storage.newest_first(saved.parent)] == [saved.name]
