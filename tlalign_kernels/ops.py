"""The operators as `torch.library` knows them: schemas, fake kernels, autograd. Imports torch, and what a window is.

Three operators, each with a backward: `attention` takes query, key and value as views, `attention_qkv` the packed
projection, whose gradient is one tensor of the same layout, and `window_attention` that of a map of tokens. A backend
registers itself in `LAUNCHERS`; its name is an argument of the operators, so that the choice is made once a call and
handed to the backward. `call` runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tlalign_kernels.windows import Windows

# Name of a backend -> the module with its launchers: `forward`, `backward`, `window_forward` and `window_backward`.
LAUNCHERS: dict[str, ModuleType] = {}


class Inputs(NamedTuple):
    """What `forward` and `backward` of a backend are told of attention.

    Attributes:
        query: (B, H, Nq, D), any strides but a unit last one, as for key and value.
        key: (B, H, Nk, D).
        value: (B, H, Nk, D).
        bias: Added to the scores, (1 or B, 1 or H, Nq, Nk), or None.
        mask: Like `bias`; additive, or bool where True lets a query see a key; or None.
        dropout_seed: int64 (1,), needed if dropout_p > 0.
        scale: Factor of the products of queries and keys.
        dropout_p: Probability with which an attention weight is dropped from A.V; labels take part undropped.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    dropout_p: float


class WindowInputs(NamedTuple):
    """What `window_forward` and `window_backward` of a backend are told of attention within the windows of a map.

    Attributes:
        qkv: (B, Ht, Wt, 3, H, D), any strides but a unit last one.
        pad_qkv: (3, H, D), contiguous, what lies in the padding; None exactly if there is none.
        bias: Added to the scores, (1, 1 or H, N, N), or None.
        dropout_seed: As in `Inputs`; windows count as images, image after image.
        windows: The map and its windows.
        scale: As in `Inputs`.
        dropout_p: As in `Inputs`.
    """

    qkv: Tensor
    pad_qkv: Tensor | None
    bias: Tensor | None
    dropout_seed: Tensor | None
    windows: Windows
    scale: float
    dropout_p: float


_library = torch.library.Library("tlalign_kernels", "DEF")
_define = functools.partial(_library.define, tags=torch.Tag.pt2_compliant_tag)

_OPTIONS = "Tensor? bias, Tensor? mask, Tensor? dropout_seed, float scale, float dropout_p"
_define(
    f"attention(Tensor query, Tensor key, Tensor value, Tensor? share, Tensor? residual, {_OPTIONS}, str backend)"
    " -> (Tensor output, Tensor share, Tensor log_sum_exp)"
)
_define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sum_exp,"
    f" {_OPTIONS}, bool needs_grad_bias, str backend)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"
)
_define(
    f"attention_qkv(Tensor qkv, Tensor? share, Tensor? residual, {_OPTIONS}, str backend)"
    " -> (Tensor output, Tensor share, Tensor log_sum_exp)"
)
_define(
    f"attention_qkv_backward(Tensor grad_output, Tensor qkv, Tensor output, Tensor log_sum_exp, {_OPTIONS},"
    " bool needs_grad_bias, str backend) -> (Tensor grad_qkv, Tensor grad_bias)"
)
_WINDOW_OPTIONS = "Tensor? bias, Tensor? dropout_seed, int[] window_size, int[] shift, float scale, float dropout_p"
_define(
    f"window_attention(Tensor qkv, Tensor? pad_qkv, Tensor? share, Tensor? residual, {_WINDOW_OPTIONS}, str backend)"
    " -> (Tensor output, Tensor share, Tensor log_sum_exp)"
)
_define(
    "window_attention_backward(Tensor grad_output, Tensor qkv, Tensor? pad_qkv, Tensor output, Tensor log_sum_exp,"
    f" {_WINDOW_OPTIONS}, bool needs_grad_bias, str backend)"
    " -> (Tensor grad_qkv, Tensor grad_pad_qkv, Tensor grad_bias)"
)


