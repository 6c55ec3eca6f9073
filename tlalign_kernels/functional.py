"""Attention with label propagation as functions: checks the arguments, picks the backend, calls the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tlalign_kernels import ops
from tlalign_kernels.backends import Explanation, Problem, choose, explain_choice
from tlalign_kernels.backends.reference import within_reach
from tlalign_kernels.labels import check_number
from tlalign_kernels.windows import Windows

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Dropouts are 0 by default, not 0.0: of that dynamic compilation makes a symbol, which no two checkpointed parts share.


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention that mixes labels as it mixes tokens: A.V and mean_h(A).share in one pass.

    The label alignment of TL-Align (arXiv 2210.06455). No gradient flows through labels, and none of size Nq x Nk is
    kept for the backward. Under autocast query, key, value and bias are cast, labels never. A query that sees no key
    gives output 0 and keeps the label `residual`.

    Args:
        query: floating (B, H, Nq, D), none of them 0 and D of 8 to 256. Any strides, read in place if the last
            dimension is contiguous and copied once if not, as for key and value.
        key: (B, H, Nk, D), dtype and device of `query`.
        value: (B, H, Nk, D), dtype and device of `query`.
        share: float32 (B, Nk, S), labels of the keys: shares of S sources or any S classes; float64 is accepted
            with a float64 query. Beside a float16 query on a GPU of less than 65520. None: no labels.
        residual: Dtype of `share`, (B, Nq, S), labels of the queries; the result is the average with them. None:
            no average.
        bias: floating, broadcastable to (B, H, Nq, Nk), added to the scores; differentiable. Finite numbers beyond
            65504 count as that, but in float64. For the gradient of one that images do not share, the CPU takes
            B x H x Nq x Nk numbers of float32 meanwhile.
        mask: bool (True: the query sees the key) or floating (added to the scores), broadcastable to
            (B, H, Nq, Nk); constant. Finite numbers beyond 65504 count as that, but in float64. Keys that are
            hidden must be finite all the same.
        scale: Factor of the products of queries and keys; None: 1 / sqrt(D).
        dropout_p: Probability with which attention weights are dropped from A.V; labels take part undropped.
        backend: Name of a backend, or "auto".

    Returns:
        output: (B, H, Nq, D), in memory as (B, Nq, H, D).
        share: (B, Nq, S), or None without labels.

    Raises:
        TypeError: If an argument is no tensor or has a wrong dtype.
        ValueError: If shapes or devices disagree, or an option is out of range.
        NotImplementedError: If the backend can't do it, with its reasons.
    """
    query, key, value, bias = _autocast(query, key, value, bias)
    sizes = _check_views(query, key, value)
    bias, mask, scale, problem = _prepare((query, key, value), sizes, share, residual, bias, mask, scale, dropout_p)
    output, share_out, _ = ops.call(
        "attention", query, key, value, share, residual, bias, mask, _seed(dropout_p, query.device), scale, dropout_p,
        choose(problem, backend),
    )  # fmt: skip
    return output.transpose(1, 2), None if share is None else share_out


