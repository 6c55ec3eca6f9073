"""Training: builds the parts of a run from its configuration, runs its steps, and loses nothing when it is stopped."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from tlalign.checkpoints import Checkpoints
from tlalign.config import BOX_MIXING, MAY_CHANGE, MAY_MOVE, PATCH_MIXING, TrainConfig, UsageError, suggestion
from tlalign.data import create_eval_loader, create_train_loader, load_data_sets, resolve_image_config
from tlalign.evaluation import autocast, evaluate, prepare_device
from tlalign.log import RunLog
from tlalign.mixing import AttentiveCutMix, MixingStrategy
from tlalign.mixing.puzzle import GRIDS
from tlalign.networks import align_targets, check_image_size, create_initial_model, create_model, create_teacher
from tlalign.processes import Processes
from tlalign.progress import TrainingProgress
from tlalign.runs import EpochRecord, RunFolder
from tlalign.signals import StopSignals
from tlalign.task import AlignedClassificationTask, create_mixing
from tlalign.teacher import Teacher
from tlalign_kernels import MixedTarget

# Reading the loss waits for an accelerator, so it is read every so many steps there.
_STEPS_BETWEEN_READS = 20


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; checkpoints written before are good."""


class TrainingInterrupted(RuntimeError):
    """A signal ended the training after a whole step, of which a checkpoint was written.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def create_optimizer(
    model: nn.Module, config: TrainConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler | None]:
    """The optimiser and the learning-rate schedule, by steps, of a configuration.

    Args:
        model: The model whose weights it moves, in no wrapper.
        config: Configuration of the run.
        steps_per_epoch: Steps of an epoch.

    Raises:
        UsageError: If timm has none of the names, or they don't take the values.
    """
    options = {"betas": config.opt_betas, "eps": config.opt_eps}
    name = config.opt.lower().removeprefix("lookahead_")
    if name not in (known := list_optimizers()):
        raise UsageError(f"opt: timm has no {config.opt}{suggestion(name, known)}")
    info = get_optimizer_info(name)
    for name, value in options.items():
        # timm would leave it out.
        if value is not None and not getattr(info, f"has_{name}"):
            raise UsageError(f"opt_{name}: expected null, for {config.opt} has none, got {value}")
    if config.opt_betas is not None and len(config.opt_betas) != (count := _count_betas(info)):
        raise UsageError(f"opt_betas: expected {count} numbers for {config.opt}, got {list(config.opt_betas)}")
    if config.momentum != TrainConfig.momentum and not info.has_momentum:
        raise UsageError(f"momentum: expected none, for {config.opt} has none, got {config.momentum}")
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **{name: value for name, value in options.items() if value is not None},
        )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            # timm's own are of 300 epochs.
            decay_epochs=0.3 * config.epochs if config.sched == "step" else None,
            decay_milestones=[part * config.epochs for part in (0.3, 0.6, 0.9)],
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"opt, sched: {error}") from error
    if scheduler is None and config.warmup_epochs:
        raise UsageError(
            f"warmup_epochs: expected 0 with sched {config.sched}, which has no warm-up (`constant` has), got "
            f"{config.warmup_epochs}"
        )
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"opt: expected one that needs no second derivatives, got {config.opt}")
    return optimizer, scheduler


def _count_betas(info: OptimInfo) -> int:
    """How many decays of averages an optimiser takes: two, but for a few that say so."""
    parameters = {} if isinstance(info.opt_class, str) else inspect.signature(info.opt_class).parameters
    default = parameters["betas"].default if "betas" in parameters else None
    return len(default) if isinstance(default, tuple) else 2


class Trainer:
    """A run: everything that its configuration describes, and the loop over its steps.

    What is random in a step depends on seed, step and process only, and the augmentation of an image on seed, epoch and
    image, so that a run that was stopped anywhere continues with the bits it would have had.

    Args:
        config: Configuration of the run.
        initialises: Whether the model gets the weights to start from; not needed before `resume`.

    Attributes:
        config: Configuration of the run.
        processes: This process among those of the run.
        device: Device that this process runs on.
        model: The model, in none of the wrappers that training needs.
        task: The model and its loss.
        optimizer: Optimiser of the model's parameters.
        scheduler: Schedule of the learning rate by steps, or None.
        train_loader: Loader of the training images.
        eval_loader: Loader of the held-out images.
        image_config: Size and normalisation of the images.
        num_classes: Number of classes.
        class_names: Their names, where the data set has any.
        steps_per_epoch: Steps of an epoch.
        step: Steps done since the start of the run.
        records: What the epochs done gave.

    Raises:
        UsageError: If the configuration can't be run.
    """

    def __init__(self, config: TrainConfig, initialises: bool = True) -> None:
        self.config = config
        self.processes = Processes.start(prepare_device(config))
        self.device = self.processes.device
        random_seed(config.seed)
        with self.processes.first_before_others():
            data = load_data_sets(config)
            create = create_initial_model if initialises else create_model
            self.model = create(config, data.num_classes).to(self.device)
        self.num_classes, self.class_names = data.num_classes, data.class_names
        self.image_config = resolve_image_config(config, self.model)
        check_image_size(self.model, self.image_config["input_size"])
        self._check_mixing()
        members = self.processes.rank, self.processes.world_size
        known = dataclasses.replace(config, num_classes=data.num_classes)  # images of others are refused
        self.train_loader = create_train_loader(data.train, known, self.image_config, self.device, *members)
        self.eval_loader = create_eval_loader(data.held_out, known, self.image_config, self.device, *members)
        self.steps_per_epoch = len(self.train_loader) // config.accumulate
        if config.aligns:
            align_targets(self.model, config)
        if config.labels_tokens:
            self._check_token_labels()
        if config.grad_checkpointing:
            self._checkpoint_activations()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.task = self._create_task()
        self._wrap()
        self.optimizer, self.scheduler = create_optimizer(self.model, config, self.steps_per_epoch)
        if config.fsdp:
            self._check_shards()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.step = 0
        self.records: list[EpochRecord] = []
        self._totals = _Totals()

    @property
    def is_best(self) -> bool:
        """Whether the weights are those after an epoch that was better than all before it."""
        if not self.records or self.step != len(self.records) * self.steps_per_epoch:
            return False
        *before, last = (record.metric for record in self.records)
        return last > max(before, default=-math.inf)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def fit(self, folder: RunFolder | None, progress: TrainingProgress) -> list[EpochRecord]:
        """Trains the steps that are left; after each epoch, and within as configured, writes log and checkpoints.

        Args:
            folder: Where to; in the first process only, None in the others.
            progress: Is told of each step.

        Returns:
            The rows of the log.

        Raises:
            NonFiniteLossError: If the loss is infinite or not a number.
            TrainingInterrupted: After SIGINT or SIGTERM.
            CheckpointError: If a checkpoint can't be written.
            OSError: If the log can't be written.
        """
        checkpoints = None if folder is None else Checkpoints(folder.path)
        opened = nullcontext() if folder is None else RunLog(folder.path, self.records, self.step)
        with StopSignals() as signals, opened as log:
            while len(self.records) < self.config.epochs:
                epoch = len(self.records) + 1
                self._train_epoch(epoch, progress, log, checkpoints, signals)
                self._stop_if_told(signals)
                try:
                    record = self._end_epoch(epoch, signals)
                except NonFiniteLossError:
                    if checkpoints is not None:
                        checkpoints.drop_newest()
                    raise
                ratio_changes, self._totals = self._totals.ratio_changes, _Totals()
                self.records.append(record)
                self._save(checkpoints, self.is_best)
                # Only now, for by its rows a run counts as trained; one that is missing comes from the checkpoint.
                if log is not None:
                    log.epoch(record, ratio_changes.numpy())
                progress.epoch_done(record.top1)
                if self.step < self.total_steps:
                    self._stop_if_told(signals)
        return self.records

    @property
    def images(self) -> list[int]:
        """Numbers of training and of held-out images; of a stream what was claimed."""
        return [len(self.train_loader.dataset), len(self.eval_loader.dataset)]

    def state(self) -> dict[str, Any]:
        """All that the run has become: a checkpoint as timm's, and what `resume` needs. Of use in every process."""
        state = {
            "epoch": len(self.records),
            "arch": self.config.model,
            "args": argparse.Namespace(**dataclasses.asdict(self.config)),
            "version": 2,
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            "optimizer": self.task.get_optimizer_state(self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
            "step": self.step,
            "processes": self.processes.world_size,
            "steps_per_epoch": self.steps_per_epoch,
            "images": self.images,
            "class_names": self.class_names,
            "records": [dataclasses.asdict(record) for record in self.records],
            "totals": vars(self._totals).copy(),
        }
        return state | ({"metric": self.records[-1].metric} if self.records else {})

    def resume(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned, also in another process.

        Raises:
            UsageError: If it is not of this model, of other classes, or not of as many images.
        """
        before, now = state.get("class_names"), self.class_names
        if before is not None and before != now:
            differ = next(pair for pair in itertools.zip_longest(before, now) if pair[0] != pair[1])
            raise UsageError(
                f"resume: the run has class {differ[0]} where the images that are there now have {differ[1]}"
            )
        images = state.get("images")
        if images is not None and images != self.images:
            raise UsageError(
                f"resume: the run has {images[0]} training and {images[1]} held-out images, but there are "
                f"{self.images[0]} and {self.images[1]} now"
            )
        try:
            self.task.load_checkpoint_state(state["state_dict"])
            if self.task.has_ema():
                self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
            self.task.load_optimizer_state(self.optimizer, state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["amp_scaler"])
            self.step = state["step"]
            self.records = [EpochRecord(**record) for record in state["records"]]
            self._totals = _Totals(**state["totals"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"resume: the checkpoint is not of this run: {error!r}") from error
        # The optimiser and its schedule are those that were loaded, whatever config.yaml says by now.
        for name, before in vars(state["args"]).items():
            now = getattr(self.config, name, before)
            before, now = (list(value) if isinstance(value, tuple) else value for value in (before, now))
            if before != now and name not in (*MAY_CHANGE, *MAY_MOVE):
                raise UsageError(f"resume: {name} of the checkpoint's run is {before}, got {now}")

    def evaluate(self, ema: bool = False, after_batch: Callable[[], None] | None = None) -> dict[str, float]:
        """Evaluates the model or its averaged weights on the held-out images, as `evaluate`."""
        model, several = self.task.get_eval_model(ema=ema), self.processes.several
        if several:
            # Statistics of batch norms are each process's own; checkpoints have those of the first.
            distribute_bn(model, self.processes.world_size)
        return evaluate(model, self.eval_loader, self.device, self.config.precision, several, after_batch)

    def dry_run(self) -> DryRun:
        """Runs two steps and evaluates two batches, without writing anything."""
        parts = itertools.chain.from_iterable(self.train_loader.epoch(epoch) for epoch in itertools.count(1))
        stopwatch = _Stopwatch(self.device)
        self.task.train()
        for _ in range(2):
            stopwatch.read()  # the first step, which also warms up, isn't counted
            loss, _ = self._train_step(parts, stopwatch)
            _check_finite(loss.item(), f"of step {self.step}")
        seconds = stopwatch.read()
        # Nor is the first batch, which starts workers and compiles. A last one, maybe smaller, would compile once more.
        batches = itertools.chain.from_iterable(itertools.repeat(self.eval_loader))
        images, _ = next(batches)
        self._evaluate_batch(images)
        start = time.monotonic()
        next(batches)
        self._evaluate_batch(images)
        evaluation = (time.monotonic() - start) * len(self.eval_loader) * (2 if self.task.has_ema() else 1)
        step = sum(seconds.values())
        return DryRun(
            steps=self.total_steps,
            step_seconds=seconds,
            images_per_second=self.config.batch_size / step,
            memory=_peak_memory(self.device),
            total_seconds=self.total_steps * step + self.config.epochs * evaluation,
        )

    def _evaluate_batch(self, images: Tensor) -> None:
        model = self.task.get_eval_model().eval()
        with torch.no_grad(), autocast(self.device, self.config.precision):
            model(images).sum().item()

    def _check_mixing(self) -> None:
        side, config = self.image_config["input_size"][-1], self.config
        cell = config.box_grid if config.mixing in BOX_MIXING else None
        if cell is not None and side % cell:
            raise UsageError(f"box_grid: expected a divisor of the {side} pixels of an image, got {cell}")
        # A box has as many cells on either side of its middle: with two cells along an image, none.
        if cell is not None and side // cell < 3:
            raise UsageError(f"box_grid: expected at most a third of the {side} pixels of an image, got {cell}")
        if config.mixing == "puzzlemix" and side % min(GRIDS):
            raise UsageError(f"img_size: expected a multiple of {min(GRIDS)} for puzzlemix, got {side}")
        patches = config.mixing in PATCH_MIXING or config.labels_tokens
        if patches and (side % config.mix_patch_size or side == config.mix_patch_size):
            raise UsageError(
                f"mix_patch_size: expected a divisor of the {side} pixels of an image that gives several patches, got "
                f"{config.mix_patch_size}"
            )

    def _create_task(self) -> AlignedClassificationTask:
        """The model with what mixes its images, what labels them and the loss."""
        config = self.config
        teacher = None
        if config.needs_teacher:
            teacher = create_teacher(config, self.num_classes, self.device, self.class_names)
        mixing = create_mixing(config, self.model, teacher)
        if teacher is not None:
            self._check_teacher(teacher, mixing)
        return AlignedClassificationTask(
            self.model,
            mixing,
            align=config.aligns,
            teacher=teacher if config.teacher_labels else None,
            loss=config.loss,
            smoothing=config.smoothing,
            seed=config.seed,
            rank=self.processes.rank,
            device=self.device,
            verbose=False,
        )

    def _check_token_labels(self) -> None:
        """Shows the model an image labelled as the teacher will, since only the model knows where its tokens lie."""
        channels, *sides = self.image_config["input_size"]
        patches = [side // self.config.mix_patch_size for side in sides]
        labels = torch.full((1, self.num_classes, *patches), 1 / self.num_classes, device=self.device)
        training = self.model.training
        try:
            with torch.no_grad():
                images = torch.zeros(1, channels, *sides, device=self.device)
                self.model.eval()(images, target=MixedTarget.from_dense(labels))
        except ValueError as error:
            raise UsageError(
                f"mix_patch_size: expected for token-labels the side of {self.config.model}'s tokens or a divisor of "
                f"it, got {self.config.mix_patch_size}: {error}"
            ) from error
        finally:
            self.model.train(training)

    def _check_teacher(self, teacher: Teacher, mixing: MixingStrategy) -> None:
        """Shows the teacher an image, since not of every network the features form a map, and one of many cells."""
        images = torch.zeros(1, *self.image_config["input_size"], device=self.device)
        try:
            cells = teacher.activation(images)[0].numel()
            if self.config.teacher_labels:
                teacher.class_scores(images)
        except (AttributeError, AssertionError, TypeError, ValueError, RuntimeError) as error:
            name = type(teacher.model).__name__
            raise UsageError(f"teacher_checkpoint: the features of {name} form no map of cells: {error}") from error
        if isinstance(mixing, AttentiveCutMix) and cells <= mixing.count:
            raise UsageError(
                f"img_size: expected images in which the teacher has more than the {mixing.count} cells that "
                f"attentive-cutmix chooses, got {cells} in {tuple(images.shape[-2:])} pixels"
            )

    def _checkpoint_activations(self) -> None:
        try:
            self.model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise UsageError(f"grad_checkpointing: {self.config.model} has none: {error}") from error

    def _wrap(self) -> None:
        """Copies the weights to average, compiles, and spreads the model over the processes, in this order."""
        config = self.config
        if config.ema_decay is not None:
            self.task.setup_ema(decay=config.ema_decay, use_warmup=True)
        if config.fsdp:
            if not self.processes.several:
                raise UsageError("fsdp: expected several processes (torchrun --nproc-per-node N -m tlalign ...), got 1")
            self.task.shard(config.precision, config.compile)
            return
        if config.compile:
            self.task.compile()
        if self.processes.several:
            self.task.prepare_distributed(device_ids=None if self.device.index is None else [self.device.index])

    def _check_shards(self) -> None:
        """Has an optimiser take steps with a few sharded weights, and save itself, since not each of timm's can."""
        # As many as those choose by that factorise, of each number of dimensions.
        model = nn.Sequential(nn.Conv2d(3, 128, 16), nn.LayerNorm(128), nn.Linear(128, 128)).to(self.device)
        fully_shard(model)
        optimizer, _ = create_optimizer(model, self.config, self.steps_per_epoch)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        try:
            for _ in range(2):  # the first may be another kind
                optimizer.step()
            get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        except Exception as error:  # what has no rule for shards has errors of many classes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"opt: expected one that works with sharded weights (fsdp), got {self.config.opt}: {reason}"
            ) from error

    def _train_epoch(
        self,
        epoch: int,
        progress: TrainingProgress,
        log: RunLog | None,
        checkpoints: Checkpoints | None,
        signals: StopSignals,
    ) -> None:
        """Trains what is left of an epoch."""
        self.task.train()
        totals, steps = self._totals, self.steps_per_epoch
        steps_between_reads = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_READS
        unread: list[tuple[Tensor, Tensor | None]] = []
        parts = self.train_loader.epoch(epoch, start=totals.steps * self.config.accumulate)
        stopwatch = _Stopwatch(self.device)
        for index in range(totals.steps + 1, steps + 1):
            unread.append(self._train_step(parts, stopwatch))
            save_now = self.config.checkpoint_steps is not None and self.step % self.config.checkpoint_steps == 0
            if not (index % steps_between_reads == 0 or index == steps or save_now):
                continue
            loss, stop = self._read(unread, stopwatch, signals, epoch)
            unread = []
            rate = self.config.batch_size * totals.steps / totals.seconds
            if log is not None:
                log.step(self.step, {"loss": loss, "lr": totals.lr, "images_per_second": rate})
            # After an epoch too, so that an evaluation that fails, or is killed, costs nothing that was trained.
            if index == steps or save_now or stop:
                self._save(checkpoints, best=False)
            # Last, since what it is written to may be full.
            progress.step_done(epoch, self.step, totals.loss / totals.steps, rate)
            if index < steps and stop:
                raise TrainingInterrupted(signals.number or signal.SIGTERM)
            # To write logs and checkpoints is not to wait for images.
            stopwatch.start()

    def _train_step(
        self, parts: Iterator[tuple[Tensor, Tensor]], stopwatch: _Stopwatch
    ) -> tuple[Tensor, Tensor | None]:
        """Trains on a batch; returns its mean loss () and, if aligned, aligned minus original ratio (images, S)."""
        accumulate = self.config.accumulate
        losses, changes = [], []
        self.optimizer.zero_grad()
        for part in range(accumulate):
            images, classes = next(parts)
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            stopwatch.lap("data")
            _seed_step(self.config.seed, self.step * accumulate + part, self.processes.rank, self.device)
            self.task.start_step(self.step * accumulate + part)
            with self.task.synchronised(part == accumulate - 1):
                with autocast(self.device, self.config.precision):
                    result = self.task(images, classes)
                stopwatch.lap("forward")
                self.scaler.scale(result["loss"] / accumulate).backward()
                stopwatch.lap("backward")
            losses.append(result["loss"].detach())
            changes.append(result.get("ratio_change"))
        self._update()
        stopwatch.lap("backward")
        return torch.stack(losses).mean(), None if changes[0] is None else torch.cat(changes)

    def _update(self) -> None:
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.task.get_clip_parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._totals.lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.step += 1
        self.task.update_ema(step=self.step)
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)

    def _read(
        self, unread: list[tuple[Tensor, Tensor | None]], stopwatch: _Stopwatch, signals: StopSignals, epoch: int
    ) -> tuple[float, bool]:
        """Takes what steps gave into the totals; returns their mean loss and whether a process was told to stop."""
        totals = self._totals
        values = [torch.stack([loss for loss, _ in unread]).mean().float()]
        values.append(torch.tensor(float(signals.number is not None), device=self.device))
        if unread[0][1] is not None:
            changes = torch.cat([change.flatten() for _, change in unread])
            totals.ratio_changes = torch.cat([totals.ratio_changes, changes.cpu()])
            values += [changes.abs().mean(), changes.square().mean(), changes.mean()]
        loss, stop, *means = self.processes.mean(torch.stack(values)).tolist()
        steps = self.steps_per_epoch
        _check_finite(loss, f"in epoch {epoch}, at or before its step {totals.steps + len(unread)} of {steps}")
        totals.steps += len(unread)
        totals.loss += loss * len(unread)
        for name, mean in zip(("ratio_change", "ratio_square", "ratio_shift"), means, strict=False):
            setattr(totals, name, getattr(totals, name) + mean * len(unread))
        for name, seconds in stopwatch.read().items():
            totals.part_seconds[name] = totals.part_seconds.get(name, 0.0) + seconds
        return loss, stop > 0

    def _end_epoch(self, epoch: int, signals: StopSignals) -> EpochRecord:
        batches = itertools.count(1)

        def stop_if_told() -> None:
            if self.device.type == "cpu" or next(batches) % _STEPS_BETWEEN_READS == 0:
                self._stop_if_told(signals)

        result = self.evaluate(after_batch=stop_if_told)
        averaged = self.evaluate(ema=True, after_batch=stop_if_told) if self.task.has_ema() else {}
        # The last step may have broken the weights without a loss to show it.
        for name, value in (("evaluation", result["loss"]), ("evaluation of the average", averaged.get("loss", 0.0))):
            _check_finite(value, f"of the {name} after epoch {epoch}")
        totals, aligns = self._totals, len(self._totals.ratio_changes) > 0
        return EpochRecord(
            epoch=epoch,
            step=self.step,
            loss=totals.loss / totals.steps,
            eval_loss=result["loss"],
            lr=totals.lr,
            top1=result["top1"],
            top5=result["top5"],
            top1_ema=averaged.get("top1"),
            top5_ema=averaged.get("top5"),
            images_per_second=self.config.batch_size * totals.steps / totals.seconds,
            **{f"{part}_seconds": seconds / totals.steps for part, seconds in totals.part_seconds.items()},
            ratio_change=totals.ratio_change / totals.steps if aligns else None,
            peak_memory=_peak_memory(self.device),
            ratio_rmse=math.sqrt(totals.ratio_square / totals.steps) if aligns else None,
            ratio_shift=totals.ratio_shift / totals.steps if aligns else None,
        )

    def _save(self, checkpoints: Checkpoints | None, best: bool) -> None:
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.task.local_parameters()]).all()
        if self.processes.mean(finite.float()) < 1:
            raise NonFiniteLossError(f"weights after step {self.step} are not finite")
        state = self.state()
        if checkpoints is not None:
            checkpoints.save(state, len(self.records), self.step, best)

    def _stop_if_told(self, signals: StopSignals) -> None:
        """Raises TrainingInterrupted in all processes if one was told to stop."""
        told = torch.tensor(float(signals.number is not None), device=self.device)
        if self.processes.mean(told).item() > 0:
            raise TrainingInterrupted(signals.number or signal.SIGTERM)


