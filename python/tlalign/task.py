"""The training task: mixes a batch, lets the model align its target, and forms the loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from tlalign.config import TrainConfig, UsageError
from tlalign.mixing import (
    AttentiveCutMix,
    BlockWise,
    FMix,
    GradientSaliency,
    MixingStrategy,
    MixUpCutMix,
    PuzzleMix,
    RandomPatches,
    ResizeMix,
    SaliencyMix,
    TokenMix,
)
from tlalign.teacher import Teacher
from tlalign_kernels import MixedTarget, mixed_binary_cross_entropy, mixed_cross_entropy

_MIXED_LOSSES = {"ce": mixed_cross_entropy, "bce": mixed_binary_cross_entropy}


class AlignedClassificationTask(ClassificationTask):
    """Classification of mixed images, trained on the target that the model aligned (TL-Align, arXiv 2210.06455).

    Batches with class ids are mixed by `mixing`; a batch that comes with a `MixedTarget` is taken as mixed already.
    Without `mixing`, batches with class ids are left to timm's own task. Distributed wrapping, compilation, averaged
    weights and checkpoints are timm's.

    Args:
        model: The model to train; with `align` one that `tlalign_kernels.patch_model` has patched.
        mixing: Strategy that mixes each batch of class ids, or None.
        align: Train on the target that the model aligned; if not, on the plain mixing ratio or the teacher's target.
        teacher: Network by whose activation maps the target of images that `mixing` mixes is formed, or None.
        loss: Cross entropy (`ce`), or binary cross entropy of each class (`bce`).
        smoothing: Label smoothing in [0, 1].
        rank: Rank of this process; each mixes differently.
        seed: Seed of the mixing, see `start_step`.
        options: Further arguments of timm's `TrainingTask`: device, dtype, verbose.
    """

    def __init__(
        self,
        model: nn.Module,
        mixing: MixingStrategy | None = None,
        align: bool = True,
        teacher: Teacher | None = None,
        loss: Literal["ce", "bce"] = "ce",
        smoothing: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        **options: Any,
    ) -> None:
        if loss not in _MIXED_LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(_MIXED_LOSSES)}, got {loss!r}")
        if teacher is not None and align:
            raise ValueError("teacher: expected None with align=True, got a teacher, whose target takes its place")
        super().__init__(model, criterion_kwargs={"loss_type": loss, "smoothing": smoothing}, **options)
        self.mixing = mixing
        self.align = align
        self.teacher = teacher
        self.loss = _MIXED_LOSSES[loss]
        self.smoothing = smoothing
        self.seed = seed
        self.rank = rank

    def start_step(self, step: int) -> None:
        """Seeds the mixing of a step, which then depends on seed, step and rank only: a resumed run repeats it."""
        if self.mixing is not None:
            self.mixing.reseed(self.seed, step, self.rank)

    def forward(self, input: Tensor, target: Tensor | MixedTarget) -> dict[str, Tensor]:
        """Computes the loss of a batch.

        Args:
            input: Images, floating (B, channels, Hi, Wi).
            target: Class ids, int64 (B,), or what the images are mixed of already.

        Returns:
            loss: Scalar to call backward on.
            output: Logits (B, C); of the class token in distilled training.
            ratio_change: float32 (), mean of |aligned - original| mixing ratio over the batch; with `align` only.
        """
        if not isinstance(target, MixedTarget):
            if self.mixing is None:
                return super().forward(input, target)
            images = input
            input, target = self.mixing(images, target)
            if self.teacher is not None:
                target = self.teacher.target(self.mixing, images, target)
        if not self.align:
            outputs = _as_tuple(self.trainable_module(input))
            return {"loss": self._mean_loss(outputs, (target,) * len(outputs)), "output": outputs[0]}
        logits, aligned = self.trainable_module(input, target=target)
        outputs, targets = _as_tuple(logits), _as_tuple(aligned)
        change = torch.stack([(each.image_share() - target.image_share()).abs().mean() for each in targets]).mean()
        return {"loss": self._mean_loss(outputs, targets), "output": outputs[0], "ratio_change": change}

    def _mean_loss(self, outputs: tuple[Tensor, ...], targets: tuple[MixedTarget, ...]) -> Tensor:
        """Mean over the heads: one, or in distilled training those of class and distillation token."""
        losses = [self.loss(*head, self.smoothing) for head in zip(outputs, targets, strict=True)]
        return torch.stack(losses).mean()


def create_mixing(
    config: TrainConfig, model: nn.Module | None = None, teacher: Teacher | None = None
) -> MixingStrategy | None:
    """The mixing strategy of a configuration, None for `none`.

    Args:
        config: Configuration of the run.
        model: The model that is trained, by whose gradient `puzzlemix` finds what is salient.
        teacher: The network that `attentive-cutmix` takes its activation from.

    Raises:
        UsageError: If a package that the strategy needs is not installed.
    """
    options = {"prob": config.mix_prob, "mode": config.mix_mode}
    alpha, patch_size = config.cutmix_alpha, config.mix_patch_size
    match config.mixing:
        case "none":
            return None
        case "random":
            return RandomPatches(patch_size, alpha, **options)
        case "block":
            return BlockWise(patch_size, alpha, **options)
        case "tokenmix":
            return TokenMix(patch_size, **options)
        case "fmix":
            return FMix(alpha, **options)
        case "resizemix":
            return ResizeMix(**options)
        case "saliencymix":
            try:
                return SaliencyMix(alpha, **options)
            except ModuleNotFoundError as error:
                raise UsageError(f"mixing: {error}") from error
        case "puzzlemix":
            return PuzzleMix(None if model is None else GradientSaliency(model), alpha, **options)
        case "attentive-cutmix":
            return AttentiveCutMix(None if teacher is None else teacher.activation, **options)
    return MixUpCutMix(
        mixup_alpha=config.mixup_alpha if config.mixing in ("mixup", "mixup-cutmix") else 0.0,
        cutmix_alpha=0.0 if config.mixing == "mixup" else alpha,
        switch_prob=config.mix_switch_prob,
        box_grid=config.box_grid,
        **options,
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
