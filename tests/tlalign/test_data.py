"""Data sets: splits, classes, loaders, and what is said when something is missing."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from tlalign.config import EvalConfig, ModelConfig, TrainConfig, UsageError, load_recipe
from tlalign.data import create_eval_loader, create_train_loader, load_data_sets, load_images, resolve_image_config
from tlalign.readers import Digits

CPU = torch.device("cpu")


@pytest.fixture
def image_folder(tmp_path):
    """An image folder of three classes, of which `b` has no held-out image."""
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (40, 30), colours[name]).save(folder / f"{number}.png")
    return tmp_path


def folder_config(folder, **values):
    return EvalConfig(**{"data": f"folder:{folder}", "model": "vit_tiny_patch16_224", "workers": 0, **values})


def test_digits_are_split_by_class_and_share_no_image():
    train, held_out = Digits(train=True), Digits(train=False)
    assert len(train) + len(held_out) == 1797
    counts = np.bincount(held_out.targets, minlength=10)
    assert counts.min() >= 34 and counts.max() <= 38
    # A few digits were scanned twice; the split itself takes each image once.
    assert len(train.images) + len(held_out.images) == 1797
    assert np.array_equal(Digits(train=True).images, train.images)


def test_digits_come_enlarged_and_normalised_through_timms_loader():
    config = TrainConfig(**load_recipe("digits"))
    model = timm.create_model("vit_tiny_patch16_224", img_size=20, in_chans=1, patch_size=4, embed_dim=6, depth=1)
    image_config = resolve_image_config(config, model)
    data = load_data_sets(config)
    assert data.num_classes == 10
    images, classes = next(iter(create_eval_loader(data.held_out, config, image_config, CPU)))
    assert images.shape == (32, 1, 20, 20) and images.dtype == torch.float32
    assert -1.001 <= images.min() < -0.9 and 0.8 < images.max() <= 1.001
    assert classes.tolist() == data.held_out.targets[:32]
    images, classes = next(create_train_loader(data.train, config, image_config, CPU).epoch(0))
    assert images.shape == (32, 1, 20, 20) and classes.dtype == torch.int64


def test_held_out_images_keep_the_class_ids_of_training(image_folder):
    data = load_data_sets(folder_config(image_folder))
    assert data.num_classes == 3
    assert {target for _, target in (data.held_out[i] for i in range(len(data.held_out)))} == {0, 2}


def test_channels_and_size_follow_the_options_then_the_model(image_folder):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=6)
    own = resolve_image_config(folder_config(image_folder), model)
    assert own["input_size"] == (3, 224, 224) and own["mean"] == (0.5, 0.5, 0.5)
    other = resolve_image_config(folder_config(image_folder, img_size=48, in_chans=1, std=(0.3,)), model)
    assert other["input_size"] == (1, 48, 48) and other["mean"] == (0.5,) and other["std"] == (0.3,)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 48)}
    assert resolve_image_config(folder_config(image_folder), model)["input_size"] == (3, 32, 48)
    for channels, mean in ((3, (0.1, 0.2)), (1, (0.1, 0.2, 0.3))):
        with pytest.raises(UsageError, match=rf"mean: expected one value, or one for each of {channels} channels"):
            resolve_image_config(folder_config(image_folder, in_chans=channels, mean=mean), model)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_held_out_images_are_cropped_as_the_model_s_own_configuration_says(tmp_path, crop_mode):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            wide.save(tmp_path / part / name / "wide.png")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=6)
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": crop_mode, "crop_pct": 0.8, "input_size": (3, 32, 32)}
    config = folder_config(tmp_path)
    loader = create_eval_loader(load_data_sets(config).held_out, config, resolve_image_config(config, model), CPU)
    expected = create_transform(**resolve_data_config(model=model))(wide)
    for image in next(iter(loader))[0]:
        torch.testing.assert_close(image, expected)


def test_a_missing_folder_says_which_layout_is_expected(tmp_path, image_folder):
    with pytest.raises(UsageError, match=r"nowhere; expected PATH/train/CLASS/IMAGE"):
        load_data_sets(folder_config(tmp_path / "nowhere"))
    for image in (image_folder / "val").rglob("*.png"):
        image.unlink()
    with pytest.raises(UsageError, match="Found 0 images"):
        load_data_sets(folder_config(image_folder))
    (image_folder / "val").rename(image_folder / "elsewhere")
    with pytest.raises(UsageError, match=r"no folder .*val; expected PATH/train/CLASS/IMAGE"):
        load_data_sets(folder_config(image_folder))


@pytest.mark.parametrize("packed", [False, True])
def test_images_of_all_usual_kinds_are_read(image_folder, packed):
    endings = {"train": (".webp", ".BMP", ".tif"), "val": (".jfif", ".ppm", ".gif")}
    for split, kinds in endings.items():
        for number, ending in enumerate(kinds):
            path = image_folder / split / "a" / f"{number}.png"
            Image.open(path).save(path.with_suffix(ending))
            path.unlink()
    if packed:
        archived(image_folder)
    data = load_data_sets(folder_config(image_folder))
    assert data.class_names == ["a", "b", "c"]
    assert (len(data.train), len(data.held_out)) == (9, 6)
    for part in (data.train, data.held_out):
        for number in range(3):
            image, target = part[number]
            assert target == 0
            assert image.getpixel((9, 9))[0] > 250


def test_a_class_without_images_to_train_on_is_refused(image_folder):
    for image in (image_folder / "train" / "b").iterdir():
        image.rename(image.with_suffix(".heic"))
    with pytest.raises(UsageError, match=r"train has no images of the classes b; expected PATH/train/CLASS/IMAGE"):
        load_data_sets(folder_config(image_folder))


def test_held_out_images_alone_are_enough_to_evaluate_on(image_folder):
    shutil.rmtree(image_folder / "train")
    data = load_data_sets(folder_config(image_folder), trains=False)
    assert data.train is None
    assert data.class_names == ["a", "c"]
    assert len(data.held_out) == 6


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_folder_that_can_not_be_read_is_an_error(image_folder, monkeypatch, part):
    def iterdir(path, whole=Path.iterdir):
        if path == image_folder / part / "c":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UsageError, match=rf"data: .*Permission denied.*{part}/c"):
        load_data_sets(folder_config(image_folder))


def test_a_home_folder_is_found(image_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(image_folder))
    assert len(load_data_sets(folder_config("~")).train) == 9


def test_an_unknown_held_out_class_is_refused(image_folder):
    (image_folder / "val" / "a").rename(image_folder / "val" / "new")
    with pytest.raises(UsageError, match="lack: new"):
        load_data_sets(folder_config(image_folder))


def archived(folder, prefix="."):
    """Packs the parts of an image folder."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            archive.add(folder / split, prefix)
        shutil.rmtree(folder / split)


