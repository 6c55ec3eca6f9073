"""Configuration: what wins, what is written, and what is refused."""

import dataclasses
import re
from pathlib import Path

import pytest

from tlalign import cli
from tlalign.config import (
    AnalyzeConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    UsageError,
    load_config_file,
    load_recipe,
    save_config,
)


@pytest.fixture
def resolved(monkeypatch):
    """Resolves the options of `tlalign train` without training."""
    seen = []
    monkeypatch.setattr(cli, "_run", lambda config, resume: seen.append(config) or 0)

    def resolve(*options: str) -> TrainConfig:
        assert cli.main(["train", *options]) == 0
        return seen[-1]

    return resolve


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path, resolved):
    recipe = load_recipe("digits")
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nlr: 2e-4\n")

    config = resolved("--lr", "0.125", "--config", str(file))

    assert (config.lr, config.epochs) == (0.125, 7)
    assert config.batch_size == recipe["batch_size"]
    assert config.model_kwargs == recipe["model_kwargs"]


def test_numbers_in_files_may_be_written_like_2e_4(tmp_path, resolved):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 2e-4\n")
    assert resolved("--config", str(file)).lr == 2e-4


def test_flags_may_be_written_with_dashes(resolved):
    assert resolved("--batch-size=32", "--mix-mode", "elem").batch_size == 32


def test_switches_need_no_value_and_lists_no_brackets(resolved):
    config = resolved("--compile", "--channels-last", "--fsdp", "false", "--layers", "-2,-1", "--mean", ".5")
    assert (config.compile, config.channels_last, config.fsdp) == (True, True, False)
    assert (config.layers, config.mean) == ((-2, -1), (0.5,))
    assert resolved("--layers=1, 3", "--grad_checkpointing").layers == (1, 3)
    assert resolved("--opt_betas", "9e-1,0.99").opt_betas == (0.9, 0.99)
    assert resolved("--layers", "2", "--layers", "null").layers is None


@pytest.mark.parametrize("name", ["#1", "&a", "NULL"])
def test_text_behind_a_flag_is_text(resolved, name):
    config = resolved("--output", name, f"--initial_checkpoint={name}", "--data_dir", "null")
    assert (config.output, config.initial_checkpoint, config.data_dir) == (name, name, None)
    assert resolved("--output=&b", f"--output={name}").output == name


def test_options_go_with_the_others_that_make_use_of_them(resolved):
    assert resolved("--auto_augment", "3a", "--color_jitter", "0.5").color_jitter == 0.5
    teacher = ("--target=token-labels", "--teacher_checkpoint=x.pth")
    assert resolved(*teacher, "--mix_patch_size=4").mix_patch_size == 4
    assert resolved("--crop_mode=rkrr", "--crop_scale=0.5,1.5").crop_scale == (0.5, 1.5)


def test_one_argument_of_the_model_can_be_changed_by_a_flag(resolved):
    config = resolved("--model_kwargs.depth", "2")
    assert config.model_kwargs == load_recipe("digits")["model_kwargs"] | {"depth": 2}


@pytest.mark.parametrize("flags", [["--model", "swin_tiny"], ["--model=swin_tiny"], ["--config", "{file}"]])
def test_the_arguments_of_a_recipe_go_with_its_model_only(tmp_path, resolved, flags):
    file = tmp_path / "mine.yaml"
    file.write_text("model: swin_tiny\n")
    flags = [flag.format(file=file) for flag in flags]
    assert resolved(*flags).model_kwargs == {}
    assert resolved(*flags, "--model_kwargs", "{depths: [2]}").model_kwargs == {"depths": [2]}
    recipe = load_recipe("digits")
    assert resolved("--model", recipe["model"]).model_kwargs == recipe["model_kwargs"]
    assert resolved("--model", f"{recipe['model']}.augreg_in21k").model_kwargs == recipe["model_kwargs"]


def test_layers_and_residual_are_flags_and_come_back_from_the_file(tmp_path, resolved):
    config = resolved("--layers", "[-1, 2]", "--residual=false")
    assert (config.layers, config.residual) == ((-1, 2), False)
    save_config(config, tmp_path / "config.yaml")
    assert dataclasses.asdict(resolved("--config", str(tmp_path / "config.yaml"))) == dataclasses.asdict(config)


def test_a_written_configuration_reads_back_as_it_was(tmp_path, resolved):
    config = resolved("--mean", "[0.25]", "--clip_grad", "null")
    save_config(config, tmp_path / "config.yaml")
    again = resolved("--config", str(tmp_path / "config.yaml"))
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_every_field_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    explained = "".join(each.__doc__ for each in (ModelConfig, EvalConfig, TrainConfig))
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in printed
        assert re.search(rf"^ +{field.name}: ", explained, re.MULTILINE)
    assert "Passes over the training images" in printed


