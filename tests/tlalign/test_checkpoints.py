"""Checkpoints: written whole or not at all, and recognised when damaged."""

import errno
import io
import pickle
import random
import resource
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tlalign.checkpoints import CheckpointError, Checkpoints, folder_classes_of, load_checkpoint, load_metadata


def state(number: int) -> dict:
    return {"step": number, "weights": torch.full((1000,), float(number))}


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Checkpoints of steps 1 to 3, the second the best."""
    saved = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        saved.save(state(step), epoch=0, step=step, best=step == 2)
    return saved


def newest(checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
    """Step of the newest good checkpoint, and which damaged ones were reported."""
    reports = []
    found = checkpoints.load_newest(reports.append)
    return None if found is None else found[1]["step"], reports


def test_the_newest_two_the_last_and_the_best_are_kept(checkpoints, tmp_path):
    assert [load_checkpoint(path)["step"] for path in sorted(checkpoints.path.iterdir())] == [2, 3]
    assert load_checkpoint(tmp_path / "last.pth.tar")["step"] == 3
    assert load_checkpoint(tmp_path / "model_best.pth.tar")["step"] == 2
    assert newest(checkpoints) == (3, [])


def test_the_end_of_an_epoch_is_newer_than_its_last_step(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for epoch in (0, 1):
        checkpoints.save({"step": 5, "epoch": epoch}, epoch=epoch, step=5)
    assert checkpoints.load_newest(pytest.fail)[1]["epoch"] == 1


def test_of_a_folder_without_checkpoints_there_is_none(tmp_path):
    assert newest(Checkpoints(tmp_path)) == (None, [])


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_taken(checkpoints, damage):
    path = max(checkpoints.path.iterdir())
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(1 if damage == "emptied" else 50):
        place = draw.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        path.unlink()
        path.write_bytes({"cut": whole[:place], "emptied": b"", "flipped": flipped}[damage])
        step, reports = newest(checkpoints)
        assert step == 2
        assert len(reports) == 1 and str(path) in reports[0]
    path.write_bytes(whole)
    assert newest(checkpoints) == (3, [])


def test_if_all_are_damaged_there_is_none_and_each_is_reported(checkpoints):
    for path in checkpoints.path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    step, reports = newest(checkpoints)
    assert step is None and len(reports) == 2


def test_damaged_checkpoints_give_way_to_those_written_after_them(checkpoints):
    damaged = sorted(checkpoints.path.iterdir())
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    for step in (1, 2, 3):
        written = checkpoints.save(state(step), epoch=0, step=step)
        assert load_checkpoint(written)["step"] == step
        assert newest(checkpoints) == (step, [])
    assert len(list(checkpoints.path.iterdir())) == 2


def test_the_checkpoint_that_a_run_continued_from_is_kept_beside_a_damaged_newer_one(checkpoints):
    damaged = max(checkpoints.path.iterdir())
    damaged.write_bytes(b"")
    # Its name may come before or after that of the one that takes its place.
    for digest in ("0" * 16, "f" * 16):
        damaged = damaged.replace(damaged.with_name(f"epoch-00000-step-000000003-{digest}.pth.tar"))
        checkpoints.save(state(3), epoch=0, step=3)
        steps = [load_checkpoint(path)["step"] for path in sorted(checkpoints.path.iterdir())]
        assert steps == [2, 3]
        damaged.write_bytes(b"")


def test_a_full_disk_leaves_the_checkpoints_before_as_they_were(checkpoints, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file can grow beyond this: the system's answer is an error as that of a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint of step 4 in .*: .*File too large"):
            checkpoints.save(state(4), epoch=0, step=4, best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    checkpoints.save(state(5), epoch=0, step=5)
    assert newest(checkpoints) == (5, [])


def test_what_a_killed_process_left_half_written_is_ignored_and_removed(checkpoints):
    unfinished = checkpoints.path / "epoch-00000-step-000000005.unfinished"
    unfinished.write_bytes(b"half of a checkpoint")
    assert newest(checkpoints) == (3, [])
    checkpoints.save(state(4), epoch=0, step=4)
    assert not unfinished.exists()


def test_what_the_disk_says_is_told_where_torch_hides_it(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: Full())
    with pytest.raises(CheckpointError, match="No space left on device"):
        Checkpoints(tmp_path).save(state(1), epoch=0, step=1)


def test_links_are_copies_where_the_file_system_has_none(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), epoch=0, step=1, best=True)
    for name in ("last.pth.tar", "model_best.pth.tar"):
        assert load_checkpoint(tmp_path / name)["step"] == 1
        assert (tmp_path / name).stat().st_nlink == 1


def test_names_are_no_copies_where_the_disk_is_full(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    with pytest.raises(CheckpointError, match=r"cannot name .*last.pth.tar: .*No space left"):
        Checkpoints(tmp_path).save(state(1), epoch=0, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_name_that_a_kill_left_half_given_is_given_anew(checkpoints, tmp_path):
    (tmp_path / "last.pth.tar.unfinished").hardlink_to(max(checkpoints.path.iterdir()))
    checkpoints.save(state(4), epoch=0, step=4)
    assert [load_checkpoint(path)["step"] for path in sorted(checkpoints.path.iterdir())] == [3, 4]
    assert load_checkpoint(tmp_path / "last.pth.tar")["step"] == 4


@pytest.mark.parametrize("places", [[(9, 99), (10, 100), (11, 110)], [(0, 9), (0, 10), (0, 11)]])
def test_the_checkpoint_before_is_kept_where_numbers_get_a_digit_more(tmp_path, places):
    saved, steps = Checkpoints(tmp_path), []
    for epoch, step in places:
        saved.save(state(step), epoch, step)
        steps.append(step)
        assert newest(saved) == (step, [])
        assert [load_checkpoint(path)["step"] for path in sorted(saved.path.iterdir())] == steps[-2:]


def test_after_the_newest_is_dropped_the_one_before_it_is_the_last(checkpoints, tmp_path):
    checkpoints.drop_newest()
    assert newest(checkpoints) == (2, []) and load_checkpoint(tmp_path / "last.pth.tar")["step"] == 2
    checkpoints.drop_newest()
    assert newest(checkpoints) == (None, []) and not (tmp_path / "last.pth.tar").exists()


def test_a_log_without_rows_is_no_trace_of_training(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.log.write_text("epoch,step\n")
    assert checkpoints.traces() == []
    checkpoints.log.write_text("epoch,step\n1,2\n")
    assert checkpoints.traces() == [checkpoints.log]


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"args": Code(tmp_path / "it ran")}, tmp_path / "x.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "x.pth")
    assert load_metadata(tmp_path / "x.pth") == {}
    assert not (tmp_path / "it ran").exists()


def test_a_file_that_is_something_else_says_nothing_beside_its_tensors(tmp_path):
    (tmp_path / "text").write_text("none")
    torch.save(torch.zeros(1), tmp_path / "tensor")
    assert [load_metadata(tmp_path / name) for name in ("nowhere", "text", "tensor")] == [{}] * 3


def test_only_a_run_on_a_folder_has_classes_of_a_folder(tmp_path):
    for data, names in (("folder:/x", ["a", "b"]), ("digits", None)):
        torch.save({"args": Namespace(data=data), "class_names": ["a", "b"]}, tmp_path / "x.pth")
        assert folder_classes_of(tmp_path / "x.pth") == names