@pytest.mark.parametrize("prefix", [None, ".", "images/train"])
def test_hidden_files_and_folders_are_left_out(image_folder, prefix):
    image = image_folder / "train" / "a" / "0.png"
    for place in (".hidden.png", "a/._0.png", ".cache/a/0.png", "a/.ipynb_checkpoints/0.png"):
        for split in ("train", "val"):
            (image_folder / split / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, image_folder / split / place)
    if prefix is not None:
        archived(image_folder, prefix)
    data = load_data_sets(folder_config(image_folder))
    assert data.class_names == ["a", "b", "c"]
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for part, names in ((data.train, "aaabbbccc"), (data.held_out, "aaaccc")):
        assert [data.class_names[target] for _, target in (part[i] for i in range(len(part)))] == list(names)
        assert [part[i][0].getpixel((0, 0)) for i in range(len(part))] == [colours[name] for name in names]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["train/stray.png", "train/a/more/stray.png", "val/stray.png", "val/new/b/stray.png"])
def test_an_image_that_lies_elsewhere_makes_no_class_but_is_named(image_folder, place, packed):
    (image_folder / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(image_folder / "train" / "a" / "0.png", image_folder / place)
    if packed:
        archived(image_folder)
    split, _, within = place.partition("/")
    with pytest.raises(UsageError, match=rf"data: 1 images in .*{split}.* are not at CLASS/IMAGE, {within} first; exp"):
        load_data_sets(folder_config(image_folder))


def test_an_archive_may_hold_an_archive_of_each_class(image_folder):
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            with tarfile.open(image_folder / split / f"{name}.tar", "w") as archive:
                archive.add(image_folder / split / name, ".")
            shutil.rmtree(image_folder / split / name)
    archived(image_folder)
    data = load_data_sets(folder_config(image_folder))
    assert data.class_names == ["a", "b", "c"]
    assert sorted(data.held_out[i][1] for i in range(6)) == [0, 0, 0, 2, 2, 2]


def test_a_damaged_archive_is_a_usage_error(image_folder):
    archived(image_folder)
    (image_folder / "train.tar").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match=r"data: .*; expected PATH/train/CLASS/IMAGE"):
        load_data_sets(folder_config(image_folder))