def attention_qkv(
    qkv: Tensor,
    share: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with label propagation on a packed projection, whose gradient is one tensor of its layout.

    Args:
        qkv: floating (B, N, 3, H, D), the output of a `qkv` linear layer, read in place.
        share: As for `attention`, with Nk = N.
        residual: As for `attention`, with Nq = N; the same tensor as `share` for TL-Align's residual average.
        bias: As for `attention`.
        mask: As for `attention`.
        scale: As for `attention`.
        dropout_p: As for `attention`.
        backend: As for `attention`.

    Returns:
        output: (B, N, H, D); merging the heads is a view.
        share: (B, N, S), or None without labels.

    Raises:
        TypeError: If an argument is no tensor or has a wrong dtype.
        ValueError: If shapes or devices disagree, or an option is out of range.
        NotImplementedError: If the backend can't do it, with its reasons.
    """
    qkv, bias = _autocast(qkv, bias)
    _check_is_tensor("qkv", qkv)
    _check_dtype("qkv", qkv.dtype)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: expected shape (B, N, 3, H, D), got {tuple(qkv.shape)}")
    batch, tokens, _, heads, head_dim = qkv.shape
    sizes = (batch, heads, tokens, tokens, head_dim)
    bias, mask, scale, problem = _prepare((qkv,), sizes, share, residual, bias, mask, scale, dropout_p)
    output, share_out, _ = ops.call(
        "attention_qkv", qkv, share, residual, bias, mask, _seed(dropout_p, qkv.device), scale, dropout_p,
        choose(problem, backend),
    )  # fmt: skip
    return output, None if share is None else share_out


def window_attention(
    qkv: Tensor,
    share: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    window_size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with label propagation within the (shifted) windows of a map, as in Swin (arXiv 2103.14030).

    Shift, padding, partition and the way back are done by indexing: nothing of the size of the projection is copied.
    As in timm's Swin the map is rolled, padded at its end to whole windows, and cut; tokens that the shift brought
    together see each other with a score that is lower by 100. Padding is a key like others, but has no label: that of
    a query is the mean over the real tokens that it attends to.

    Args:
        qkv: floating (B, Ht, Wt, 3, H, D), the output of a `qkv` linear layer on a map of Ht x Wt tokens.
        share: float32 (B, Ht, Wt, S), labels of the tokens; float64 is accepted with a float64 projection. None: no
            labels.
        residual: Dtype of `share`, (B, Ht, Wt, S), labels to average the result with. None: no average.
        window_size: Tokens of a window along each axis; N is their product.
        shift: Tokens by which the map is rolled towards its start along each axis, less than a window.
        bias: floating, relative position bias, broadcastable to (H, N, N) or as a table
            ((2 * window_size[0] - 1) * (2 * window_size[1] - 1), H) of what belongs to the differences of positions;
            differentiable. Large numbers: as for `attention`.
        pad_qkv: floating (3, H, D), dtype of `qkv`, what the projection is in the padding: its bias. Differentiable.
            None: zeros, a projection without a bias. Of no account where windows fit the map.
        scale: As for `attention`.
        dropout_p: As for `attention`.
        backend: As for `attention`.

    Returns:
        output: (B, Ht, Wt, H, D); merging the heads is a view.
        share: (B, Ht, Wt, S), or None without labels.

    Raises:
        TypeError: If an argument is no tensor or has a wrong dtype.
        ValueError: If shapes or devices disagree, or an option is out of range.
        NotImplementedError: If the backend can't do it, with its reasons.
    """
    qkv, bias, pad_qkv = _autocast(qkv, bias, pad_qkv)
    bias, pad_qkv, scale, problem = window_problem(
        qkv, share, residual, window_size, shift, bias, pad_qkv, scale, dropout_p
    )
    output, share_out, _ = ops.call(
        "window_attention", qkv, pad_qkv, share, residual, bias, _seed(dropout_p, qkv.device), window_size, shift,
        scale, dropout_p, choose(problem, backend),
    )  # fmt: skip
    return output, None if share is None else share_out


def window_problem(
    qkv: Tensor,
    share: Tensor | None,
    residual: Tensor | None,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    pad_qkv: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor | None, Tensor | None, float, Problem]:
    """Checks the arguments of `window_attention`; returns bias, padding and scale of the operator, and the problem.

    Raises what `window_attention` does, but for what is wrong with the backend.
    """
    _check_is_tensor("qkv", qkv)
    _check_dtype("qkv", qkv.dtype)
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv: expected shape (B, Ht, Wt, 3, H, D), got {tuple(qkv.shape)}")
    batch, rows, columns, _, heads, head_dim = qkv.shape
    window_size, shift = _two_integers("window_size", window_size, 1), _two_integers("shift", shift, 0)
    if shift[0] >= window_size[0] or shift[1] >= window_size[1]:
        raise ValueError(f"shift: expected less than the window of {window_size}, got {shift}")
    windows = Windows((rows, columns), window_size, shift)
    tokens = windows.tokens()
    if isinstance(bias, Tensor) and bias.dim() == 2 and not all(size in (1, tokens) for size in bias.shape):
        bias = _relative_position_bias(bias, windows, heads)
    if isinstance(bias, Tensor) and bias.dim() > 3:
        raise ValueError(f"bias: expected a table or a shape broadcastable to (H, N, N), got {tuple(bias.shape)}")
    if pad_qkv is not None:
        _check_is_tensor("pad_qkv", pad_qkv)
        if pad_qkv.dtype != qkv.dtype:
            raise TypeError(f"pad_qkv: expected {qkv.dtype} as qkv, got {pad_qkv.dtype}")
        _check_device("pad_qkv", pad_qkv, qkv.device)
        _check_shape("pad_qkv", pad_qkv, (3, heads, head_dim))
    if not windows.is_padded():
        pad_qkv = None
    elif pad_qkv is None:
        pad_qkv = qkv.new_zeros((3, heads, head_dim))
    sizes = (batch * windows.count(), heads, tokens, tokens, head_dim)
    tensors = (qkv,) if pad_qkv is None else (qkv, pad_qkv)
    bias, _, scale, problem = _prepare(tensors, sizes, share, residual, bias, None, scale, dropout_p, windows)
    return bias, pad_qkv, scale, problem


def _two_integers(name: str, sizes: object, least: int) -> tuple[int, int]:
    if isinstance(sizes, (tuple, list)) and len(sizes) == 2:
        first, second = sizes
        if hasattr(first, "__index__") and hasattr(second, "__index__") and first >= least and second >= least:
            return int(first), int(second)
    raise ValueError(f"{name}: expected two integers of at least {least}, got {sizes!r}")


def _relative_position_bias(table: Tensor, windows: Windows, heads: int) -> Tensor:
    """Gathers (H, N, N) from a table of differences of positions (Swin, arXiv 2103.14030, equation 4)."""
    height, width = windows.window_size
    _check_shape("bias", table, ((2 * height - 1) * (2 * width - 1), heads))
    row, column = torch.meshgrid(
        torch.arange(height, device=table.device), torch.arange(width, device=table.device), indexing="ij"
    )
    row, column = row.flatten(), column.flatten()
    rows, columns = row[:, None] - row + height - 1, column[:, None] - column + width - 1
    # The gradient of an embedding is summed in a fixed order (but where `torch.compile` makes its own kernel of it, for
    # a GPU and without deterministic algorithms); that of indexing is not.
    return torch.nn.functional.embedding(rows * (2 * width - 1) + columns, table).permute(2, 0, 1)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: Tensor | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0,
    backend: str = "auto",
) -> Explanation:
    """Says which backend `attention` would take for these arguments, and why not the others; computes nothing.

    Args and exceptions are those of `attention`, but a backend that can't do it does not raise.

    Returns:
        The name of the backend, its kernels, and why others don't take the call; as text, all of it.
    """
    query, key, value, bias = _autocast(query, key, value, bias)
    sizes = _check_views(query, key, value)
    *_, problem = _prepare((query, key, value), sizes, share, residual, bias, mask, scale, dropout_p)
    return explain_choice(problem, backend)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts tensors to the dtype of the autocast region that is active on their device, if one is."""
    if not torch._C._is_any_autocast_enabled():
        return list(tensors)
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return list(tensors)
    # float64 is left alone, as PyTorch's own autocast does; then what goes with it is, too.
    if isinstance(tensors[0], Tensor) and tensors[0].dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator, so that dropout follows `torch.manual_seed` and checkpointing repeats it."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) if dropout_p > 0 else None


def _check_views(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int]:
    """Checks query, key and value; returns B, H, Nq, Nk and D."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_is_tensor(name, tensor)
        _check_dtype(name, tensor.dtype, query.dtype)
        _check_device(name, tensor, query.device)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (B, H, N, D), got shape {tuple(tensor.shape)}")
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    _check_shape("key", key, (batch, heads, keys, head_dim))
    _check_shape("value", value, (batch, heads, keys, head_dim))
    return batch, heads, queries, keys, head_dim


