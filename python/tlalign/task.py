"""The training task: mixes a batch, lets the model align its target, and forms the loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tlalign.config import TrainConfig, UsageError
from tlalign.mixing import (
    AttentiveCutMix,
    BlockWise,
    CutMix,
    FMix,
    GradientSaliency,
    MixingStrategy,
    MixUp,
    MixUpCutMix,
    PuzzleMix,
    RandomPatches,
    ResizeMix,
    SaliencyMix,
    TokenMix,
)
from tlalign.teacher import Teacher
from tlalign_kernels import MixedTarget, mixed_binary_cross_entropy, mixed_cross_entropy

# Sharded weights are kept in checkpoints as any others.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_MIXED_LOSSES = {"ce": mixed_cross_entropy, "bce": mixed_binary_cross_entropy}


class AlignedClassificationTask(ClassificationTask):
    """Classification of mixed images, trained on the target that the model aligned (TL-Align, arXiv 2210.06455).

    Batches with class ids are mixed by `mixing`; a batch that comes with a `MixedTarget` is taken as mixed already.
    Without `mixing`, batches with class ids have timm's own loss. Distributed wrapping, compilation, averaged weights
    and checkpoints are timm's.

    Args:
        model: The model to train; with `align` one that `tlalign_kernels.patch_model` has patched.
        mixing: Strategy that mixes each batch of class ids, or None.
        align: Train on the target that the model aligned; if not, on the plain mixing ratio or the teacher's target.
        teacher: Network that labels the images that `mixing` mixes, or None: with `align` each token, for the model to
            align; else each image, by what is seen of its activation map.
        loss: Cross entropy (`ce`), or binary cross entropy of each class (`bce`).
        smoothing: Label smoothing in [0, 1).
        rank: Rank of this process; each mixes differently.
        seed: Seed of the mixing, see `start_step`.
        options: Further arguments of timm's `TrainingTask`: device, dtype, verbose.

    Raises:
        ValueError: If there is no such loss, or `smoothing` is out of range.
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
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected 0 to less than 1, got {smoothing}")
        super().__init__(model, criterion_kwargs={"loss_type": loss, "smoothing": smoothing}, **options)
        self.sharded = False
        self.mixing = mixing
        self.align = align
        self.teacher = teacher
        self.loss = _MIXED_LOSSES[loss]
        self.smoothing = smoothing
        self.seed = seed
        self.rank = rank

    @property
    def model(self) -> nn.Module:
        """The model itself, in no wrapper."""
        return unwrap_model(self.trainable_module)

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
            ratio_change: float32 (B, S), aligned or the teacher's minus original mixing ratio; in distilled training
                those of the class tokens, then those of the distillation tokens; with `align` or a teacher only. Of
                dense labels (B, 1), half the sum of |aligned - original| over the classes, which for two classes is
                the change of their ratio.
        """
        changes = {}
        if not isinstance(target, MixedTarget):
            if self.mixing is None:
                outputs = _as_tuple(self.trainable_module(input))
                # In single precision, as the losses of mixed images are in whatever the model computes.
                losses = [
                    self.criterion(each.to(torch.promote_types(each.dtype, torch.float32)), target) for each in outputs
                ]
                return {"loss": torch.stack(losses).mean(), "output": outputs[0]}
            images = input
            input, target = self.mixing(images, target)
            if self.teacher is not None and self.align:
                target = self.teacher.token_labels(self.mixing, images, target)
            elif self.teacher is not None:
                original, target = target, self.teacher.target(self.mixing, images, target)
                changes = {"ratio_change": target.image_share() - original.image_share()}
        if not self.align:
            outputs = _as_tuple(self.trainable_module(input))
            return {"loss": self._mean_loss(outputs, (target,) * len(outputs)), "output": outputs[0], **changes}
        logits, aligned = self.trainable_module(input, target=target)
        outputs, targets = _as_tuple(logits), _as_tuple(aligned)
        change = torch.cat([each.image_share() for each in targets]) - target.image_share().repeat(len(targets), 1)
        if target.token_labels is not None:
            change = change.abs().sum(dim=1, keepdim=True) / 2
        return {"loss": self._mean_loss(outputs, targets), "output": outputs[0], "ratio_change": change}

    def shard(self, precision: str, compile: bool = False) -> None:
        """Spreads weights, gradients and optimiser over the processes (FSDP2), of averaged weights too.

        Args:
            precision: float32, or what weights are gathered and computed in, bfloat16.
            compile: Compile each block, which sharding leaves whole.

        Raises:
            UsageError: For float16, whose loss scaling does not know of shards.
        """
        if precision == "float16":
            raise UsageError("precision: expected float32 or bfloat16 with fsdp, got float16")
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, precision), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if self.has_ema():
            # Of weights, which are sharded, and buffers, which are not, PyTorch makes no list to average at once.
            self.trainable_module_ema.foreach = False
        for model in (self.model, *([self.trainable_module_ema.module] if self.has_ema() else [])):
            if precision != "float32":
                # Beside statistics in float32 batch norms take no weights but such, whatever they normalise.
                for module in model.modules():
                    if isinstance(module, _BatchNorm):
                        fully_shard(module, mp_policy=replace(policy, param_dtype=None))
            holders = [module for name, module in model.named_modules() if name.rpartition(".")[-1] == "blocks"]
            blocks = [block for module in holders for block in module.children()]
            if compile and model is self.model:
                # They share code, of which PyTorch compiles 8 variants and no more. Each drops paths at a rate of its
                # own, and is compiled once more for evaluation.
                config = torch._dynamo.config
                config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
                for block in blocks:
                    block.compile()
            for module in (*blocks, model):
                fully_shard(module, mp_policy=policy)
        self.sharded = True

    def synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Context of a part of a batch; gradients are exchanged in the last."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.no_sync()

    def local_parameters(self) -> list[Tensor]:
        """Parameters, of sharded ones the part that this process holds."""
        parameters = self.model.parameters()
        return [each.to_local() if isinstance(each, DTensor) else each for each in parameters]

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """As timm's, but never wrapped in DDP: evaluation needs no exchange."""
        model = super().get_eval_model(module, ema)
        return model.module if isinstance(model, DistributedDataParallel) else model

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = unwrap_model) -> dict[str, Any]:
        """As timm's; of sharded weights the whole, in the first process."""
        if not self.sharded:
            return super().get_checkpoint_state(ema, unwrap_fn)
        if ema and not self.has_ema():
            return {}
        model = self.trainable_module_ema.module if ema else self.model
        return {"state_dict_ema" if ema else "state_dict": get_model_state_dict(model, options=_WHOLE)}

    def load_checkpoint_state(
        self, state_dict: dict[str, Tensor], task_state: Any = None, ema: bool = False, strict: bool = True
    ) -> None:
        """As timm's; each process takes its part of the whole."""
        if not self.sharded:
            super().load_checkpoint_state(state_dict, task_state, ema, strict)
            return
        model = self.trainable_module_ema.module if ema else self.model
        set_model_state_dict(model, state_dict, options=_WHOLE)

    def get_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State of an optimiser; of sharded weights the whole, in the first process, by the names of the weights."""
        return (
            get_optimizer_state_dict(self.model, optimizer, options=_WHOLE) if self.sharded else optimizer.state_dict()
        )

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Loads what `get_optimizer_state` returned."""
        if self.sharded:
            set_optimizer_state_dict(self.model, optimizer, state, options=_WHOLE)
        else:
            optimizer.load_state_dict(state)

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
        case "cutmix":
            return CutMix(alpha, box_grid=config.box_grid, **options)
        case "mixup":
            return MixUp(config.mixup_alpha, **options)
        case "mixup-cutmix":
            return MixUpCutMix(
                config.mixup_alpha, alpha, switch_prob=config.mix_switch_prob, box_grid=config.box_grid, **options
            )
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


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