@dataclass(frozen=True)
class DryRun:
    """What two steps tell of a whole run.

    Attributes:
        steps: Steps of the whole run.
        step_seconds: Time of the second step, by its parts data, forward and backward.
        images_per_second: Rate of training.
        memory: Bytes that were in use at most: on an accelerator by tensors, on the CPU by the process.
        total_seconds: Time that the whole run would take, evaluation included.
    """

    steps: int
    step_seconds: dict[str, float]
    images_per_second: float
    memory: int
    total_seconds: float


@dataclass
class _Totals:
    """Sums over the steps of an epoch so far; means over the processes, but for times and the last.

    `lr` is no sum, but the learning rate of the last step.
    """

    steps: int = 0
    lr: float = 0.0
    loss: float = 0.0
    ratio_change: float = 0.0
    ratio_square: float = 0.0
    ratio_shift: float = 0.0
    part_seconds: dict[str, float] = field(default_factory=dict)
    ratio_changes: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def seconds(self) -> float:
        return sum(self.part_seconds.values())


class _Stopwatch:
    """Times the parts of steps; on an accelerator by its own events, so that nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Begins a part now; what came since the last one ended counts for none."""
        self.marks = [("start", self._now())]

    def lap(self, part: str) -> None:
        """Ends a part of a step; the next begins."""
        self.marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds: dict[str, float] = {}
        for (_, start), (part, end) in itertools.pairwise(self.marks):
            elapsed = end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1000
            seconds[part] = seconds.get(part, 0.0) + elapsed
        self.marks = self.marks[-1:]
        return seconds

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event


def _seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Makes what a step draws (dropout, dropped paths and patches) the same whenever it is computed."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    # torch.manual_seed takes milliseconds where there is no accelerator.
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the loss {where} is {loss}")
