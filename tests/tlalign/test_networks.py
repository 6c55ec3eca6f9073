"""Where a run's weights come from: random, published, or a checkpoint."""

import argparse
import dataclasses
from unittest import mock

import pytest
import torch
from training import tiny

from tlalign.config import CONFIG_FILE, UsageError, save_config
from tlalign.engine import Trainer
from tlalign.evaluation import evaluate_checkpoint
from tlalign.export import export_checkpoint
from tlalign.networks import (
    check_image_size,
    create_initial_model,
    create_model,
    create_teacher,
    load_all_weights,
    load_weights,
)

MODEL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a run on 10 classes, and its averaged weights."""
    torch.manual_seed(1)
    config = tiny(tmp_path, model_kwargs=MODEL)
    weights, averaged = (create_model(config, 10).state_dict() for _ in range(2))
    torch.save({"state_dict": weights, "state_dict_ema": averaged}, tmp_path / "last.pth.tar")
    return tmp_path / "last.pth.tar", averaged


def test_training_starts_from_the_averaged_weights_of_a_checkpoint(checkpoint, tmp_path):
    path, averaged = checkpoint
    model = create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 10)
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())


def test_for_other_classes_the_head_is_new_and_the_rest_that_of_the_checkpoint(checkpoint, tmp_path, caplog):
    path, averaged = checkpoint
    create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 10)
    assert caplog.messages == []
    state = create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 7).state_dict()
    assert caplog.messages == ["initial_checkpoint: head of 10 classes is left out, a new one of 7 is trained"]
    assert state["head.weight"].shape == (7, 16)
    same = [name for name, value in state.items() if torch.equal(value, averaged.get(name)[: len(value)])]
    assert set(state) - set(same) == {"head.weight"}  # the bias starts at zero in both


def test_for_other_classes_both_heads_of_a_distilled_model_are_new(tmp_path, caplog):
    config = tiny(tmp_path, model="deit_tiny_distilled_patch16_224", model_kwargs=MODEL)
    weights = create_model(config, 10).state_dict()
    torch.save(weights, tmp_path / "last.pth.tar")
    config = dataclasses.replace(config, initial_checkpoint=str(tmp_path / "last.pth.tar"))
    state = create_initial_model(config, 7).state_dict()
    assert [message.split()[1] for message in caplog.messages] == ["head", "head_dist"]
    assert state["head.weight"].shape == state["head_dist.weight"].shape == (7, 16)
    assert torch.equal(state["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])


def test_arguments_are_no_fault_of_published_weights(tmp_path):
    with pytest.raises(UsageError, match=r"model: timm can't make vit_tiny_patch16_224 with .*nonsense"):
        create_initial_model(tiny(tmp_path, pretrained=True, model_kwargs={"nonsense": 1}), 10)


@pytest.mark.parametrize("lost", ["blocks.0.attn.qkv.weight", "head.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, tmp_path, lost):
    path, averaged = checkpoint
    del averaged[lost]
    torch.save(averaged, path)
    with pytest.raises(UsageError, match=rf"(?s)initial_checkpoint: .* is not of this vit_tiny.*Missing key.*{lost}"):
        create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 10)


def test_weights_that_are_no_numbers_are_refused(checkpoint, tmp_path):
    path, averaged = checkpoint
    averaged["head.weight"][0, 0] = float("nan")
    torch.save(averaged, path)
    with pytest.raises(UsageError, match=r"initial_checkpoint: expected numbers in .*, got some in head.weight"):
        create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 10)


def test_a_size_of_images_that_the_model_cannot_take_is_told(tmp_path):
    flexible = {"model": "naflexvit_base_patch16_gap", "model_kwargs": {"embed_dim": 48, "depth": 1, "num_heads": 3}}
    model = create_model(tiny(tmp_path, **flexible), 10).train()
    check_image_size(model, (1, 32, 48))
    with pytest.raises(UsageError, match="img_size: the model can't take images of 33 x 48 pixels: "):
        check_image_size(model, (1, 33, 48))
    assert model.training
    path, other = tmp_path / "weights.pth", tiny(tmp_path, **flexible, img_size=33)
    torch.save(model.state_dict(), path)
    for use in (
        lambda: Trainer(other),
        lambda: evaluate_checkpoint(path, other),
        lambda: export_checkpoint(path, tmp_path / "out.pth", other),
    ):
        with pytest.raises(UsageError, match="img_size: the model can't take images of 33 x 33 pixels: "):
            use()


def test_arguments_that_timm_refuses_are_named(tmp_path):
    of_patches = {"model": "xcit_nano_12_p16_224", "model_kwargs": {"depth": 1}, "img_size": 49}
    with pytest.raises(
        UsageError, match=r"model: timm can't make xcit_nano.* with {'img_size': 49, 'in_chans': 1, 'depth': 1}: "
    ):
        create_model(tiny(tmp_path, **of_patches), 10)
    with pytest.raises(UsageError, match=r"timm can't make .*'img_size': 99999999999.*: [^\n]+$"):
        create_model(tiny(tmp_path, img_size=99999999999), 10)


@pytest.mark.parametrize("model", ["local-dir:nowhere", "hf_hub:a/b/c"])
def test_a_model_that_is_not_where_its_name_says_is_told(tmp_path, model):
    with pytest.raises(UsageError, match=f"timm can't make {model} with"):
        create_model(tiny(tmp_path, model=model, model_kwargs={}), 10)


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    path, _ = checkpoint
    config = tiny(tmp_path, model_kwargs={**MODEL, "depth": 2}, initial_checkpoint=str(path))
    with pytest.raises(UsageError, match=r"initial_checkpoint: .* is not of this vit_tiny"):
        create_initial_model(config, 10)


def test_images_of_one_channel_take_the_weights_of_three(checkpoint, tmp_path):
    path, averaged = checkpoint
    averaged["patch_embed.proj.weight"] = averaged["patch_embed.proj.weight"].repeat(1, 3, 1, 1)
    torch.save(averaged, path)
    state = create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 10).state_dict()
    torch.testing.assert_close(state["patch_embed.proj.weight"], averaged["patch_embed.proj.weight"].sum(1, True))


@pytest.mark.parametrize("in_chans", [3, None])  # None: the model's own
def test_images_of_three_channels_take_the_weights_of_one(checkpoint, tmp_path, in_chans):
    path, averaged = checkpoint
    options = {"initial_checkpoint": str(path), "in_chans": in_chans, "mean": (0.5,), "std": (0.5,)}
    model = create_initial_model(tiny(tmp_path, **options), 10)
    expected = averaged["patch_embed.proj.weight"].expand(-1, 3, -1, -1) / 3
    torch.testing.assert_close(model.state_dict()["patch_embed.proj.weight"], expected)
    assert model.pretrained_cfg["input_size"][0] == 3


def test_weights_of_as_many_channels_are_no_matter_of_warnings(checkpoint, tmp_path, caplog):
    path, _ = checkpoint
    create_initial_model(tiny(tmp_path, initial_checkpoint=str(path)), 10)
    assert "channels" not in caplog.text
    config = tiny(tmp_path, model_kwargs={**MODEL, "embed_dim": 32}, initial_checkpoint=str(path))
    with pytest.raises(UsageError, match=r"is not of this vit_tiny.*size mismatch"):
        create_initial_model(config, 10)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"epoch,step\n1,5\n", b"hello", b"{}", b"\xff" * 2000], ids=len)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"^checkpoint: {path} is no checkpoint with weights, or damaged"):
        load_weights("checkpoint", path, use_ema=True)


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        torch.zeros(1),
        3,
        {"weight": 3},
        {"weight": torch.zeros(1), "more": {"weight": torch.zeros(1)}},
        {0: torch.zeros(1)},
        {"state_dict": [torch.zeros(1)]},
        {"model": "vit"},
    ],
)
def test_what_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(UsageError, match=rf"^checkpoint: .*{path}"):
        load_weights("checkpoint", path, use_ema=True)


def test_averaged_weights_may_be_fewer(tmp_path):
    weight, path = torch.ones(1), tmp_path / "weights.pth"
    for averaged in ({"a": weight}, {"a": weight, "b": 2 * weight}):
        torch.save({"state_dict": {"a": weight, "b": weight}, "state_dict_ema": averaged}, path)
        assert load_all_weights(path) == {"model": {"a": weight, "b": weight}, "EMA": averaged}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_a_gpu_lacks_is_not_the_fault_of_the_image_size(error):
    model = torch.nn.Linear(3, 3)
    model.forward = mock.Mock(side_effect=error("no memory"))
    with pytest.raises(error):
        check_image_size(model, (3, 16, 16))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "pvt_tiny"])
def test_published_weights_that_cannot_be_had_are_an_error(tmp_path, monkeypatch, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = tiny(tmp_path, model=model, model_kwargs={}, img_size=None, in_chans=None, pretrained=True)
    with pytest.raises(UsageError, match=f"pretrained: cannot get the published weights of {model}: .*"):
        create_initial_model(config, 10)


@pytest.mark.parametrize("place", ["last.pth.tar", "checkpoints/epoch-00001-step-000000005-0.pth.tar"])
def test_a_teacher_is_what_the_configuration_of_its_run_says(checkpoint, tmp_path, place):
    path, averaged = checkpoint
    save_config(tiny(tmp_path, model_kwargs=MODEL), tmp_path / CONFIG_FILE)
    (tmp_path / "checkpoints").mkdir()
    config = tiny(tmp_path, target="teacher", teacher_checkpoint=str(path.replace(tmp_path / place)))
    state = create_teacher(config, 10, torch.device("cpu")).model.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in state.items())


def test_a_teacher_may_be_named_as_its_configuration_does(checkpoint, tmp_path):
    path, averaged = checkpoint
    save_config(tiny(tmp_path, model_kwargs=MODEL), tmp_path / CONFIG_FILE)
    named = {"teacher_checkpoint": str(path), "teacher_model": "vit_tiny_patch16_224"}
    state = create_teacher(tiny(tmp_path, target="teacher", **named), 10, torch.device("cpu")).model.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in state.items())


def test_a_teacher_of_a_folder_knows_the_classes_of_another_by_name(tmp_path):
    model = tiny(tmp_path, model_kwargs=MODEL, data="folder:images")
    save_config(model, tmp_path / CONFIG_FILE)
    known = {"args": argparse.Namespace(data="folder:images"), "class_names": ["ape", "bee", "cat"]}
    torch.save({"state_dict": create_model(model, 3).state_dict(), **known}, tmp_path / "last.pth.tar")
    path = str(tmp_path / "last.pth.tar")
    config = dataclasses.replace(model, target="teacher", teacher_checkpoint=path, data="folder:others")
    create_teacher(config, 3, torch.device("cpu"), ["ape", "bee", "cat"])
    message = "teacher_checkpoint: expected the classes of folder:others, got bee for its cat"
    with pytest.raises(UsageError, match=message):
        create_teacher(config, 3, torch.device("cpu"), ["ape", "cat", "bee"])
    # What names a data set gives its classes says nothing.
    create_teacher(dataclasses.replace(config, data="torch/cifar10"), 3, torch.device("cpu"), ["ape", "cat", "bee"])


@pytest.mark.parametrize("classes", [7, 0])
def test_a_teacher_that_only_looks_may_know_other_classes(tmp_path, classes):
    weights = create_model(tiny(tmp_path, model="resnet10t", model_kwargs={}, img_size=None), classes).state_dict()
    torch.save(weights, tmp_path / "other.pth")
    teacher = {"teacher_checkpoint": str(tmp_path / "other.pth"), "teacher_model": "resnet10t"}
    looking = tiny(tmp_path, mixing="attentive-cutmix", target="tl-align", **teacher)
    state = create_teacher(looking, 10, torch.device("cpu")).model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in state.items())
    with pytest.raises(UsageError, match=r"teacher_checkpoint: .* is not of this resnet10t"):
        create_teacher(tiny(tmp_path, target="teacher", **teacher), 10, torch.device("cpu"))


def test_weights_come_from_one_place(tmp_path):
    with pytest.raises(UsageError, match="pretrained, initial_checkpoint: expected one of the two"):
        tiny(tmp_path, pretrained=True, initial_checkpoint="some.pth")
