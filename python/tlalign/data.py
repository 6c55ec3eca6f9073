"""Data sets by their names, and the loaders that augment and normalise their images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import posterize
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import fast_collate
from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler, Subset
from torchvision.transforms import Compose

from tlalign.config import HUGGING_FACE, EvalConfig, ModelConfig, TrainConfig, UsageError
from tlalign.loaders import (
    Augmentation,
    CheckedLoader,
    EvalImages,
    EvalLoader,
    EvalStream,
    InMode,
    TrainLoader,
    TrainSetLoader,
    TrainStreamLoader,
    leave_signals_to_the_main_process,
)
from tlalign.readers import (
    ImageStream,
    LooseImages,
    check_workers,
    open_folder,
    open_hugging_face,
    open_shards,
    open_small,
    open_torchvision,
    parts_of_folder,
)
from tlalign.unreadable import UnreadableImages


@dataclass(frozen=True)
class DataSets:
    """The parts of a data set, of PIL images and class ids.

    Attributes:
        train: Images to train on; None if they were not asked for, and are not there.
        held_out: Images to evaluate on.
        num_classes: Number of classes.
        class_names: Their names, where the data set has any.
    """

    train: Dataset | None
    held_out: Dataset
    num_classes: int
    class_names: list[str]


def load_data_sets(config: EvalConfig, trains: bool = True, folder_classes: Sequence[str] | None = None) -> DataSets:
    """Opens the data set of a configuration.

    Args:
        config: The configuration.
        trains: Whether there must be images to train on; a folder may do without.
        folder_classes: Names of the classes of a folder, in order of their ids; None: those that it has.

    Raises:
        UsageError: If there is no such data set, or it isn't where it should be.
    """
    family = config.data.partition("/")[0]
    if config.data in ("digits", "mnist-5k"):
        train, held_out, names = open_small(config)
    elif config.folder is not None:
        train, held_out, names = open_folder(config.folder, trains, folder_classes)
    elif family == "torch":
        train, held_out, names = open_torchvision(config)
    elif family == "wds":
        train, held_out, names = open_shards(config)
    elif family in HUGGING_FACE:
        train, held_out, names = open_hugging_face(config)
    else:
        raise UsageError(
            "data: expected digits, mnist-5k, folder:PATH, torch/NAME, wds/, hfds/NAME or hfids/NAME, got "
            f"{config.data!r}"
        )
    if config.num_classes is None and not names:
        raise UsageError(f"num_classes: expected a number, since {config.data} doesn't tell how many it has, got null")
    if config.num_classes is not None and config.num_classes < len(names):
        raise UsageError(f"num_classes: expected at least the {len(names)} of {config.data}, got {config.num_classes}")
    # ImageNet of torchvision has several for each class.
    return DataSets(train, held_out, config.num_classes or len(names), [str(name) for name in names])


def load_images(config: EvalConfig, folder_classes: Sequence[str] | None = None) -> DataSets:
    """Opens images whose classes are of no matter: a data set, or any folder of images.

    Args:
        config: The configuration.
        folder_classes: As for `load_data_sets`; of a folder without classes, how many the model has.

    Returns:
        The data set; of a folder without classes each image has one of its own, named as its file.

    Raises:
        UsageError: As for `load_data_sets`.
    """
    root = config.folder
    if root is None or not root.is_dir() or any(parts_of_folder(root)):
        return load_data_sets(config, trains=False, folder_classes=folder_classes)
    num_classes = config.num_classes or len(folder_classes or ())
    if not num_classes:
        raise UsageError(f"num_classes: expected that of the model, since {config.data} has no classes, got null")
    images = LooseImages(root)
    return DataSets(None, images, num_classes, images.classes)


def resolve_image_config(config: ModelConfig, model: nn.Module) -> dict[str, Any]:
    """Size, normalisation, interpolation and crop of the images: those configured, else the model's own.

    Raises:
        UsageError: If there are not as many means or standard deviations as channels.
    """
    own = resolve_data_config({"interpolation": config.interpolation, "crop_pct": config.crop_pct}, model=model)
    channels, height, width = own["input_size"]
    channels = config.in_chans or channels
    image_config = own | {"input_size": (channels, config.img_size or height, config.img_size or width)}
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"{name}: expected one value, or one for each of {channels} channels, got {values}")
        if values is None:
            values = own[name] if len(own[name]) == channels else (sum(own[name]) / len(own[name]),)
        image_config[name] = tuple(values) if len(values) == channels else tuple(values) * channels
    return image_config


def create_train_loader(
    data: Dataset,
    config: TrainConfig,
    image_config: dict[str, Any],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """Loader of the images that a process trains on.

    Of a set with random access, how an image is augmented is a function of the seed, the epoch, the image and the
    number of its repeat only. Processes take turns in the order of the epoch, so that the micro-batches of all of them
    together hold what one process would have in a micro-batch as much larger. Neither workers, nor where an epoch is
    taken up, nor the random state of the process change a bit.

    An epoch of a stream is the same each time for the same number of workers and processes, and the same batch_size;
    what lies before its start is read again.

    Args:
        data: Images to train on.
        config: Configuration of the run.
        image_config: See `resolve_image_config`.
        device: Device to put batches on.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        UsageError: If the batch is larger than the data set or can't be divided, or the augmentation can't be made.
    """
    size = _micro_batch_size(config, world_size)
    if len(data) < config.batch_size:
        raise UsageError(f"batch_size: expected at most the {len(data)} training images, got {config.batch_size}")
    arguments = {
        "size": size,
        "length": len(data) // config.batch_size * config.accumulate,
        "augment": Augmentation(_create_train_transform(config, image_config), config.seed),
        "device": device,
        "unreadable": UnreadableImages(config.max_unreadable),
        **_loader_options(config, device),
    }
    if isinstance(data, ImageStream):
        if config.aug_repeats > 1:
            raise UsageError(f"aug_repeats: expected 1 with the stream {config.data}, got {config.aug_repeats}")
        check_workers(data, config.workers, world_size)
        return TrainStreamLoader(data, rank, world_size, **arguments)
    place = {"num_replicas": world_size, "rank": rank}
    if config.aug_repeats > 1:
        # As many images as without repeats, where timm's default rounds them down to a multiple of 256.
        sampler = RepeatAugSampler(data, num_repeats=config.aug_repeats, selected_round=0, **place)
    else:
        sampler = DistributedSampler(data, drop_last=True, **place)
    return TrainSetLoader(data, sampler, config.aug_repeats, **arguments)


def create_eval_loader(
    data: Dataset,
    config: EvalConfig,
    image_config: dict[str, Any],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> EvalLoader:
    """Loader of normalised batches (images, class ids) on `device`, each image once and in order.

    Processes take turns; the last of them may be given images again, for as many batches as the others, beyond
    `loader.sampler.num_valid_samples`. Of a stream each process evaluates all images, which counts each as often as the
    others. An image that can't be read raises an `UnreadableImagesError` that names it.

    Args:
        data: Images to evaluate on.
        config: Configuration of the run or evaluation.
        image_config: See `resolve_image_config`.
        device: Device to put batches on.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        UsageError: If the batch of a run can't be divided, or images have neither 1 nor 3 channels.
    """
    if image_config["interpolation"] == "random":
        # Evaluation draws nothing; timm takes bilinear where it can't draw one.
        image_config = image_config | {"interpolation": "bilinear"}
    crop = {name: image_config[name] for name in ("crop_pct", "crop_mode")}
    transform = _create_transform(image_config, **crop, use_prefetcher=True)
    sampler = None
    if isinstance(data, ImageStream):
        images = EvalStream(data, transform, config.workers)
    else:
        images = EvalImages(data, transform)
        if world_size > 1:
            sampler = OrderedDistributedSampler(images, num_replicas=world_size, rank=rank)
    loader = CheckedLoader(
        images,
        batch_size=_micro_batch_size(config, world_size) if isinstance(config, TrainConfig) else config.batch_size,
        sampler=sampler,
        collate_fn=fast_collate,
        persistent_workers=config.workers > 0,
        **_loader_options(config, device),
    )
    channels, mean, std = image_config["input_size"][0], image_config["mean"], image_config["std"]
    return EvalLoader(loader, mean=mean, std=std, channels=channels, device=device)


def sample_images(
    data: Dataset, count: int, config: EvalConfig, image_config: dict[str, Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Takes images from all over a data set, of a stream the first ones; always the same.

    Args:
        data: Images to evaluate on.
        count: Number of images B; a batch at most.
        config: Configuration of the run or evaluation.
        image_config: See `resolve_image_config`.
        device: Device to put them on.

    Returns:
        Images (B, channels, Hi, Wi) and class ids (B,), as evaluation sees them.
    """
    images, classes = next(iter(create_eval_loader(sampled(data, count), config, image_config, device)))
    return images[:count], classes[:count]


