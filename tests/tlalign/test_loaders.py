"""Loaders: what decides order and augmentation, shares of processes, and images that can't be read."""

import itertools
import logging
import os
import pickle
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.task import evaluation_sample_limit
from torchvision.transforms import ColorJitter, InterpolationMode
from torchvision.transforms import functional as TF

from tlalign.config import EvalConfig, TrainConfig, UsageError
from tlalign.data import create_eval_loader, create_train_loader, load_data_sets, sample_images
from tlalign.engine import evaluate
from tlalign.loaders import Augmentation, CheckedLoader, _AugmentedImages
from tlalign.unreadable import UnreadableImage, UnreadableImages, UnreadableImagesError

CPU = torch.device("cpu")
IMAGE_CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
COUNT = 26


@pytest.fixture
def folder(tmp_path):
    """An image folder of noise, each image of another average, which tells it from the others."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", 11)):
        for index in range(count):
            path = tmp_path / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = 8 * index + pixels.integers(0, 48, (20, 24, 3))
            Image.fromarray(shade.astype(np.uint8)).save(path)
    return tmp_path


def train_config(folder, **values) -> TrainConfig:
    given = {"data": f"folder:{folder}", "model": "", "batch_size": 8, "workers": 0, "random_erasing": 0.5, **values}
    return TrainConfig(**given)


def train_loader(config, rank=0, world_size=1):
    return create_train_loader(load_data_sets(config).train, config, IMAGE_CONFIG, CPU, rank, world_size)


def collect(batches):
    images, classes = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(classes)


def plain(folder, **values) -> TrainConfig:
    """Without augmentation, so that an image can be told by its pixels."""
    nothing = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.2, 1.2), "hflip": 0.0, "auto_augment": None}
    return train_config(folder, **nothing, color_jitter=0.0, random_erasing=0.0, **values)


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_neither_workers_nor_random_state_nor_the_start_change_a_bit(folder):
    loader = train_loader(train_config(folder))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    epoch = list(loader.epoch(3))
    assert len(epoch) == len(loader) == 3
    assert epoch[0][0].shape == (8, 3, 16, 16) and epoch[0][0].dtype == torch.float32
    assert epoch[0][1].dtype == torch.int64
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert same(epoch, list(loader.epoch(3)))
    assert same(epoch[2:], list(loader.epoch(3, start=2)))
    workers = train_loader(train_config(folder, workers=2))
    next(workers.epoch(1))  # abandoned, with batches under way
    assert same(epoch, list(workers.epoch(3)))
    assert same(epoch[1:], list(workers.epoch(3, start=1)))
    for other in (loader.epoch(4), train_loader(train_config(folder, seed=1)).epoch(3)):
        assert not torch.equal(epoch[0][0], next(other)[0])


def test_loading_leaves_the_random_state_of_the_process_alone(folder):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    for workers in (0, 1):
        config = train_config(folder, workers=workers)
        list(train_loader(config).epoch(0))
        list(create_eval_loader(load_data_sets(config).held_out, config, IMAGE_CONFIG, CPU))
    assert state() == before


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (2, 2), (4, 1)])
def test_processes_and_parts_together_have_the_images_of_one(folder, world_size, accumulate, repeats):
    values = {"batch_size": 8, "mixing": "none", "aug_repeats": repeats}
    whole = list(train_loader(train_config(folder, **values)).epoch(1))
    config = train_config(folder, **values, accumulate=accumulate)
    loaders = [train_loader(config, rank, world_size) for rank in range(world_size)]
    assert {len(loader) for loader in loaders} == {len(whole) * accumulate}
    parts = [list(loader.epoch(1)) for loader in loaders]
    for step, (images, classes) in enumerate(whole):
        # Position p of the order is image p // world_size of process p % world_size.
        own = [collect(part[step * accumulate : (step + 1) * accumulate]) for part in parts]
        assert torch.equal(torch.stack([part[0] for part in own], dim=1).flatten(0, 1), images)
        assert torch.equal(torch.stack([part[1] for part in own], dim=1).flatten(0, 1), classes)


def test_an_epoch_takes_each_image_once(folder):
    # Batches of 13 divide the 26 images.
    images, _ = collect(train_loader(plain(folder, batch_size=13)).epoch(0))
    assert len(images) == len(images.flatten(1).unique(dim=0)) == COUNT


def test_repeats_are_augmented_anew_and_an_epoch_stays_as_long(folder):
    images, classes = collect(train_loader(plain(folder, batch_size=13, aug_repeats=3)).epoch(0))
    distinct, counts = images.flatten(1).unique(dim=0, return_counts=True)
    assert len(images) == COUNT and len(distinct) == 9 and counts.tolist().count(3) >= 8
    augmented, same_classes = collect(train_loader(train_config(folder, batch_size=13, aug_repeats=3)).epoch(0))
    assert torch.equal(classes, same_classes)
    assert len(augmented.flatten(1).unique(dim=0)) == COUNT


def test_repeats_do_not_round_the_images_of_an_epoch_down():
    loader = train_loader(train_config("", data="digits", batch_size=479, aug_repeats=3))
    keys = [key for batch in loader._keys for key in batch]
    assert len(keys) == len(set(keys)) == 1437  # timm's default would take 1280


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "policy",
    [
        *["rand-m9-mstd0.5-inc1", "rand-m9", "rand-m15-mmax15-inc1", "rand-tweights", "rand-t3a", "rand-t3aw"],
        *["v0", "v0r", "original", "originalr", "3a", "augmix"],
    ],
)
def test_every_operation_of_a_policy_runs_at_every_level(policy, channels):
    config = train_config("", data="digits", batch_size=2, auto_augment=policy)
    grey = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
    image_config = IMAGE_CONFIG if channels == 3 else IMAGE_CONFIG | grey
    loader = create_train_loader([None] * 2, config, image_config, CPU)
    # As a worker gets it that is started anew.
    augment = pickle.loads(pickle.dumps(loader._loader.dataset.augment))
    steps = augment.transform.transforms[1].transforms
    (chosen,) = (step for step in steps if isinstance(step, AutoAugment | RandAugment | AugMixAugment))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    for operation in chosen.ops if hasattr(chosen, "ops") else itertools.chain(*chosen.policy):
        operation.prob, operation.magnitude_std = 1.0, 0
        for level in range(16):
            operation.magnitude = level
            result = operation(image)
            assert (result.mode, result.size) == (image.mode, image.size)
            if operation.name == "PosterizeIncreasing":
                # timm keeps 4 bits at level 0, and none at level 10.
                keeps = 0xFF << (4 + int(min(level, operation.magnitude_max or 10) * 0.4)) & 0xFF
                assert np.array_equal(np.asarray(result), np.asarray(image) & keeps)


@pytest.mark.parametrize("crop_mode", ["rrc", "rkrc", "rkrr"])
def test_random_interpolation_trains_and_evaluates_by_bilinear(folder, crop_mode):
    config = train_config(folder, crop_mode=crop_mode)
    data = load_data_sets(config)
    random_config, bilinear = (IMAGE_CONFIG | {"interpolation": name} for name in ("random", "bilinear"))
    images, _ = next(create_train_loader(data.train, config, random_config, CPU).epoch(0))
    assert images.shape == (8, 3, 16, 16)
    evaluated = [collect(create_eval_loader(data.held_out, config, each, CPU)) for each in (random_config, bilinear)]
    assert torch.equal(evaluated[0][0], evaluated[1][0])


def test_crop_mode_and_three_augment_are_timms(folder):
    config = train_config(folder, auto_augment="3a", color_jitter=0.3, crop_mode="rkrr")
    _, transform = train_loader(config)._loader.dataset.augment.transform.transforms
    names = [type(each).__name__ for each in transform.transforms]
    assert names[:2] == ["ResizeKeepRatio", "RandomCropOrPad"]
    (policy,) = (each for each in transform.transforms if isinstance(each, AutoAugment))
    assert {operation.name for (operation,) in policy.policy} == {"Solarize", "Desaturate", "GaussianBlurRand"}
    (jitter,) = (each for each in transform.transforms if isinstance(each, ColorJitter))
    assert jitter.brightness == (0.7, 1.3)
    with pytest.raises(UsageError, match="auto_augment: timm can't make 'nonsense'"):
        train_loader(train_config(folder, auto_augment="nonsense"))


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        ({"batch_size": 8}, 3, r"batch_size: expected a multiple of 3, for 3 processes and 1 accumulated parts, got 8"),
        ({"batch_size": 4, "accumulate": 8}, 1, "batch_size: expected a multiple of 8, .* got 4"),
        ({"batch_size": 4, "accumulate": 2}, 2, "batch_size: expected at least 2 images to mix in each of 4 parts"),
        ({"batch_size": 28}, 1, "batch_size: expected at most the 26 training images, got 28"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused(folder, values, world_size, message):
    with pytest.raises(UsageError, match=message):
        train_loader(train_config(folder, **values), 0, world_size)


def test_a_batch_may_be_one_image_where_none_is_mixed(folder):
    assert len(train_loader(train_config(folder, batch_size=1, mixing="none"))) == COUNT


@pytest.mark.parametrize("channels", [1, 3])
def test_images_take_the_channels_of_the_model(folder, channels):
    config = train_config(folder)
    image_config = {**IMAGE_CONFIG, "input_size": (channels, 16, 16), "mean": (0.5,) * channels}
    image_config["std"] = image_config["mean"]
    data = load_data_sets(config)
    images, _ = next(create_train_loader(data.train, config, image_config, CPU).epoch(0))
    held_out, _ = next(iter(create_eval_loader(data.held_out, config, image_config, CPU)))
    assert images.shape == held_out.shape == (8, channels, 16, 16)
    with pytest.raises(UsageError, match=r"^in_chans: expected 1 or 3"):
        create_train_loader(data.train, config, {**IMAGE_CONFIG, "input_size": (2, 16, 16)}, CPU)


def test_processes_evaluate_each_image_once(folder):
    config = train_config(folder, mixing="none")
    held_out = load_data_sets(config).held_out
    whole, _ = collect(create_eval_loader(held_out, config, IMAGE_CONFIG, CPU))
    assert len(whole) == len(held_out) == 11
    loaders = [create_eval_loader(held_out, config, IMAGE_CONFIG, CPU, rank, 4) for rank in range(4)]
    # As many batches each, for the collectives of sharded models; what was added to make them even isn't counted.
    assert {len(list(loader)) for loader in loaders} == {2}
    assert [evaluation_sample_limit(loader) for loader in loaders] == [3, 3, 3, 2]
    counted = [collect(loader)[0][: evaluation_sample_limit(loader)] for loader in loaders]
    for rank, images in enumerate(counted):
        assert torch.equal(images, whole[rank::4])
    assert all(loader.dataset is held_out for loader in loaders)


def broken_files(folder) -> list:
    """Breaks four images of the training part in different ways."""
    files = sorted((folder / "train" / "a").iterdir())[:4]
    files[0].write_bytes(files[0].read_bytes()[:200])
    whole = folder / "whole.jpg"
    Image.open(files[1]).resize((90, 90)).save(whole)
    broken = [files[0], *(file.with_suffix(".jpg") for file in files[1:])]
    broken[1].write_bytes(whole.read_bytes()[:-300])
    broken[2].write_bytes(b"")
    broken[3].write_text("no image")
    for file in files[1:]:
        file.unlink()
    whole.unlink()
    return broken


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_once_and_the_next_ones_taken(folder, caplog, workers):
    before = {image.numpy().tobytes() for image in collect(train_loader(plain(folder, batch_size=13)).epoch(0))[0]}
    broken = broken_files(folder)
    config = plain(folder, batch_size=13, workers=workers, max_unreadable=4)
    loader = train_loader(config)
    with caplog.at_level(logging.WARNING, "tlalign"):
        epochs = [collect(loader.epoch(epoch))[0] for epoch in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    assert len(loader.unreadable) == 4
    for epoch in epochs:
        seen = {image.numpy().tobytes() for image in epoch}
        assert len(epoch) == COUNT and len(seen) == COUNT - 4 and seen < before
    if not workers:
        warned = "\n".join(caplog.messages)
        assert len(caplog.messages) == 4 and all(str(file) in warned for file in broken)
        assert "image 4 of at most 4 that can't be read is left out" in warned


def test_an_unreadable_image_may_have_a_name_that_is_not_utf_8(caplog):
    unreadable = UnreadableImages(1)
    for _ in range(2):
        unreadable.add(UnreadableImage(os.fsdecode(b"\xfcbad.png"), OSError("no image")))
    assert len(unreadable) == 1
    assert r"\udcfcbad.png" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_more_unreadable_images_than_the_limit_stop_the_run(folder, workers):
    broken = broken_files(folder)
    loader = train_loader(plain(folder, batch_size=13, workers=workers, max_unreadable=3))
    with pytest.raises(UnreadableImagesError) as raised:
        list(loader.epoch(0))
    message = str(raised.value)
    del raised  # which would keep the workers
    assert message.startswith("4 images can't be read, max_unreadable is 3; the last: ")
    assert sum(str(file) in message for file in broken) == 1 and "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_held_out_image_is_an_error(folder, workers):
    file = folder / "val" / "a" / "4.png"
    file.write_bytes(file.read_bytes()[:300])
    config = EvalConfig(data=f"folder:{folder}", model="", batch_size=4, workers=workers)
    loader = create_eval_loader(load_data_sets(config).held_out, config, IMAGE_CONFIG, CPU)
    with pytest.raises(UnreadableImagesError, match=f"^a held-out image can't be read; repair or remove it: {file}"):
        evaluate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 6)), loader, CPU)


def test_only_unreadable_images_are_no_data_set(folder):
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    loader = train_loader(train_config(folder, max_unreadable=100))
    with pytest.raises(UnreadableImagesError, match="none of the 26 images can be read"):
        next(loader.epoch(0))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system tells no sender of a signal")
def test_workers_outlive_signals_to_a_group_but_not_the_main_process(folder):
    script = f"""