def _prepare(tensors, sizes, share, residual, bias, mask, scale, dropout_p, windows=None):
    """Checks the other arguments; returns bias and mask in four dimensions, the scale, and the problem.

    `tensors` are query, key and value, or the one that holds them; `sizes` are B, H, Nq, Nk and D. With `windows` each
    of them counts as an image, but labels are those of the map.
    """
    query, name = tensors[0], "query" if len(tensors) == 3 else "qkv"
    batch, heads, queries, keys, head_dim = sizes
    if min(sizes) < 1:
        raise ValueError(f"{name}: expected no empty dimension, got B, H, Nq, Nk, D = {sizes}")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: expected a head dimension D of {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}")
    of_map = None if windows is None else query.shape[:3]
    _check_labels(query, share, residual, of_map or (batch, keys), of_map or (batch, queries))
    check_number("dropout_p", dropout_p)
    if scale is not None:
        check_number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a value in [0, 1), got {dropout_p}")
    scores = sizes[:4]
    if bias is not None:
        _check_is_tensor("bias", bias)
        _check_dtype("bias", bias.dtype)
        # The gradient of what broadcasts over queries or keys is summed before it is rounded.
        is_summed = query.dtype == torch.float32 and tuple(bias.shape[-2:]) != scores[2:]
        if is_summed or (bias.dtype == torch.float64 and query.dtype != torch.float64):
            bias = bias.float()
        bias = _over_scores("bias", bias, scores, query.device)
    if mask is not None:
        _check_is_tensor("mask", mask)
        if mask.dtype not in (torch.bool, *_DTYPES):
            raise TypeError(f"mask: expected torch.bool or one of {list(_DTYPES)}, got {mask.dtype}")
        if mask.requires_grad:
            raise ValueError("mask: expected a constant, got one that requires a gradient; pass it as bias")
        mask = within_reach(mask, query.dtype)
        if mask.dtype == torch.float64 and query.dtype != torch.float64:
            mask = mask.float()
        mask = _over_scores("mask", mask, scores, query.device)
    problem = Problem(
        device_type=query.device.type,
        dtype=query.dtype,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        sources=0 if share is None else share.shape[-1],
        share_dtype=None if share is None else share.dtype,
        has_bias=bias is not None,
        has_mask=mask is not None if windows is None else windows.has_regions(),
        dropout_p=dropout_p,
        needs_gradient=torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (*tensors, bias)),
        windows=windows,
        device_index=query.device.index,
    )
    return bias, mask, head_dim**-0.5 if scale is None else float(scale), problem


