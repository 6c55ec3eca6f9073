"""Recipes: what they set, where it is from, and that timm makes of it what it should."""

import importlib.resources
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import DropPath
from timm.models import get_arch_pretrained_cfgs

import tlalign.models  # noqa: F401 (makes timm know them)
from tlalign import cli
from tlalign.config import TrainConfig, field_names, load_recipe, recipe_names
from tlalign.engine import create_optimizer
from tlalign_kernels import patch_model

# What defines the setting: epochs, batch, greatest, first and least learning rate, warm-up, weight decay, drop path,
# repeats of an image, gradient norm.
SETTINGS = {
    "deit_tiny": (300, 1024, 1e-3, 1e-6, 1e-5, 5, 0.05, 0.1, 3, None),
    "deit_small": (300, 1024, 1e-3, 1e-6, 1e-5, 5, 0.05, 0.1, 3, None),
    "deit_base": (300, 1024, 1e-3, 1e-6, 1e-5, 5, 0.05, 0.1, 3, None),
    "pvt_tiny": (300, 1024, 1e-3, 1e-6, 1e-5, 5, 0.05, 0.1, 3, None),
    "pvt_small": (300, 1024, 1e-3, 1e-6, 1e-5, 5, 0.05, 0.1, 3, None),
    "swin_tiny": (300, 1024, 1e-3, 1e-6, 1e-5, 20, 0.05, 0.2, 1, 5.0),
    "swin_small": (300, 1024, 1e-3, 1e-6, 1e-5, 20, 0.05, 0.3, 1, 5.0),
    "swin_base": (300, 1024, 1e-3, 1e-6, 1e-5, 20, 0.05, 0.5, 1, 5.0),
    "finetune_deit_base": (40, 1024, 1e-5, None, None, 0, 1e-8, 0.0, 3, None),
    "finetune_swin_base": (40, 1024, 1e-5, None, None, 0, 1e-8, 0.5, 1, 5.0),
    "transfer_cifar10": (1000, 768, 0.01, 1e-6, 1e-5, 5, 1e-4, 0.0, 3, None),
    "transfer_cifar100": (1000, 768, 0.01, 1e-6, 1e-5, 5, 1e-4, 0.0, 3, None),
    "transfer_flowers102": (1000, 768, 0.01, 1e-6, 1e-5, 5, 1e-4, 0.0, 3, None),
    "transfer_stanford_cars": (1000, 768, 0.01, 1e-6, 1e-5, 5, 1e-4, 0.0, 3, None),
}
DEMOS = ("digits", "mnist5k")

# A file of a repository, a page, a paper, or where a data set is from.
SOURCE = re.compile(r"\w+\.(py|sh|md|yaml)|issue \d+|TL-Align paper|Hugging Face|torchvision")


def config_of(name: str) -> TrainConfig:
    return TrainConfig(**{"data": "folder:nowhere"} | load_recipe(name))