import os, signal, sys
from tlalign.config import TrainConfig
from tlalign.data import create_train_loader, load_data_sets
import torch
config = TrainConfig(data="folder:{folder}", model="", batch_size=2, workers=2)
loader = create_train_loader(load_data_sets(config).train, config, {IMAGE_CONFIG}, torch.device("cpu"))
batches = loader.epoch(0)
next(batches), next(batches)  # of both workers
workers = [worker.pid for worker in loader._loader._iterator._workers]
for number in (signal.SIGINT, signal.SIGTERM):
    for worker in workers:
        os.system(f"kill -{{number}} {{worker}}")
print(2 + len(list(batches)), *workers)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    batches, *workers = map(int, done.stdout.split())
    assert batches == COUNT // 2
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_options_of_the_images_reach_timms_transform(folder):
    config = train_config(
        folder, hflip=0.3, color_jitter=0.2, auto_augment=None, random_erasing=0.7, crop_scale=(0.3, 0.6),
        crop_ratio=(0.9, 1.1),
    )  # fmt: skip
    image_config = IMAGE_CONFIG | {"interpolation": "nearest", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    loader = create_train_loader(load_data_sets(config).train, config, image_config, CPU)
    crop, flip, jitter, _, normalise, erasing = loader._loader.dataset.augment.transform.transforms[1].transforms
    assert (crop.scale, crop.ratio, crop.interpolation) == ((0.3, 0.6), (0.9, 1.1), InterpolationMode.NEAREST)
    assert (flip.p, jitter.brightness) == (0.3, (0.8, 1.2))
    assert (erasing.probability, erasing.per_pixel) == (0.7, True)  # of noise, not of one colour
    torch.testing.assert_close(
        (normalise.mean, normalise.std), (torch.tensor((0.1, 0.2, 0.3)), torch.tensor((0.4, 0.5, 0.6)))
    )


@pytest.mark.parametrize(
    ("mode", "crop"),
    [("rrc", "RandomResizedCropAndInterpolation"), ("rkrc", "CenterCropOrPad"), ("rkrr", "RandomCropOrPad")],
)
def test_each_crop_mode_is_timms(folder, mode, crop):
    steps = (
        train_loader(train_config(folder, crop_mode=mode))._loader.dataset.augment.transform.transforms[1].transforms
    )
    assert crop in [type(step).__name__ for step in steps[:2]]


def test_images_are_in_another_order_in_each_epoch_and_of_each_seed(folder):
    def order(epoch, **values):
        images, _ = collect(train_loader(plain(folder, batch_size=13, **values)).epoch(epoch))
        return images.mean(dim=(1, 2, 3)).tolist()

    orders = [order(0), order(1), order(2), order(0, seed=1), order(1, seed=1)]
    assert len({tuple(each) for each in orders}) == 5
    # Shuffled: files lie by their shade, which no order is.
    assert all(each != sorted(each) and sorted(each) == sorted(orders[0]) for each in orders)


def test_seed_epoch_image_and_repeat_each_change_the_numbers_of_all_three_generators():
    def transform(_):
        return random.random(), np.random.rand(), torch.rand(()).item()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [Augmentation(transform, seed)(None, *key) for seed in (0, 1) for key in keys]
    assert all(len(set(numbers)) == len(drawn) for numbers in zip(*drawn, strict=True))


def test_an_image_is_augmented_anew_in_each_epoch_and_for_each_seed(folder):
    def augmented(epoch, index, repeat, **values):
        return train_loader(train_config(folder, **values))._loader.dataset[epoch, index, repeat][0]

    first = augmented(0, 3, 0)
    assert torch.equal(first, augmented(0, 3, 0))
    for other in (augmented(1, 3, 0), augmented(0, 3, 1), augmented(0, 3, 0, seed=1)):
        assert not torch.equal(first, other)


def test_held_out_images_are_resized_cropped_and_normalised_as_configured(folder):
    image_config = IMAGE_CONFIG | {
        "interpolation": "nearest",
        "crop_pct": 0.5,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    config = train_config(folder)
    data = load_data_sets(config)
    images, _ = next(iter(create_eval_loader(data.held_out, config, image_config, CPU)))
    # The shorter side becomes 16 / 0.5.
    expected = TF.center_crop(TF.resize(data.held_out[0][0], 32, InterpolationMode.NEAREST), 16)
    expected = TF.normalize(TF.to_tensor(expected), image_config["mean"], image_config["std"])
    torch.testing.assert_close(images[0], expected, atol=1e-5, rtol=1e-5)


def test_sampled_images_are_from_all_over_the_set(folder):
    config = train_config(folder)
    held_out = load_data_sets(config).held_out
    images, classes = sample_images(held_out, 4, config, IMAGE_CONFIG, CPU)
    chosen = np.random.default_rng(0).permutation(11)[:4]
    whole, _ = collect(create_eval_loader(held_out, config, IMAGE_CONFIG, CPU))
    assert torch.equal(images, whole[chosen])
    assert classes.tolist() == held_out.targets[chosen].tolist()


def test_there_may_be_more_classes_than_the_data_set_has(folder):
    assert load_data_sets(train_config(folder, num_classes=7)).num_classes == 7


def test_a_negative_class_is_refused():
    with pytest.raises(UsageError, match="an image of class -1"):
        list(CheckedLoader([(torch.zeros(1), -1)], num_classes=2))


def test_the_first_image_stands_for_a_last_one_that_can_not_be_read():
    class LastUnreadable:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 2:
                raise UnreadableImage("c.png", OSError("damaged"))
            return f"image {index}", index

    images = _AugmentedImages(LastUnreadable(), lambda image, *key: image, UnreadableImages(1))
    assert images[0, 2, 0] == ("image 0", 0)
