"""Loaders of training and held-out images: their order, their augmentation, and what they are seeded with."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, get_worker_info

from tlalign.config import UsageError
from tlalign.readers import ImageStream
from tlalign.unreadable import (
    NoUnreadableImages,
    UnreadableImage,
    UnreadableImages,
    UnreadableImagesError,
    held_out_error,
)

Transform = Callable[[Image.Image], Tensor]


class Augmentation:
    """Augments each image by random numbers of its own.

    Args:
        transform: Draws from the random states of Python, numpy and torch, which are left as they were.
        seed: Seed of the run.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform = transform
        self.seed = seed

    def __call__(self, image: Image.Image, *key: int) -> Tensor:
        words = np.random.SeedSequence((self.seed, *key)).generate_state(3, np.uint64).tolist()
        # Another generator in the place of numpy's takes a tenth of the time of saving the state of its own.
        state, numpy_generator = random.getstate(), np.random.get_bit_generator()
        # torch.manual_seed would seed accelerators as well.
        with torch.random.fork_rng(devices=[]):
            random.seed(words[0])
            np.random.set_bit_generator(np.random.PCG64(words[1]))
            torch.default_generator.manual_seed(words[2])
            try:
                return self.transform(image)
            finally:
                random.setstate(state)
                np.random.set_bit_generator(numpy_generator)


class InMode:
    """Transform to a mode of PIL: L or RGB."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)


class CheckedLoader(DataLoader):
    """Loader of batches whose class ids are known to be in range: a stream doesn't tell them before it is read.

    Args:
        dataset: Gives an image and its class id.
        num_classes: Number of classes; None: any.
        options: Further arguments of the DataLoader.
    """

    def __init__(self, dataset: Dataset, num_classes: int | None = None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.num_classes = num_classes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and class ids; raises UsageError where an id is that of no class."""
        # Here and not in a worker, since the error would come out of that with its traceback in the message.
        for images, classes in super().__iter__():
            if self.num_classes is not None:
                wrong = classes[(classes < 0) | (classes >= self.num_classes)]
                if len(wrong):
                    raise UsageError(
                        f"data: expected classes from 0 to {self.num_classes - 1} (num_classes {self.num_classes}), "
                        f"got an image of class {wrong[0]}"
                    )
            yield images, classes


class TrainLoader:
    """Loader of shuffled, augmented, normalised micro-batches; `accumulate` of each process make up a step.

    Args:
        dataset: The images, as they were opened.
        size: Images in a micro-batch.
        length: Micro-batches of this process in an epoch.
        augment: Augments an image; its seed is that of the order as well.
        device: Device to put micro-batches on.
        unreadable: Counts the images that can't be read.
        options: Further arguments of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        length: int,
        augment: Augmentation,
        device: torch.device,
        unreadable: UnreadableImages,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.unreadable = unreadable
        self._size = size
        self._length = length
        self._augment = augment
        self._device = device
        self._options = options

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Gives the micro-batches of an epoch.

        Args:
            epoch: Decides, with the seed of the run, the order of the images and how they are augmented.
            start: Number of the first one; those before it are left out.

        Yields:
            Images, float32 (B, channels, Hi, Wi), and class ids, int64 (B,), on the device.

        Raises:
            UnreadableImagesError: If more images can't be read than max_unreadable.
            UsageError: If a class id is that of no class.
        """
        try:
            for images, classes in self._batches(epoch, start):
                yield images.to(self._device, non_blocking=True), classes.to(self._device, non_blocking=True)
        except UnreadableImagesError as error:
            # In a traceback the workers would wait for the garbage collector, which takes seconds to end them.
            raise error.with_traceback(None) from None

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError


class TrainSetLoader(TrainLoader):
    """Loader of a set with random access.

    Args:
        dataset: Images to train on.
        sampler: Order of this process, with `rank`, `num_replicas` and `set_epoch`.
        repeats: How often the order has each image, one after the other over all processes.
        arguments: Further ones of `TrainLoader`.
    """

    def __init__(self, dataset: Dataset, sampler: DistributedSampler, repeats: int, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self._keys = _MicroBatchKeys(sampler, repeats, self._size, self._length, self._augment.seed)
        images = _AugmentedImages(dataset, self._augment, self.unreadable)
        # Workers stay: an epoch is in the keys that they are given.
        options = self._options | {"persistent_workers": self._options["num_workers"] > 0}
        self._loader = CheckedLoader(images, batch_sampler=self._keys, **options)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._keys.epoch, self._keys.start = epoch, start
        yield from self._loader


class TrainStreamLoader(TrainLoader):
    """Loader of a stream.

    Args:
        dataset: Images to train on.
        rank: Number of this process.
        world_size: Number of processes.
        arguments: Further ones of `TrainLoader`.
    """

    def __init__(self, dataset: ImageStream, rank: int, world_size: int, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self._place = {"dist_rank": rank, "dist_num_replicas": world_size, "batch_size": self._size}

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed, rank = self._augment.seed, self._place["dist_rank"]
        worker_seed = int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])
        seeds = {"common_seed": seed, "worker_seed": worker_seed}
        stream = self.dataset.prepared(self.unreadable, self._options["num_workers"], **seeds, **self._place)
        stream.reader.set_epoch(epoch)
        options = self._options | {"generator": torch.Generator().manual_seed(worker_seed)}
        # Workers are new in each epoch, and with them the shuffle buffers that they keep.
        loader = CheckedLoader(
            _AugmentedStream(stream, self._augment, epoch, rank),
            batch_size=self._size,
            drop_last=True,
            **options,
        )
        yield from itertools.islice(loader, start, len(self))


