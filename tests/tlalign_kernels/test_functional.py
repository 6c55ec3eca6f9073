"""The operator: accuracy and gradients of every backend, properties of labels, and the contracts of torch."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import call, check_heads_may_be_permuted, check_labels_never_influence_others
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tlalign_kernels as tlk
from tlalign_kernels import ops, selftest
from tlalign_kernels.backends import AUTO_ORDER, BACKENDS, problem_class, reference
from tlalign_kernels.backends.bias_sums import images_of_sum
from tlalign_kernels.selftest import CASES, Case, cast_inputs, compare, make_inputs, run_operator, run_plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def is_usable(backend, dtype=torch.float32):
    tensor = torch.empty(1, 1, 1, 8, dtype=dtype)
    return tlk.explain(tensor, tensor, tensor, backend=backend).backend is not None


# Triton is among them under TRITON_INTERPRET=1: see test_triton.py.
backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if is_usable(name)])


@pytest.fixture
def another_backend():
    """Adds the reference under the name "another", with some of its functions replaced."""

    def add(**replaced):
        functions = {name: getattr(reference, name) for name in ("forward", "backward", "unsupported_reasons")}
        BACKENDS["another"] = ops.LAUNCHERS["another"] = SimpleNamespace(**{**functions, **replaced})

    yield add
    BACKENDS.pop("another", None)
    ops.LAUNCHERS.pop("another", None)


def only_float16(problem):
    return [] if problem.dtype == torch.float16 else [f"dtype: expected float16, got {problem.dtype}"]


@st.composite
def cases(draw):
    """Random shapes and options."""
    queries = draw(st.integers(1, 40))
    packed = draw(st.booleans())
    return Case(
        "random",
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        queries=queries,
        keys=queries if packed else draw(st.integers(1, 40)),
        head_dim=draw(st.integers(8, 40)),
        sources=draw(st.integers(1, 5)),
        packed=packed,
        residual=draw(st.booleans()),
        bias_scale=draw(st.sampled_from([0.0, 1.0, 10.0])),
        mask=draw(st.sampled_from([None, "causal", "rows", "additive"])),
    )


# Accuracy


@pytest.mark.parametrize("case", [case for case in CASES if case.dropout_p == 0], ids=lambda case: case.name)
def test_reference_in_float64_is_plain_attention(case):
    inputs = make_inputs(case, "cpu", torch.float64)
    ours, plain = run_operator(case, inputs, "reference"), run_plain(case, inputs)
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-12, atol=1e-12)
    assert ours["share"].dtype == torch.float64


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_errors_are_within_the_bound(backend, dtype, case, seed):
    if reasons := selftest.reasons_against(case, dtype, backend, "cpu"):
        pytest.skip("; ".join(reasons))
    if backend == "triton" and case.queries > 30:
        # Interpreted, programs run in turn, for minutes; smaller cases have several images and more heads.
        case = dataclasses.replace(case, batch=1, heads=min(case.heads, 2))
    checks = compare(case, dtype, backend, seed=seed)
    gradients = {"gradient of query", "gradient of value"} if case.windows is None else {"gradient of qkv"}
    assert {check.tensor for check in checks} >= {"output", "share", *gradients}
    assert [check for check in checks if not check.passed] == []


@backends
@given(case=cases(), seed=st.integers(0, 2**31))
def test_errors_are_within_the_bound_at_random_shapes(backend, case, seed):
    assert [check for check in compare(case, torch.float32, backend, seed=seed) if not check.passed] == []


def test_the_bound_notices_an_error_of_one_part_in_ten_thousand(another_backend):
    def forward(inputs, share, residual, output, *others):
        reference.forward(inputs, share, residual, output, *others)
        output.mul_(1.0001)

    another_backend(forward=forward)
    failed = [check.tensor for check in compare(CASES[0], torch.float32, "another") if not check.passed]
    assert "output" in failed
    assert "share" not in failed


@backends
@pytest.mark.parametrize("head_dim", [8, 16, 48, 72, 80, 88, 128, 256])
def test_head_dims(backend, head_dim):
    case = Case("head dim", queries=19, keys=23, head_dim=head_dim)
    assert all(check.passed for check in compare(case, torch.float32, backend))


# Labels


@backends
@given(case=cases(), seed=st.integers(0, 2**31), constant=st.floats(0, 1))
def test_shares_stay_in_the_unit_interval_and_a_constant_is_a_fixed_point(backend, case, seed, constant):
    inputs = make_inputs(case, "cpu", torch.float32, seed)
    share = call(inputs, backend=backend)[1]
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-6
    # Without a residual, queries that see no key have the label 0.
    if case.mask == "rows" and not case.residual:
        inputs["mask"] = None
    same = {"share": torch.full_like(inputs["share"], constant)}
    if case.residual:
        same["residual"] = torch.full_like(inputs["residual"], constant)
    fixed = call(inputs, **same, backend=backend)[1]
    torch.testing.assert_close(fixed, torch.full_like(fixed, constant), rtol=0, atol=2e-6)


@backends
@given(case=cases(), seed=st.integers(0, 2**31))
def test_one_share_equals_dense_labels_of_the_pair(backend, case, seed):
    classes, first, second = 10, 3, 7
    # Without a residual, queries that see no key have the label 0.
    case = dataclasses.replace(case, sources=1, residual=case.residual or case.mask == "rows")
    inputs = make_inputs(case, "cpu", torch.float32, seed)

    def as_classes(share):
        return torch.zeros(*share.shape[:2], classes).index_add_(
            2, torch.tensor([first, second]), torch.cat((1 - share, share), dim=2)
        )

    dense = {name: as_classes(inputs[name]) for name in ("share", "residual") if inputs[name] is not None}
    share = call(inputs, backend=backend)[1]
    aligned = call(inputs, **dense, backend=backend)[1]
    # Dense labels are mixed by exp(score - log_sum_exp): the rounding of a log-sum-exp of up to 32 comes to 2e-6.
    torch.testing.assert_close(aligned, as_classes(share), rtol=0, atol=3e-6)


@backends
@given(case=cases(), seed=st.integers(0, 2**31))
def test_permuting_heads_leaves_labels_alone(backend, case, seed):
    check_heads_may_be_permuted(case, backend, seed)


@backends
@given(case=cases(), seed=st.integers(0, 2**31), sources=st.integers(1, 5))
def test_labels_never_influence_outputs_or_gradients(backend, case, seed, sources):
    check_labels_never_influence_others(case, backend, seed, sources)


@backends
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_repeats_bit_for_bit(backend, case):
    inputs = make_inputs(case, "cpu", torch.float32)
    first, second = run_operator(case, inputs, backend), run_operator(case, inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@backends
def test_queries_that_see_no_key_give_zero_and_keep_their_label(backend):
    case = Case("rows", queries=21, keys=24, mask="rows")
    inputs = make_inputs(case, "cpu", torch.float32)
    blind = torch.arange(21) % 3 == 0
    results = run_operator(case, inputs, backend)
    assert torch.equal(results["share"][:, blind], inputs["residual"][:, blind])
    assert not results["output"][:, :, blind].any()
    assert not results["gradient of query"][:, :, blind].any()
    assert all(torch.isfinite(tensor).all() for tensor in results.values())
    assert not call(inputs, residual=None, backend=backend)[1][:, blind].any()


@backends
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("mask", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        *(("bias", dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("lowest", [None, -1e9])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_large_finite_number_masks_but_for_queries_that_have_it_for_all_keys(backend, name, dtype, lowest, sign):
    case = Case("rows", queries=5, keys=7)
    inputs = make_inputs(case, "cpu", torch.float32)
    lowest = torch.finfo(dtype).min if lowest is None else lowest
    mask = torch.zeros(5, 7, dtype=dtype)
    mask[1] = -sign * lowest
    mask[2, 1:] = mask[4, 3:] = lowest
    mask[3] = float("-inf")
    results = run_operator(case, {**inputs, name: mask[None, None]}, backend)
    results.pop("gradient of bias", None)
    as_bool = torch.ones(5, 7, dtype=torch.bool)
    as_bool[2, 1:] = as_bool[4, 3:] = as_bool[3] = False
    expected = run_operator(case, {**inputs, "mask": as_bool}, backend)
    for name, tensor in results.items():
        # Beside the number float32 keeps scores to 1 / 256.
        torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=0.02 * float(expected[name].abs().max()))
    torch.testing.assert_close(results["output"][:, :, 4], expected["output"][:, :, 4], rtol=1e-5, atol=1e-5)
    assert not results["output"][:, :, 3].any()


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_large_numbers_differ_in_float64(name):
    query, share = torch.zeros(1, 1, 2, 8, dtype=torch.float64), torch.tensor([[[1.0], [0.0]]])
    offsets = torch.tensor([1e5 + 1, 1e5], dtype=torch.float64)
    _, mixed = tlk.attention(query, query, query, share, **{name: offsets})
    torch.testing.assert_close(mixed, torch.tensor([1.0, 0.0]).softmax(dim=0)[0].expand(1, 2, 1))


@backends
def test_a_bias_in_float64_counts_as_float32(backend):
    inputs = make_inputs(Case("bias", queries=5, keys=7), "cpu", torch.float32)
    bias = torch.randn(5, 7, dtype=torch.float64).requires_grad_()
    output, share = call(inputs, bias=bias, backend=backend)
    expected = call(inputs, bias=bias.detach().float(), backend=backend)
    assert torch.equal(output, expected[0])
    assert torch.equal(share, expected[1])
    output.square().sum().backward()
    assert bias.grad.dtype == torch.float64
    assert bias.grad.any()


@backends
@pytest.mark.parametrize("sources", [1, 9])
def test_a_bias_of_minus_infinity_hides_keys_as_a_mask_does(backend, sources):
    inputs = make_inputs(Case("hidden", queries=6, keys=7, sources=sources), "cpu", torch.float32)
    mask = torch.rand(1, 3, 6, 7) > 0.5
    mask[:, 1, 2] = mask[:, :, 3] = False
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    by_bias, by_mask = call(inputs, bias=bias, backend=backend), call(inputs, mask=mask, backend="reference")
    for ours, expected in zip(by_bias, by_mask, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


@backends
@pytest.mark.parametrize("sources", [1, 9])
@pytest.mark.parametrize("bias", [-9999.7, 9999.7])
def test_weights_add_up_to_one_where_scores_are_large(backend, sources, bias):
    # So does what a constant label, and a gradient, is multiplied by. In float32 such scores are known to 1 / 1024.
    query, key, value = torch.randn(3, 1, 2, 20, 16).unbind(0)
    value.requires_grad_()
    share = torch.full((1, 20, sources), 0.3)
    output, mixed = tlk.attention(query, key, value, share, bias=torch.tensor(bias), backend=backend)
    torch.testing.assert_close(mixed, share, rtol=0, atol=2e-6)
    grad_output = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, value, grad_output)
    torch.testing.assert_close(gradient.sum(dim=2), grad_output.sum(dim=2), rtol=1e-5, atol=3e-5)


@backends
@pytest.mark.parametrize("sources", [1, 9])
def test_heads_that_see_no_key_do_not_count_in_the_mean(backend, sources):
    inputs = make_inputs(Case("heads", queries=6, keys=6, sources=sources, residual=False), "cpu", torch.float32)
    mask = torch.ones(1, 3, 6, 6, dtype=torch.bool)
    mask[:, 1, 2] = False
    share = call(inputs, mask=mask, backend=backend)[1]
    others = {name: inputs[name][:, [0, 2]] for name in ("query", "key", "value")}
    torch.testing.assert_close(share[:, 2], call(inputs, **others, backend=backend)[1][:, 2], rtol=0, atol=2e-6)


@backends
def test_a_share_that_requires_a_gradient_is_accepted_and_gets_none(backend):
    inputs = make_inputs(Case("share", queries=6, keys=6), "cpu", torch.float32)
    leaf = inputs["share"].clone().requires_grad_()
    query = inputs["query"].clone().requires_grad_()
    output, share = call(inputs, query=query, share=leaf, residual=leaf, backend=backend)
    assert not share.requires_grad
    output.sum().backward()
    assert leaf.grad is None
    assert query.grad is not None


# Gradients and memory


@backends
def test_gradients_of_any_strides_are_handled(backend):
    inputs = make_inputs(Case("strides", queries=9, keys=9), "cpu", torch.float32)
    query = inputs["query"].clone().requires_grad_()

    def gradient(grad_output):
        output, _ = call(inputs, query=query, backend=backend)
        return torch.autograd.grad(output, query, grad_output)[0]

    ones = torch.ones(())
    torch.testing.assert_close(gradient(ones.expand(2, 3, 9, 64)), gradient(torch.ones(2, 3, 9, 64)))
    grad_output = torch.randn(64, 9, 3, 2).permute(3, 2, 1, 0)
    torch.testing.assert_close(gradient(grad_output), gradient(grad_output.contiguous()))


@backends
@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
@pytest.mark.parametrize("bias_scale", [0.0, 1.0])
def test_any_scale_gives_the_scores_of_a_scaled_query(backend, scale, bias_scale):
    case = Case("scale", queries=18, keys=21, head_dim=20, bias_scale=bias_scale)
    inputs = make_inputs(case, "cpu", torch.float32)
    scaled = {**inputs, "query": inputs["query"] * scale}
    results = call(inputs, scale=scale, backend=backend)
    # Scores of up to about 60, a product and a query each rounded.
    for result, expected in zip(results, call(scaled, scale=1.0, backend=backend), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=3e-5)


@backends
def test_inputs_of_any_strides_are_handled(backend):
    case = Case("strides", queries=9, keys=11, sources=3, bias_scale=1.0)
    inputs = make_inputs(case, "cpu", torch.float32)
    expected = run_operator(case, inputs, backend)
    turned = {
        name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor is not None else None
        for name, tensor in inputs.items()
    }
    assert turned["query"].stride(-1) != 1 and turned["share"].stride(-1) != 1
    results = run_operator(case, turned, backend)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-5)


@backends
def test_views_of_projections_are_read_where_they_lie(backend):
    def results(query, key, value):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output, _ = tlk.attention(*leaves, backend=backend)
        grad_output = torch.arange(output.numel()).view_as(output).half() / 500
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    wide, many, long = (torch.randn(batch, tokens, 3, 2, 16).half() for batch, tokens in ((2, 7), (4, 7), (2, 9)))
    query, key, value = ops.unpack_qkv(wide)
    for views in ((query, key, value), (query, key, key), ops.unpack_qkv(many[::2]), ops.unpack_qkv(long[:, :7])):
        expected = results(*(view.clone(memory_format=torch.contiguous_format) for view in views))
        for ours, of_copies in zip(results(*views), expected, strict=True):
            torch.testing.assert_close(ours, of_copies, rtol=1e-3, atol=1e-3)


@backends
@pytest.mark.parametrize("heads", [1, 3])
def test_a_bias_that_was_expanded_over_images_has_the_gradient_of_each(backend, heads):
    batch = 3 if backend == "triton" else 97
    inputs = make_inputs(Case("expanded", batch=batch, queries=5, keys=7, head_dim=8), "cpu", torch.float32)
    bias, gradients = torch.randn(1, heads, 5, 7), []
    for leaf in (bias.expand(batch, 3, 5, 7), bias.repeat(batch, 3 // heads, 1, 1)):
        output, _ = call(inputs, bias=leaf.requires_grad_(), backend=backend)
        gradients += torch.autograd.grad(output, leaf, inputs["grad_output"])
    torch.testing.assert_close(*gradients)


@backends
def test_bias_and_mask_broadcast(backend):
    inputs = make_inputs(Case("broadcast", queries=5, keys=7, head_dim=8), "cpu", torch.float32)
    scores = torch.zeros(2, 3, 5, 7)
    shapes = [(), (7,), (5, 7), (5, 1), (3, 5, 7), (3, 1, 1), (1, 3, 5, 7), (2, 1, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7)]
    # Interpreted, each takes seconds.
    for shape in [(7,), (5, 1), (2, 1, 5, 7)] if backend == "triton" else shapes:
        bias = torch.randn(shape, requires_grad=True)
        output, share = call(inputs, bias=bias, backend=backend)
        full = (scores + bias.detach()).requires_grad_()
        full_output, full_share = call(inputs, bias=full, backend=backend)
        torch.testing.assert_close(output, full_output)
        torch.testing.assert_close(share, full_share)
        (gradient,) = torch.autograd.grad(output, bias, inputs["grad_output"])
        (full_gradient,) = torch.autograd.grad(full_output, full, inputs["grad_output"])
        torch.testing.assert_close(gradient, full_gradient.sum_to_size(shape), rtol=1e-5, atol=1e-5)
        allowed = torch.rand(shape) > 0.3
        masked, masked_share = call(inputs, mask=allowed, backend=backend)
        added = torch.zeros(shape).masked_fill(~allowed, float("-inf"))
        added_output, added_share = call(inputs, mask=added, backend=backend)
        assert torch.equal(masked, added_output)
        assert torch.equal(masked_share, added_share)


@pytest.mark.parametrize(
    ("batch", "bias_images", "tiles", "images"),
    [(5, 5, 100, 1), (64, 1, 12, 1), (128, 1, 16, 2), (4096, 1, 1, 4), (3, 1, 100_000, 3)],
)
def test_about_1024_programs_sum_the_gradients_of_a_bias(batch, bias_images, tiles, images):
    assert images_of_sum(batch, bias_images, tiles) == images


@backends
@pytest.mark.parametrize("shape", [(), (7,), (60, 1)])
def test_the_gradient_of_a_bias_of_fewer_bits_is_summed_before_it_is_rounded(backend, shape):
    inputs = make_inputs(Case("broadcast", queries=60, keys=7, head_dim=8), "cpu", torch.float32)
    bias = torch.randn(shape).bfloat16()
    gradients = []
    for leaf in (bias.requires_grad_(), bias.detach().float().requires_grad_()):
        output, _ = call(inputs, bias=leaf, backend=backend)
        gradients += torch.autograd.grad(output, leaf, inputs["grad_output"])
    assert torch.equal(gradients[0], gradients[1].bfloat16())


@backends
@pytest.mark.parametrize("mask_shape", [(1, 1, 20, 20), (70, 1, 20, 20)])
def test_a_bias_that_images_share_and_a_mask_add_up(backend, mask_shape):
    # So many images that a task of the CPU kernels has several, for which it keeps what they share.
    case = Case("windows", batch=70, heads=2, queries=20, keys=20, head_dim=8, bias_scale=1.0)
    inputs = make_inputs(case, "cpu", torch.float32)
    mask = (torch.rand(mask_shape) > 0.3) | torch.eye(20, dtype=torch.bool)
    whole = (inputs["bias"] + torch.zeros(mask_shape).masked_fill(~mask, float("-inf"))).expand(70, 2, 20, 20)
    results = []
    for changes in ({"mask": mask}, {"bias": whole}):
        query = inputs["query"].clone().requires_grad_()
        output, share = call(inputs, query=query, backend=backend, **changes)
        (gradient,) = torch.autograd.grad(output, query, inputs["grad_output"])
        results.append((output.detach(), share, gradient))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_computed_for_a_bias_that_needs_none(another_backend):
    asked = []

    def recording(backward):
        return lambda *arguments: asked.append(arguments[-1] is not None) or backward(*arguments)

    another_backend(
        backward=recording(reference.backward),
        window_forward=reference.window_forward,
        window_backward=recording(reference.window_backward),
    )
    qkv = torch.randn(1, 4, 3, 2, 8, requires_grad=True)
    for needs_gradient in (False, True):
        options = dict(bias=torch.zeros(4, 4, requires_grad=needs_gradient), backend="another")
        for output in (
            tlk.attention_qkv(qkv, **options)[0],
            tlk.attention(*ops.unpack_qkv(qkv), **options)[0],
            tlk.window_attention(qkv.unflatten(1, (2, 2)), window_size=(2, 2), **options)[0],
        ):
            output.sum().backward()
    assert asked == [False] * 3 + [True] * 3


@backends
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_of_the_size_of_the_scores_is_saved(backend, packed):
    case = Case("memory", batch=1, heads=2, queries=130, keys=130, head_dim=16, packed=packed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        run_operator(case, make_inputs(case, "cpu", torch.float32), backend)
    assert saved
    assert max(shape.numel() for shape in saved) < 130 * 130


def test_packed_gradient_has_the_layout_of_the_projection():
    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    output, share = tlk.attention_qkv(qkv, torch.rand(2, 9, 1))
    assert output.shape == (2, 9, 4, 16)
    assert output.is_contiguous()
    assert share.shape == (2, 9, 1)
    nodes = output.grad_fn.next_functions
    assert type(nodes[0][0]).__name__ == "AccumulateGrad"  # neither unbind nor cat in between
    (gradient,) = torch.autograd.grad(output.sum(), qkv)
    assert gradient.is_contiguous()


def test_output_lies_in_memory_with_heads_beside_each_other():
    output, share = tlk.attention(*torch.randn(3, 2, 4, 9, 16).unbind(0))
    assert output.transpose(1, 2).is_contiguous()
    assert share is None


def test_transforms_that_differentiate_are_refused_and_others_computed():
    qkv, share = torch.randn(3, 5, 3, 2, 8), torch.rand(3, 5, 1)

    def attended(qkv, share):
        return tlk.attention_qkv(qkv[None], share[None])[0].sum()

    with pytest.raises(NotImplementedError, match=r"attention_qkv: transforms of torch\.func"):
        torch.func.grad(attended)(qkv[0], share[0])
    forward_mode = (
        lambda: torch.func.jvp(attended, (qkv[0], share[0]), (qkv[1], share[1])),
        lambda: torch.func.jacfwd(attended)(qkv[0], share[0]),
        lambda: torch.func.linearize(attended, qkv[0], share[0]),
        lambda: torch.compile(lambda: torch.func.jvp(attended, (qkv[0], share[0]), (qkv[1], share[1])))(),
    )
    for transform in forward_mode:
        with pytest.raises(NotImplementedError, match="attention_qkv: there is no forward-mode derivative"):
            transform()
    with torch.no_grad():
        expected = torch.stack([attended(*each) for each in zip(qkv, share, strict=True)])
        torch.testing.assert_close(torch.vmap(attended)(qkv, share), expected)


def test_batched_gradients_are_those_of_each():
    qkv, share = torch.randn(2, 16, 3, 2, 8, requires_grad=True), torch.rand(2, 16, 1)
    query, key, value = qkv.unbind(2)
    maps = qkv.unflatten(1, (4, 4)), share.unflatten(1, (4, 4))
    for output, _ in (
        tlk.attention_qkv(qkv, share),
        tlk.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), share),
        tlk.window_attention(*maps, window_size=(2, 2), shift=(1, 1)),
    ):
        gradients = torch.randn(3, *output.shape)
        (batched,) = torch.autograd.grad(output, qkv, gradients, retain_graph=True, is_grads_batched=True)
        each = [torch.autograd.grad(output, qkv, gradient, retain_graph=True)[0] for gradient in gradients]
        torch.testing.assert_close(batched, torch.stack(each))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_mode_derivative_raises(gradients):
    qkv = torch.randn(1, 5, 3, 2, 8)
    with torch.set_grad_enabled(gradients), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, torch.ones_like(qkv))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            tlk.attention_qkv(dual)


def test_autocast_leaves_what_goes_with_float64_alone():
    qkv, bias = torch.randn(1, 7, 3, 2, 8, dtype=torch.float64), torch.randn(2, 7, 7)
    expected = tlk.attention_qkv(qkv, bias=bias)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tlk.attention_qkv(qkv, bias=bias)[0], expected)
    qkv, bias = qkv.float(), bias.double()
    expected = tlk.attention_qkv(qkv.bfloat16(), bias=bias)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tlk.attention_qkv(qkv, bias=bias)[0], expected)


def test_autocast_of_another_device_changes_nothing():
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert tlk.attention_qkv(torch.randn(1, 7, 3, 2, 8))[0].dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", before)
    with torch.autocast("cpu", torch.bfloat16):
        assert tlk.attention_qkv(torch.randn(1, 7, 3, 2, 8, device="meta"))[0].dtype == torch.float32


def test_a_problem_needs_a_gradient_if_anything_asks_for_one(monkeypatch):
    problems = []

    def choose(problem, backend):
        problems.append(problem)
        return "reference"

    monkeypatch.setattr("tlalign_kernels.functional.choose", choose)
    qkv, bias = torch.randn(1, 5, 3, 2, 8), torch.zeros(5, 5, requires_grad=True)
    tlk.attention_qkv(qkv)
    tlk.attention_qkv(qkv, bias=bias)
    with torch.no_grad():
        tlk.attention_qkv(qkv, bias=bias)
    pad_qkv = torch.zeros(3, 2, 8, requires_grad=True)
    tlk.window_attention(torch.randn(1, 3, 3, 3, 2, 8), window_size=(2, 2), pad_qkv=pad_qkv)
    assert [problem.needs_gradient for problem in problems] == [False, True, False, True]


def test_a_problem_is_of_the_gpu_of_its_tensors(monkeypatch):
    problems = []
    monkeypatch.setattr("tlalign_kernels.functional.choose", lambda problem, _: problems.append(problem) or "reference")
    with FakeTensorMode():
        tlk.attention_qkv(torch.empty(1, 9, 3, 2, 8, device="cuda:1"))
        tlk.window_attention(torch.empty(1, 4, 4, 3, 2, 8, device="cuda:2"), window_size=(2, 2))
    tlk.attention_qkv(torch.randn(1, 9, 3, 2, 8))
    assert [problem.device_index for problem in problems] == [1, 2, None]
    assert problem_class(problems[0]).device_index is None


def test_regions_of_shifted_windows_count_as_a_mask(monkeypatch):
    problems = []
    monkeypatch.setattr("tlalign_kernels.functional.choose", lambda problem, _: problems.append(problem) or "reference")
    for shift in ((0, 0), (0, 1)):
        tlk.window_attention(torch.randn(1, 4, 4, 3, 2, 8), window_size=(2, 2), shift=shift)
    assert [problem.has_mask for problem in problems] == [False, True]


def test_a_second_derivative_raises():
    query, key, value = torch.randn(3, 1, 2, 5, 8, requires_grad=True).unbind(0)
    output, _ = tlk.attention(query, key, value)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


# Dropout


def test_philox_gives_the_published_numbers():
    # Known answers of Philox4x32-10 from the Random123 distribution.
    zero = torch.zeros(1, dtype=torch.int64)
    assert reference._philox(zero, zero).item() == 0x6627E8D5
    index = torch.tensor([0x85A308D3243F6A88 - 2**64])
    seed = torch.tensor([0x299F31D0A4093822])
    expected = philox_by_the_book([0x243F6A88, 0x85A308D3, 0, 0], 0x299F31D0A4093822)
    assert reference._philox(index, seed).item() == expected
    assert philox_by_the_book([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822) == 0xD16CFE09


def philox_by_the_book(counter, key):
    """Philox4x32-10 in Python's unbounded integers."""
    words = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ words[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ words[1],
            first & 0xFFFFFFFF,
        ]
        words = [(words[0] + 0x9E3779B9) & 0xFFFFFFFF, (words[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter[0]


@backends
def test_dropout_drops_attention_weights_but_no_labels(backend):
    case = Case("dropout", batch=4, heads=3, queries=32, keys=32, head_dim=32, residual=False)
    inputs = make_inputs(case, "cpu", torch.float32)
    # With the identity as value, the output is the dropped attention matrix itself.
    inputs["value"] = torch.eye(32).expand(4, 3, 32, 32)
    full, share = call(inputs, backend=backend)
    torch.manual_seed(1)
    dropped, dropped_share = call(inputs, dropout_p=0.25, backend=backend)
    factor = dropped / full
    torch.testing.assert_close(factor, torch.where(factor > 0.5, 1 / 0.75, 0.0).to(factor))
    assert abs((factor == 0).double().mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / factor.numel())
    assert torch.equal(dropped_share, share)
    torch.manual_seed(1)
    assert torch.equal(call(inputs, dropout_p=0.25, backend=backend)[0], dropped)
    assert not torch.equal(call(inputs, dropout_p=0.25, backend=backend)[0], dropped)


def test_gradients_see_the_same_dropout():
    case = Case("dropout", batch=1, heads=2, queries=6, keys=5, head_dim=8, residual=False)
    inputs = make_inputs(case, "cpu", torch.float64)

    def attend(query, key, value):
        torch.manual_seed(3)
        return tlk.attention(query, key, value, dropout_p=0.5, backend="reference")[0]

    # In float64, which other backends need not have: they are compared with this one, dropout included.
    leaves = [inputs[name].clone().requires_grad_() for name in ("query", "key", "value")]
    assert torch.autograd.gradcheck(attend, leaves)


# torch


OPERATOR_CALLS = {
    "attention": lambda: (*leaves(3, 2, 3, 11, 16), *torch.rand(2, 2, 11, 2).unbind(0), bias_leaf(), None, None),
    "attention without labels": lambda: (*leaves(3, 2, 3, 11, 16), None, None, None, mask(), torch.tensor([5])),
    "attention_qkv": lambda: (*leaves(1, 2, 11, 3, 3, 16), torch.rand(2, 11, 1), None, bias_leaf(), mask(), None),
}


def leaves(count, *shape):
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def bias_leaf():
    return torch.randn(1, 3, 11, 11, requires_grad=True)


def mask():
    return torch.rand(2, 1, 11, 11) > 0.2


@backends
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck(backend, name):
    tensors = OPERATOR_CALLS[name]()
    dropout_p = 0.0 if tensors[-1] is None else 0.3
    operator = getattr(torch.ops.tlalign_kernels, name.split()[0]).default
    result = torch.library.opcheck(operator, (*tensors, 0.25, dropout_p, backend))
    assert set(result.values()) == {"SUCCESS"}


def test_all_operators_are_said_to_be_fit_for_compiling():
    assert all(torch.Tag.pt2_compliant_tag in operator.tags for operator, *_ in ops._OPERATORS.values())


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.add(operator.name())
        return operator(*arguments, **(options or {}))


@backends
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_operators_are_seen_by_dispatch_modes_and_compute_the_same(name, backend):
    *tensors, _ = OPERATOR_CALLS[name]()
    leaves = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    name = name.split()[0]

    def run():
        output, *_ = ops.call(name, *tensors, None, 0.25, 0.0, backend)
        return output, *torch.autograd.grad(output.sum(), leaves)

    direct = run()
    with Seen() as seen:
        dispatched = run()
    assert {f"tlalign_kernels::{name}", f"tlalign_kernels::{name}_backward"} <= seen.names
    assert all(torch.equal(first, second) for first, second in zip(direct, dispatched, strict=True))


@pytest.mark.parametrize("sources", [0, 1, 3])
@pytest.mark.parametrize("name", ["attention", "attention_qkv", "window_attention"])
def test_flops_are_those_of_the_products(name, sources):
    batch, heads, queries, keys, head_dim = {
        "attention": (2, 3, 11, 5, 16),
        "attention_qkv": (2, 3, 11, 11, 16),
        "window_attention": (2 * 4, 3, 9, 9, 16),  # 6 x 6 tokens in windows of 3 x 3
    }[name]
    query, key, value = leaves(1, batch, heads, queries, head_dim) + leaves(2, batch, heads, keys, head_dim)
    labels = torch.rand(batch, keys, sources)
    with FlopCounterMode(display=False) as of_scores:
        scores = query @ key.transpose(-2, -1)
    with FlopCounterMode(display=False) as plain:
        weights = scores.softmax(dim=-1)
        if sources:
            _ = weights.detach().mean(dim=1) @ labels
        (weights @ value).sum().backward()
    share = labels if sources else None
    with FlopCounterMode(display=False) as ours:
        if name == "attention":
            output, _ = tlk.attention(query, key, value, share)
        elif name == "attention_qkv":
            output, _ = tlk.attention_qkv(*leaves(1, batch, queries, 3, heads, head_dim), share)
        else:
            share = share if share is None else share.view(2, 6, 6, sources)
            output, _ = tlk.window_attention(*leaves(1, 2, 6, 6, 3, heads, head_dim), share, window_size=(3, 3))
        output.sum().backward()
    # The backward computes the scores once more.
    assert ours.get_total_flops() == plain.get_total_flops() + 2 * of_scores.get_total_flops()


def test_subclasses_of_tensors_see_the_operator():
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            seen.append(function)
            return super().__torch_function__(function, types, arguments, options or {})

    tlk.attention_qkv(torch.randn(1, 4, 3, 2, 8).as_subclass(Watching))
    assert torch.ops.tlalign_kernels.attention_qkv.default in seen


@backends
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph_at_the_first_call(backend, dynamic):
    inputs = make_inputs(Case("compile", queries=12, keys=12, bias_scale=1.0), "cpu", torch.float32)

    def step(query, key, value, share, bias):
        output, share = tlk.attention(query * 2, key, value, share, share, bias=bias, backend=backend)
        return output.sin(), share + 1

    names = ("query", "key", "value", "share", "bias")
    tensors = [inputs[name].clone().requires_grad_(name != "share") for name in names]
    torch._dynamo.reset()
    compiled, compiled_share = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*tensors)
    eager, eager_share = step(*tensors)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(compiled_share, eager_share)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), wanted), torch.autograd.grad(eager.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_compiles_for_any_size_where_two_parts_are_checkpointed():
    def two(qkv, share):
        for _ in range(2):
            _, share = checkpoint(tlk.attention_qkv, qkv, share, use_reentrant=False)
        return share

    qkv, share = torch.randn(1, 5, 3, 2, 8, requires_grad=True), torch.rand(1, 5, 1)
    torch._dynamo.reset()
    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, share), two(qkv, share))


