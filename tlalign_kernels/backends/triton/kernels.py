"""Attention with label propagation as Triton kernels: forward, head mean, dense labels, and the gradients.

Scores are in units of ln 2, so that `exp2` is all that the softmax takes. A label costs a tensor-core column block:
the product P.V gets columns [1, parts of the shares] beside V (`pack_labels`). Column 0 is the row sum of the softmax,
which a plain kernel computes by additions, and the others the labels in this head. Nothing is added by atomics: the
bits of a result do not depend on the order in which programs run. Offsets of images and heads are 64 bits wide, those
within one are 32.

Triton's blocks are as wide as powers of two. What has the D columns of a head is a tuple of blocks as wide as WIDTHS
says, so that a head of 80 is 64 and 16 wide, and not 128.

WINDOWS, a constant, is None or says how a map is divided into windows. A window then counts as an image: its rows are
looked up in the map, its `place` is where it begins in the rolled and padded map, and what belongs to the kernels alone
(the log-sum-exp, packed labels, scratch) has N rows a window, window after window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tlalign_kernels.windows import Windows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# What is added to the scores of tokens of different regions, as the reference has it.
REGION_BIAS = tl.constexpr(-100.0)
# What finite numbers of a bias are brought to, as those of masks: all keys of a query at -1e9 would differ by rounding.
GREATEST_BIAS = tl.constexpr(65504.0)


@triton.constexpr_function
def _along(windows, size, axis):
    """One of the sizes of `Windows`, which the compiler hands on as a mere tuple."""
    return getattr(Windows(*windows), size)[axis]


@triton.constexpr_function
def _windows_along(windows, axis):
    return Windows(*windows).grid_size()[axis]


@triton.constexpr_function
def _count(windows):
    return Windows(*windows).count()


@triton.constexpr_function
def _is_padded(windows):
    return windows is not None and Windows(*windows).is_padded()


@triton.constexpr_function
def _has_regions(windows):
    return windows is not None and Windows(*windows).has_regions()


@triton.constexpr_function
def _tokens_of_image(tokens, windows):
    return tokens if windows is None else windows[0][0] * windows[0][1]


@triton.constexpr_function
def _labels(sources, windows):
    """Labels of a key: one a source, and in padded windows whether it is real."""
    return sources + 1 if sources > 0 and _is_padded(windows) else sources


@triton.constexpr_function
def _packed_rows(sources, parts, windows):
    """Rows of the packed labels of an image; whether a key is real takes one only."""
    return sources * parts + _labels(sources, windows) - sources


@triton.constexpr_function
def _unit(bias, mask):
    """What scores are multiplied with in the exponent of 2: nothing more where their factor holds it.

    A bias or mask is added as it is, so that large ones are rounded as seldom as may be.
    """
    return LOG2_E.value if bias != 0 or mask != 0 else 1.0


@triton.constexpr_function
def _precise(precision):
    """How labels are multiplied: never as plain TF32, whatever the products of float32 are allowed to be."""
    return "tf32x3" if precision == "tf32" else precision


@triton.constexpr_function
def _size(sizes, block):
    """One of the sizes, which older Triton takes for a number that is none of a kernel's."""
    return sizes[block]


@triton.constexpr_function
def _first(sizes, block):
    """Where a block begins, if they lie one behind the other."""
    return sum(sizes[:block])


@triton.constexpr_function
def _is_narrow(widths):
    """Whether columns lie in many blocks, as registers are scarce."""
    return len(widths) > 2


@triton.constexpr_function
def _exceeds(widths, block, columns):
    """Whether a block has more columns than are left for it."""
    return sum(widths[: block + 1]) > columns


