"""Training and evaluation: builds the parts of a run from its configuration and runs its epochs."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.models
import torch
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import CheckpointSaver, dispatch_clip_grad, random_seed
from torch import Tensor, nn
from torch.utils.data import Subset

import tlalign.models  # noqa: F401 (timm knows them from here on)
from tlalign.config import (
    CONFIG_FILE,
    PATCH_MIXING,
    EvalConfig,
    TrainConfig,
    UsageError,
    field_names,
    load_config_file,
    suggestion,
)
from tlalign.data import create_eval_loader, create_train_loader, load_data_sets, resolve_image_config
from tlalign.progress import TrainingProgress
from tlalign.runs import EpochRecord, RunFolder
from tlalign.task import AlignedClassificationTask, create_mixing
from tlalign.teacher import Teacher
from tlalign_kernels import patch_model

# Reading the loss waits for an accelerator, so it is read every so many steps there.
_STEPS_BETWEEN_READS = 20


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; checkpoints written before are good."""


class Trainer:
    """A run: everything that its configuration describes, and the loop over epochs.

    Args:
        config: Configuration of the run.

    Attributes:
        config: Configuration of the run.
        device: Device that it runs on.
        task: The model and its loss.
        optimizer: Optimiser of the model's parameters.
        scheduler: Schedule of the learning rate by steps, or None.
        train_loader: Loader of the training images.
        eval_loader: Loader of the held-out images.
        image_config: Size and normalisation of the images.
        class_names: Names of the classes, where the data set has any.
        step: Steps done since the start of the run.

    Raises:
        UsageError: If the configuration can't be run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = choose_device(config)
        random_seed(config.seed)
        data = load_data_sets(config)
        model = create_model(config, data.num_classes).to(self.device)
        self.class_names = data.class_names
        self.image_config = resolve_image_config(config, model)
        side = self.image_config["input_size"][-1]
        if config.box_grid is not None and side % config.box_grid:
            raise UsageError(f"box_grid: expected a divisor of the {side} pixels of an image, got {config.box_grid}")
        if config.mixing in PATCH_MIXING and (side % config.mix_patch_size or side == config.mix_patch_size):
            raise UsageError(
                f"mix_patch_size: expected a divisor of the {side} pixels of an image that gives several patches, got "
                f"{config.mix_patch_size}"
            )
        self.train_loader = create_train_loader(data.train, config, self.image_config, self.device)
        self.eval_loader = create_eval_loader(data.held_out, config, self.image_config, self.device)
        if config.aligns:
            _patch(model, config)
        teacher = create_teacher(config, data.num_classes, self.device) if config.needs_teacher else None
        self.task = AlignedClassificationTask(
            model,
            create_mixing(config, model, teacher),
            align=config.aligns,
            teacher=teacher if config.target == "teacher" else None,
            loss=config.loss,
            smoothing=config.smoothing,
            seed=config.seed,
            device=self.device,
            verbose=False,
        )
        if config.ema_decay is not None:
            self.task.setup_ema(decay=config.ema_decay, use_warmup=True)
        try:
            self.optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer,
                sched=config.sched,
                num_epochs=config.epochs,
                warmup_epochs=config.warmup_epochs,
                warmup_lr=config.warmup_lr,
                min_lr=config.min_lr,
                step_on_epochs=False,
                updates_per_epoch=len(self.train_loader),
            )
        except (ValueError, AssertionError) as error:
            raise UsageError(f"opt, sched: {error}") from error
        self.step = 0

    def fit(self, folder: RunFolder, progress: TrainingProgress) -> list[EpochRecord]:
        """Trains all epochs; after each, writes the log and the checkpoints.

        Returns:
            The rows of the log.

        Raises:
            NonFiniteLossError: If the loss is infinite or not a number.
        """
        saver = CheckpointSaver(
            self.task.get_trainable_module(),
            self.optimizer,
            args=argparse.Namespace(**dataclasses.asdict(self.config)),
            task=self.task,
            checkpoint_dir=str(folder.path),
            max_history=1,
        )
        # Here, since evaluation needs no matplotlib.
        from tlalign.log import RunLog

        records = []
        with RunLog(folder.path) as log:
            for epoch in range(1, self.config.epochs + 1):
                record = self._epoch(epoch, progress)
                records.append(record)
                log.epoch(record, None)
                saver.save_checkpoint(epoch, metric=record.metric)
                progress.epoch_done(record.top1)
        return records

    def evaluate(self, ema: bool = False) -> dict[str, float]:
        """Evaluates the model or its averaged weights on the held-out images, as `evaluate`."""
        return evaluate(self.task.get_eval_model(ema=ema), self.eval_loader, self.device, self.config.precision)

    def sample_held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Takes images from all over the held-out ones, always the same.

        Args:
            count: Number of images B; a batch at most.

        Returns:
            Images (B, channels, Hi, Wi) and class ids (B,), as evaluation sees them.
        """
        data = self.eval_loader.dataset
        chosen = np.random.default_rng(0).permutation(len(data))[:count].tolist()
        loader = create_eval_loader(Subset(data, chosen), self.config, self.image_config, self.device)
        return next(iter(loader))

    def _epoch(self, epoch: int, progress: TrainingProgress) -> EpochRecord:
        loss, ratio_change, images_per_second = self._train_epoch(epoch, progress)
        result = self.evaluate()
        averaged = self.evaluate(ema=True) if self.task.has_ema() else {}
        # The last step may have broken the weights without a loss to show it.
        for name, value in (("evaluation", result["loss"]), ("evaluation of the average", averaged.get("loss", 0.0))):
            _check_finite(value, f"of the {name} after epoch {epoch}")
        return EpochRecord(
            epoch=epoch,
            step=self.step,
            loss=loss,
            eval_loss=result["loss"],
            lr=self.optimizer.param_groups[0]["lr"],
            top1=result["top1"],
            top5=result["top5"],
            top1_ema=averaged.get("top1"),
            top5_ema=averaged.get("top5"),
            images_per_second=images_per_second,
            data_seconds=0.0,
            forward_seconds=0.0,
            backward_seconds=0.0,
            ratio_change=ratio_change,
        )

    def _train_epoch(self, epoch: int, progress: TrainingProgress) -> tuple[float, float | None, float]:
        """Trains an epoch; returns mean loss, mean change of the mixing ratio (None without) and images per second."""
        self.task.train()
        means = {}
        steps, images_seen, start = len(self.train_loader), 0, time.monotonic()
        steps_between_reads = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_READS
        for index, (images, classes) in enumerate(self.train_loader, start=1):
            result = self._forward(images, classes)
            for name in ("loss", "ratio_change"):
                if name in result:
                    means[name] = means.get(name, 0.0) + (result[name].detach() - means.get(name, 0.0)) / index
            if index % steps_between_reads == 0 or index == steps:
                loss = means["loss"].item()
                _check_finite(loss, f"in epoch {epoch}, at or before its step {index} of {steps}")
            self._update(result["loss"])
            images_seen += len(images)
            if index % steps_between_reads == 0 or index == steps:
                progress.step_done(epoch, self.step, loss, images_seen / (time.monotonic() - start))
        ratio_change = means["ratio_change"].item() if "ratio_change" in means else None
        return loss, ratio_change, images_seen / (time.monotonic() - start)

    def _forward(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        self.task.start_step(self.step)
        with autocast(self.device, self.config.precision):
            return self.task(images, classes)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip_grad is not None:
            dispatch_clip_grad(self.task.get_clip_parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.task.update_ema(step=self.step)
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, device: torch.device, precision: str = "float32") -> dict[str, float]:
    """Evaluates a model on all images of a loader.

    Args:
        model: Model that returns logits (B, C).
        loader: Gives images (B, channels, Hi, Wi) and class ids (B,).
        device: Device of the model.
        precision: What the model computes in; but for float32 by autocast.

    Returns:
        `loss` (cross entropy), `top1` and `top5` (per cent).
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    for images, classes in loader:
        with autocast(device, precision):
            output = model(images)
        evaluator.update(output, classes)
    return evaluator.compute()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to a precision; none to float32."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def evaluate_checkpoint(path: Path, config: EvalConfig) -> dict[str, dict[str, float]]:
    """Evaluates the weights of a checkpoint on held-out images, in a model as timm makes it.

    Args:
        path: Checkpoint of timm or tlalign.
        config: What the model is and which images it is evaluated on.

    Returns:
        As `evaluate`, for `model` and, if the checkpoint holds other, averaged weights, for `EMA`.

    Raises:
        UsageError: If the checkpoint can't be read or is not of this model, or the configuration can't be run.
    """
    device = choose_device(config)
    weights = {name: load_weights("checkpoint", path, name == "EMA") for name in ("model", "EMA")}
    averaged = weights["EMA"]
    if all(key in averaged and torch.equal(tensor, averaged[key]) for key, tensor in weights["model"].items()):
        del weights["EMA"]
    data = load_data_sets(config)
    model = create_model(config, data.num_classes, pretrained=False)
    loader = create_eval_loader(data.held_out, config, resolve_image_config(config, model), device)
    results = {}
    for name, state in weights.items():
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UsageError(f"checkpoint: {path} is not of this {config.model}: {error}") from error
        results[name] = evaluate(model.to(device), loader, device, config.precision)
    return results


def choose_device(config: EvalConfig) -> torch.device:
    """The device of a configuration, by default the accelerator if there is one.

    Raises:
        UsageError: If there is no such device.
    """
    if config.device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: cannot use {config.device!r}: {str(error).splitlines()[0]}") from error


def create_model(config: EvalConfig, num_classes: int, **overrides: Any) -> nn.Module:
    """The timm model of a configuration.

    Args:
        config: Names the model and its arguments.
        num_classes: Number of classes.
        overrides: Arguments that replace those of the configuration.

    Raises:
        UsageError: If timm has no such model, or refuses the arguments.
    """
    architecture = config.model.split(".")[0]
    if ":" not in architecture and not timm.is_model(architecture):
        raise UsageError(f"model: timm has no {config.model}{suggestion(config.model, timm.list_models())}")
    for name in ("img_size", "in_chans", "num_classes"):
        if name in config.model_kwargs:
            raise UsageError(
                f"model_kwargs: expected {name} as an option of its own (--{name} {config.model_kwargs[name]})"
            )
    requested = {"img_size": config.img_size, "in_chans": config.in_chans}
    try:
        arguments = timm.models.resolve_model_input_args(config.model, requested, **config.model_kwargs | overrides)
        return timm.create_model(**arguments, num_classes=num_classes)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"model_kwargs: timm can't make {config.model} with {config.model_kwargs}: {error}") from error


def create_teacher(config: TrainConfig, num_classes: int, device: torch.device) -> Teacher:
    """The trained network of a configuration, with its averaged weights if its checkpoint has any.

    Args:
        config: Names the checkpoint, and its model if no configuration lies beside it.
        num_classes: Number of classes that it knows.
        device: Device to run it on.

    Raises:
        UsageError: If the checkpoint can't be read or is not of this model.
    """
    path = Path(config.teacher_checkpoint)
    beside = path.parent / CONFIG_FILE
    values = load_config_file(beside) if beside.is_file() else {}
    values = {name: value for name, value in values.items() if name in field_names(EvalConfig)}
    if config.teacher_model is not None:
        values = {"model": config.teacher_model}
    if "model" not in values:
        raise UsageError(f"teacher_model: expected the timm model of {path}, beside which no {CONFIG_FILE} lies")
    values |= {"data": config.data, "img_size": config.img_size, "in_chans": config.in_chans}
    model = create_model(EvalConfig(**values), num_classes, pretrained=False)
    try:
        model.load_state_dict(load_weights("teacher_checkpoint", path, use_ema=True))
    except RuntimeError as error:
        raise UsageError(f"teacher_checkpoint: {path} is not of this {values['model']}: {error}") from error
    return Teacher(model.to(device))


def load_weights(name: str, path: Path, use_ema: bool) -> dict[str, Tensor]:
    """Weights in the checkpoint that the option `name` gives."""
    try:
        # weights_only, so that a checkpoint from anywhere runs no code.
        return load_state_dict(str(path), use_ema=use_ema)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UsageError(f"{name}: cannot read {path}: {error}") from error


def _patch(model: nn.Module, config: TrainConfig) -> None:
    """Makes a model align targets as its configuration says."""
    options = {"layers": config.layers, "residual": config.residual, "method": config.target}
    try:
        patch_model(model, **options)
    except NotImplementedError as error:
        raise UsageError(f"target: {config.target} can't train {config.model}: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the loss {where} is {loss}")