def unpack_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, H, N, D) of query, key and value in a projection (B, N, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def unit_last_stride(tensor: Tensor) -> Tensor:
    """Kernels read rows of D: a tensor strided there is copied, once."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _empty_outputs(
    like: Tensor, share: Tensor | None, shape: tuple[int, ...], rows: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of a shape (..., H, D), share (..., S), and log-sum-exp, whose shape is `rows`."""
    device, wide = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
    # An operator can't return None: without labels the share has no column.
    sources, of_share = (0, torch.float32) if share is None else (share.shape[-1], share.dtype)
    return (
        torch.empty(shape, dtype=like.dtype, device=device),
        torch.empty((*shape[:-2], sources), dtype=of_share, device=device),
        torch.empty(rows, dtype=wide, device=device),
    )


def _empty_attention_outputs(query: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    return _empty_outputs(query, share, (batch, queries, heads, head_dim), (batch, heads, queries))


def _empty_grad_bias(like: Tensor, bias: Tensor | None, needs_grad_bias: bool) -> Tensor:
    return torch.empty_like(bias, memory_format=torch.contiguous_format) if needs_grad_bias else like.new_empty((0,))


def _attention(query, key, value, share, residual, bias, mask, dropout_seed, scale, dropout_p, backend):
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    inputs = Inputs(query, key, value, bias, mask, dropout_seed, scale, dropout_p)
    return _forward(inputs, share, residual, backend)


def _attention_qkv(qkv, share, residual, bias, mask, dropout_seed, scale, dropout_p, backend):
    inputs = Inputs(*unpack_qkv(unit_last_stride(qkv)), bias, mask, dropout_seed, scale, dropout_p)
    return _forward(inputs, share, residual, backend)


def _forward(
    inputs: Inputs, share: Tensor | None, residual: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    share, residual = _contiguous(share, residual)
    output, share_out, log_sum_exp = _empty_attention_outputs(inputs.query, share)
    LAUNCHERS[backend].forward(inputs, share, residual, output, None if share is None else share_out, log_sum_exp)
    return output, share_out, log_sum_exp


def _attention_backward(
    grad_output, query, key, value, output, log_sum_exp,
    bias, mask, dropout_seed, scale, dropout_p, needs_grad_bias, backend,
):  # fmt: skip
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    *grads, grad_bias = _attention_backward_fake(
        grad_output, query, key, value, output, log_sum_exp,
        bias, mask, dropout_seed, scale, dropout_p, needs_grad_bias, backend,
    )  # fmt: skip
    inputs = Inputs(query, key, value, bias, mask, dropout_seed, scale, dropout_p)
    LAUNCHERS[backend].backward(
        inputs, grad_output, output, log_sum_exp, *grads, grad_bias if needs_grad_bias else None
    )
    return *grads, grad_bias


def _attention_qkv_backward(
    grad_output, qkv, output, log_sum_exp, bias, mask, dropout_seed, scale, dropout_p, needs_grad_bias, backend
):
    qkv = unit_last_stride(qkv)
    grad_qkv, grad_bias = _attention_qkv_backward_fake(
        grad_output, qkv, output, log_sum_exp, bias, mask, dropout_seed, scale, dropout_p, needs_grad_bias, backend
    )
    inputs = Inputs(*unpack_qkv(qkv), bias, mask, dropout_seed, scale, dropout_p)
    LAUNCHERS[backend].backward(
        inputs, grad_output, output, log_sum_exp, *unpack_qkv(grad_qkv), grad_bias if needs_grad_bias else None
    )
    return grad_qkv, grad_bias


def _window_attention(qkv, pad_qkv, share, residual, bias, dropout_seed, window_size, shift, scale, dropout_p, backend):
    qkv = unit_last_stride(qkv)
    pad_qkv, share, residual = _contiguous(pad_qkv, share, residual)
    output, share_out, log_sum_exp = _empty_window_outputs(qkv, share, window_size, shift)
    inputs = WindowInputs(qkv, pad_qkv, bias, dropout_seed, _windows(qkv, window_size, shift), scale, dropout_p)
    LAUNCHERS[backend].window_forward(
        inputs, share, residual, output, None if share is None else share_out, log_sum_exp
    )
    return output, share_out, log_sum_exp


def _window_attention_backward(
    grad_output, qkv, pad_qkv, output, log_sum_exp,
    bias, dropout_seed, window_size, shift, scale, dropout_p, needs_grad_bias, backend,
):  # fmt: skip
    qkv, (pad_qkv,) = unit_last_stride(qkv), _contiguous(pad_qkv)
    grad_qkv, grad_pad_qkv, grad_bias = _window_attention_backward_fake(
        grad_output, qkv, pad_qkv, output, log_sum_exp,
        bias, dropout_seed, window_size, shift, scale, dropout_p, needs_grad_bias, backend,
    )  # fmt: skip
    inputs = WindowInputs(qkv, pad_qkv, bias, dropout_seed, _windows(qkv, window_size, shift), scale, dropout_p)
    LAUNCHERS[backend].window_backward(
        inputs, grad_output, output, log_sum_exp,
        grad_qkv, None if pad_qkv is None else grad_pad_qkv, grad_bias if needs_grad_bias else None,
    )  # fmt: skip
    return grad_qkv, grad_pad_qkv, grad_bias


def _windows(qkv: Tensor, window_size: list[int], shift: list[int]) -> Windows:
    return Windows(tuple(qkv.shape[1:3]), tuple(window_size), tuple(shift))


def _empty_window_outputs(
    qkv: Tensor, share: Tensor | None, window_size: list[int], shift: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, columns, _, heads, head_dim = qkv.shape
    windows = _windows(qkv, window_size, shift)
    of_windows = (batch * windows.count(), heads, windows.tokens())
    return _empty_outputs(qkv, share, (batch, rows, columns, heads, head_dim), of_windows)


def _attention_fake(query, key, value, share, residual, bias, mask, dropout_seed, scale, dropout_p, backend):
    return _empty_attention_outputs(query, share)


def _attention_qkv_fake(qkv, share, residual, bias, mask, dropout_seed, scale, dropout_p, backend):
    return _empty_attention_outputs(unpack_qkv(qkv)[0], share)


def _attention_backward_fake(
    grad_output, query, key, value, output, log_sum_exp,
    bias, mask, dropout_seed, scale, dropout_p, needs_grad_bias, backend,
):  # fmt: skip
    # Gradients lie as (B, N, H, D), like the linear layers that made query, key and value.
    grads = [
        torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for tensor in (query, key, value)
    ]
    return *grads, _empty_grad_bias(query, bias, needs_grad_bias)


def _attention_qkv_backward_fake(
    grad_output, qkv, output, log_sum_exp, bias, mask, dropout_seed, scale, dropout_p, needs_grad_bias, backend
):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), _empty_grad_bias(qkv, bias, needs_grad_bias)


def _window_attention_fake(
    qkv, pad_qkv, share, residual, bias, dropout_seed, window_size, shift, scale, dropout_p, backend
):
    return _empty_window_outputs(qkv, share, window_size, shift)


def _window_attention_backward_fake(
    grad_output, qkv, pad_qkv, output, log_sum_exp,
    bias, dropout_seed, window_size, shift, scale, dropout_p, needs_grad_bias, backend,
):  # fmt: skip
    return (
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        qkv.new_empty((0,) if pad_qkv is None else pad_qkv.shape),
        _empty_grad_bias(qkv, bias, needs_grad_bias),
    )


def _differentiated(name: str, tensors: int, constants: int) -> tuple[Callable, Callable]:
    """Formula and context of an operator, for autograd.

    Its arguments are so many tensors with a gradient, share, residual, bias, so many constant tensors, and options.
    """
    bias, first_option, backward_name = tensors + 2, tensors + 3 + constants, f"{name}_backward"

    def setup_context(ctx, inputs, output):
        attended, share_out, log_sum_exp = output
        ctx.mark_non_differentiable(share_out, log_sum_exp)
        # Else autograd would fill a gradient of zeros for each non-differentiable output, and for an unused one.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], attended, log_sum_exp, *inputs[bias:first_option])
        needs_grad_bias = inputs[bias] is not None and ctx.needs_input_grad[bias]
        ctx.options = (*inputs[first_option:-1], needs_grad_bias, inputs[-1])

    def backward(ctx, grad_output, _grad_share, _grad_log_sum_exp):
        grads = [None] * len(ctx.needs_input_grad)
        if grad_output is not None:
            saved = ctx.saved_tensors  # asked for once: checkpointing computes them again, and refuses to do so twice
            *of_tensors, of_bias = call(backward_name, grad_output, *saved, *ctx.options)
            # An operator can't return None.
            grads[:tensors] = [None if saved[i] is None else grad for i, grad in enumerate(of_tensors)]
            grads[bias] = of_bias if ctx.options[-2] else None
        return tuple(grads)

    return backward, setup_context


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("attention with label propagation has no second derivative")


def _flops(rows: tuple[int, int, int], keys: int, head_dim: int, products: int, sources: int = 0) -> int:
    """Of so many matrix products, `rows` their (B, H, Nq), and of the labels, as `torch.utils.flop_counter` counts."""
    batch, heads, queries = rows
    return 2 * batch * queries * keys * (products * heads * head_dim + sources)


def _attention_flops(_query, key, *_, out_shape, **__):
    output, share, rows = out_shape
    return _flops(rows, key[2], output[-1], 2, share[-1])


def _packed_flops(*_, out_shape, **__):
    output, share, rows = out_shape
    return _flops(rows, rows[2], output[-1], 2, share[-1])


# Two products for each of the forward's, one for the gradient of either factor, and the scores once more.
def _attention_backward_flops(grad_output, _query, key, _value, _output, rows, *_, **__):
    return _flops(rows, key[2], grad_output[-1], 5)


def _attention_qkv_backward_flops(grad_output, _qkv, _output, rows, *_, **__):
    return _flops(rows, rows[2], grad_output[-1], 5)


def _window_attention_backward_flops(grad_output, _qkv, _pad_qkv, _output, rows, *_, **__):
    return _flops(rows, rows[2], grad_output[-1], 5)


def _function(
    name: str, kernel: Callable, autograd: Callable, setup_context: Callable | None
) -> type[torch.autograd.Function]:
    """An operator as an autograd function that calls its kernel without the dispatcher."""

    def forward(ctx, *arguments):
        output = kernel(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(autograd)}
    return type(name, (torch.autograd.Function,), methods)


_OPERATORS: dict[str, tuple[torch._ops.OpOverload, Callable, type[torch.autograd.Function]]] = {}

for _name, _kernel, _fake, (_autograd, _setup), _formula in (
    ("attention", _attention, _attention_fake, _differentiated("attention", 3, 2), _attention_flops),
    ("attention_qkv", _attention_qkv, _attention_qkv_fake, _differentiated("attention_qkv", 1, 2), _packed_flops),
    (
        "window_attention", _window_attention, _window_attention_fake, _differentiated("window_attention", 2, 1),
        _packed_flops,
    ),
    (
        "attention_backward", _attention_backward, _attention_backward_fake, (_no_second_derivative, None),
        _attention_backward_flops,
    ),
    (
        "attention_qkv_backward", _attention_qkv_backward, _attention_qkv_backward_fake, (_no_second_derivative, None),
        _attention_qkv_backward_flops,
    ),
    (
        "window_attention_backward", _window_attention_backward, _window_attention_backward_fake,
        (_no_second_derivative, None), _window_attention_backward_flops,
    ),
):  # fmt: skip
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tlalign_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"tlalign_kernels::{_name}",
        _autograd,
        setup_context=_setup,
        lib=_library,
    )
    _packet = getattr(torch.ops.tlalign_kernels, _name)
    register_flop_formula(_packet)(_formula)
    _OPERATORS[_name] = (_packet.default, _kernel, _function(_name, _kernel, _autograd, _setup))


def is_captured() -> bool:
    """Whether a compiler, a tracer or a mode sees the operators that are called; tensors may have no values then."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
    )


def call(name: str, *arguments) -> tuple[Tensor, ...]:
    """Runs an operator: through the dispatcher where it is to be seen, compiled or intercepted, else directly.

    On the way through the dispatcher and what `torch.library` makes of a formula written in Python, the host spends
    two to three times as long as on the kernel's own work, and small models wait for the host.
    """
    operator, kernel, function = _OPERATORS[name]
    first = arguments[0]
    is_plain = type(first) in (Tensor, torch.nn.Parameter) and not first.is_meta
    # Batched gradients (is_grads_batched, vectorized Jacobians) are of the usual class, without storage.
    is_watched = is_captured() or torch._C._functorch.is_legacy_batchedtensor(first)
    is_transformed = torch._C._are_functorch_transforms_active()
    has_tangents = torch.autograd.forward_ad._current_level >= 0
    if has_tangents and (is_transformed or is_watched or not is_plain):
        # What torch.library registers would take them for 0.
        raise NotImplementedError(
            f"{name}: there is no forward-mode derivative, which jvp, jacfwd and linearize of torch.func take"
        )
    if is_transformed:
        try:
            return operator(*arguments)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            raise NotImplementedError(
                f"{name}: transforms of torch.func that differentiate can't see what torch.library registers; take "
                "torch.autograd instead"
            ) from error
    if is_watched or not is_plain:
        return operator(*arguments)
    # Autograd refuses forward-mode derivatives, too.
    is_differentiated = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return function.apply(*arguments) if has_tangents or is_differentiated else kernel(*arguments)