@triton.jit
def _program(blocks, heads):
    """Block, head and image of this program; one dimension, since the others of a grid end at 65535."""
    program = tl.program_id(0)
    return program % blocks, (program // blocks % heads).to(tl.int64), (program // blocks // heads).to(tl.int64)


@triton.jit
def _program_after_loop(block, head, image, rows, heads, BLOCK: tl.constexpr, WIDTHS: tl.constexpr):
    """Block, head and image once more, of a program that has BLOCK of `rows`.

    Where registers are scarce, none is to hold them while a loop runs: they are computed anew, by operations without
    signs, which the compiler does not take for those of `_program`.
    """
    if not _is_narrow(WIDTHS):
        return block, head, image
    else:
        blocks = (tl.cast(rows, tl.uint32) - 1) // BLOCK + 1
        program = tl.cast(tl.program_id(0), tl.uint32)
        pair, heads = program // blocks, tl.cast(heads, tl.uint32)
        return (program % blocks).to(tl.int32), (pair % heads).to(tl.int64), (pair // heads).to(tl.int64)


@triton.jit
def _place(image, WINDOWS: tl.constexpr):
    """Image in the batch, and where in its rolled and padded map the window begins."""
    if WINDOWS is None:
        return image, (0, 0)  # not None, which functions of older Triton can't return
    else:
        COUNT: tl.constexpr = _count(WINDOWS)
        ACROSS: tl.constexpr = _windows_along(WINDOWS, 1)
        HEIGHT: tl.constexpr = _along(WINDOWS, "window_size", 0)
        WIDTH: tl.constexpr = _along(WINDOWS, "window_size", 1)
        number = image.to(tl.int32)
        window = number % COUNT
        return (number // COUNT).to(tl.int64), (window // ACROSS * HEIGHT, window % ACROSS * WIDTH)


@triton.jit
def _token(row, place, WINDOWS: tl.constexpr):
    """Which token of its image is in a row of a window, and whether it is one: False in the padding."""
    if WINDOWS is None:
        return row, True
    else:
        ROWS: tl.constexpr = _along(WINDOWS, "map_size", 0)
        COLUMNS: tl.constexpr = _along(WINDOWS, "map_size", 1)
        DOWN: tl.constexpr = _along(WINDOWS, "shift", 0) % ROWS
        ACROSS: tl.constexpr = _along(WINDOWS, "shift", 1) % COLUMNS
        y = place[0] + row // _along(WINDOWS, "window_size", 1)
        x = place[1] + row % _along(WINDOWS, "window_size", 1)
        is_real = (y < ROWS) & (x < COLUMNS)
        if DOWN > 0:
            y = tl.where(y >= ROWS - DOWN, y - (ROWS - DOWN), y + DOWN)
        if ACROSS > 0:
            x = tl.where(x >= COLUMNS - ACROSS, x - (COLUMNS - ACROSS), x + ACROSS)
        return y * COLUMNS + x, is_real


@triton.jit
def _kind(image, place, WINDOWS: tl.constexpr):
    """Which bias is that of an image: in windows it depends on what the shift brought together in them."""
    if WINDOWS is None:
        return image
    elif not _has_regions(WINDOWS):
        return image * 0
    else:
        is_lowest = place[0] == (_windows_along(WINDOWS, 0) - 1) * _along(WINDOWS, "window_size", 0)
        is_rightmost = place[1] == (_windows_along(WINDOWS, 1) - 1) * _along(WINDOWS, "window_size", 1)
        return (is_lowest.to(tl.int32) * 2 + is_rightmost.to(tl.int32)).to(tl.int64)


@triton.jit
def _region(row, kind, WINDOWS: tl.constexpr):
    """A number of what lay together before the shift, of rows of a window of this kind."""
    HEIGHT: tl.constexpr = _along(WINDOWS, "window_size", 0)
    WIDTH: tl.constexpr = _along(WINDOWS, "window_size", 1)
    below = (kind >= 2) & (row // WIDTH >= HEIGHT - _along(WINDOWS, "shift", 0))
    beside = (kind % 2 == 1) & (row % WIDTH >= WIDTH - _along(WINDOWS, "shift", 1))
    return below.to(tl.int32) * 2 + beside.to(tl.int32)


@triton.jit
def _within_reach(bias):
    return tl.where(tl.abs(bias) < float("inf"), tl.clamp(bias, -GREATEST_BIAS, GREATEST_BIAS), bias)


@triton.jit
def arrange_bias(
    bias, arranged, bias_head, bias_query, bias_key, heads, queries, keys, row,
    HAS_BIAS: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A bias (1 or H, Nq, Nk), or none, to (kinds of windows, 1 or H, Nq, `row`); a program has a query.

    What the attention kernels then read is aligned, has -inf beyond the last key, and parts the regions.
    """
    query = tl.program_id(0) % queries
    head = (tl.program_id(0) // queries % heads).to(tl.int64)
    kind = tl.program_id(0) // queries // heads
    for first in range(0, row, BLOCK):
        key = first + tl.arange(0, BLOCK)
        value = tl.where(key < keys, 0.0, float("-inf"))
        if HAS_BIAS:
            at = bias + head * bias_head + query * bias_query + key * bias_key
            value = _within_reach(tl.load(at, mask=key < keys, other=float("-inf")).to(tl.float32))
        if WINDOWS is not None:
            differ = _region(query, kind, WINDOWS) != _region(key, kind, WINDOWS)
            value = tl.where(differ, value + REGION_BIAS, value)
        at = arranged + tl.program_id(0).to(tl.int64) * row + key
        tl.store(at, value.to(arranged.dtype.element_ty), mask=key < row)


@triton.jit
def _pad_rows(pad, head, heads, D: tl.constexpr):
    """What the padding is in a head, of query, key and value; where there is none, nothing to be read."""
    if pad is None:
        return 0, 0, 0
    else:
        return pad + head * D, pad + (heads + head) * D, pad + (2 * heads + head) * D


@triton.jit
def _load(
    data, row, column, stride, first, end, place, pad, D: tl.constexpr, EXCEEDS: tl.constexpr, ENDS: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Columns of rows `first` + row, zeros from row `end` on (with ENDS) and from column D on (if some EXCEED it).

    In the padding of windows, `pad` or zeros; then what lies beyond the end is of no account.
    """
    if WINDOWS is not None:
        token, is_real = _token(first + row, place, WINDOWS)
        at = data + (token * stride + column)
        inside = first + row < end
        if _is_padded(WINDOWS):
            inside = (inside & is_real) if ENDS else is_real
        other = 0.0
        if pad is not None and _is_padded(WINDOWS):
            other = tl.load(pad + column, mask=column < D, other=0.0)
        if EXCEEDS:
            return tl.load(at, mask=inside & (column < D), other=other)
        elif ENDS or _is_padded(WINDOWS):
            return tl.load(at, mask=inside, other=other)
        else:
            return tl.load(at)
    # In this order tiles have their addresses in common, but for a constant.
    at = data + (row * stride + column) + first * stride
    if ENDS:
        if EXCEEDS:
            return tl.load(at, mask=(first + row < end) & (column < D), other=0.0)
        else:
            return tl.load(at, mask=first + row < end, other=0.0)
    else:
        if EXCEEDS:
            return tl.load(at, mask=column < D, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _of_rows(numbers, TRANSPOSED: tl.constexpr):
    """One number a row of a matrix, or, transposed, a column."""
    if TRANSPOSED:
        return numbers[None, :]
    else:
        return numbers[:, None]


@triton.jit
def _load_rows(
    data, stride, first, end, ROWS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, ENDS: tl.constexpr,
    place=None, pad=None, WINDOWS: tl.constexpr = None, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """ROWS rows of D numbers from `first` on, a matrix (ROWS, width) for each of the WIDTHS.

    Transposed they are (width, ROWS), without a way round through shared memory.
    """
    row = _of_rows(tl.arange(0, ROWS), TRANSPOSED)
    blocks = ()
    for i in tl.static_range(len(WIDTHS)):
        column = _of_rows(_first(WIDTHS, i) + tl.arange(0, _size(WIDTHS, i)), not TRANSPOSED)
        blocks = blocks + (
            _load(data, row, column, stride, first, end, place, pad, D, _exceeds(WIDTHS, i, D), ENDS, WINDOWS),
        )
    return blocks


@triton.jit
def _store_rows(
    data, stride, first, end, values, ROWS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    place=None, WINDOWS: tl.constexpr = None,
):  # fmt: skip
    """Writes ROWS rows of D numbers from `first` on; of windows, those that are not padding."""
    row = tl.arange(0, ROWS)[:, None]
    for i in tl.static_range(len(WIDTHS)):
        column = (_first(WIDTHS, i) + tl.arange(0, _size(WIDTHS, i)))[None, :]
        inside = first + row < end
        if _exceeds(WIDTHS, i, D):
            inside = inside & (column < D)
        if WINDOWS is None:
            at = data + (row * stride + column) + first * stride
        else:
            token, is_real = _token(first + row, place, WINDOWS)
            at = data + (token * stride + column)
            if _is_padded(WINDOWS):
                inside = inside & is_real
        tl.store(at, values[i].to(data.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Sums to begin with, for rows of D numbers."""
    blocks = ()
    for i in tl.static_range(len(WIDTHS)):
        blocks = blocks + (tl.zeros((ROWS, _size(WIDTHS, i)), tl.float32),)
    return blocks


@triton.jit
def _times(rows, factor, WIDTHS: tl.constexpr):
    """Rows of D numbers, multiplied."""
    blocks = ()
    for i in tl.static_range(len(WIDTHS)):
        blocks = blocks + (rows[i] * factor,)
    return blocks


@triton.jit
def _products(rows, columns, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """Products of rows of D numbers with such as are transposed."""
    products = tl.dot(rows[0], columns[0], input_precision=PRECISION)
    for i in tl.static_range(1, len(WIDTHS)):
        products = tl.dot(rows[i], columns[i], products, input_precision=PRECISION)
    return products


@triton.jit
def _products_in_turn(
    left, LEFT_ROW: tl.constexpr, first_left, end_left, pad_left,
    right, RIGHT_ROW: tl.constexpr, first_right, end_right, pad_right, place,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Products of LEFT and RIGHT rows of D numbers in memory; registers hold one narrow block of columns at a time."""
    WIDTH: tl.constexpr = _size(WIDTHS, 0)
    products = tl.zeros((LEFT, RIGHT), tl.float32)
    for first_column in range(0, D, WIDTH):
        column = first_column + tl.arange(0, WIDTH)
        rows = _load(
            left, tl.arange(0, LEFT)[:, None], column[None, :], LEFT_ROW, first_left, end_left, place, pad_left,
            D, D % WIDTH > 0, True, WINDOWS,
        )  # fmt: skip
        columns = _load(
            right, tl.arange(0, RIGHT)[None, :], column[:, None], RIGHT_ROW, first_right, end_right, place, pad_right,
            D, D % WIDTH > 0, True, WINDOWS,
        )  # fmt: skip
        products = tl.dot(rows, columns, products, input_precision=PRECISION)
    return products


@triton.jit
def _transposed(rows, WIDTHS: tl.constexpr):
    """Rows of D numbers as columns."""
    blocks = ()
    for i in tl.static_range(len(WIDTHS)):
        blocks = blocks + (tl.trans(rows[i]),)
    return blocks


@triton.jit
def _add_mixed(weights, rows, sums, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of rows of D numbers, plus weights times rows."""
    blocks = ()
    for i in tl.static_range(len(WIDTHS)):
        blocks = blocks + (tl.dot(weights, rows[i], sums[i], input_precision=PRECISION),)
    return blocks


@triton.jit
def _of_head(
    query, key, value, query_image, query_head, key_image, key_head, value_image, value_head, image, head,
    TOKENS: tl.constexpr, ROW: tl.constexpr, GAP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Where query, key and value, or their gradients, of an image and head begin.

    GAP: elements from query to key and from key to value in a packed projection of TOKENS rows: one set of addresses
    serves all three. Else 0.
    """
    if GAP > 0:
        query += image * (TOKENS * ROW) + head * D
        return query, query + GAP, query + 2 * GAP
    else:
        query += image * query_image + head * query_head
        return query, key + image * key_image + head * key_head, value + image * value_image + head * value_head


@triton.jit
def _offset_base(data, image, head, image_stride, head_stride):
    """Where the bias or mask of an image and head begins, if there is one."""
    if data is None:
        return 0
    else:
        return data + image * image_stride + head * head_stride


# Kinds of a bias beside those of `_add_offsets`: as `arrange_bias` wrote it, and with finite numbers of any size.
ARRANGED = tl.constexpr(3)
UNBOUNDED = tl.constexpr(4)


@triton.jit
def _add_offsets(scores, row, row_end, row_stride, column, column_end, column_stride, data, KIND: tl.constexpr):
    """Scores plus a bias or mask there; KIND 0: none, 1: additive, 2: bool, True where a key is seen, or UNBOUNDED."""
    if KIND != 0:
        inside = (row < row_end) & (column < column_end)
        at = data + row * row_stride + column * column_stride
        if KIND == 2:
            scores = tl.where(tl.load(at, mask=inside, other=1) != 0, scores, float("-inf"))
        else:
            offsets = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            scores += _within_reach(offsets) if KIND == UNBOUNDED else offsets
    return scores


@triton.jit
def _in_octets(number, end):
    """Whether numbers lie in groups of eight that begin before an end: of constants, the compiler knows which do."""
    return number < (end + 7) // 8 * 8


@triton.jit
def _add_bias(scores, row, rows, row_stride, column, columns, column_stride, data, KIND: tl.constexpr):
    """Scores plus a bias, of a KIND as in `_add_offsets` or from `arrange_bias`, which has -inf beyond the last key."""
    if KIND == ARRANGED:
        inside = (row < rows) & _in_octets(column, columns)
        return scores + tl.load(data + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        return _add_offsets(scores, row, rows, row_stride, column, columns, column_stride, data, KIND)


@triton.jit
def _kept(row, keys, column, first, seed, threshold, factor):
    """What attention weights are multiplied with, 0 or `factor`: Philox at their index, as the reference has it."""
    index = first + row.to(tl.int64) * keys + column.to(tl.int64)
    word = tl.randint(seed, index).to(tl.uint32, bitcast=True)
    return tl.where(word >= threshold, factor, 0.0)


@triton.jit
def pack_labels(
    share, parts, keys, tokens,
    SOURCES: tl.constexpr, PARTS: tl.constexpr, PARTS_ROW: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Splits share (B, tokens, S) into parts (B, S * PARTS, PARTS_ROW), zeros from key Nk on and in the padding.

    A share of float32 is the sum of three parts of 8 or 11 bits, so that its product on tensor cores is exact up to the
    rounding of the probabilities. Padded windows have one more row: 1 where a key is real.
    """
    PACKED: tl.constexpr = _packed_rows(SOURCES, PARTS, WINDOWS)
    blocks = (PARTS_ROW + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    key = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    of_map, place = _place(image, WINDOWS)
    token, inside = _token(key, place, WINDOWS)
    inside = inside & (key < keys)
    for source in tl.static_range(SOURCES):
        rest = tl.load(share + (of_map * tokens + token) * SOURCES + source, mask=inside, other=0.0)
        for part in tl.static_range(PARTS):
            rounded = rest.to(parts.dtype.element_ty)
            at = parts + (image * PACKED + source * PARTS + part) * PARTS_ROW + key
            tl.store(at, rounded, mask=key < PARTS_ROW)
            rest = rest - rounded.to(tl.float32)
    if PACKED > SOURCES * PARTS:
        at = parts + (image * PACKED + SOURCES * PARTS) * PARTS_ROW + key
        tl.store(at, inside.to(parts.dtype.element_ty), mask=key < PARTS_ROW)


@triton.jit
def _label_columns(
    parts, first, PARTS_ROW: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns [1, parts of source 1, parts of source 2, ..., 0] of ROWS keys from `first` on, (ROWS, COLUMNS).

    PACKED of them are in memory, as rows, so that a thread reads several keys at once.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    rest = (tl.where(column == 0, 1.0, 0.0) + tl.zeros((ROWS, COLUMNS), tl.float32)).to(DTYPE)
    if PACKED > 0:
        at = parts + ((column - 1) * PARTS_ROW + tl.arange(0, ROWS)[:, None]) + first
        return tl.load(at, mask=(column > 0) & (column <= PACKED), other=rest)
    else:
        return rest


@triton.jit
def _finish(
    output, log_sum_exp, image, head, heads, queries, first, accumulated, labels, highest, place,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Writes the output and the log-sum-exp of one head from the sums over all keys; returns 1 / row sum."""
    total = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == 0, labels, 0.0), 1)
    inverse = 1.0 / total
    if MASKED:
        inverse = tl.where(total == 0.0, 0.0, inverse)
    of_map, _ = _place(image, WINDOWS)
    start = output + (of_map * _tokens_of_image(queries, WINDOWS) * heads + head) * D
    accumulated = _times(accumulated, inverse[:, None], WIDTHS)
    _store_rows(start, heads * D, first, queries, accumulated, ROWS, D, WIDTHS, place, WINDOWS)
    row = first + tl.arange(0, ROWS)
    # log2(0) + the maximum, -inf, is -inf: a query that sees no key.
    known = (highest + tl.log2(total)) * LN_2
    tl.store(log_sum_exp + (image * heads + head) * queries + row, known, mask=row < queries)
    return inverse


@triton.jit
def _sum_parts(labels, source, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The label of one source from its parts."""
    column = tl.arange(0, COLUMNS)[None, :]
    is_part = (column > source * PARTS) & (column <= (source + 1) * PARTS)
    return tl.sum(tl.where(is_part, labels, 0.0), 1)


@triton.jit
def _store_head_share(
    head_share, pair, queries, first, labels, inverse,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LABELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    for label in tl.static_range(LABELS):
        mixed = _sum_parts(labels, label, COLUMNS, PARTS) * inverse
        tl.store(head_share + (pair * LABELS + label) * queries + row, mixed, mask=row < queries)


@triton.jit
def _scores(
    q, key, KEY_ROW: tl.constexpr, row, queries, first, keys, factor,
    bias, bias_query, bias_key, mask, mask_query, mask_key,
    SIZE: tl.constexpr, ENDS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, place=None, pad_key=None, WINDOWS: tl.constexpr = None, k=None,
):  # fmt: skip
    """Scores of some queries and SIZE keys from `first` on; -inf from key `keys` on, if this tile ENDS them.

    k: these keys, if they are on chip.
    """
    if k is None:
        k = _load_rows(key, KEY_ROW, first, keys, SIZE, D, WIDTHS, ENDS, place, pad_key, WINDOWS, TRANSPOSED=True)
    return _with_offsets(
        _products(q, k, WIDTHS, PRECISION) * factor, row, queries, first, keys, bias, bias_query, bias_key,
        mask, mask_query, mask_key, SIZE, ENDS, BIAS, MASK,
    )  # fmt: skip


@triton.jit
def _with_offsets(
    scores, row, queries, first, keys, bias, bias_query, bias_key, mask, mask_query, mask_key,
    SIZE: tl.constexpr, ENDS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The rest of `_scores`."""
    row = row[:, None]
    column = first + tl.arange(0, SIZE)[None, :]
    scores = _add_bias(scores, row, queries, bias_query, column, keys, bias_key, bias, BIAS)
    scores = _add_offsets(scores, row, queries, mask_query, column, keys, mask_key, mask, MASK)
    if ENDS and BIAS != ARRANGED:
        scores = tl.where(column < keys, scores, float("-inf"))
    return scores


@triton.jit
def _without_padding(values, other, first, keys, ENDS: tl.constexpr, BIAS: tl.constexpr):
    """Scores or weights of the keys from `first` on, but `other` beyond the last octet of `keys`, a constant.

    What would be computed there the compiler then leaves out, as it does by itself where no bias of windows is loaded.
    """
    if ENDS and BIAS == ARRANGED:
        return tl.where(_in_octets(first + tl.arange(0, values.shape[1]), keys)[None, :], values, other)
    else:
        return values


@triton.jit
def _add_values(
    p, accumulated, labels, value, VALUE_ROW: tl.constexpr, w, row, queries, first, keys, pair,
    seed, threshold, kept_factor, place, pad_value,
    SIZE: tl.constexpr, ENDS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr, v=None,
):  # fmt: skip
    """Adds P V and P w, where w = [1, share], of SIZE keys from `first` on; v: their values, if they are on chip."""
    if v is None:
        v = _load_rows(value, VALUE_ROW, first, keys, SIZE, D, WIDTHS, ENDS, place, pad_value, WINDOWS)
    kept = p
    if DROPS:
        column = first + tl.arange(0, SIZE)
        kept = p * _kept(
            row[:, None], keys, column[None, :], pair * queries * keys, tl.load(seed), threshold, kept_factor
        )
    accumulated = _add_mixed(kept.to(w.dtype), v, accumulated, WIDTHS, PRECISION)
    return accumulated, tl.dot(p.to(w.dtype), w, labels, input_precision=_precise(PRECISION))


@triton.jit
def _max_of_lanes(scores):
    """Maxima of every eighth key, which one thread has: what goes across threads is then done once for all tiles."""
    return tl.max(tl.reshape(scores, (scores.shape[0], scores.shape[1] // 8, 8)), 1)


@triton.jit
def _highest(scores, BIAS: tl.constexpr, MASK: tl.constexpr):
    """Maxima of the rows of all tiles.

    Beside what is added to them the compiler has scores lie as that was loaded; lanes it then makes of other threads.
    """
    if BIAS == 0 and MASK == 0:
        lanes = _max_of_lanes(scores[0])
        for i in tl.static_range(1, len(scores)):
            lanes = tl.maximum(lanes, _max_of_lanes(scores[i]))
        return tl.max(lanes, 1)
    else:
        highest = tl.max(scores[0], 1)
        for i in tl.static_range(1, len(scores)):
            highest = tl.maximum(highest, tl.max(scores[i], 1))
        return highest


# output = softmax(scale Q K^T + bias + mask) V, for keys that are all on chip: a program has BLOCK_Q queries of a head.
# Registers hold the scores of all keys, the sums of P V and of P [1, share]; shared memory passes tiles of K and V on.
# Reads Q once, K and V once a program; writes O, the log-sum-exp and the shares of the head.
# = reference.forward, but for the mean over heads.
@triton.jit
def attention_forward_row(
    query, key, value, pad, parts, bias, mask, seed, output, log_sum_exp, head_share,
    query_image, query_head, key_image, key_head, value_image, value_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    factor, threshold, kept_factor, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GAP: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, PARTS_ROW: tl.constexpr, SOURCES: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, FOLDS: tl.constexpr,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Keys lie in tiles of sizes TILES.

    GAP: see `_of_head`.
    FOLDS: the factor is positive and nothing is added to the scores, so that it can wait for the exponential.
    """
    block, head, image = _program((QUERIES + BLOCK_Q - 1) // BLOCK_Q, HEADS)
    of_map, place = _place(image, WINDOWS)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    query, key, value = _of_head(
        query, key, value, query_image, query_head, key_image, key_head, value_image, value_head, of_map, head,
        _tokens_of_image(QUERIES, WINDOWS), QUERY_ROW, GAP, D,
    )  # fmt: skip
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    mask = _offset_base(mask, image, head, mask_image, mask_head)
    PACKED: tl.constexpr = _packed_rows(SOURCES, PARTS, WINDOWS)
    if PACKED > 0:
        parts += image * (PACKED * PARTS_ROW)
    pad_query, pad_key, pad_value = _pad_rows(pad, head, HEADS, D)
    q = _load_rows(query, QUERY_ROW, first, QUERIES, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)

    COUNT: tl.constexpr = len(TILES)
    scores = ()
    for i in tl.static_range(COUNT):
        of_tile = _scores(
            q, key, KEY_ROW, row, QUERIES, _first(TILES, i), KEYS, 1.0 if FOLDS else factor,
            bias, bias_query, bias_key, mask, mask_query, mask_key, _size(TILES, i), i == COUNT - 1,
            D, WIDTHS, BIAS, MASK, PRECISION, place, pad_key, WINDOWS,
        )  # fmt: skip
        of_tile = _without_padding(of_tile, float("-inf"), _first(TILES, i), KEYS, i == COUNT - 1, BIAS)
        scores = scores + (of_tile,)
    highest = _highest(scores, BIAS, MASK)
    unit = factor if FOLDS else _unit(BIAS, MASK)
    highest *= unit
    shift = highest
    if not FOLDS:
        shift = tl.where(highest == float("-inf"), 0.0, highest)

    accumulated = _zeros(BLOCK_Q, WIDTHS)
    labels = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    for i in tl.static_range(COUNT):
        w = _label_columns(parts, _first(TILES, i), PARTS_ROW, _size(TILES, i), PACKED, COLUMNS, q[0].dtype)
        p = tl.exp2(scores[i] * unit - shift[:, None])
        accumulated, labels = _add_values(
            _without_padding(p, 0.0, _first(TILES, i), KEYS, i == COUNT - 1, BIAS),
            accumulated, labels, value, VALUE_ROW, w, row, QUERIES, _first(TILES, i), KEYS, image * HEADS + head,
            seed, threshold, kept_factor, place, pad_value, _size(TILES, i), i == COUNT - 1,
            D, WIDTHS, DROPS, PRECISION, WINDOWS,
        )  # fmt: skip
    inverse = _finish(
        output, log_sum_exp, image, head, HEADS, QUERIES, first, accumulated, labels, highest, place,
        BLOCK_Q, D, WIDTHS, COLUMNS, not FOLDS, WINDOWS,
    )  # fmt: skip
    _store_head_share(
        head_share, image * HEADS + head, QUERIES, first, labels, inverse,
        BLOCK_Q, COLUMNS, _labels(SOURCES, WINDOWS), PARTS,
    )  # fmt: skip


@triton.jit
def _stream_tile(
    q, highest, accumulated, labels, key, KEY_ROW: tl.constexpr, value, VALUE_ROW: tl.constexpr,
    parts, PARTS_ROW: tl.constexpr, row, queries, first, keys, factor,
    bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
    place, pad_key, pad_value,
    SIZE: tl.constexpr, ENDS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, FOLDS: tl.constexpr,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr, k=None, v=None, w=None,
):  # fmt: skip
    """One step of the online softmax (FlashAttention, arXiv 2205.14135); k, v, w: of its keys, if they are on chip."""
    scores = _scores(
        q, key, KEY_ROW, row, queries, first, keys, 1.0 if FOLDS else factor, bias, bias_query, bias_key, mask,
        mask_query, mask_key, SIZE, ENDS, D, WIDTHS, BIAS, MASK, PRECISION, place, pad_key, WINDOWS, k,
    )  # fmt: skip
    unit = factor if FOLDS else _unit(BIAS, MASK)
    now = tl.maximum(highest, tl.max(scores, 1) * unit)
    shift = now
    if not FOLDS:
        shift = tl.where(now == float("-inf"), 0.0, now)
    kept = tl.exp2(highest - shift)
    if w is None:
        w = _label_columns(parts, first, PARTS_ROW, SIZE, PACKED, COLUMNS, q[0].dtype)
    accumulated, labels = _add_values(
        tl.exp2(scores * unit - shift[:, None]), _times(accumulated, kept[:, None], WIDTHS), labels * kept[:, None],
        value, VALUE_ROW, w, row, queries, first, keys, pair, seed, threshold, kept_factor, place, pad_value,
        SIZE, ENDS, D, WIDTHS, DROPS, PRECISION, WINDOWS, v,
    )  # fmt: skip
    return now, accumulated, labels


# The same for any number of keys, in tiles that pass by: registers hold one tile of scores and running sums.
@triton.jit
def attention_forward_stream(
    query, key, value, pad, parts, bias, mask, seed, output, log_sum_exp, head_share,
    query_image, query_head, key_image, key_head, value_image, value_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    heads, queries, keys, factor, threshold, kept_factor,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, PARTS_ROW: tl.constexpr, SOURCES: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, FOLDS: tl.constexpr,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Keys lie in whole tiles of TILE and a last one of TAIL; if that is 0, in tiles of TILE, any of which may end."""
    block, head, image = _program((queries + BLOCK_Q - 1) // BLOCK_Q, heads)
    of_map, place = _place(image, WINDOWS)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    if _is_narrow(WIDTHS) and (BIAS != 0 or MASK != 0):
        # Rows beyond the last read the bias of the last, so that whether they are in it takes no registers in the loop;
        # of a loop that is sure to run, no second set of first values is kept.
        tl.assume(queries > 0)
        tl.assume(keys > 0)
        row = tl.minimum(row, queries - 1)
    query += of_map * query_image + head * query_head
    key += of_map * key_image + head * key_head
    value += of_map * value_image + head * value_head
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    mask = _offset_base(mask, image, head, mask_image, mask_head)
    PACKED: tl.constexpr = _packed_rows(SOURCES, PARTS, WINDOWS)
    if PACKED > 0:
        parts += image * (PACKED * PARTS_ROW)
    pad_query, pad_key, pad_value = _pad_rows(pad, head, heads, D)
    q = _load_rows(query, QUERY_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)

    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    accumulated = _zeros(BLOCK_Q, WIDTHS)
    labels = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    whole = keys
    if TAIL > 0:
        whole = keys // TILE * TILE
    for start in range(0, whole, TILE):
        highest, accumulated, labels = _stream_tile(
            q, highest, accumulated, labels, key, KEY_ROW, value, VALUE_ROW, parts, PARTS_ROW, row, queries, start,
            keys, factor, bias, bias_query, bias_key, mask, mask_query, mask_key, image * heads + head,
            seed, threshold, kept_factor, place, pad_key, pad_value, TILE, TAIL == 0, D, WIDTHS, COLUMNS, PACKED,
            BIAS, MASK, DROPS, FOLDS, PRECISION, WINDOWS,
        )  # fmt: skip
    if TAIL > 0:
        highest, accumulated, labels = _stream_tile(
            q, highest, accumulated, labels, key, KEY_ROW, value, VALUE_ROW, parts, PARTS_ROW, row, queries, whole,
            keys, factor, bias, bias_query, bias_key, mask, mask_query, mask_key, image * heads + head,
            seed, threshold, kept_factor, place, pad_key, pad_value, TAIL, True, D, WIDTHS, COLUMNS, PACKED,
            BIAS, MASK, DROPS, FOLDS, PRECISION, WINDOWS,
        )  # fmt: skip
    block, head, image = _program_after_loop(block, head, image, queries, heads, BLOCK_Q, WIDTHS)
    first = block * BLOCK_Q
    of_map, place = _place(image, WINDOWS)
    inverse = _finish(
        output, log_sum_exp, image, head, heads, queries, first, accumulated, labels, highest, place,
        BLOCK_Q, D, WIDTHS, COLUMNS, not FOLDS, WINDOWS,
    )  # fmt: skip
    _store_head_share(
        head_share, image * heads + head, queries, first, labels, inverse,
        BLOCK_Q, COLUMNS, _labels(SOURCES, WINDOWS), PARTS,
    )  # fmt: skip


# The same for windows of a map: a program has all queries of a head, BLOCK_Q at a time. Shared memory holds K, V and
# [1, share]. Reads the projection and the bias once; writes O, the log-sum-exp and the shares of the head.
@triton.jit
def attention_forward_window(
    query, key, value, pad, parts, bias, mask, seed, output, log_sum_exp, head_share,
    query_image, query_head, key_image, key_head, value_image, value_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    factor, threshold, kept_factor, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GAP: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, PARTS_ROW: tl.constexpr, SOURCES: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, FOLDS: tl.constexpr,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """See `attention_forward_row`."""
    _, head, image = _program(1, HEADS)
    of_map, place = _place(image, WINDOWS)
    query, key, value = _of_head(
        query, key, value, query_image, query_head, key_image, key_head, value_image, value_head, of_map, head,
        _tokens_of_image(QUERIES, WINDOWS), QUERY_ROW, GAP, D,
    )  # fmt: skip
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    PACKED: tl.constexpr = _packed_rows(SOURCES, PARTS, WINDOWS)
    if PACKED > 0:
        parts += image * (PACKED * PARTS_ROW)
    pad_query, pad_key, pad_value = _pad_rows(pad, head, HEADS, D)
    COUNT: tl.constexpr = len(TILES)
    k = ()
    v = ()
    w = ()
    for i in tl.static_range(COUNT):
        k = k + (
            _load_rows(
                key, KEY_ROW, _first(TILES, i), KEYS, _size(TILES, i), D, WIDTHS, i == COUNT - 1, place, pad_key,
                WINDOWS, TRANSPOSED=True,
            ),
        )  # fmt: skip
        v = v + (
            _load_rows(
                value, VALUE_ROW, _first(TILES, i), KEYS, _size(TILES, i), D, WIDTHS, i == COUNT - 1, place, pad_value,
                WINDOWS,
            ),
        )  # fmt: skip
        w = w + (
            _label_columns(
                parts, _first(TILES, i), PARTS_ROW, _size(TILES, i), PACKED, COLUMNS, query.dtype.element_ty
            ),
        )
    for first in range(0, QUERIES, BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        q = _load_rows(query, QUERY_ROW, first, QUERIES, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
        highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        accumulated = _zeros(BLOCK_Q, WIDTHS)
        labels = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
        for i in tl.static_range(COUNT):
            highest, accumulated, labels = _stream_tile(
                q, highest, accumulated, labels, key, KEY_ROW, value, VALUE_ROW, parts, PARTS_ROW, row, QUERIES,
                _first(TILES, i), KEYS, factor, bias, bias_query, bias_key, mask, mask_query, mask_key,
                image * HEADS + head, seed, threshold, kept_factor, place, pad_key, pad_value, _size(TILES, i),
                i == COUNT - 1, D, WIDTHS, COLUMNS, PACKED, BIAS, MASK, DROPS, FOLDS, PRECISION, WINDOWS,
                k[i], v[i], w[i],
            )  # fmt: skip
        inverse = _finish(
            output, log_sum_exp, image, head, HEADS, QUERIES, first, accumulated, labels, highest, place,
            BLOCK_Q, D, WIDTHS, COLUMNS, not FOLDS, WINDOWS,
        )  # fmt: skip
        _store_head_share(
            head_share, image * HEADS + head, QUERIES, first, labels, inverse,
            BLOCK_Q, COLUMNS, _labels(SOURCES, WINDOWS), PARTS,
        )  # fmt: skip


# The same for so few keys that one tile has them, and the mean over heads with it: a program has BLOCK_Q queries of an
# image, and their heads pass by. Registers hold [1, share] and the sum of the shares of the heads, which no longer
# go through memory. The programs are fewer, so many images are wanted. = reference.forward
@triton.jit
def attention_forward_heads(
    query, key, value, pad, parts, bias, mask, seed, output, log_sum_exp, residual, share,
    query_image, query_head, key_image, key_head, value_image, value_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    factor, threshold, kept_factor, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GAP: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, PARTS_ROW: tl.constexpr, SOURCES: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, FOLDS: tl.constexpr,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Labels and residual (B, Nq, S) to share (B, Nq, S); the rest as in `attention_forward_row`."""
    block, _, image = _program((QUERIES + BLOCK_Q - 1) // BLOCK_Q, 1)
    of_map, place = _place(image, WINDOWS)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    if GAP > 0:
        query += of_map * (_tokens_of_image(QUERIES, WINDOWS) * QUERY_ROW)
        key = query + GAP
        value = key + GAP
    else:
        query += of_map * query_image
        key += of_map * key_image
        value += of_map * value_image
    PACKED: tl.constexpr = _packed_rows(SOURCES, PARTS, WINDOWS)
    if PACKED > 0:
        parts += image * (PACKED * PARTS_ROW)
    w = _label_columns(parts, 0, PARTS_ROW, BLOCK_K, PACKED, COLUMNS, query.dtype.element_ty)
    mean = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    for number in tl.range(0, HEADS):
        head = tl.cast(number, tl.int64)
        if GAP > 0:
            at_query, at_key, at_value = query + number * D, key + number * D, value + number * D
        else:
            at_query, at_key, at_value = query + head * query_head, key + head * key_head, value + head * value_head
        pad_query, pad_key, pad_value = _pad_rows(pad, head, HEADS, D)
        q = _load_rows(at_query, QUERY_ROW, first, QUERIES, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
        scores = _scores(
            q, at_key, KEY_ROW, row, QUERIES, 0, KEYS, 1.0 if FOLDS else factor,
            _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head),
            bias_query, bias_key,
            _offset_base(mask, image, head, mask_image, mask_head), mask_query, mask_key,
            BLOCK_K, True, D, WIDTHS, BIAS, MASK, PRECISION, place, pad_key, WINDOWS,
        )  # fmt: skip
        scores = _without_padding(scores, float("-inf"), 0, KEYS, True, BIAS)
        unit = factor if FOLDS else _unit(BIAS, MASK)
        highest = tl.max(scores, 1) * unit
        shift = highest
        if not FOLDS:
            shift = tl.where(highest == float("-inf"), 0.0, highest)
        accumulated, labels = _add_values(
            _without_padding(tl.exp2(scores * unit - shift[:, None]), 0.0, 0, KEYS, True, BIAS),
            _zeros(BLOCK_Q, WIDTHS), tl.zeros((BLOCK_Q, COLUMNS), tl.float32), at_value, VALUE_ROW, w, row, QUERIES,
            0, KEYS, image * HEADS + head, seed, threshold, kept_factor, place, pad_value,
            BLOCK_K, True, D, WIDTHS, DROPS, PRECISION, WINDOWS,
        )  # fmt: skip
        inverse = _finish(
            output, log_sum_exp, image, head, HEADS, QUERIES, first, accumulated, labels, highest, place,
            BLOCK_Q, D, WIDTHS, COLUMNS, not FOLDS, WINDOWS,
        )  # fmt: skip
        mean += labels * inverse[:, None]
    token, inside = _token(row, place, WINDOWS)
    inside = inside & (row < QUERIES)
    if _labels(SOURCES, WINDOWS) > SOURCES:
        seeing = _sum_parts(mean, SOURCES, COLUMNS, PARTS)
    elif FOLDS:
        seeing = tl.zeros((BLOCK_Q,), tl.float32) + HEADS
    else:
        # Row sums over themselves. To count heads by their maxima the compiler forms these twice, in another layout.
        seeing = tl.floor(tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == 0, mean, 0.0), 1) + 0.5)
    for source in tl.static_range(SOURCES):
        _store_mean(
            _sum_parts(mean, source, COLUMNS, PARTS), seeing, residual, share,
            (of_map * _tokens_of_image(QUERIES, WINDOWS) + token) * SOURCES + source, inside, HAS_RESIDUAL,
        )  # fmt: skip


@triton.jit
def _store_mean(total, seeing, residual, share, at, inside, HAS_RESIDUAL: tl.constexpr):
    """Writes the mean of a label, averaged with the residual.

    seeing: the number of heads in which a query sees a key, or with padding the sum of what it sees of real keys.
    """
    mean = tl.where(seeing != 0, total / tl.where(seeing != 0, seeing, 1.0), 0.0)
    if HAS_RESIDUAL:
        own = tl.load(residual + at, mask=inside, other=0.0)
        mean = tl.where(seeing != 0, (mean + own) * 0.5, own)
    tl.store(share + at, mean, mask=inside)


@triton.jit
def _sum_heads(head_share, image, heads, queries, row, inside, label, LABELS: tl.constexpr):
    """The sum of a label over the heads, in fixed order."""
    total = tl.zeros(row.shape, tl.float32)
    for head in range(heads):
        of_head = head_share + ((image * heads + head) * LABELS + label) * queries
        total += tl.load(of_head + row, mask=inside, other=0.0)
    return total


# share = mean of the shares over the heads in which a query sees a key, in fixed order, averaged with the residual.
@triton.jit
def average_heads(
    head_share, log_sum_exp, residual, share, heads, queries,
    SOURCES: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """head_share (B, H, S, Nq) and residual (B, Nq, S) to share (B, Nq, S); a program has BLOCK queries of an image.

    Not MASKED: every query sees a key in every head. In padded windows head_share has one more label, what is seen of
    real keys, whose sum then takes the place of the number of heads.
    """
    LABELS: tl.constexpr = _labels(SOURCES, WINDOWS)
    blocks = (queries + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = row < queries
    of_map, place = _place(image, WINDOWS)
    token, is_real = _token(row, place, WINDOWS)
    to_share = inside & is_real
    seeing = tl.zeros((BLOCK,), tl.float32) + heads
    if LABELS > SOURCES:
        seeing = _sum_heads(head_share, image, heads, queries, row, inside, SOURCES, LABELS)
    elif MASKED:
        for head in range(heads):
            known = tl.load(log_sum_exp + (image * heads + head) * queries + row, mask=inside, other=0.0)
            seeing -= tl.where(known == float("-inf"), 1.0, 0.0)
    for source in tl.static_range(SOURCES):
        total = _sum_heads(head_share, image, heads, queries, row, inside, source, LABELS)
        at = (of_map * _tokens_of_image(queries, WINDOWS) + token) * SOURCES + source
        _store_mean(total, seeing, residual, share, at, to_share, HAS_RESIDUAL)


@triton.jit
def _log_sum_exp(data, row, end):
    """In units of ln 2, and infinite where no key is seen and beyond the last query: probabilities are 0 there."""
    known = tl.load(data + row, mask=row < end, other=float("-inf"))
    return tl.where(known == float("-inf"), float("inf"), known * LOG2_E)


# exp(score - log_sum_exp) is good to half a unit in the last place of the log-sum-exp: up to here, in units of ln 2, to
# 2e-6.
PRECISE_LOG_SUM_EXP = tl.constexpr(46.0)


# 1 / sum_j exp(score_j - log_sum_exp) in one head: 1 but for the rounding of a large log-sum-exp, for which alone the
# product of queries and keys is formed once more.
@triton.jit
def normalise(
    query, key, pad, bias, mask, log_sum_exp, inverse,
    query_image, query_head, key_image, key_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    heads, queries, keys, factor,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    WINDOWS: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (B, H, Nq) to its factor of the same shape."""
    block, head, image = _program((queries + BLOCK_Q - 1) // BLOCK_Q, heads)
    of_map, place = _place(image, WINDOWS)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    key += of_map * key_image + head * key_head
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    mask = _offset_base(mask, image, head, mask_image, mask_head)
    query += of_map * query_image + head * query_head
    pad_query, pad_key, _ = _pad_rows(pad, head, heads, D)
    q = _load_rows(query, QUERY_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
    pair = image * heads + head
    known = _log_sum_exp(log_sum_exp + pair * queries, row, queries)
    total = tl.full((BLOCK_Q,), 1.0, tl.float32)
    if tl.max(tl.where(known == float("inf"), 0.0, tl.abs(known))) > PRECISE_LOG_SUM_EXP:
        total -= 1.0
        for start in range(0, keys, TILE):
            scores = _scores(
                q, key, KEY_ROW, row, queries, start, keys, factor, bias, bias_query, bias_key, mask, mask_query,
                mask_key, TILE, True, D, WIDTHS, BIAS, MASK, PRECISION, place, pad_key, WINDOWS,
            )  # fmt: skip
            total += tl.sum(tl.exp2(scores * _unit(BIAS, MASK) - known[:, None]), 1)
    tl.store(inverse + pair * queries + row, tl.where(total == 0.0, 0.0, 1.0 / total), mask=row < queries)


@triton.jit
def _inverse(data, first, row, end, NORMALISES: tl.constexpr):
    if NORMALISES:
        return tl.load(data + first + row, mask=row < end, other=0.0)
    else:
        return tl.full(row.shape, 1.0, tl.float32)


# share = mean_h(A_h) . share, averaged with the residual, for many sources: the scores are recomputed and the
# probabilities averaged over heads in registers, so that the product with the labels does not grow with the heads.
# A program has BLOCK_Q queries of an image; sums over tiles of keys stay in the result.
@triton.jit
def dense_share(
    query, key, pad, bias, mask, log_sum_exp, inverse, share, residual, share_out,
    query_image, query_head, key_image, key_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    heads, queries, keys, sources, factor,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    NORMALISES: tl.constexpr, WINDOWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Share (B, Nk, C) and residual (B, Nq, C) to share_out (B, Nq, C), LABELS of C at a time.

    In padded windows what a query sees of real keys is known after the last tile: what it is divided by then.
    """
    PADDED: tl.constexpr = _is_padded(WINDOWS)
    blocks = (queries + BLOCK_Q - 1) // BLOCK_Q
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    of_map, place = _place(image, WINDOWS)
    token, is_real = _token(row, place, WINDOWS)
    inside = is_real & (row < queries)
    seen = tl.zeros((BLOCK_Q,), tl.float32)
    seeing = tl.zeros((BLOCK_Q,), tl.float32)
    for number in range(heads):
        known = _log_sum_exp(log_sum_exp + (image * heads + number) * queries, row, queries)
        seeing += tl.where(known == float("inf"), 0.0, 1.0)
    # The mean over the heads that see a key, and half of that where there is a residual to average with.
    weight = tl.where(seeing > 0, (0.5 if HAS_RESIDUAL else 1.0) / tl.maximum(seeing, 1.0), 0.0)
    own = tl.where(seeing > 0, 0.5, 1.0)
    for start in range(0, keys, TILE):
        mean = tl.zeros((BLOCK_Q, TILE), tl.float32)
        for number in range(heads):
            head = tl.cast(number, tl.int64)
            at = query + of_map * query_image + head * query_head
            at_key = key + of_map * key_image + head * key_head
            pad_query, pad_key, _ = _pad_rows(pad, head, heads, D)
            if _is_narrow(WIDTHS):
                products = _products_in_turn(
                    at, QUERY_ROW, first, queries, pad_query, at_key, KEY_ROW, start, keys, pad_key, place,
                    BLOCK_Q, TILE, D, WIDTHS, PRECISION, WINDOWS,
                )  # fmt: skip
            else:
                q = _load_rows(at, QUERY_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
                k = _load_rows(
                    at_key, KEY_ROW, start, keys, TILE, D, WIDTHS, True, place, pad_key, WINDOWS, TRANSPOSED=True
                )
                products = _products(q, k, WIDTHS, PRECISION)
            scores = _with_offsets(
                products * factor, row, queries, start, keys,
                _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head),
                bias_query, bias_key,
                _offset_base(mask, image, head, mask_image, mask_head), mask_query, mask_key,
                TILE, True, BIAS, MASK,
            )  # fmt: skip
            pair = (image * heads + head) * queries
            known = _log_sum_exp(log_sum_exp + pair, row, queries)
            p = tl.exp2(scores * _unit(BIAS, MASK) - known[:, None])
            mean += p * _inverse(inverse, pair, row, queries, NORMALISES)[:, None]
        of_key = start + tl.arange(0, TILE)
        token_of_key, is_real_key = _token(of_key, place, WINDOWS)
        has_label = is_real_key & (of_key < keys)
        if PADDED:
            seen += tl.sum(tl.where(has_label[None, :], mean, 0.0), 1)
        else:
            mean *= weight[:, None]
        for label in range(0, sources, LABELS):
            column = label + tl.arange(0, LABELS)
            cell = inside[:, None] & (column < sources)[None, :]
            at = (of_map * _tokens_of_image(queries, WINDOWS) + token)[:, None] * sources + column[None, :]
            of_keys = tl.load(
                share + (of_map * _tokens_of_image(keys, WINDOWS) + token_of_key)[:, None] * sources + column[None, :],
                mask=has_label[:, None] & (column < sources)[None, :], other=0.0,
            )  # fmt: skip
            if start > 0:
                sums = tl.load(share_out + at, mask=cell, other=0.0)
            elif HAS_RESIDUAL and not PADDED:
                sums = tl.load(residual + at, mask=cell, other=0.0) * own[:, None]
            else:
                sums = tl.zeros((BLOCK_Q, LABELS), tl.float32)
            sums = tl.dot(mean, of_keys, sums, input_precision=_precise(PRECISION))
            if PADDED:
                is_last = start + TILE >= keys
                if is_last:
                    sees = (seen > 0)[:, None]
                    sums = tl.where(sees, sums / tl.where(seen > 0, seen, 1.0)[:, None], 0.0)
                    if HAS_RESIDUAL:
                        passing = tl.load(residual + at, mask=cell, other=0.0)
                        sums = tl.where(sees, (sums + passing) * 0.5, passing)
            tl.store(share_out + at, sums, mask=cell)
        # What one thread has stored another may load for the next tile.
        tl.debug_barrier()


# Backward


@triton.jit
def _probabilities(
    scores, row, queries, column, keys, known, inverse, bias, bias_query, bias_key, mask, mask_query, mask_key,
    ENDS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, NORMALISES: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Probabilities of products of queries and keys, as these lie in `_grad_scores`."""
    row, column = _of_rows(row, TRANSPOSED), _of_rows(column, not TRANSPOSED)
    scores = _add_bias(scores, row, queries, bias_query, column, keys, bias_key, bias, BIAS)
    scores = _add_offsets(scores, row, queries, mask_query, column, keys, mask_key, mask, MASK)
    p = tl.exp2(scores * _unit(BIAS, MASK) - _of_rows(known, TRANSPOSED))
    if NORMALISES:
        p *= _of_rows(inverse, TRANSPOSED)
    if ENDS and BIAS != ARRANGED:
        p = tl.where(column < keys, p, 0.0)
    return p


@triton.jit
def _dropped(
    p, grad, row, column, keys, row_term, first, seed, threshold, kept_factor,
    DROPS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What `_grad_scores` returns, of probabilities and their gradients; `first`: index of the first of this head."""
    kept = p
    if DROPS:
        row, column = _of_rows(row, TRANSPOSED), _of_rows(column, not TRANSPOSED)
        kept_or_not = _kept(row, keys, column, first, tl.load(seed), threshold, kept_factor)
        kept = p * kept_or_not
        grad *= kept_or_not
    return kept, p * (grad - _of_rows(row_term, TRANSPOSED))


@triton.jit
def _grad_scores(
    q, k, v, d_o, row, queries, column, keys, factor, known, inverse, row_term,
    bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
    ENDS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, NORMALISES: tl.constexpr,
    PRECISION: tl.constexpr, WIDTHS: tl.constexpr, TRANSPOSED: tl.constexpr = True,
):  # fmt: skip
    """(Dropped) probabilities and gradients of scores of some keys and queries, both (keys, queries) in float32.

    Transposed, they are left factors of the products for keys and values as they lie in registers; not transposed,
    (queries, keys), of that for queries.
    """
    if TRANSPOSED:
        scores = _products(k, _transposed(q, WIDTHS), WIDTHS, PRECISION) * factor
    else:
        scores = _products(q, _transposed(k, WIDTHS), WIDTHS, PRECISION) * factor
    p = _probabilities(
        scores, row, queries, column, keys, known, inverse, bias, bias_query, bias_key, mask, mask_query, mask_key,
        ENDS, BIAS, MASK, NORMALISES, TRANSPOSED,
    )  # fmt: skip
    if TRANSPOSED:
        grad = _products(v, _transposed(d_o, WIDTHS), WIDTHS, PRECISION)
    else:
        grad = _products(d_o, _transposed(v, WIDTHS), WIDTHS, PRECISION)
    return _dropped(
        p, grad, row, column, keys, row_term, pair * queries * keys, seed, threshold, kept_factor, DROPS, TRANSPOSED
    )


@triton.jit
def _head_step(
    d_q, d_k, d_v, row_term, k, v, column, query, pad_query, grad_output, log_sum_exp, inverse, place, first, factor,
    bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
    QUERY_ROW: tl.constexpr, GRAD_OUTPUT_ROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SIZE: tl.constexpr, ENDS: tl.constexpr, KEYS_END: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, NORMALISES: tl.constexpr, PRECISION: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """What SIZE queries from `first` on and some keys give to the gradients of either."""
    row = first + tl.arange(0, SIZE)
    q = _load_rows(query, QUERY_ROW, first, QUERIES, SIZE, D, WIDTHS, ENDS, place, pad_query, WINDOWS)
    d_o = _load_rows(grad_output, GRAD_OUTPUT_ROW, first, QUERIES, SIZE, D, WIDTHS, ENDS, place, None, WINDOWS)
    p, d_s = _grad_scores(
        q, k, v, d_o, row, QUERIES, column, KEYS, factor, _log_sum_exp(log_sum_exp + pair * QUERIES, row, QUERIES),
        _inverse(inverse, pair * QUERIES, row, QUERIES, NORMALISES), row_term,
        bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
        KEYS_END, BIAS, MASK, DROPS, NORMALISES, PRECISION, WIDTHS,
    )  # fmt: skip
    if QUERIES <= SIZE:
        # As `_without_padding`. Of several tiles the compiler sees it: at N = 197 this would add 4 % of instructions.
        inside = _in_octets(row, QUERIES)[None, :]
        p, d_s = tl.where(inside, p, 0.0), tl.where(inside, d_s, 0.0)
    d_v = _add_mixed(p.to(d_o[0].dtype), d_o, d_v, WIDTHS, PRECISION)
    d_s = d_s.to(q[0].dtype)
    d_k = _add_mixed(d_s, q, d_k, WIDTHS, PRECISION)
    return _add_mixed(tl.trans(d_s), k, d_q, WIDTHS, PRECISION), d_k, d_v


@triton.jit
def _row_term(
    d_o, output, first, end, output_row, place, ROWS: tl.constexpr, ENDS: tl.constexpr, D: tl.constexpr,
    WIDTHS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij dP_ij = dO_i . O_i, with dropout too (FlashAttention, arXiv 2205.14135)."""
    o = _load_rows(output, output_row, first, end, ROWS, D, WIDTHS, ENDS, place, None, WINDOWS)
    # Not a mere product: its sum with another lane's would be fused in either lane, and so rounded otherwise in each.
    term = tl.sum(tl.fma(d_o[0].to(tl.float32), o[0].to(tl.float32), tl.zeros(o[0].shape, tl.float32)), 1)
    for i in tl.static_range(1, len(WIDTHS)):
        term += tl.sum(tl.fma(d_o[i].to(tl.float32), o[i].to(tl.float32), tl.zeros(o[i].shape, tl.float32)), 1)
    return term


@triton.jit
def _store_pad_sums(
    pad_sums, part, head, heads, column, d_k, d_v, place,
    D: tl.constexpr, WIDTHS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Adds up the gradients of the keys and values in the padding, a part (H, 2, D) of zeros for each block of keys."""
    if _is_padded(WINDOWS):
        down = place[0] > _along(WINDOWS, "map_size", 0) - _along(WINDOWS, "window_size", 0)
        across = place[1] > _along(WINDOWS, "map_size", 1) - _along(WINDOWS, "window_size", 1)
        if down | across:
            _, is_real = _token(column, place, WINDOWS)
            for i in tl.static_range(len(WIDTHS)):
                dimension = _first(WIDTHS, i) + tl.arange(0, _size(WIDTHS, i))
                at = pad_sums + (part * heads + head) * 2 * D + dimension
                tl.store(at, tl.sum(tl.where(is_real[:, None], 0.0, d_k[i]), 0), mask=dimension < D)
                tl.store(at + D, tl.sum(tl.where(is_real[:, None], 0.0, d_v[i]), 0), mask=dimension < D)


@triton.jit
def _head_block(
    d_q, terms, start, query, key, value, grad_output, pad_query, pad_key, pad_value, bias, mask, seed,
    log_sum_exp, inverse, grad_key, grad_value, pad_sums, bias_query, bias_key, mask_query, mask_key,
    image, head, place, scale, factor, threshold, kept_factor,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GRAD_OUTPUT_ROW: tl.constexpr,
    GRAD_KEY_ROW: tl.constexpr, GRAD_VALUE_ROW: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr, NORMALISES: tl.constexpr, PRECISION: tl.constexpr,
    WINDOWS: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr, ENDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of SIZE keys and values from `start` on; returns those of queries, with what they add."""
    COUNT: tl.constexpr = len(terms)
    column = start + tl.arange(0, SIZE)
    k = _load_rows(key, KEY_ROW, start, KEYS, SIZE, D, WIDTHS, ENDS, place, pad_key, WINDOWS)
    v = _load_rows(value, VALUE_ROW, start, KEYS, SIZE, D, WIDTHS, ENDS, place, pad_value, WINDOWS)
    d_k = _zeros(SIZE, WIDTHS)
    d_v = _zeros(SIZE, WIDTHS)
    pair = image * HEADS + head
    sums = ()
    for i in tl.static_range(COUNT):
        d_q_of_tile, d_k, d_v = _head_step(
            d_q[i], d_k, d_v, terms[i], k, v, column, query, pad_query, grad_output, log_sum_exp, inverse, place,
            _first(TILES, i), factor,
            bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
            QUERY_ROW, GRAD_OUTPUT_ROW, QUERIES, KEYS, _size(TILES, i), i == COUNT - 1, ENDS,
            D, WIDTHS, BIAS, MASK, DROPS, NORMALISES, PRECISION, WINDOWS,
        )  # fmt: skip
        sums = sums + (d_q_of_tile,)
    d_k = _times(d_k, scale, WIDTHS)
    _store_rows(grad_key, GRAD_KEY_ROW, start, KEYS, d_k, SIZE, D, WIDTHS, place, WINDOWS)
    _store_rows(grad_value, GRAD_VALUE_ROW, start, KEYS, d_v, SIZE, D, WIDTHS, place, WINDOWS)
    part = image * ((KEYS + BLOCK_K - 1) // BLOCK_K) + start // BLOCK_K
    _store_pad_sums(pad_sums, part, head, HEADS, column, d_k, d_v, place, D, WIDTHS, WINDOWS)
    return sums


# All gradients of one head in one program, for queries that are all on chip: registers hold dQ of all of them, blocks
# of keys pass by, and for each of them the tiles of queries. Five products where two kernels need seven.
# Reads K and V once, Q and dO once a block of keys (from the caches); writes dQ, dK, dV once.
@triton.jit
def attention_backward_head(
    query, key, value, grad_output, output, pad, bias, mask, seed, log_sum_exp, inverse, row_terms,
    grad_query, grad_key, grad_value, pad_sums,
    query_image, query_head, key_image, key_head, value_image, value_head, grad_output_image, grad_output_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    grad_query_image, grad_query_head, grad_key_image, grad_key_head, grad_value_image, grad_value_head,
    scale, factor, threshold, kept_factor, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GRAD_OUTPUT_ROW: tl.constexpr,
    GRAD_QUERY_ROW: tl.constexpr, GRAD_KEY_ROW: tl.constexpr, GRAD_VALUE_ROW: tl.constexpr, GAP: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr,
    NORMALISES: tl.constexpr, PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Queries lie in tiles of sizes TILES; row_terms is written unless it is None.

    TAIL_K: size of a block of its own for the last keys, which alone is masked; 0: they are in blocks of BLOCK_K, too.
    GAP: see `_of_head`; that of the gradients is the same.
    """
    _, head, image = _program(1, HEADS)
    of_map, place = _place(image, WINDOWS)
    pair = image * HEADS + head
    query, key, value = _of_head(
        query, key, value, query_image, query_head, key_image, key_head, value_image, value_head, of_map, head,
        _tokens_of_image(QUERIES, WINDOWS), QUERY_ROW, GAP, D,
    )  # fmt: skip
    grad_query, grad_key, grad_value = _of_head(
        grad_query, grad_key, grad_value, grad_query_image, grad_query_head, grad_key_image, grad_key_head,
        grad_value_image, grad_value_head, of_map, head, _tokens_of_image(QUERIES, WINDOWS), GRAD_QUERY_ROW, GAP, D,
    )  # fmt: skip
    grad_output += of_map * grad_output_image + head * grad_output_head
    output += (of_map * _tokens_of_image(QUERIES, WINDOWS) * HEADS + head) * D
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    mask = _offset_base(mask, image, head, mask_image, mask_head)
    pad_query, pad_key, pad_value = _pad_rows(pad, head, HEADS, D)

    COUNT: tl.constexpr = len(TILES)
    terms = ()
    d_q = ()
    for i in tl.static_range(COUNT):
        d_o = _load_rows(
            grad_output, GRAD_OUTPUT_ROW, _first(TILES, i), QUERIES, _size(TILES, i), D, WIDTHS, i == COUNT - 1,
            place, None, WINDOWS,
        )  # fmt: skip
        term = _row_term(
            d_o, output, _first(TILES, i), QUERIES, HEADS * D, place, _size(TILES, i), i == COUNT - 1, D, WIDTHS,
            WINDOWS,
        )  # fmt: skip
        if row_terms is not None:
            row = _first(TILES, i) + tl.arange(0, term.shape[0])
            tl.store(row_terms + pair * QUERIES + row, term, mask=row < QUERIES)
        terms = terms + (term,)
        d_q = d_q + (_zeros(term.shape[0], WIDTHS),)
    WHOLE: tl.constexpr = KEYS // BLOCK_K * BLOCK_K if TAIL_K > 0 else KEYS
    for start in tl.range(0, WHOLE, BLOCK_K, num_stages=1):
        d_q = _head_block(
            d_q, terms, start, query, key, value, grad_output, pad_query, pad_key, pad_value, bias, mask, seed,
            log_sum_exp, inverse, grad_key, grad_value, pad_sums, bias_query, bias_key, mask_query, mask_key,
            image, head, place, scale, factor, threshold, kept_factor, HEADS, QUERIES, KEYS,
            QUERY_ROW, KEY_ROW, VALUE_ROW, GRAD_OUTPUT_ROW, GRAD_KEY_ROW, GRAD_VALUE_ROW,
            D, WIDTHS, BIAS, MASK, DROPS, NORMALISES, PRECISION, WINDOWS, BLOCK_K, BLOCK_K, WHOLE % BLOCK_K > 0, TILES,
        )  # fmt: skip
    if TAIL_K > 0:
        d_q = _head_block(
            d_q, terms, WHOLE, query, key, value, grad_output, pad_query, pad_key, pad_value, bias, mask, seed,
            log_sum_exp, inverse, grad_key, grad_value, pad_sums, bias_query, bias_key, mask_query, mask_key,
            image, head, place, scale, factor, threshold, kept_factor, HEADS, QUERIES, KEYS,
            QUERY_ROW, KEY_ROW, VALUE_ROW, GRAD_OUTPUT_ROW, GRAD_KEY_ROW, GRAD_VALUE_ROW,
            D, WIDTHS, BIAS, MASK, DROPS, NORMALISES, PRECISION, WINDOWS, BLOCK_K, TAIL_K, True, TILES,
        )  # fmt: skip
    for i in tl.static_range(COUNT):
        _store_rows(
            grad_query, GRAD_QUERY_ROW, _first(TILES, i), QUERIES, _times(d_q[i], scale, WIDTHS), _size(TILES, i),
            D, WIDTHS, place, WINDOWS,
        )  # fmt: skip


# dQ = scale dS K: a program has BLOCK_Q queries of a head, and blocks of keys pass by. Writes their row terms as well,
# for the kernels below that have no query to themselves.
@triton.jit
def attention_backward_queries(
    query, key, value, grad_output, output, pad, bias, mask, seed, log_sum_exp, inverse, row_terms, grad_query,
    query_image, query_head, key_image, key_head, value_image, value_head,
    grad_output_image, grad_output_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    grad_query_image, grad_query_head,
    heads, queries, keys, scale, factor, threshold, kept_factor,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GRAD_OUTPUT_ROW: tl.constexpr,
    GRAD_QUERY_ROW: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr,
    NORMALISES: tl.constexpr, PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of query and row terms (B, H, Nq) of BLOCK_Q queries."""
    block, head, image = _program((queries + BLOCK_Q - 1) // BLOCK_Q, heads)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    pair = image * heads + head
    of_map, place = _place(image, WINDOWS)
    key += of_map * key_image + head * key_head
    value += of_map * value_image + head * value_head
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    mask = _offset_base(mask, image, head, mask_image, mask_head)
    query += of_map * query_image + head * query_head
    grad_output += of_map * grad_output_image + head * grad_output_head
    pad_query, pad_key, pad_value = _pad_rows(pad, head, heads, D)
    q = _load_rows(query, QUERY_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
    d_o = _load_rows(grad_output, GRAD_OUTPUT_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, None, WINDOWS)
    known = _log_sum_exp(log_sum_exp + pair * queries, row, queries)
    output += (of_map * _tokens_of_image(queries, WINDOWS) * heads + head) * D
    row_term = _row_term(d_o, output, first, queries, heads * D, place, BLOCK_Q, True, D, WIDTHS, WINDOWS)
    tl.store(row_terms + pair * queries + row, row_term, mask=row < queries)
    d_q = _zeros(BLOCK_Q, WIDTHS)
    for start in range(0, keys, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        k = _load_rows(key, KEY_ROW, start, keys, BLOCK_K, D, WIDTHS, True, place, pad_key, WINDOWS)
        v = _load_rows(value, VALUE_ROW, start, keys, BLOCK_K, D, WIDTHS, True, place, pad_value, WINDOWS)
        _, d_s = _grad_scores(
            q, k, v, d_o, row, queries, column, keys, factor, known, 1.0, row_term,
            bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
            True, BIAS, MASK, DROPS, False, PRECISION, WIDTHS, TRANSPOSED=False,
        )  # fmt: skip
        d_q = _add_mixed(d_s.to(k[0].dtype), k, d_q, WIDTHS, PRECISION)
    block, head, image = _program_after_loop(block, head, image, queries, heads, BLOCK_Q, WIDTHS)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    pair = image * heads + head
    of_map, place = _place(image, WINDOWS)
    # What makes up for the rounding of the log-sum-exp is a factor of all of a query's probabilities.
    d_q = _times(d_q, _inverse(inverse, pair * queries, row, queries, NORMALISES)[:, None] * scale, WIDTHS)
    grad_query += of_map * grad_query_image + head * grad_query_head
    _store_rows(grad_query, GRAD_QUERY_ROW, first, queries, d_q, BLOCK_Q, D, WIDTHS, place, WINDOWS)


# dK = scale dS^T Q, dV = P^T dO: a program has BLOCK_K keys of a head, and blocks of queries pass by.
@triton.jit
def attention_backward_keys(
    query, key, value, grad_output, pad, bias, mask, seed, log_sum_exp, inverse, row_terms,
    grad_key, grad_value, pad_sums,
    query_image, query_head, key_image, key_head, value_image, value_head,
    grad_output_image, grad_output_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    grad_key_image, grad_key_head, grad_value_image, grad_value_head,
    heads, queries, keys, scale, factor, threshold, kept_factor,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GRAD_OUTPUT_ROW: tl.constexpr,
    GRAD_KEY_ROW: tl.constexpr, GRAD_VALUE_ROW: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr,
    NORMALISES: tl.constexpr, PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of key and value of BLOCK_K keys."""
    block, head, image = _program((keys + BLOCK_K - 1) // BLOCK_K, heads)
    first = block * BLOCK_K
    column = first + tl.arange(0, BLOCK_K)
    pair = image * heads + head
    of_map, place = _place(image, WINDOWS)
    query += of_map * query_image + head * query_head
    key += of_map * key_image + head * key_head
    value += of_map * value_image + head * value_head
    grad_output += of_map * grad_output_image + head * grad_output_head
    bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
    mask = _offset_base(mask, image, head, mask_image, mask_head)
    pad_query, pad_key, pad_value = _pad_rows(pad, head, heads, D)
    k = _load_rows(key, KEY_ROW, first, keys, BLOCK_K, D, WIDTHS, True, place, pad_key, WINDOWS)
    v = _load_rows(value, VALUE_ROW, first, keys, BLOCK_K, D, WIDTHS, True, place, pad_value, WINDOWS)
    d_k = _zeros(BLOCK_K, WIDTHS)
    d_v = _zeros(BLOCK_K, WIDTHS)
    for start in range(0, queries, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        q = _load_rows(query, QUERY_ROW, start, queries, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
        d_o = _load_rows(grad_output, GRAD_OUTPUT_ROW, start, queries, BLOCK_Q, D, WIDTHS, True, place, None, WINDOWS)
        known = _log_sum_exp(log_sum_exp + pair * queries, row, queries)
        row_term = tl.load(row_terms + pair * queries + row, mask=row < queries, other=0.0)
        # Rows of keys beyond the last are not written; only the sums of padding would see them.
        p, d_s = _grad_scores(
            q, k, v, d_o, row, queries, column, keys, factor, known,
            _inverse(inverse, pair * queries, row, queries, NORMALISES), row_term,
            bias, bias_query, bias_key, mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
            _is_padded(WINDOWS), BIAS, MASK, DROPS, NORMALISES, PRECISION, WIDTHS,
        )  # fmt: skip
        d_v = _add_mixed(p.to(d_o[0].dtype), d_o, d_v, WIDTHS, PRECISION)
        d_k = _add_mixed(d_s.to(q[0].dtype), q, d_k, WIDTHS, PRECISION)
    block, head, image = _program_after_loop(block, head, image, keys, heads, BLOCK_K, WIDTHS)
    first = block * BLOCK_K
    column = first + tl.arange(0, BLOCK_K)
    of_map, place = _place(image, WINDOWS)
    grad_key += of_map * grad_key_image + head * grad_key_head
    grad_value += of_map * grad_value_image + head * grad_value_head
    d_k = _times(d_k, scale, WIDTHS)
    _store_rows(grad_key, GRAD_KEY_ROW, first, keys, d_k, BLOCK_K, D, WIDTHS, place, WINDOWS)
    _store_rows(grad_value, GRAD_VALUE_ROW, first, keys, d_v, BLOCK_K, D, WIDTHS, place, WINDOWS)
    part = image * ((keys + BLOCK_K - 1) // BLOCK_K) + block
    _store_pad_sums(pad_sums, part, head, heads, column, d_k, d_v, place, D, WIDTHS, WINDOWS)


# dBias = dS, summed where the bias is broadcast: a program has one tile of one head of the bias and one part of the
# images, which pass by; the parts are added afterwards, in fixed order.
@triton.jit
def attention_backward_bias(
    query, key, value, grad_output, pad, bias, mask, seed, log_sum_exp, inverse, row_terms, parts,
    query_image, query_head, key_image, key_head, value_image, value_head,
    grad_output_image, grad_output_head,
    bias_image, bias_head, bias_query, bias_key, mask_image, mask_head, mask_query, mask_key,
    images, heads, queries, keys, bias_heads, images_of_part, factor, threshold, kept_factor,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GRAD_OUTPUT_ROW: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPS: tl.constexpr,
    NORMALISES: tl.constexpr, PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Parts (parts of the images, bias_heads, Nq, Nk) of the gradient, in float32; a bias of one head serves all."""
    key_blocks = (keys + BLOCK_K - 1) // BLOCK_K
    query_blocks = (queries + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    first_key = program % key_blocks * BLOCK_K
    first = program // key_blocks % query_blocks * BLOCK_Q
    head_of_bias = program // key_blocks // query_blocks % bias_heads
    part = (program // key_blocks // query_blocks // bias_heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_Q)
    column = first_key + tl.arange(0, BLOCK_K)
    heads_of_bias = heads // bias_heads
    total = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    first_pair = part * images_of_part * heads_of_bias
    end = tl.minimum((part + 1) * images_of_part, images) * heads_of_bias
    for number in range(first_pair, end):
        image = number // heads_of_bias
        head = head_of_bias * heads_of_bias + number % heads_of_bias
        of_map, place = _place(image, WINDOWS)
        pair = image * heads + head
        at_query = query + of_map * query_image + head * query_head
        at_grad = grad_output + of_map * grad_output_image + head * grad_output_head
        at_key = key + of_map * key_image + head * key_head
        at_value = value + of_map * value_image + head * value_head
        pad_query, pad_key, pad_value = _pad_rows(pad, head, heads, D)
        at_bias = _offset_base(bias, _kind(image, place, WINDOWS), head, bias_image, bias_head)
        at_mask = _offset_base(mask, image, head, mask_image, mask_head)
        known = _log_sum_exp(log_sum_exp + pair * queries, row, queries)
        of_row = _inverse(inverse, pair * queries, row, queries, NORMALISES)
        row_term = tl.load(row_terms + pair * queries + row, mask=row < queries, other=0.0)
        if _is_narrow(WIDTHS):
            scores = factor * _products_in_turn(
                at_key, KEY_ROW, first_key, keys, pad_key, at_query, QUERY_ROW, first, queries, pad_query, place,
                BLOCK_K, BLOCK_Q, D, WIDTHS, PRECISION, WINDOWS,
            )  # fmt: skip
            p = _probabilities(
                scores, row, queries, column, keys, known, of_row, at_bias, bias_query, bias_key,
                at_mask, mask_query, mask_key, True, BIAS, MASK, NORMALISES, True,
            )  # fmt: skip
            grad = _products_in_turn(
                at_value, VALUE_ROW, first_key, keys, pad_value, at_grad, GRAD_OUTPUT_ROW, first, queries, None, place,
                BLOCK_K, BLOCK_Q, D, WIDTHS, PRECISION, WINDOWS,
            )  # fmt: skip
            _, d_s = _dropped(
                p, grad, row, column, keys, row_term, pair * queries * keys, seed, threshold, kept_factor, DROPS, True
            )
        else:
            q = _load_rows(at_query, QUERY_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, pad_query, WINDOWS)
            d_o = _load_rows(at_grad, GRAD_OUTPUT_ROW, first, queries, BLOCK_Q, D, WIDTHS, True, place, None, WINDOWS)
            k = _load_rows(at_key, KEY_ROW, first_key, keys, BLOCK_K, D, WIDTHS, True, place, pad_key, WINDOWS)
            v = _load_rows(at_value, VALUE_ROW, first_key, keys, BLOCK_K, D, WIDTHS, True, place, pad_value, WINDOWS)
            _, d_s = _grad_scores(
                q, k, v, d_o, row, queries, column, keys, factor, known, of_row, row_term,
                at_bias, bias_query, bias_key, at_mask, mask_query, mask_key, pair, seed, threshold, kept_factor,
                True, BIAS, MASK, DROPS, NORMALISES, PRECISION, WIDTHS,
            )  # fmt: skip
        total += d_s
    cells = parts + ((part * bias_heads + head_of_bias) * queries + row)[None, :] * keys + column[:, None]
    tl.store(cells, total, mask=(column < keys)[:, None] & (row < queries)[None, :])
