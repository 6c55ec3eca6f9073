"""Swaps the modules of a timm model for subclasses that know how labels pass through them, and back.

An instance is given a subclass (`instance.__class__ = ...`): parameters, buffers and hooks are shared, checkpoints
keep their keys, copies made by `deepcopy` follow labels too, and no class of timm is touched. Without a target the
subclass runs timm's own forward.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from timm.models import checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from tlalign_kernels.backends import BACKENDS
from tlalign_kernels.functional import MAX_HEAD_DIM, MIN_HEAD_DIM
from tlalign_kernels.labels import MixedTarget

# How a patched model aligns targets, see `patch_model`.
METHODS = ("tl-align", "transmix")


class LabelFollower:
    """Base of the classes that modules are swapped to: how labels pass through one kind of module.

    A follower subclasses this class and the module's own class, and adds no state. Its `forward` takes a keyword
    `share`, float32 (B, N, S), or (B, Ht, Wt, S) where tokens form a map: None runs the module's own forward; a share
    makes it return `(tokens, share)`.
    `share` is a flat argument, so that activation checkpointing sees it.

    Attributes:
        label_follows: Whether the module takes labels; `patch_model` sets False in blocks that `layers` leaves out.
        label_residual: Whether residual connections average labels (Y^ + Y) / 2, set by `patch_model`.
        label_stochastic_depth: Whether labels stay where an attention is dropped, set by `patch_model`.
        label_backend: Backend of the attention operators, set by `patch_model`.
        mirrors: Methods of the module's class that the follower repeats or relies on, with the digest of the source
            that was read (`source_digest`). A different source is an error when patching, never a guess.
        untouched: Names of children that no labelled token passes through.
    """

    label_follows: bool = True
    label_residual: bool = True
    label_stochastic_depth: bool = False
    label_backend: str = "auto"
    mirrors: ClassVar[dict[str, str]] = {}
    untouched: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError, naming the module, if its configuration can't be followed."""

    def drop_attention(
        self, drop_path: nn.Module, attended: Tensor, share: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drops the attention of some images (stochastic depth) and, with `label_stochastic_depth`, the label of it.

        Args:
            drop_path: timm's DropPath or nn.Identity of the attention.
            attended: Tokens, (B, N, channels) or (B, Ht, Wt, channels).
            share: Their labels, (B, N, S) or (B, Ht, Wt, S).
            before: The labels that passed by the attention.

        Returns:
            drop_path(attended), and the labels: for the images that it drops those of `before`.
        """
        if not self.label_stochastic_depth or isinstance(drop_path, nn.Identity):
            return drop_path(attended), share
        factor = drop_path_factor(drop_path, attended)
        return attended * factor, torch.where(factor == 0, before, share)


class ModelFollower(LabelFollower):
    """Base of the followers of whole models: `model(images, target=...)` returns `(logits, aligned)`.

    Attributes:
        label_method: How targets are aligned, one of `METHODS`, set by `patch_model`.
    """

    label_method: str = "tl-align"

    @classmethod
    def check_transmix(cls, model: nn.Module) -> None:
        """Raises NotImplementedError unless the logits are those of a class token, which TransMix needs."""
        raise NotImplementedError(
            f"method: TransMix needs a class token that is in all blocks, which {_describe(model)} has not"
        )

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The blocks that `layers` of `patch_model` counts, in the order of the forward."""
        raise NotImplementedError

    def align(
        self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """Logits (B, C) of images, and the label (B, S) that arrives at the head; that after each block is appended.

        Of several heads both are tuples.
        """
        raise NotImplementedError

    def align_target(
        self, images: Tensor, target: MixedTarget, collect_layers: bool, *options: object
    ) -> tuple[Tensor, MixedTarget]:
        """What `forward` returns with a target, see `ImageModelFollower`; `options` are further ones of `align`."""
        self.check_target(images, target)
        if not torch.compiler.is_compiling():
            for method in self.mirrors:  # a forward that wraps the model's has called this one
                if method != "forward" and _has_other(self, method):
                    raise NotImplementedError(
                        f"{method}: expected that of {_describe(self)}, got one that was set on the model since it was "
                        "patched, which is not run with a target"
                    )
        layer_shares = [] if collect_layers else None
        logits, share = self.align(images, target, layer_shares, *options)
        # Reentrant checkpointing marks all outputs as differentiable; labels are not.
        if isinstance(share, tuple):
            return logits, tuple(target.with_share(part.detach(), layer_shares) for part in share)
        return logits, target.with_share(share.detach(), layer_shares)

    def check_target(self, images: Tensor, target: MixedTarget) -> None:
        """Raises TypeError or ValueError unless `target` belongs to `images` (B, channels, Hi, Wi)."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if not isinstance(target, MixedTarget):
            raise TypeError(f"target: expected a MixedTarget, got {type(target).__name__}")
        if images.dim() != 4:
            raise ValueError(f"images: expected 4 dimensions (B, channels, Hi, Wi), got shape {tuple(images.shape)}")
        if images.shape[0] == 0:
            raise ValueError("images: expected at least one with a target, got none")
        if target.batch_size != images.shape[0]:
            raise ValueError(f"target: expected a batch of {images.shape[0]} images, got {target.batch_size}")
        if target.device != images.device:
            raise ValueError(f"target: expected on the device of the images ({images.device}), got {target.device}")
        size = tuple(images.shape[-2:])
        if target.image_size is not None and target.image_size != size:
            raise ValueError(f"target: expected boxes or masks for images of {size} pixels, got {target.image_size}")


class ImageModelFollower(ModelFollower):
    """Base of the followers of models whose forward takes images and nothing else."""

    def forward(
        self, x: Tensor, target: MixedTarget | None = None, collect_layers: bool = False
    ) -> Tensor | tuple[Tensor, MixedTarget]:
        """Classifies images and aligns their target.

        Args:
            x: Images, (B, channels, Hi, Wi).
            target: What the images are mixed of; None runs the model's own forward.
            collect_layers: Keep the share after each block in `aligned.layer_shares`: (B, Ht, Wt, S), or (B, N, S)
                where tokens are no map: those of the prefix come first.

        Returns:
            Logits (B, C), with a target also the aligned target.

        Raises:
            TypeError: If `target` is no MixedTarget.
            ValueError: If `target` does not belong to the images, the images don't fit the model, or `collect_layers`
                is set without a target.
        """
        if target is None:
            if collect_layers:
                raise ValueError("collect_layers: expected False without a target, got True")
            return super().forward(x)
        return self.align_target(x, target, collect_layers)


def follows_labels(module: nn.Module) -> bool:
    """Whether a module of a patched model takes labels, or is a block that `layers` leaves out.

    It is asked for its attribute, which wrappers hand on, since the class of a block that is compiled, checkpointed or
    sharded alone is the wrapper's.

    Raises:
        TypeError: If it is neither, as a module is that came into the model later.
    """
    follows = getattr(module, "label_follows", None)
    if follows is None:
        raise TypeError(
            f"model: expected modules that were there when it was patched, got {type(module).__name__}; patch it "
            "again, or make a block of your own with aligned modules, as AlignedBlock with attn_layer=AlignedAttention"
        )
    return follows


def run_block(block: nn.Module, *arguments: object, share: Tensor, checkpoints: bool = False) -> tuple[Tensor, Tensor]:
    """Runs a block of a patched model.

    Args:
        block: A follower, also in a wrapper of its own, or a block that `layers` leaves out.
        arguments: Those of its forward, tokens first.
        share: Labels of the tokens.
        checkpoints: Whether its activations are computed again in the backward.

    Returns:
        Tokens and labels; of a block that is left out the labels as they were.

    Raises:
        TypeError: If the block is neither, or a hook took its labels away.
    """
    run = functools.partial(checkpoint, block) if checkpoints else block
    if not follows_labels(block):
        return run(*arguments), share
    # Flat arguments: reentrant checkpointing gives no gradient to tensors inside containers.
    return _with_labels(block, run(*arguments, share))


def follow(module: nn.Module, *arguments: object, **options: object) -> tuple[Tensor, ...]:
    """Calls a follower with labels among its arguments.

    Raises:
        TypeError: If it is none, as a module is that came into the model later, or a hook took its labels away.
    """
    follows_labels(module)
    return _with_labels(module, module(*arguments, **options))


def run_stages(
    stages: Iterable[nn.Module], x: object, share: Tensor, layer_shares: list[Tensor] | None
) -> tuple[object, Tensor]:
    """Runs the stages of a patched model; the share after each of their blocks is appended, unless there is no list.

    Returns:
        Tokens, as the stages take and return them, and labels.
    """
    for stage in stages:
        x, share, *of_blocks = follow(stage, x, share, layer_shares is not None)
        if layer_shares is not None:
            layer_shares.extend(*of_blocks)
    return x, share


def _with_labels(module: nn.Module, result: object) -> tuple[Tensor, ...]:
    if not isinstance(result, tuple):
        raise TypeError(
            f"{type(module).__name__}: expected (tokens, share), got {type(result).__name__}; with a target hooks take "
            "and return labels beside tokens"
        )
    return result


def check_head_dim(head_dim: int, name: str) -> None:
    """Raises NotImplementedError for heads that no backend has."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{name}: expected a head dimension of {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
        )


def check_pooling(pooling: str, *defined: str) -> None:
    """Raises NotImplementedError for a pooling of a model's tokens for which labels are not defined."""
    if pooling not in defined:
        *others, last = map(repr, defined)
        wanted = f"{', '.join(others)} and {last}" if others else last
        raise NotImplementedError(f"global_pool: labels are defined for {wanted} pooling, got {pooling!r}")


def attention_dropout(attention: nn.Module) -> float:
    """Probability with which an attention of timm drops weights now.

    Its fused way asks the mode of the attention, the other one that of the dropout, which may be set apart.

    Raises:
        NotImplementedError: If something else stands in the place of the dropout.
    """
    dropout = attention.attn_drop
    if isinstance(dropout, nn.Identity):
        return 0.0
    if not isinstance(dropout, nn.Dropout):
        raise NotImplementedError(
            f"attn_drop: expected a Dropout, got {type(dropout).__name__}, which would be given no attention matrix"
        )
    drops = attention.training if getattr(attention, "fused_attn", False) else dropout.training
    return dropout.p if drops else 0.0


def attention_options(attention: nn.Module) -> dict[str, object]:
    """Scale, dropout (see `attention_dropout`) and backend of the operator in the place of an attention of timm."""
    return {"scale": attention.scale, "dropout_p": attention_dropout(attention), "backend": attention.label_backend}


def projected_padding(projection: nn.Module, x: Tensor, by_heads: tuple[int, int, int]) -> Tensor | None:
    """What the projection of tokens x (..., channels) makes of zeros, as `by_heads`, (3, H, D); None: zeros."""
    # One that isn't bare has an adapter, or is quantised.
    padding = projection.bias if is_bare(projection, nn.Linear) else projection(x.new_zeros(1, x.shape[-1]))
    return None if padding is None else padding.view(by_heads)


def is_bare(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """Whether a call of a module is the forward of `module_class`, and nothing else, such as a hook, takes part."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    of_all = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
    return type(module) is module_class and "forward" not in vars(module) and not any((*hooks, *of_all))


def drop_path_factor(drop_path: nn.Module, x: Tensor) -> Tensor:
    """What timm's DropPath multiplies x (B, ...) by: 0 for the images that it drops. Draws what drop_path(x) would."""
    return drop_path(x.new_ones(x.shape[0], *[1] * (x.dim() - 1)))


# Class of a module -> its follower, or None for modules that act on each token alone (and for plain containers).
_followers: dict[type[nn.Module], type[LabelFollower] | None] = {}
_originals: dict[type[LabelFollower], type[nn.Module]] = {}


def register(module_class: type[nn.Module], follower: type[LabelFollower] | None) -> None:
    """Tells how labels pass through a module class, which is matched by exact type.

    Args:
        module_class: The class as it appears in models.
        follower: A subclass of `module_class` and of `LabelFollower` (or `ModelFollower` for a whole model). None: the
            module acts on each token alone, so that labels pass unchanged (an MLP, a normalisation over channels).

    Raises:
        TypeError: If `follower` is not such a class, or is that of another module class already.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class: expected a subclass of torch.nn.Module, got {module_class!r}")
    if follower is not None:
        is_class = isinstance(follower, type)
        if not (is_class and issubclass(follower, LabelFollower) and issubclass(follower, module_class)):
            raise TypeError(
                f"follower: expected a subclass of LabelFollower and {module_class.__name__}, or None, got {follower!r}"
            )
        if _originals.setdefault(follower, module_class) is not module_class:
            raise TypeError(
                f"follower: expected one of its own for {module_class.__name__}, got {follower.__name__}, which is "
                f"that of {_originals[follower].__name__}"
            )
    _followers[module_class] = follower


def patch_model(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    residual: bool = True,
    backend: str = "auto",
    method: str = "tl-align",
    stochastic_depth: bool = False,
) -> nn.Module:
    """Makes a timm model follow labels: `model(images, target=target)` then returns `(logits, aligned)`.

    Without `target` the model runs timm's own forward. Patch first, then compile, then wrap or shard. Patching again
    replaces the options. Nothing is changed if an error is raised.

    Args:
        model: A timm model, changed in place.
        layers: Blocks in which labels are aligned, counted from 0 (negative: from the end); None: all.
        residual: Average labels over residual connections; False gives Y <- A.Y in each layer (an ablation).
        backend: Name of a backend, or "auto".
        method: "tl-align" follows labels from layer to layer. "transmix" (arXiv 2111.09833) weights the labels of the
            patches by the attention of the class token in the last block, averaged over the heads, and leaves out the
            attention to other prefix tokens; `layers`, `residual` and `stochastic_depth` are then of no account and
            must not be given. A patch on the border of a mask has its fraction here (the paper rounds it), and the
            target is of the attention alone (the authors' code averages it with the plain ratio).
        stochastic_depth: Leave the labels of an image as they are in blocks that drop its attention (DropPath); False
            aligns them there too, as the paper does.

    Returns:
        `model` itself.

    Raises:
        NotImplementedError: If a module can't be followed, naming it, or its forward is not the one that was read; for
            "transmix" also if the logits are not those of a class token.
        TypeError: If `model` is no module, `layers` not iterable, or a flag no bool.
        ValueError: If `model` is compiled or wrapped already, or an option is out of range.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    for name, flag in (("residual", residual), ("stochastic_depth", stochastic_depth)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "transmix":
        if layers is not None or not residual or stochastic_depth:
            raise ValueError(
                "layers, residual, stochastic_depth: expected none of them with method='transmix', which is of the "
                "last block"
            )
        layers, residual = [-1], False
    _check_bare(model)
    plan, left_out = _plan(model, layers)
    if method == "transmix":
        plan[0][1].check_transmix(model)
    unpatch_model(model)
    for module, follower in plan:
        module.__class__ = follower
        module.label_residual = residual
        module.label_stochastic_depth = stochastic_depth
        module.label_backend = backend
    for block in left_out:
        block.label_follows = False
    model.label_method = method
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Gives all modules their own classes back; does nothing to a model that is not patched.

    Args:
        model: A model, changed in place.

    Returns:
        `model` itself.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If `model` is compiled or wrapped, or parametrized since it was patched.
    """
    _check_bare(model)
    for name, module in model.named_modules():
        if isinstance(module, LabelFollower) and (_has_other(module, "forward") or is_parametrized(module)):
            raise ValueError(
                f"{name or 'model'}: expected {_describe(module)} as it was when patched, got one with a forward or "
                "parametrization of its own; unpatch before that"
            )
    for module in model.modules():
        if not _has_other(module, "forward"):
            module.__dict__.pop("forward", None)
        if isinstance(module, LabelFollower):
            module.__class__ = _own_class(module)
        for option in ("label_follows", "label_residual", "label_stochastic_depth", "label_backend", "label_method"):
            module.__dict__.pop(option, None)
    return model


def unfollowable_reason(model: nn.Module) -> str | None:
    """Why `patch_model(model)` would raise, or None if it would not; changes nothing."""
    try:
        _check_bare(model)
        _plan(model, None)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return None


def source_digest(function: object) -> str:
    """Short digest of the source of a function, by which a changed forward is noticed; "no source" without one."""
    try:
        source = inspect.getsource(function)
    except OSError:
        return "no source"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _plan(
    model: nn.Module, layers: Iterable[int] | None
) -> tuple[list[tuple[nn.Module, type[LabelFollower]]], list[nn.Module]]:
    """All modules to swap with their followers, and the blocks left out; raises on the first that can't be followed."""
    follower = _followers.get(_own_class(model))
    if follower is None or not issubclass(follower, ModelFollower):
        known = sorted(cls.__name__ for cls, f in _followers.items() if f is not None and issubclass(f, ModelFollower))
        raise NotImplementedError(
            f"model: can't follow labels through {_describe(model)}; models that can be: {', '.join(known)}"
        )
    blocks = follower.label_blocks(model)
    chosen = range(len(blocks)) if layers is None else _chosen(layers, len(blocks))
    left_out = {id(block): block for index, block in enumerate(blocks) if index not in chosen}
    if any(id(blocks[index]) in left_out for index in chosen):
        raise ValueError("layers: expected all or none of the indices of a block that is run several times, got some")

    def visit(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, type[LabelFollower]]]:
        if id(module) in left_out:
            return
        module_class = _own_class(module)
        if module_class not in _followers:
            raise NotImplementedError(
                f"{name}: can't follow labels through {_describe(module)}; "
                "tlalign_kernels.register(...) tells how labels pass through it"
            )
        follower = _followers[module_class]
        if follower is not None:
            _check_source(module_class, follower)
            _check_instance(module, follower, name or "model")
            follower.check(module, name or "model")
            yield module, follower
        for child_name, child in module.named_children():
            if follower is None or child_name not in follower.untouched:
                yield from visit(child, f"{name}.{child_name}" if name else child_name)

    return list(visit(model, "")), list(left_out.values())


def _own_class(module: nn.Module) -> type[nn.Module]:
    return _originals.get(type(module), type(module))


def _describe(module: nn.Module) -> str:
    return _name_of(_own_class(module))


def _name_of(module_class: type[nn.Module]) -> str:
    return f"{module_class.__module__}.{module_class.__qualname__}"


def _chosen(layers: Iterable[int], blocks: int) -> set[int]:
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected an iterable of block indices, got {layers!r}")
    layers = list(layers)
    try:
        indices = [operator.index(layer) for layer in layers]
    except TypeError:
        indices = [blocks]
    if any(not -blocks <= index < blocks for index in indices):
        known = f"block indices from {-blocks} to {blocks - 1}" if blocks else "none, since no block can align"
        raise ValueError(f"layers: expected {known}, got {layers}")
    return {index % blocks for index in indices}


def _check_source(module_class: type[nn.Module], follower: type[LabelFollower]) -> None:
    for method, digest in follower.mirrors.items():
        given = source_digest(getattr(module_class, method))
        if given != digest:
            raise NotImplementedError(
                f"{_name_of(module_class)}.{method}: expected the source with digest "
                f"{digest}, which {follower.__name__} follows, got {given}; install the timm version that "
                "tlalign-kernels asks for"
            )


def _check_instance(module: nn.Module, follower: type[LabelFollower], name: str) -> None:
    """Raises if a wrapper has put a method of its own before one that the follower repeats."""
    for method in ("forward", *follower.mirrors):
        if _has_other(module, method):
            raise NotImplementedError(
                f"{name}.{method}: expected that of {_describe(module)}, got one that was set on the module; patch the "
                "model before it is wrapped"
            )


def _has_other(module: nn.Module, method: str) -> bool:
    """Whether a method was set on a module, and is not its class's own, as wrappers leave it that were taken off."""
    own = getattr(module.__dict__.get(method), "__func__", None) is getattr(type(module), method)
    return method in module.__dict__ and not (own and module.__dict__[method].__self__ is module)


def _check_bare(model: nn.Module) -> None:
    """Raises if the model is no module, or any part of it is compiled, scripted, traced or wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wrappers = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    made_by_compilers = (torch.jit.ScriptModule, torch.fx.GraphModule, torch._dynamo.OptimizedModule)
    for name, module in model.named_modules():
        if isinstance(module, wrappers + made_by_compilers) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or 'model'}: expected a model that is not compiled or wrapped, got {type(module).__name__}; "
                "patch or unpatch first, then compile, then wrap or shard"
            )