def test_the_help_of_compare_is_of_a_comparison(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    printed = capsys.readouterr().out
    assert "Folder of the comparison" in printed
    assert "--mixing " not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epoch", "3"], "did you mean epochs?"),
        (["--resume"], "resume: expected one argument"),
        (["--recipe"], "recipe: expected one argument"),
        (["--dry_run=yes"], "dry_run: expected true or false, got yes"),
        (["--output="], "output: expected a path, got an empty one"),
        (["--data=mnist-5k"], "is not made for mnist-5k; give --recipe mnist5k or none"),
        (
            ["--warmup_epochs=0", "--warmup_lr=0.1"],
            "warmup_lr: expected none, for a run without warmup_epochs makes no",
        ),
        (["--crop_scale=0.5,2"], "crop_scale: expected at most 1 with crop_mode rrc, got (0.5, 2.0)"),
        (
            ["--target=teacher", "--teacher_checkpoint=x.pth", "--mix_patch_size=5"],
            "mix_patch_size: expected none, for mixing cutmix and target teacher makes no use of it, got 5",
        ),
        (["--mixing", "cutmixx"], "puzzlemix, tokenmix, got cutmixx; did you mean cutmix?\n"),
        (
            ["--target", "alignment"],
            "target: expected one of ratio, tl-align, token-labels, transmix, teacher, got ali",
        ),
        (
            ["--target", "ratio", "--layers", "[1]"],
            "stochastic_depth: expected none with the target ratio",
        ),
        (["--target", "transmix", "--residual", "false"], "expected none with the target transmix, only with tl-align"),
        (["--target", "ratio", "--stochastic_depth", "true"], "layers, residual, stochastic_depth: expected none"),
        (
            ["--target", "token-labels"],
            "teacher_checkpoint: expected weights of a trained network for the target to",
        ),
        (["--target", "teacher"], "teacher_checkpoint: expected weights of a trained network for the target teacher"),
        (["--mixing", "attentive-cutmix"], "teacher_checkpoint: expected weights of a trained network for attentive"),
        (
            ["--teacher_checkpoint", "some.pth"],
            "teacher_checkpoint: expected none, for mixing cutmix and target",
        ),
        (
            ["--mixing", "none", "--layers", "[0]"],
            "layers: expected none, for mixing none and target tl-align",
        ),
        (
            ["--mixing", "mixup", "--box_grid", "4"],
            "box_grid: expected none, for mixing mixup makes no use",
        ),
        (
            ["--mixing", "mixup", "--cutmix_alpha", ".2"],
            "cutmix_alpha: expected none, for mixing mixup makes no use of",
        ),
        (["--mixup_alpha", ".2"], "mixup_alpha: expected none, for mixing cutmix makes no use of it, got 0.2\n"),
        (["--mix_switch_prob", ".2"], "mix_switch_prob: expected none, for mixing cutmix makes no use"),
        (
            ["--mix_patch_size", "2"],
            "mix_patch_size: expected none, for mixing cutmix and target tl-align makes no use",
        ),
        (["--train_split", "train+val"], "train_split: expected none, for data digits makes no use of it"),
        (["--recipe=mnist5k", "--data_dir=x"], "data_dir: expected none, for data mnist-5k makes no use of it"),
        (
            ["--recipe", "none", "--model", "vit_tiny_patch16_224", "--data", "folder:x", "--data_dir", "x"],
            "data_dir: expected none, for data folder:x makes no use of it, got x",
        ),
        (
            ["--recipe", "none", "--model", "vit_tiny_patch16_224", "--data", "wds/", "--download", "true"],
            "download: expected none, for data wds/ makes no use of it, got True",
        ),
        (
            ["--auto_augment", "rand-m9", "--color_jitter", "0.4"],
            "color_jitter: expected none, for auto_augment rand-m9 makes no use of it, got 0.4",
        ),
        (["--mixing", "none", "--mix_mode", "elem"], "mix_mode: expected none, for mixing none makes no use of it"),
        (["--lr", "fast"], "error: lr: expected a number, got fast\n"),
        (["--epochs", "1.5"], "error: epochs: expected a whole number, got 1.5\n"),
        (["--pretrained", "3"], "error: pretrained: expected true or false, got 3\n"),
        (["--layers", "1.5"], "error: layers: expected a list [a whole number, ...] or null, got [1.5]\n"),
        (["--layers", "last"], "error: layers: expected a list [a whole number, ...] or null, got last\n"),
        (["--epochs", "3"], "0 to epochs - 1 = 2 (give it beside fewer epochs than a recipe's), got 5"),
        (["--opt_betas", "[0.9,1.5]"], "error: opt_betas: expected numbers from 0 to less than 1, got (0.9, 1.5)"),
        (["--momentum", "1"], "error: momentum: expected 0 to less than 1, got 1"),
        (["--opt_betas", "[0.9]"], "error: opt_betas: expected 2 numbers for adamw, got [0.9]"),
        (["--model_kwargs", "3"], "error: model_kwargs: expected a mapping {name: value}, got 3\n"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--smoothing", "1"], "smoothing: expected 0 to less than 1, got 1"),
        (["--hflip", "2"], "hflip: expected 0 to 1, got 2"),
        (["--lr", "nan"], "nan"),
        (["--seed", "4294967296"], "seed: expected 0 to 4294967295, got 4294967296"),
        (["--crop_scale", "[-1,0.8]"], "crop_scale: expected two numbers, 0 < least <= greatest, got (-1.0, 0.8)"),
        (["--crop_scale", "[1,0.8]"], "crop_scale: expected two numbers, 0 < least <= greatest, got (1.0, 0.8)"),
        (["--crop_ratio", "[0,0]"], "crop_ratio: expected two numbers, 0 < least <= greatest, got (0.0, 0.0)"),
        (["--crop_pct", "0.001"], "crop_pct: expected at least 0.1 and at most 1, got 0.001"),
        (["--std", "[0.0]"], "std: expected numbers of more than 0, got (0.0,)"),
        (["--mean", "[.nan]"], "mean: expected finite numbers, got (nan,)"),
        (["--recipe", "digit"], "recipe: expected none or one of deit_base"),
        (["--data", "folder:/pictures"], "--recipe none"),
        (["--recipe", "none"], "data"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_wrong_options_are_usage_errors_with_a_message(options, message, capsys):
    assert cli.main(["train", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("num_classes", "img_size", "in_chans", "batch_size", "box_grid", "mix_patch_size")),
        *((name, 0) for name in ("aug_repeats", "accumulate", "checkpoint_steps")),
        *((name, -1) for name in ("workers", "max_unreadable")),
        *((name, 1.5) for name in ("random_erasing", "mix_prob", "mix_switch_prob", "ema_decay")),
        *((name, -0.5) for name in ("color_jitter", "weight_decay", "warmup_lr", "min_lr")),
        *((name, 0.0) for name in ("lr", "clip_grad", "cutmix_alpha", "mixup_alpha", "opt_eps")),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UsageError, match=f"^{name}: expected .*, got {value}$"):
        TrainConfig(model="", data="", **{name: value})


def test_an_unknown_key_in_a_file_gets_a_suggestion(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1\n")
    with pytest.raises(UsageError, match=r"unknown key 'learning_rate' in .*mine.yaml"):
        load_config_file(file)
    file.write_text("epohcs: 3\n")
    with pytest.raises(UsageError, match="did you mean epochs"):
        load_config_file(file)
    file.write_text("recipe: deit_tiny\n")
    with pytest.raises(UsageError, match="a recipe is chosen by --recipe"):
        load_config_file(file)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match="config"):
        load_config_file(file)


@pytest.mark.parametrize("name", ["mixing", "lr", "epochs", "residual", "crop_scale"])
def test_a_value_left_empty_in_a_file_is_a_usage_error(tmp_path, capsys, name):
    file = tmp_path / "mine.yaml"
    file.write_text(f"{name}:\n")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert f"{name}: expected a value, got null" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "[1]"])
@pytest.mark.parametrize("flags", [[], ["--model_kwargs.depth=1"]])
def test_arguments_of_the_model_in_a_file_are_a_mapping(tmp_path, capsys, value, flags):
    file = tmp_path / "mine.yaml"
    file.write_text(f"model_kwargs: {value}\n")
    assert cli.main(["train", "--config", str(file), *flags]) == 2
    assert (
        f"model_kwargs: expected a mapping {{name: value}} in {file}, got {value or 'null'}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs: many", "epochs: expected a whole number, got many"),
        ("opt: {name: adamw}", "opt: expected text, got {'name': 'adamw'}"),
        ("img_size: {height: 32}", "img_size: expected a whole number or null, got {'height': 32}"),
    ],
)
def test_a_wrong_type_in_a_file_is_a_usage_error(tmp_path, capsys, line, message):
    file = tmp_path / "mine.yaml"
    file.write_text(f"{line}\n")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert f"error: {message}\n" in capsys.readouterr().err


def test_a_file_that_is_no_text_is_a_usage_error(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"model: \xff\n")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert f"error: config: cannot read {file}: " in capsys.readouterr().err


def test_home_is_found_in_a_file_and_behind_an_equals_sign(tmp_path, resolved, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "mine.yaml"
    file.write_text("initial_checkpoint: ~/a.pth\nteacher_checkpoint: ~/b.pth\ntarget: teacher\n")
    sets = ("--recipe", "none", "--model", "vit_tiny_patch16_224", "--data", "torch/cifar10", "--data_dir=~/sets")
    config = resolved("--config", str(file), "--output=~/runs/1", *sets)
    assert (config.initial_checkpoint, config.output) == ("/home/me/a.pth", "/home/me/runs/1")
    assert (config.data_dir, config.teacher_checkpoint) == ("/home/me/sets", "/home/me/b.pth")
    folders = [TrainConfig(model="", data=data).folder for data in ("folder:~/a", "folder:", "digits")]
    assert folders == [Path("/home/me/a"), None, None]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert AnalyzeConfig(model="", data="digits", table1_weights="~").table1_weights == str(tmp_path)
