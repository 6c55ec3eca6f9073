"""Images that can't be read: in training they are counted and left out up to a limit, in evaluation an error."""

from __future__ import annotations

import logging
import zlib
from typing import IO

import numpy as np
import torch
from PIL import Image

_logger = logging.getLogger(__name__)

# Processes share a flag for each hash of a name; that two of a few hundred names have one in common is unlikely.
_HASHES = 2**20


class UnreadableImage(Exception):
    """One image can't be read.

    Args:
        name: Name of its file, or what else says which it is.
        error: What reading it raised.
    """

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name, error)
        # That of a file need not be UTF-8, which logs are.
        self.name = name.encode(errors="backslashreplace").decode()
        self.error = error

    def __str__(self) -> str:
        return f"{self.name} ({type(self.error).__name__}: {self.error})"


class UnreadableImagesError(RuntimeError):
    """More images can't be read than a run allows.

    A DataLoader raises the exception of a worker anew, from a message that has the worker's traceback before its own;
    only the latter is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class UnreadableImages:
    """Counts images that can't be read, each once, over all processes that load images for this one.

    Args:
        limit: How many may be left out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seen = torch.zeros(_HASHES, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return int(self._seen.sum())

    def add(self, image: UnreadableImage) -> None:
        """Counts an image and warns of it, if it is a new one.

        Raises:
            UnreadableImagesError: If there are more than the limit.
        """
        seen = zlib.crc32(image.name.encode()) % _HASHES
        if self._seen[seen]:
            return
        self._seen[seen] = True
        count = len(self)
        if count > self.limit:
            raise UnreadableImagesError(
                f"{count} images can't be read, max_unreadable is {self.limit}; the last: {image}"
            )
        _logger.warning("image %d of at most %d that can't be read is left out: %s", count, self.limit, image)


class NoUnreadableImages(UnreadableImages):
    """Refuses any image that can't be read."""

    def __init__(self) -> None:
        super().__init__(0)

    def add(self, image: UnreadableImage) -> None:
        raise held_out_error(image)


def held_out_error(image: UnreadableImage) -> UnreadableImagesError:
    """What a held-out image that can't be read raises: an accuracy over other images would be another one."""
    return UnreadableImagesError(f"a held-out image can't be read; repair or remove it: {image}")


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Reads and decodes an image to RGB.

    Args:
        file: Path or open file.

    Raises:
        UnreadableImage: If it can't be read.
    """
    # Decoders raise all kinds of exceptions on broken files, SyntaxError and struct.error among them.
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:
        raise UnreadableImage(str(file), error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB; grey of 16 bits by its upper 8, as Pillow does colours, where it would cut grey off.

    Raises:
        ValueError: If it has grey of 32 bits, which may mean anything.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected colours or grey of at most 16 bits, got Pillow's mode {image.mode}")
    return image.convert("RGB")