def test_compiles_options_that_change_between_calls():
    query = torch.randn(1, 2, 8, 16)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, dropout_p, scale):
        return tlk.attention(query, query, query, dropout_p=dropout_p, scale=scale)[0]

    for scale in (0.5, 0.4, 0.3):
        expected, _ = tlk.attention(query, query, query, scale=scale)
        torch.testing.assert_close(compiled(query, 0.0, scale), expected)
    for dropout_p in (0.1, 0.2):
        torch.manual_seed(0)
        expected, _ = tlk.attention(query, query, query, dropout_p=dropout_p, scale=0.5)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(query, dropout_p, 0.5), expected)


@backends
def test_compiled_dropout_is_drawn_anew_at_each_call(backend):
    qkv = torch.randn(1, 8, 3, 2, 16)
    torch._dynamo.reset()

    def step(qkv):
        return tlk.attention_qkv(qkv, dropout_p=0.5, backend=backend)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(qkv), compiled(qkv))


@backends
def test_autocast_casts_tokens_and_never_labels(backend):
    dtype = torch.bfloat16 if is_usable(backend, torch.bfloat16) else torch.float16
    inputs = make_inputs(Case("autocast", queries=9, keys=9, bias_scale=1.0), "cpu", torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        output, share = call(inputs, backend=backend)
        qkv, bias = torch.randn(1, 9, 3, 2, 16), torch.randn(9, 9)
        packed, _ = tlk.attention_qkv(qkv, bias=bias, backend=backend)
    assert torch.equal(packed, tlk.attention_qkv(qkv.to(dtype), bias=bias.to(dtype), backend=backend)[0])
    assert (output.dtype, packed.dtype, share.dtype) == (dtype, dtype, torch.float32)
    expected, expected_share = call(cast_inputs(inputs, dtype), backend=backend)
    assert torch.equal(output, expected)
    assert torch.equal(share, expected_share)


# Choice of the backend


def test_an_explicit_backend_never_falls_back(another_backend):
    another_backend(unsupported_reasons=only_float16)
    tensors = torch.randn(3, 1, 2, 5, 8).unbind(0)
    with pytest.raises(NotImplementedError, match=r"'another' does not support [\s\S]*dtype: expected float16"):
        tlk.attention(*tensors, backend="another")
    tlk.attention(*(tensor.half() for tensor in tensors), backend="another")


def test_explain_names_the_choice_and_all_reasons(another_backend):
    another_backend(unsupported_reasons=only_float16)
    tensors = torch.randn(3, 1, 2, 5, 8).unbind(0)
    explanation = tlk.explain(*tensors)
    assert explanation.backend == next(name for name in AUTO_ORDER["cpu"] if not explanation.reasons[name])
    assert explanation.reasons["another"] == ["dtype: expected float16, got torch.float32"]
    assert re.search(r"another: dtype: expected float16", str(explanation))
    assert tlk.explain(*tensors, backend="another").backend is None


def test_explain_tells_of_the_dtype_that_autocast_gives(another_backend):
    another_backend(unsupported_reasons=only_float16)
    tensors = torch.randn(3, 1, 2, 5, 8).unbind(0)
    with torch.autocast("cpu", torch.float16):
        assert tlk.explain(*tensors, backend="another").backend == "another"


def test_unknown_backends_are_refused():
    tensors = torch.randn(3, 1, 2, 5, 8).unbind(0)
    for function in (tlk.attention, tlk.explain):
        with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*, got 'fast'"):
            function(*tensors, backend="fast")


# Errors


def good():
    return {"query": torch.randn(2, 3, 5, 8), "key": torch.randn(2, 3, 7, 8), "value": torch.randn(2, 3, 7, 8)}


BAD_CALLS = [
    ({"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
    ({"query": torch.randn(2, 5, 8)}, ValueError, r"query: expected 4 dimensions .* got shape \(2, 5, 8\)"),
    ({"query": torch.randint(0, 2, (2, 3, 5, 8))}, TypeError, "query: expected one of"),
    ({"key": torch.randn(2, 3, 7, 8).half()}, TypeError, "key: expected torch.float32 as query, got torch.float16"),
    ({"key": torch.randn(2, 3, 7, 9)}, ValueError, r"key: expected shape \(2, 3, 7, 8\), got \(2, 3, 7, 9\)"),
    ({"key": torch.randn(2, 2, 7, 8)}, ValueError, "key: expected shape"),
    ({"value": torch.randn(2, 3, 6, 8)}, ValueError, "value: expected shape"),
    ({"value": torch.randn(2, 3, 7, 8, device="meta")}, ValueError, "value: expected on cpu as the other tensors"),
    ({name: torch.randn(0, 3, 7, 8) for name in ("query", "key", "value")}, ValueError, "expected no empty dimension"),
    ({"query": torch.randn(2, 3, 0, 8)}, ValueError, "expected no empty dimension"),
    ({name: torch.randn(2, 3, 7, 4) for name in ("query", "key", "value")}, ValueError, "head dimension D of 8 to 256"),
    ({name: torch.randn(1, 1, 2, 257) for name in ("query", "key", "value")}, ValueError, "8 to 256, got 257"),
    ({"share": torch.rand(2, 7, 1).bfloat16()}, TypeError, "share: expected torch.float32, got torch.bfloat16"),
    ({"share": torch.rand(2, 7, 1).double()}, TypeError, "share: expected torch.float32, got torch.float64"),
    ({"share": torch.rand(2, 7)}, ValueError, r"share: expected shape \(2, 7, S\), got \(2, 7\)"),
    ({"share": torch.rand(2, 5, 1)}, ValueError, "share: expected shape"),
    ({"share": torch.rand(2, 7, 0)}, ValueError, "share: expected shape"),
    ({"share": torch.rand(2, 7, 1, device="meta")}, ValueError, "share: expected on cpu as the other tensors"),
    ({"residual": torch.rand(2, 5, 1)}, ValueError, "residual: expected None without a share"),
    ({"share": torch.rand(2, 7, 1), "residual": torch.rand(2, 5, 2)}, ValueError, "residual: expected shape"),
    ({"share": torch.rand(2, 7, 1), "residual": torch.rand(2, 7, 1)}, ValueError, "residual: expected shape"),
    ({"share": torch.rand(2, 7, 1), "residual": torch.rand(2, 5, 1).half()}, TypeError, "residual: .* torch.float32"),
    ({"share": torch.rand(2, 7, 1), "residual": [1.0]}, TypeError, "residual: expected a tensor, got list"),
    (
        {"share": torch.rand(2, 7, 1), "residual": torch.rand(2, 5, 1, device="meta")},
        ValueError,
        "residual: expected on cpu as the other tensors",
    ),
    ({"bias": [1.0]}, TypeError, "bias: expected a tensor, got list"),
    ({"bias": torch.randn(5, 7, device="meta")}, ValueError, "bias: expected on cpu as the other tensors, got meta"),
    ({"mask": torch.ones(5, 7, device="meta").bool()}, ValueError, "mask: expected on cpu as the other tensors"),
    ({"bias": torch.randn(3, 7, 5)}, ValueError, "bias: expected a shape broadcastable"),
    ({"bias": torch.randn(1, 2, 3, 5, 7)}, ValueError, "bias: expected a shape broadcastable"),
    ({"bias": torch.ones(5, 7).bool()}, TypeError, r"bias: expected one of \[torch.float32, .*got torch.bool"),
    ({"mask": torch.ones(5, 7).long()}, TypeError, "mask: expected torch.bool or one of .*got torch.int64"),
    ({"mask": torch.ones(5, 7, requires_grad=True)}, ValueError, "mask: expected a constant"),
    ({"mask": torch.ones(4, 7).bool()}, ValueError, "mask: expected a shape broadcastable"),
    ({"bias": torch.ones(5, 7).to(torch.float8_e4m3fn)}, TypeError, "bias: expected one of .*got torch.float8_e4m3fn"),
    ({"mask": torch.ones(5, 7).to(torch.float8_e4m3fn)}, TypeError, "mask: expected torch.bool or .*float8_e4m3fn"),
    (
        {"share": torch.rand(2, 7, 1).to_sparse()},
        TypeError,
        "share: expected a dense tensor, got layout",
    ),
    (
        {"mask": torch.nested.nested_tensor([torch.ones(5, 7)])},
        TypeError,
        "mask: expected a dense tensor, got a nested",
    ),
    ({"scale": torch.tensor(0.3, requires_grad=True)}, TypeError, "scale: expected a number, got Tensor"),
    ({"scale": "0.5"}, TypeError, "scale: expected a number, got str"),
    ({"dropout_p": np.array([0.1])}, TypeError, "dropout_p: expected a number, got ndarray"),
    ({"backend": ["cpu"]}, ValueError, r"backend: expected 'auto' or one of .*, got \['cpu'\]"),
    ({"scale": torch.nan}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": -torch.inf}, ValueError, "scale: expected a finite number, got -inf"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a value in"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a value in"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        tlk.attention(**{**good(), **changes})


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 5, 2, 3, 8)])
def test_bad_projections_are_refused(shape):
    with pytest.raises(ValueError, match=r"qkv: expected shape \(B, N, 3, H, D\), got"):
        tlk.attention_qkv(torch.randn(shape))


def test_projections_that_are_no_tensors_are_refused():
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled), pytest.raises(TypeError, match="qkv: expected a tensor, got list"):
            tlk.attention_qkv([1.0])


@pytest.mark.parametrize(("shape", "message"), [((2, 0, 3, 2, 8), "no empty dim"), ((2, 5, 3, 2, 4), "a head dim")])
def test_sizes_of_projections_are_refused_by_their_name(shape, message):
    with pytest.raises(ValueError, match=f"qkv: expected {message}"):
        tlk.attention_qkv(torch.randn(shape))


@backends
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_offsets_that_are_negated_only_when_they_are_read(name, backend):
    query, key, value = torch.randn(3, 2, 3, 10, 16).half().unbind(0)
    offsets = torch.randn(3, 10, 10, dtype=torch.complex32).conj().imag
    assert offsets.is_neg()
    ours, plain = (
        tlk.attention(query, key, value, **{name: each}, backend=backend)[0]
        for each in (offsets, offsets.resolve_neg())
    )
    assert torch.equal(ours, plain)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore:.*TracerWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_compute_what_the_function_does():
    qkv, share = torch.randn(2, 9, 3, 2, 8), torch.rand(2, 9, 1)
    with torch.no_grad():
        traced = torch.jit.trace(tlk.attention_qkv, (qkv, share))
        others = torch.randn_like(qkv), torch.rand_like(share)
        for ours, plain in zip(traced(*others), tlk.attention_qkv(*others), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_graphs_of_real_tensors_hold_the_operator(pre_dispatch):
    qkv, others = torch.randn(2, 2, 9, 3, 2, 8)
    graph = make_fx(lambda qkv: tlk.attention_qkv(qkv)[0], pre_dispatch=pre_dispatch)(qkv)
    assert torch.equal(graph(others), tlk.attention_qkv(others)[0])


def test_shapes_are_known_on_the_meta_device():
    output, share = tlk.attention_qkv(torch.randn(2, 9, 3, 2, 8, device="meta"), torch.rand(2, 9, 1, device="meta"))
    assert (output.shape, share.shape) == ((2, 9, 2, 8), (2, 9, 1))


def test_selftest_has_a_case_of_each_option():
    assert {case.packed for case in CASES} == {case.bias_scale > 0 for case in CASES} == {True, False}
    assert {case.mask for case in CASES} >= {None, "causal", "rows", "additive"}
    assert any(case.dropout_p for case in CASES)
    assert {case.windows.is_padded() for case in CASES if case.windows is not None} == {True, False}
    assert {case.windows.has_regions() for case in CASES if case.windows is not None} == {True, False}
    assert set(selftest.ROUNDING) >= set(DTYPES)