class EvalLoader(PrefetchLoader):
    """timm's loader that normalises batches on the device, of images in their order."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from super().__iter__()
        except UnreadableImagesError as error:
            raise error.with_traceback(None) from None  # as in training

    def __len__(self) -> int:
        # A stream has no number of batches for torch; where it doesn't tell how many images it has, none.
        if isinstance(self.dataset, ImageStream):
            return math.ceil(len(self.dataset) / self.loader.batch_size)
        return super().__len__()

    @property
    def dataset(self) -> Dataset:
        """The images, as they were opened."""
        return self.loader.dataset.dataset


class EvalImages(Dataset):
    """Images of a set with random access, transformed.

    Args:
        dataset: Images to evaluate on.
        transform: Makes a tensor of an image.
    """

    def __init__(self, dataset: Dataset, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, target = self.dataset[index]
        except UnreadableImage as error:
            raise held_out_error(error) from error
        return self.transform(image), int(target)


class EvalStream(IterableDataset):
    """Images of a stream, transformed.

    Args:
        dataset: Images to evaluate on.
        transform: Makes a tensor of an image.
        workers: Processes that will read them.
    """

    def __init__(self, dataset: ImageStream, transform: Transform, workers: int) -> None:
        self.dataset = dataset
        self.transform = transform
        # Each process evaluates all images: that counts each once, or each as often as the others.
        self._stream = dataset.prepared(NoUnreadableImages(), workers, dist_rank=0, dist_num_replicas=1)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, target in self._stream:
            yield self.transform(image), int(target)


def leave_signals_to_the_main_process(worker: int) -> None:
    """Has a worker ignore Ctrl-C and SIGTERM sent to a group of processes: the main process ends it in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_word_of_the_main_process, daemon=True).start()


def _end_on_word_of_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _MicroBatchKeys(Sampler):
    """Epoch, index and number of the repeat of each image of a process's micro-batches."""

    def __init__(self, sampler: DistributedSampler, repeats: int, size: int, length: int, seed: int) -> None:
        self.sampler = sampler
        self.repeats = repeats
        self.size = size
        self.length = length
        # Samplers add the epoch: seeds next to one another would have the same orders, an epoch apart.
        self.order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, start = self.epoch, self.start
        self.sampler.set_epoch(self.order_seed + epoch)
        indices = list(self.sampler)
        rank, world_size = self.sampler.rank, self.sampler.num_replicas
        for number in range(start, self.length):
            places = range(number * self.size, (number + 1) * self.size)
            yield [(epoch, indices[place], (rank + world_size * place) % self.repeats) for place in places]


class _AugmentedImages(Dataset):
    """Images by epoch, index and number of the repeat, which alone decide, with the seed, how they are augmented."""

    def __init__(self, dataset: Dataset, augment: Augmentation, unreadable: UnreadableImages) -> None:
        self.dataset = dataset
        self.augment = augment
        self.unreadable = unreadable

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        image, target = self._read(key[1])
        return self.augment(image, *key), int(target)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """The image of an index, or the first readable one after it."""
        count = len(self.dataset)
        for candidate in range(index, index + count):
            try:
                return self.dataset[candidate % count]
            except UnreadableImage as error:
                self.unreadable.add(error)
        raise UnreadableImagesError(f"none of the {count} images can be read")


class _AugmentedStream(IterableDataset):
    """Images of a stream without end; epoch, process, worker and place in its stream decide how they are augmented."""

    def __init__(self, stream: ImageStream, augment: Augmentation, epoch: int, rank: int) -> None:
        self.stream = stream
        self.augment = augment
        self.epoch = epoch
        self.rank = rank

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        places = itertools.count()
        # Again from the start, so that images that are left out don't leave an epoch without its last batches.
        while True:
            image = None
            for image, target in self.stream:
                yield self.augment(image, self.epoch, self.rank, worker.id if worker else 0, next(places)), int(target)
            if image is None:
                raise UnreadableImagesError("a stream has no image that can be read")