def test_classes_are_numbered_in_natural_order_always_the_same(image_folder):
    for name in ("10", "9", "09", "B"):
        shutil.copytree(image_folder / "train" / "a", image_folder / "train" / name)
    assert load_data_sets(folder_config(image_folder)).class_names == ["09", "9", "10", "a", "B", "b", "c"]


def test_loose_images_are_of_the_classes_that_the_model_knows(tmp_path):
    for place in ("one.png", "more/two.png", "more/.two.png", ".cache/three.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    data = load_images(folder_config(tmp_path), ["a", "b", "c"])
    assert (data.num_classes, sorted(data.class_names)) == (3, ["one", "two"])
    assert load_images(folder_config(tmp_path, num_classes=5), ["a", "b", "c"]).num_classes == 5
    with pytest.raises(UsageError, match=r"num_classes: expected that of the model, since folder:.* has no classes"):
        load_images(folder_config(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "imagenet"}, "expected digits, mnist-5k, folder:PATH, .*, got 'imagenet'"),
        ({"data": "torch/cifar10"}, "data_dir: expected a folder for torch/cifar10, got null; --download true fetches"),
        ({"data": "torch/stanford_cars"}, "got null; its URL is dead, .* expected DATA_DIR/stanford_cars with"),
        ({"data": "torch/cifar11", "data_dir": "."}, "Unknown torchvision dataset"),
        ({"data": "torch/image_folder", "data_dir": "."}, "expected folder:PATH for a folder of images, got torch/im"),
        ({"data": "digits", "num_classes": 5}, "num_classes: expected at least the 10 of digits, got 5"),
    ],
)
def test_a_data_set_that_does_not_exist_is_a_usage_error(values, message):
    with pytest.raises(UsageError, match=message):
        load_data_sets(EvalConfig(model="vit_tiny_patch16_224", **values))


def test_a_torchvision_set_that_is_not_there_says_how_to_fetch_it(tmp_path):
    config = EvalConfig(data="torch/cifar10", model="vit_tiny_patch16_224", data_dir=str(tmp_path))
    with pytest.raises(UsageError, match="--download true fetches it"):
        load_data_sets(config)
    config = EvalConfig(data="torch/imagenet", model="vit_tiny_patch16_224", data_dir=str(tmp_path))
    with pytest.raises(UsageError, match=r"torch/imagenet is not in .*\)$"):
        load_data_sets(config)


def test_a_batch_larger_than_the_data_set_is_refused():
    config = TrainConfig(**load_recipe("digits") | {"batch_size": 5000})
    data = load_data_sets(config)
    with pytest.raises(UsageError, match="batch_size: expected at most the 1437 training images, got 5000"):
        create_train_loader(data.train, config, {}, CPU)


def test_crop_interpolation_and_grey_mean_follow_the_options_then_the_model():
    model = timm.create_model("resnet10t")  # of ImageNet's mean
    own = resolve_image_config(ModelConfig(model="x", in_chans=1), model)
    assert (own["interpolation"], own["crop_pct"], own["mean"]) == ("bicubic", 0.875, (pytest.approx(0.449),))
    other = resolve_image_config(ModelConfig(model="x", interpolation="nearest", crop_pct=0.6, mean=(0.2,)), model)
    assert (other["interpolation"], other["crop_pct"], other["mean"]) == ("nearest", 0.6, (0.2, 0.2, 0.2))
