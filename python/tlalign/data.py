"""Data sets and their loaders: scikit-learn's digits, image folders and torchvision sets, all by timm's loaders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from tlalign.config import EvalConfig, TrainConfig, UsageError

_FOLDER_LAYOUT = "expected PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE (validation or test for val)"
_HELD_OUT_FOLDERS = ("val", "validation", "test")


class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, a fifth of each class held out.

    The split is fixed: no seed of a run moves an image from one part to the other.

    Args:
        train: The images to train on, or those held out.
    """

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        chosen = np.sort(parts[0 if train else 1])
        self.images = (digits.images[chosen] * 255 / 16).round().astype(np.uint8)
        self.targets = digits.target[chosen].tolist()
        self.classes = [str(digit) for digit in digits.target_names]
        self.transform = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return image if self.transform is None else self.transform(image), self.targets[index]


@dataclass(frozen=True)
class DataSets:
    """The parts of a data set.

    Attributes:
        train: Images to train on.
        held_out: Images to evaluate on.
        num_classes: Number of classes.
        class_names: Their names, where the data set has any.
    """

    train: Dataset
    held_out: Dataset
    num_classes: int
    class_names: list[str]


def load_data_sets(config: EvalConfig) -> DataSets:
    """Opens the data set of a configuration.

    Raises:
        UsageError: If there is no such data set, or it isn't where it should be.
    """
    kind, _, place = config.data.partition(":")
    if config.data == "digits":
        train, held_out = Digits(train=True), Digits(train=False)
        names = train.classes
    elif kind == "folder" and place:
        train, held_out = _image_folder(Path(place))
        names = list(train.reader.class_to_idx)
    elif config.data.startswith("torch/"):
        train, held_out = (_torchvision_set(config, split) for split in ("train", "validation"))
        names = list(getattr(train, "classes", ()))
    else:
        raise UsageError(f"data: expected digits, folder:PATH or torch/NAME, got {config.data!r}")
    if config.num_classes is None and not names:
        raise UsageError(f"num_classes: expected a number, since {config.data} doesn't tell how many it has, got null")
    if config.num_classes is not None and config.num_classes < len(names):
        raise UsageError(f"num_classes: expected at least the {len(names)} of {config.data}, got {config.num_classes}")
    return DataSets(train, held_out, config.num_classes or len(names), names)


def resolve_image_config(config: EvalConfig, model: nn.Module) -> dict[str, Any]:
    """Size, normalisation, interpolation and crop of the images: those configured, else the model's own."""
    own = resolve_data_config(model=model)
    channels, height, width = own["input_size"]
    channels = config.in_chans or channels
    image_config = {
        "input_size": (channels, config.img_size or height, config.img_size or width),
        "interpolation": config.interpolation or own["interpolation"],
        "crop_pct": config.crop_pct or own["crop_pct"],
    }
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"{name}: expected one value, or one for each of {channels} channels, got {values}")
        if values is None:
            values = own[name] if len(own[name]) == channels else (sum(own[name]) / len(own[name]),)
        image_config[name] = tuple(values) if len(values) == channels else tuple(values) * channels
    return image_config


def create_train_loader(data: Dataset, config: TrainConfig, image_config: dict[str, Any], device: torch.device) -> Any:
    """Loader of shuffled, augmented, normalised batches (images, class ids) on `device`.

    Raises:
        UsageError: If a batch is larger than the data set.
    """
    if len(data) < config.batch_size:
        raise UsageError(f"batch_size: expected at most the {len(data)} training images, got {config.batch_size}")
    return create_loader(
        data,
        input_size=image_config["input_size"],
        batch_size=config.batch_size,
        is_training=True,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto_augment,
        re_prob=config.random_erasing,
        re_mode="pixel",
        interpolation=image_config["interpolation"],
        mean=image_config["mean"],
        std=image_config["std"],
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        device=device,
    )


def create_eval_loader(data: Dataset, config: EvalConfig, image_config: dict[str, Any], device: torch.device) -> Any:
    """Loader of normalised batches (images, class ids) on `device`, each image once and in order."""
    return create_loader(
        data,
        input_size=image_config["input_size"],
        batch_size=config.batch_size,
        interpolation=image_config["interpolation"],
        mean=image_config["mean"],
        std=image_config["std"],
        crop_pct=image_config["crop_pct"],
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        device=device,
    )


def _image_folder(root: Path) -> tuple[Dataset, Dataset]:
    if not root.is_dir():
        raise UsageError(f"data: no folder {root}; {_FOLDER_LAYOUT}")
    held_out_folder = next((root / name for name in _HELD_OUT_FOLDERS if (root / name).is_dir()), root / "val")
    folders = root / "train", held_out_folder
    # timm would fall back to all of PATH, and so evaluate on what was trained on.
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"data: no folder {folder}; {_FOLDER_LAYOUT}")
    try:
        train, held_out = (create_dataset("", root=str(folder), search_split=False) for folder in folders)
    except RuntimeError as error:
        raise UsageError(f"data: {error}; {_FOLDER_LAYOUT}") from error
    class_map = train.reader.class_to_idx
    unknown = sorted(set(held_out.reader.class_to_idx) - set(class_map))
    if unknown:
        raise UsageError(f"data: {held_out_folder} has classes that {root / 'train'} lacks: {', '.join(unknown)}")
    # A class without held-out images would shift the ids of those after it.
    return train, create_dataset("", root=str(held_out_folder), search_split=False, class_map=class_map)


def _torchvision_set(config: EvalConfig, split: str) -> Dataset:
    if config.data_dir is None:
        raise UsageError(f"data_dir: expected a folder for {config.data}, got null")
    try:
        return create_dataset(config.data, root=config.data_dir, split=split, download=config.download)
    except AssertionError as error:
        raise UsageError(f"data: {error}") from error
    except RuntimeError as error:
        missing = f"{config.data} is not in {config.data_dir} ({error})"
        raise UsageError(f"data: {missing}; --download true fetches it") from error
