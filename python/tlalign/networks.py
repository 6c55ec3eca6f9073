"""The networks of a configuration: the model, where its weights come from, and the teacher."""

from __future__ import annotations

import itertools
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

import tlalign.models  # noqa: F401 (timm knows them from here on)
from tlalign.checkpoints import folder_classes_of
from tlalign.config import CONFIG_FILE, ModelConfig, TrainConfig, UsageError, field_names, load_config_file, suggestion
from tlalign.runs import config_beside, newest_in
from tlalign.teacher import Teacher
from tlalign_kernels import patch_model

_logger = logging.getLogger(__name__)


def create_model(config: ModelConfig, num_classes: int, **overrides: Any) -> nn.Module:
    """The timm model of a configuration, with random weights.

    Args:
        config: Names the model and its arguments.
        num_classes: Number of classes.
        overrides: Arguments of timm.create_model that replace those of the configuration.

    Raises:
        UsageError: If timm has no such model, or refuses the arguments.
    """
    if ":" not in config.model and not timm.is_model(config.model):
        raise UsageError(f"model: timm has no {config.model}{suggestion(config.model, timm.list_models())}")
    for name in ("img_size", "in_chans", "num_classes"):
        if name in config.model_kwargs:
            raise UsageError(
                f"model_kwargs: expected {name} as an option of its own (--{name} {config.model_kwargs[name]})"
            )
    try:
        return timm.create_model(**model_arguments(config, num_classes, **overrides))
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        given = {name: getattr(config, name) for name in ("img_size", "in_chans") if getattr(config, name) is not None}
        given |= config.model_kwargs
        reason = (str(error) or type(error).__name__).splitlines()[0]  # PyTorch's may end in a trace of C++
        raise UsageError(f"model: timm can't make {config.model} with {given}: {reason}") from error


def model_arguments(config: ModelConfig, num_classes: int, **overrides: Any) -> dict[str, Any]:
    """Arguments of timm.create_model for the model of a configuration; see `create_model`."""
    requested = {"img_size": config.img_size, "in_chans": config.in_chans}
    arguments = timm.models.resolve_model_input_args(config.model, requested, **config.model_kwargs | overrides)
    return arguments | {"num_classes": num_classes}


def create_initial_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The timm model of a configuration with the weights that training starts from, as its options say.

    Raises:
        UsageError: If timm has no such model, or the weights can't be had or are not of it.
    """
    overrides: dict[str, Any] = {}
    if config.initial_checkpoint is not None:
        weights = load_weights("initial_checkpoint", Path(config.initial_checkpoint))
        model = create_model(config, num_classes)
        for name in _classifiers(model):
            # timm would load the rest without looking whether it is all there. A new head is taken along instead.
            known = len(weights.get(f"{name}.weight", ()))
            if known not in (0, num_classes):
                _logger.warning(
                    "initial_checkpoint: %s of %d classes is left out, a new one of %d is trained",
                    name, known, num_classes,
                )  # fmt: skip
                weights |= {key: value for key, value in model.state_dict().items() if key.startswith(f"{name}.")}
        source = {"state_dict": weights, "num_classes": num_classes}
        first, input_size = (model.default_cfg.get(key) for key in ("first_conv", "input_size"))
        if f"{first}.weight" in weights:  # timm adapts it to the model's channels if it is told of how many it is
            source["input_size"] = (weights[f"{first}.weight"].shape[1], *input_size[1:])
            overrides["in_chans"] = model.get_parameter(f"{first}.weight").shape[1]
        described = f"initial_checkpoint: {config.initial_checkpoint} is not of this {config.model}"
    elif config.pretrained:
        source = {}
        described = f"pretrained: cannot get the published weights of {config.model}"
    else:
        return create_model(config, num_classes)
    create_model(config, 1)  # says what else is wrong
    try:
        model = create_model(config, num_classes, pretrained=True, pretrained_cfg_overlay=source, **overrides)
    except Exception as error:  # downloads have errors of many classes
        raise UsageError(f"{described}: {_first_reason(error.__cause__ or error)}") from error
    if "input_size" in source:
        model.pretrained_cfg["input_size"] = input_size
    return model


def create_teacher(
    config: TrainConfig, num_classes: int, device: torch.device, class_names: Sequence[str] = ()
) -> Teacher:
    """The trained network of a configuration, with its averaged weights if its checkpoint has any.

    Args:
        config: Names the checkpoint, and its model if no configuration lies beside it.
        num_classes: Number of classes that it knows, if it is to label images.
        device: Device to run it on.
        class_names: Their names, which those of its own images have to be, where both are of folders.

    Raises:
        UsageError: If the checkpoint can't be read, is not of this model, or not of these classes.
    """
    path = Path(config.teacher_checkpoint)
    beside = config_beside(path)
    values = load_config_file(beside) if beside.is_file() else {}
    values = {name: value for name, value in values.items() if name in field_names(ModelConfig)}
    if config.teacher_model not in (None, values.get("model")):
        values = {"model": config.teacher_model}
    if "model" not in values:
        raise UsageError(f"teacher_model: expected the timm model of {path}, beside which no {CONFIG_FILE} lies")
    values |= {"img_size": config.img_size, "in_chans": config.in_chans}
    teacher, weights = ModelConfig(**values), load_weights("teacher_checkpoint", path)
    if not config.teacher_labels:  # only its features are asked for
        num_classes = count_classes(weights, teacher) or 0
    elif config.folder is not None and (known := folder_classes_of(path)) and known != list(class_names):
        own, other = next(pair for pair in itertools.zip_longest(class_names, known) if pair[0] != pair[1])
        raise UsageError(f"teacher_checkpoint: expected the classes of {config.data}, got {other} for its {own}")
    model = create_model(teacher, num_classes)
    set_weights("teacher_checkpoint", path, weights, model, teacher.model)
    return Teacher(model.to(device), config.mix_patch_size)


def count_classes(weights: dict[str, Tensor], config: ModelConfig) -> int | None:
    """Number of classes of a model's weights; None if they have no classifier, or one that timm doesn't name."""
    with torch.device("meta"):
        names = _classifiers(create_model(config, 1))
    return next((len(weights[f"{name}.weight"]) for name in names if f"{name}.weight" in weights), None)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that timm calls a model's classifier; distilled models have two."""
    names = model.default_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(name: str, path: Path, use_ema: bool = True) -> dict[str, Tensor]:
    """Weights in the checkpoint that the option `name` gives, averaged ones if it holds any and they are wanted.

    Raises:
        UsageError: If it can't be read, or holds something else.
    """
    if path.is_dir():
        raise UsageError(f"{name}: expected a file, got the folder {path}{newest_in(path)}")
    try:
        # weights_only, so that a checkpoint from anywhere runs no code.
        weights = load_state_dict(str(path), use_ema=use_ema)
    except OSError as error:
        raise UsageError(f"{name}: cannot read {path}: {str(error) or 'no such file'}") from error
    except Exception as error:  # files that are something else have errors of many classes
        raise UsageError(
            f"{name}: {path} is no checkpoint with weights, or damaged ({type(error).__name__})"
        ) from error
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name}: expected weights in {path}, got {key} of type {type(value).__name__}")
        if value.isnan().any():
            raise UsageError(f"{name}: expected numbers in {path}, got some in {key} that are none")
    return weights


