"""Export: timm loads what is written by itself, and gets the run's own logits."""

import copy
import errno
import json
import os

import pytest
import timm
import torch
from safetensors import safe_open

from tlalign import export
from tlalign.cli import main
from tlalign.config import CONFIG_FILE, ModelConfig, TrainConfig, UsageError, load_recipe, save_config
from tlalign_kernels import patch_model

MODEL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
ARGUMENTS = {"img_size": 16, "in_chans": 1, "num_classes": 10, **MODEL}


def make_model(seed: int):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as a compiled, aligning run leaves it, with the weights of seed 1 and an average of seed 2."""
    config = TrainConfig(**load_recipe("digits") | {"model_kwargs": MODEL, "img_size": 16})
    save_config(config, tmp_path / CONFIG_FILE)
    states = {}
    for name, seed in (("state_dict", 1), ("state_dict_ema", 2)):
        state = patch_model(make_model(seed)).state_dict()
        states[name] = {f"_orig_mod.{key}": value for key, value in state.items()}
    path = tmp_path / "last.pth.tar"
    torch.save(states | {"epoch": 1, "arch": "vit_tiny_patch16_224"}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("options", "seed"), [([], 2), (["--ema=true"], 2), (["--ema=false"], 1)])
def test_timm_loads_the_file_and_gives_the_same_logits(checkpoint, tmp_path, capsys, suffix, options, seed):
    output = tmp_path / "out" / f"exported{suffix}"
    output.parent.mkdir()
    assert main(["export", str(checkpoint), "--output", str(output), *options]) == 0
    model = make_model(seed)
    images = torch.randn(3, 1, 16, 16)
    (call,) = [line for line in capsys.readouterr().out.splitlines() if "create_model" in line]
    loaded = eval(call.split("; ")[1], {"timm": timm}).eval()
    assert torch.equal(loaded(images), model(images))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    if suffix == ".pth":
        assert list(torch.load(output, weights_only=True)) == list(model.state_dict())
    else:
        with safe_open(output, "pt") as file:
            assert set(file.keys()) == set(model.state_dict())
            metadata = file.metadata()
        assert metadata["architecture"] == "vit_tiny_patch16_224"
        assert metadata["weights"] == ("EMA" if seed == 2 else "model")
        assert json.loads(metadata["model_args"]) == ARGUMENTS | {"img_size": [16, 16]}
        image_config = json.loads(metadata["pretrained_cfg"])
        assert [image_config[name] for name in ("input_size", "mean", "std")] == [[1, 16, 16], [0.5], [0.5]]
        assert metadata["timm"] == timm.__version__


def test_flags_say_what_a_checkpoint_without_configuration_is(checkpoint, tmp_path, capsys):
    (tmp_path / CONFIG_FILE).unlink()
    output = tmp_path / "exported.pth"
    # Flags may come before the checkpoint too.
    options = ["--model=vit_tiny_patch16_224", "--model-kwargs", str(MODEL), "--img_size=16", "--in_chans=1"]
    assert main(["export", *options, str(checkpoint), "--output", str(output)]) == 0
    # A bare state dict, which is exported as it is.
    again = tmp_path / "again.safetensors"
    assert main(["export", str(output), "--output", str(again), *options]) == 0
    assert "weights of the model" in capsys.readouterr().out
    assert main(["export", str(output), "--output", str(tmp_path / "x.pth"), "--ema=true", *options]) == 2
    assert "ema: expected averaged weights" in capsys.readouterr().err


def test_what_training_drops_is_there_when_logits_are_compared(checkpoint, tmp_path):
    options = ["--output", str(tmp_path / "exported.pth"), "--model_kwargs.proj_drop_rate=0.5"]
    assert main(["export", str(checkpoint), *options]) == 0


def test_a_model_of_this_package_is_loaded_with_an_import(tmp_path, capsys):
    import tlalign.models  # noqa: F401

    arguments = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 1, 2]}
    torch.save(timm.create_model("pvt_tiny", num_classes=3, **arguments).state_dict(), tmp_path / "pvt.pth")
    options = [
        "--model=pvt_tiny",
        "--model_kwargs",
        json.dumps(arguments),
        "--output",
        str(tmp_path / "out.safetensors"),
    ]
    assert main(["export", str(tmp_path / "pvt.pth"), *options]) == 0
    assert "import timm, tlalign.models; timm.create_model('pvt_tiny'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.head.bias.data[0].add_(1e-6), "gives other logits, by up to 9"),
        (lambda model: model.head.register_buffer("scale", torch.ones(())), "timm can't load"),
    ],
)
def test_a_file_that_gives_other_logits_is_removed(checkpoint, tmp_path, capsys, monkeypatch, change, message):
    save = export._save

    def save_another(model, path, metadata):
        model = copy.deepcopy(model)
        change(model)
        save(model, path, metadata)

    monkeypatch.setattr(export, "_save", save_another)
    before = set(tmp_path.iterdir())
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported.pth")]) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = set(tmp_path.iterdir())
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported.safetensors")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_home_is_found_behind_an_equals_sign(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", str(checkpoint), "--output=~/exported.pth", "--ema"]) == 0
    assert (tmp_path / "exported.pth").is_file()


def test_an_existing_file_is_never_written_over(checkpoint, tmp_path, capsys):
    output = tmp_path / "exported.pth"
    output.write_bytes(b"mine")
    assert main(["export", str(checkpoint), "--output", str(output)]) == 2
    assert "expected a new file" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output=x.bin"], "ends in .safetensors or .pth, got x.bin"),
        ([], "output: expected a file, got nothing"),
        (["--output=nowhere/x.pth"], "output: cannot write nowhere/x.pth"),
        (["--output=x.pth", "--model_kwargs.embed_dim=32"], "is not of this vit_tiny_patch16_224"),
        (["--output=x.pth", "--num_classes=7"], "is not of this vit_tiny_patch16_224"),
        (["--output=x.pth", "--ema=1"], "ema: expected true or false or null, got 1\n"),
        (["--output=x.pth", "--batch_size=8"], "unrecognized arguments: --batch_size=8"),
        (["--output=x.pth", "--model=resnet10t"], "don't tell how many resnet10t has"),
        (
            ["--output=x.pth", "--model=vit_tinny_patch16_224"],
            "timm has no vit_tinny_patch16_224; did you mean",
        ),
    ],
)
def test_what_cannot_be_exported_ends_with_a_message_and_code_2(
    checkpoint, options, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(checkpoint), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()


def test_weights_that_layers_share_are_written_for_each_and_in_any_layout(tmp_path):
    layer = torch.nn.Linear(3, 3)
    layer.weight.data = layer.weight.data.T
    model = torch.nn.Sequential(layer, layer)
    export._save(model, tmp_path / "shared.safetensors", {})
    with safe_open(tmp_path / "shared.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())


def test_safetensors_takes_no_path_that_is_no_text(checkpoint, tmp_path):
    output = tmp_path / os.fsdecode(b"\xfc.safetensors")
    config = ModelConfig(model="vit_tiny_patch16_224", model_kwargs=MODEL, img_size=16, in_chans=1)
    with pytest.raises(UsageError, match=r"output: .* is not valid UTF-8"):
        export.export_checkpoint(checkpoint, output, config)
    assert not output.exists()


def test_without_a_checkpoint_it_is_asked_for(capsys):
    assert main(["export", "--output=x.pth"]) == 2
    assert "required: checkpoint" in capsys.readouterr().err
    assert main(["export", "nowhere.pth", "--output=x.pth", "--model=vit_tiny_patch16_224"]) == 2
    assert "checkpoint: expected a file, got nowhere.pth" in capsys.readouterr().err