def sampled(data: Dataset, count: int) -> Dataset:
    """So many images from all over a data set, always the same; a stream is left as it is."""
    if isinstance(data, ImageStream):
        return data
    return Subset(data, np.random.default_rng(0).permutation(len(data))[:count].tolist())


def _micro_batch_size(config: TrainConfig, world_size: int) -> int:
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size: expected a multiple of {parts}, for {world_size} processes and {config.accumulate} "
            f"accumulated parts, got {config.batch_size}"
        )
    size = config.batch_size // parts
    if size < 2 and config.mixing != "none":
        raise UsageError(f"batch_size: expected at least 2 images to mix in each of {parts} parts, got {size}")
    return size


def _create_train_transform(config: TrainConfig, image_config: dict[str, Any]) -> Compose:
    try:
        return _create_transform(
            image_config,
            is_training=True,
            train_crop_mode=config.crop_mode,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
        )
    except UsageError:
        raise
    except (AssertionError, ValueError) as error:
        raise UsageError(f"auto_augment: timm can't make {config.auto_augment!r} ({error})") from error


def _create_transform(image_config: dict[str, Any], **options: Any) -> Compose:
    channels = image_config["input_size"][0]
    if channels not in (1, 3):
        raise UsageError(f"in_chans: expected 1 or 3, which images are read with, got {channels}")
    transform = create_transform(
        image_config["input_size"],
        interpolation=image_config["interpolation"],
        mean=image_config["mean"],
        std=image_config["std"],
        **options,
    )
    for step in transform.transforms:
        # RandAugment and AugMix have a list of operations, AutoAugment lists of them.
        for operation in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return Compose([InMode("L" if channels == 1 else "RGB"), transform])


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's; but of no bits, which policies ask for and Pillow 13 refuses, black as it was before."""
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def _loader_options(config: EvalConfig, device: torch.device) -> dict[str, Any]:
    return {
        "num_classes": config.num_classes,
        "num_workers": config.workers,
        "pin_memory": device.type not in ("cpu", "mps"),
        "worker_init_fn": leave_signals_to_the_main_process,
        # Else each epoch would draw from the random state of the process.
        "generator": torch.Generator(),
    }