def load_all_weights(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """Weights of the `model` in a checkpoint and, if it holds others, of its `EMA`.

    Raises:
        UsageError: As for `load_weights`.
    """
    weights, averaged = (load_weights("checkpoint", checkpoint, use_ema) for use_ema in (False, True))
    # timm takes the model's where there are no others.
    if all(key in averaged and torch.equal(tensor, averaged[key]) for key, tensor in weights.items()):
        return {"model": weights}
    return {"model": weights, "EMA": averaged}


def set_weights(option: str, path: Path, weights: dict[str, Tensor], model: nn.Module, name: str) -> None:
    """Gives a model the weights that were in a checkpoint.

    Args:
        option: What gave the checkpoint, for the error.
        path: The checkpoint, for the error.
        weights: All weights of the model.
        model: The model.
        name: Its name, for the error.

    Raises:
        UsageError: If they are of another model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{option}: {path} is not of this {name}: {_first_reason(error)}") from error


@torch.no_grad()
def check_image_size(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Shows a model an image, whose size only the model knows whether it can take.

    Args:
        model: The model, on any device.
        input_size: Channels, height and width of the images.

    Raises:
        UsageError: If it can't take it.
    """
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()(torch.zeros(1, *input_size, device=device))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # no fault of the size
    except (RuntimeError, ValueError, AssertionError) as error:
        size = " x ".join(map(str, input_size[1:]))
        raise UsageError(f"img_size: the model can't take images of {size} pixels: {_first_reason(error)}") from error
    finally:
        model.train(training)


def _first_reason(error: BaseException) -> str:
    """What an error says; of PyTorch's about weights, which has a line for each kind and tensor, the first line."""
    headline, *reasons = str(error).splitlines() or [type(error).__name__]
    if not reasons:
        return headline
    others = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return textwrap.shorten(reasons[0].rstrip("."), 300, placeholder=" ...") + others


def align_targets(model: nn.Module, config: TrainConfig) -> None:
    """Makes a model align targets as its configuration says.

    Raises:
        UsageError: If labels can't be followed through the model, or it has no such layers.
    """
    try:
        patch_model(
            model,
            layers=config.layers,
            residual=config.residual,
            method="transmix" if config.target == "transmix" else "tl-align",
            stochastic_depth=config.stochastic_depth,
        )
    except NotImplementedError as error:
        raise UsageError(f"target: {config.target} can't train {config.model}: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
