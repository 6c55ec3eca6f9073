"""Checkpoints of a run: written whole or not at all, recognised when damaged, and found again."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from tlalign.config import CHECKPOINTS_FOLDER
from tlalign.runs import BEST_CHECKPOINT, LAST_CHECKPOINT, LOG_FILE

_SUFFIX = ".pth.tar"
_UNFINISHED = ".unfinished"
# Hexadecimal digits of SHA-256 in a file's name: enough to recognise damage, which is no adversary.
_DIGEST_DIGITS = 16


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints in the folder of a run.

    `checkpoints/epoch-E-step-N-DIGEST.pth.tar` are the newest two, from which a run continues. The digest of its
    content in a file's name tells whether it is whole, and name and content appear together. `last.pth.tar` is another
    name of the newest, `model_best.pth.tar` one of the best.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINTS_FOLDER
        self.last = folder / LAST_CHECKPOINT
        self.best = folder / BEST_CHECKPOINT
        self.log = folder / LOG_FILE

    def save(self, state: dict[str, Any], epoch: int, step: int, best: bool = False) -> Path:
        """Writes a checkpoint, and removes all others but the one before it.

        Args:
            state: What `load_newest` gives back: tensors, numbers, strings and containers of them.
            epoch: Epochs done.
            step: Steps done, those of the epoch in progress among them.
            best: Whether it is the best of the run so far.

        Returns:
            The file.

        Raises:
            CheckpointError: If it can't be written.
        """
        try:
            self.path.mkdir(exist_ok=True)
            for unfinished in self.path.glob(f"*{_UNFINISHED}"):
                unfinished.unlink()
            written = _write(state, self.path, f"epoch-{epoch:05d}-step-{step:09d}")
            self.give_names(written, best)
            # Those that claim to be newer were found damaged, else the run had continued from them.
            older = [path for path in self._newest_first() if _place(path) < _place(written)]
            for path in {*self._newest_first()} - {written, *older[:1]}:
                path.unlink()
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint of step {step} in {self.path}: {error}") from error
        return written

    def give_names(self, newest: Path, best: bool) -> None:
        """Gives the newest checkpoint its other names; to one that is found, too, for a kill may have left it undone.

        Args:
            newest: The checkpoint.
            best: Whether it is the best of the run.

        Raises:
            CheckpointError: If a name can't be given.
        """
        try:
            for name in (self.last, self.best) if best else (self.last,):
                _name_also(newest, name)
        except OSError as error:
            raise CheckpointError(f"cannot name {newest} {name}: {error}") from error

    def drop_newest(self) -> None:
        """Removes the newest checkpoint, whose weights turned out to be no good; the one before it is the last then."""
        newest, *older = self._newest_first()
        if older:
            _name_also(older[0], self.last)
        else:
            self.last.unlink(missing_ok=True)
        newest.unlink()

    def load_newest(self, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Reads the newest checkpoint that is not damaged.

        Args:
            report: Is told of each that is.

        Returns:
            The file and its content, on the CPU; None if there is no good one.
        """
        for path in self._newest_first():
            digest = path.name.removesuffix(_SUFFIX).rpartition("-")[-1]
            try:
                if _digest_of(path) != digest:
                    raise ValueError("its content is not what was written")
                return path, load_checkpoint(path)
            except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
                report(f"{path} is damaged ({error}); taking the one before it")
        return None

    def traces(self) -> list[Path]:
        """Files that only a run that has trained leaves: checkpoints, damaged or not, and a log with rows."""
        has_rows = self.log.is_file() and len(self.log.read_bytes().splitlines()) > 1
        names = [name for name in (self.last, self.best) if name.exists()]
        return [*names, *([self.log] if has_rows else []), *self._newest_first()]

    def _newest_first(self) -> list[Path]:
        return sorted(self.path.glob(f"epoch-*{_SUFFIX}"), reverse=True)


def _place(path: Path) -> str:
    """Place of a checkpoint in the run: its name without the digest."""
    return path.name.rpartition("-")[0]


def load_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint onto a device; one from anywhere runs no code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location=device, weights_only=True)


def load_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint of timm or tlalign says beside its tensors; nothing if the file is something else."""
    try:
        content = load_checkpoint(path, device="meta")
    except Exception:  # files that are something else have errors of many classes
        return {}
    return content if isinstance(content, dict) else {}


def folder_classes_of(path: Path) -> list[str] | None:
    """Names of the classes that a checkpoint knows, in order of their ids, if it is of a run on a folder of images."""
    content = load_metadata(path)
    data = getattr(content.get("args"), "data", None)
    return content.get("class_names") if str(data).startswith("folder:") else None


class _DigestFile:
    """A file for torch.save that forms the digest of what is written, and keeps the error that torch hides."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:_DIGEST_DIGITS]


def _write(state: dict[str, Any], folder: Path, name: str) -> Path:
    unfinished = folder / f"{name}{_UNFINISHED}"
    try:
        with unfinished.open("wb") as file:
            digesting = _DigestFile(file)
            try:
                torch.save(state, digesting)
            except RuntimeError as error:
                raise digesting.error or OSError(str(error)) from error
            file.flush()
            os.fsync(file.fileno())
        written = folder / f"{name}-{digesting.digest.hexdigest()[:_DIGEST_DIGITS]}{_SUFFIX}"
        unfinished.replace(written)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(folder)
    return written


def _name_also(file: Path, name: Path) -> None:
    """Has another name stand for a file too, at once; a copy where the file system has no links."""
    unfinished = name.with_name(name.name + _UNFINISHED)
    unfinished.unlink(missing_ok=True)
    # Renaming one name of a file to another one of it does nothing, and would leave both.
    if name.exists() and name.samefile(file):
        return
    try:
        unfinished.hardlink_to(file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(file, unfinished)
        with unfinished.open("rb+") as copy:
            os.fsync(copy.fileno())
    unfinished.replace(name)
    _sync(name.parent)


def _sync(folder: Path) -> None:
    """Has the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