def _check_labels(
    query: Tensor, share: Tensor | None, residual: Tensor | None, keys: tuple[int, ...], queries: tuple[int, ...]
) -> None:
    """Checks labels of keys and of queries, whose shapes without the sources are given."""
    if share is None:
        if residual is not None:
            raise ValueError("residual: expected None without a share, got a tensor")
        return
    _check_is_tensor("share", share)
    allowed = (torch.float32, torch.float64) if query.dtype == torch.float64 else (torch.float32,)
    if share.dtype not in allowed:
        raise TypeError(
            f"share: expected {' or '.join(map(str, allowed))}, got {share.dtype}; labels keep their "
            "precision (with FSDP2: cast_forward_inputs=False)"
        )
    _check_device("share", share, query.device)
    if share.dim() != len(keys) + 1 or share.shape[:-1] != keys or share.shape[-1] < 1:
        raise ValueError(f"share: expected shape ({', '.join(map(str, keys))}, S), got {tuple(share.shape)}")
    if residual is not None:
        _check_is_tensor("residual", residual)
        if residual.dtype != share.dtype:
            raise TypeError(f"residual: expected {share.dtype} as share, got {residual.dtype}")
        _check_device("residual", residual, query.device)
        _check_shape("residual", residual, (*queries, share.shape[-1]))


def _over_scores(name: str, tensor: Tensor, scores: tuple[int, ...], device: torch.device) -> Tensor:
    """Views `tensor` as (1 or B, 1 or H, Nq, Nk); the last two dimensions are expanded, at no cost in memory."""
    _check_device(name, tensor, device)
    shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    fits = len(shape) == 4
    for given, size in zip(shape, scores, strict=False):
        fits = fits and given in (1, size)
    if not fits:
        given = tuple(tensor.shape)
        raise ValueError(f"{name}: expected a shape broadcastable to (B, H, Nq, Nk) = {scores}, got {given}")
    # Backends read memory, where a tensor such as z.conj().imag is not negated yet.
    tensor = tensor.resolve_neg().view(shape)
    return tensor if shape[2:] == scores[2:] else tensor.expand(shape[0], shape[1], scores[2], scores[3])


def _check_is_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        given = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {given}")


def _check_dtype(name: str, dtype: torch.dtype, wanted: torch.dtype | None = None) -> None:
    if dtype not in _DTYPES or (wanted is not None and dtype != wanted):
        expected = f"{wanted} as query" if wanted in _DTYPES else f"one of {list(_DTYPES)}"
        raise TypeError(f"{name}: expected {expected}, got {dtype}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device} as the other tensors, got {tensor.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