def text_of(name: str) -> str:
    return (importlib.resources.files("tlalign") / "recipes" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_valid_configuration_of_known_keys_each_given_once(name):
    keys = re.findall(r"^([^#\s][^:]*):", text_of(name), re.MULTILINE)
    assert sorted(keys) == sorted(set(keys)), "a later value of the same key would win in silence"
    assert set(keys) == set(load_recipe(name)) <= set(field_names(TrainConfig))
    config_of(name)


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_of_a_recipe_says_where_it_is_from(name):
    title, *blocks = text_of(name).rstrip().split("\n\n")
    assert all(line.startswith("#") for line in title.splitlines()), "a recipe begins with what it is"
    for block in blocks:
        comment = re.match(r"(#.*\n)*", block)[0]
        assert comment, f"no comment above {block.splitlines()[0]!r}"
        assert name in DEMOS or SOURCE.search(comment), f"no source in {comment!r}"


def test_the_table_has_all_recipes_of_papers():
    assert sorted([*SETTINGS, *DEMOS]) == recipe_names()


@pytest.mark.parametrize(("name", "expected"), SETTINGS.items())
def test_a_recipe_has_the_setting_of_its_paper(name, expected):
    config = config_of(name)
    constant = config.sched == "constant"
    assert expected == (
        config.epochs,
        config.batch_size,
        config.lr,
        None if constant else config.warmup_lr,
        None if constant else config.min_lr,
        config.warmup_epochs,
        config.weight_decay,
        config.model_kwargs["drop_path_rate"],
        config.aug_repeats,
        config.clip_grad,
    )
    assert constant == name.startswith("finetune")
    assert config.opt == ("sgd" if name.startswith("transfer") else "adamw")
    assert config.opt_eps == (None if name.startswith("transfer") else 1e-8)
    assert config.random_erasing == (0 if name.startswith("transfer") else 0.25)
    assert (config.ema_decay, config.crop_pct, config.interpolation) == (None, 0.875, "bicubic")
    assert (config.loss, config.smoothing, config.auto_augment) == ("ce", 0.1, "rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_of_the_paper_mix_by_cutmix_alone_in_whole_patches(name):
    config = config_of(name)
    assert (config.mixing, config.target, config.method) == ("cutmix", "tl-align", "cutmix+tl-align")
    assert (config.cutmix_alpha, config.mix_prob, config.mix_mode, config.box_grid) == (1.0, 1.0, "batch", 16)
    assert config.layers is None and config.residual


def test_the_digits_are_what_they_were():
    config = config_of("digits")
    assert (config.data, config.batch_size, config.lr, config.epochs) == ("digits", 32, 1.5e-3, 30)
    assert (config.warmup_epochs, config.weight_decay, config.ema_decay) == (5, 0.05, 0.99)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_is_one_of_timm_with_the_drop_path_and_size_of_the_recipe(name):
    config = config_of(name)
    with torch.device("meta"):
        model = timm.create_model(config.model, **config.model_kwargs)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(config.model_kwargs["drop_path_rate"])
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert model.pretrained_cfg["num_classes"] == 1000


@pytest.mark.parametrize("name", SETTINGS)
def test_a_start_from_published_weights_names_which_ones(name):
    config = config_of(name)
    assert config.pretrained == name.startswith(("finetune", "transfer"))
    if config.pretrained:
        architecture, tag = config.model.split(".")
        assert config.model in get_arch_pretrained_cfgs(architecture)
        assert tag in ("fb_in1k", "ms_in1k"), "trained on ImageNet-1K alone"


@pytest.mark.parametrize(
    ("name", "spared", "decayed"),
    [
        ("deit_tiny", {"pos_embed", "cls_token"}, set()),
        # As in the code of PVT, which spares the class token alone.
        ("pvt_tiny", {"cls_token"}, {f"pos_embed{stage}" for stage in range(1, 5)}),
        (
            "swin_tiny",
            {
                f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"
                for stage, depth in enumerate((2, 2, 6, 2))
                for block in range(depth)
            },
            set(),
        ),
    ],
)
def test_weight_decay_of_a_patched_model_spares_what_the_models_own_code_spares(name, spared, decayed):
    config = config_of(name)
    with torch.device("meta"):
        model = patch_model(timm.create_model(config.model, **config.model_kwargs))
    optimizer, _ = create_optimizer(model, config, 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(each)]: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert set(decay) == set(names.values())
    many = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert {name for name in many if not decay[name]} == spared
    assert all(decay[name] == 0 for name in set(decay) - many), "biases and scales of norms"
    assert all(decay[name] == 0.05 for name in decayed)


@pytest.mark.parametrize("name", ["finetune_deit_base", "finetune_swin_base"])
def test_fine_tunes_keep_their_learning_rate_from_the_first_step_to_the_last(name):
    config = config_of(name)
    optimizer, scheduler = create_optimizer(torch.nn.Linear(1, 1), config, 2)
    rates = {optimizer.param_groups[0]["lr"]}
    for step in range(1, 2 * config.epochs + 1):
        scheduler.step_update(step)
        rates.add(optimizer.param_groups[0]["lr"])
    assert rates == {1e-5}


def test_a_recipe_without_data_asks_for_it(capsys):
    assert "data" not in load_recipe("deit_tiny")
    assert cli.main(["train", "--recipe", "deit_tiny"]) == 2
    printed = capsys.readouterr().err
    assert "data" in printed
    assert "Traceback" not in printed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of two classes, with a dozen images to train on and half a dozen held out."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def check_dry_run(name: str, pictures: Path, output: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--batch_size=4", "--workers=0", "--device=cpu", "--pretrained=false", f"--output={output}"]
    if name not in DEMOS:  # which have images of their own, with one channel
        options.append(f"--data=folder:{pictures}")
    assert cli.main(["train", "--recipe", name, "--dry-run", *options]) == 0
    printed = capsys.readouterr().out
    for expected in (r"[\d.,]+ images/s", "memory", rf"{config_of(name).epochs} epochs"):
        assert re.search(expected, printed), f"no {expected} in {printed}"
    assert not list(output.glob("**/*.pth.tar"))


def test_deit_tiny_passes_a_dry_run(pictures, tmp_path, capsys):
    check_dry_run("deit_tiny", pictures, tmp_path / "run", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "deit_tiny"])
def test_every_recipe_passes_a_dry_run(name, pictures, tmp_path, capsys):
    check_dry_run(name, pictures, tmp_path / "run", capsys)
