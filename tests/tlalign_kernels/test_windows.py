"""Windows of a map: which tokens they hold, and attention within them on every backend."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models import swin_transformer

import tlalign_kernels as tlk
from tlalign_kernels.backends import BACKENDS, reference
from tlalign_kernels.ops import WindowInputs
from tlalign_kernels.selftest import Case, compare, make_inputs, reasons_against, run_operator
from tlalign_kernels.windows import Windows

PLAIN = Case("plain", heads=2, head_dim=8, bias_scale=1.0, windows=Windows((6, 8), (3, 4), (0, 0)))
PADDED = Case("padded", heads=2, head_dim=8, sources=2, bias_scale=1.0, windows=Windows((7, 9), (4, 4), (2, 1)))

# Triton is among them under TRITON_INTERPRET=1.
backends = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if not reasons_against(PADDED, torch.float32, name, "cpu")]
)


def inputs_of(case, dtype=torch.float32, seed=0):
    return make_inputs(case, "cpu", dtype, seed)


def call(case, inputs, **changes):
    arguments = {name: tensor for name, tensor in inputs.items() if name != "grad_output"}
    options = dict(window_size=case.windows.window_size, shift=case.windows.shift)
    return tlk.window_attention(**{**arguments, **options, **changes})


@st.composite
def geometries(draw):
    """Maps and windows of all kinds: padded, larger than the map, shifted along one axis or both."""
    window = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    shift = tuple(draw(st.integers(0, size - 1)) for size in window)
    return Windows(draw(st.tuples(st.integers(1, 15), st.integers(1, 15))), window, shift)


@st.composite
def cases(draw):
    return Case(
        "random",
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 12, 16, 32])),
        sources=draw(st.integers(1, 3)),
        residual=draw(st.booleans()),
        bias_scale=draw(st.sampled_from([0.0, 1.0])),
        windows=draw(geometries()),
    )


# Which tokens lie where


@given(windows=geometries())
def test_every_token_lies_in_one_window(windows):
    numbers = windows.token_numbers()
    assert numbers.shape == (windows.count(), windows.tokens())
    real = numbers[numbers >= 0]
    assert torch.equal(real.sort().values, torch.arange(windows.map_size[0] * windows.map_size[1]))
    assert windows.is_padded() == (len(real) < numbers.numel())


@given(windows=geometries())
def test_scattering_undoes_gathering(windows):
    tokens = torch.randn(2, *windows.map_size, 3)
    found = torch.empty_like(tokens)
    windows.scatter(windows.gather(tokens, padding=7.0), found)
    assert torch.equal(found, tokens)


def test_maps_and_windows_are_copied_without_waiting_for_a_gpu():
    windows = Windows((5, 9), (4, 4), (1, 2))
    with torch.device("meta"):  # which refuses what depends on values
        tokens = torch.empty(2, 5, 9, 3)
        windows.scatter(windows.gather(tokens), tokens)
        qkv, pad_qkv = torch.empty(2, 5, 9, 3, 1, 8), torch.empty(3, 1, 8)
        inputs = WindowInputs(qkv, pad_qkv, None, None, windows, 1.0, 0.0)
        output, log_sum_exp = qkv[:, :, :, 0], torch.empty(2 * windows.count(), 1, 16)
        reference.window_forward(inputs, None, None, output.clone(), None, log_sum_exp)
        reference.window_backward(inputs, output, output, log_sum_exp, qkv.clone(), pad_qkv.clone(), None)


@given(windows=geometries(), batch=st.integers(1, 2))
def test_tokens_lie_where_timm_puts_them(windows, batch):
    class Recorder(torch.nn.Module):
        """Takes the place of a block's attention and keeps what it is given."""

        def forward(self, x, mask=None):
            self.x, self.mask = x, mask
            return x

    block = swin_transformer.SwinTransformerBlock(
        8, windows.map_size, 1, window_size=windows.window_size, shift_size=windows.shift, always_partition=True
    )
    block.attn = Recorder()
    tokens = torch.randn(batch, *windows.map_size, 8)
    assert torch.equal(block._attn(tokens), tokens)
    assert torch.equal(windows.gather(tokens), block.attn.x)
    regions = windows.regions()
    see_each_other = regions[:, :, None] == regions[:, None, :]
    seen = torch.ones_like(see_each_other) if block.attn.mask is None else block.attn.mask == 0
    assert torch.equal(see_each_other, seen)


# The operator


@backends
@given(case=cases(), seed=st.integers(0, 2**31))
def test_errors_are_within_the_bound_at_random_shapes(backend, case, seed):
    assert [check for check in compare(case, torch.float32, backend, seed=seed) if not check.passed] == []


@backends
@given(case=cases(), seed=st.integers(0, 2**31), constant=st.floats(0, 1))
def test_shares_stay_in_the_unit_interval_and_a_constant_is_a_fixed_point(backend, case, seed, constant):
    inputs = inputs_of(case, seed=seed)
    share = call(case, inputs, backend=backend)[1]
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-6
    same = {"share": torch.full_like(share, constant)}
    same["residual"] = same["share"] if case.residual else None
    torch.testing.assert_close(call(case, inputs, **same, backend=backend)[1], same["share"], rtol=0, atol=3e-6)


@backends
def test_one_window_over_the_whole_map_is_attention(backend):
    case = Case("whole", heads=2, head_dim=16, windows=Windows((5, 6), (5, 6), (0, 0)))
    inputs = inputs_of(case)
    output, share = call(case, inputs, backend=backend)
    labels = {name: inputs[name].flatten(1, 2) for name in ("share", "residual")}
    expected, expected_share = tlk.attention_qkv(inputs["qkv"].flatten(1, 2), **labels, backend="reference")
    torch.testing.assert_close(output.flatten(1, 2), expected)
    torch.testing.assert_close(share.flatten(1, 2), expected_share)


@backends
@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=lambda case: case.name)
def test_labels_never_influence_outputs_or_gradients(backend, case):
    inputs = inputs_of(case)
    first = run_operator(case, inputs, backend)
    others = {"share": torch.rand(2, *case.windows.map_size, 3), "residual": None}
    second = run_operator(case, {**inputs, **others}, backend)
    for name in first.keys() - {"share"}:
        assert torch.equal(first[name], second[name]), name


@backends
def test_without_labels_there_are_none(backend):
    inputs = inputs_of(PADDED)
    output, share = call(PADDED, inputs, share=None, residual=None, backend=backend)
    assert share is None
    assert torch.equal(output, call(PADDED, inputs, backend=backend)[0])


@backends
def test_a_projection_of_any_strides_is_read(backend):
    inputs = inputs_of(PADDED)
    wide = torch.randn(2, 9, 12, 3, 2, 16)
    view = wide[:, 1:8, 2:11, :, :, :8]
    assert not view.is_contiguous()
    expected = call(PADDED, {**inputs, "qkv": view.contiguous()}, backend=backend)
    for result, wanted in zip(call(PADDED, {**inputs, "qkv": view}, backend=backend), expected, strict=True):
        assert torch.equal(result, wanted)
    # Here tokens are evenly spaced.
    apart = wide[:, :7, :9].contiguous()[..., :8]
    close = {**inputs, "qkv": apart.contiguous()}
    assert torch.equal(
        call(PADDED, {**inputs, "qkv": apart}, backend=backend)[0], call(PADDED, close, backend=backend)[0]
    )
    turned = inputs["qkv"].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(
        call(PADDED, {**inputs, "qkv": turned}, backend=backend)[0], call(PADDED, inputs, backend=backend)[0]
    )


@backends
def test_labels_and_padding_of_any_strides_are_read(backend):
    inputs = inputs_of(PADDED)
    names = ("share", "residual", "pad_qkv")
    turned = {name: inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in names}
    assert not any(tensor.is_contiguous() for tensor in turned.values())
    results = run_operator(PADDED, {**inputs, **turned}, backend)
    for name, expected in run_operator(PADDED, inputs, backend).items():
        assert torch.equal(results[name], expected), name


@backends
def test_a_gradient_of_any_strides_is_handled(backend):
    inputs = inputs_of(PADDED)
    qkv = inputs["qkv"].clone().requires_grad_()

    def gradient(grad_output):
        return torch.autograd.grad(call(PADDED, inputs, qkv=qkv, backend=backend)[0], qkv, grad_output)[0]

    assert torch.equal(gradient(torch.ones(()).expand(2, 7, 9, 2, 8)), gradient(torch.ones(2, 7, 9, 2, 8)))
    grad_output = torch.randn(8, 2, 9, 7, 2).permute(4, 3, 2, 1, 0)
    assert torch.equal(gradient(grad_output), gradient(grad_output.contiguous()))


@backends
def test_maps_that_are_cut_from_larger_ones_have_their_gradients(backend):
    def gradients(qkv, grad_output):
        qkv = qkv.detach().requires_grad_()
        output, _ = tlk.window_attention(qkv, window_size=(3, 4), shift=(1, 2), backend=backend)
        return torch.autograd.grad(output, qkv, grad_output)[0]

    qkv, grad_output = torch.randn(2, 7, 10, 3, 2, 8)[:, :6, :8], torch.randn(2, 7, 10, 2, 8)[:, :6, :8]
    expected = gradients(qkv.contiguous(), grad_output.contiguous())
    torch.testing.assert_close(gradients(qkv, grad_output.contiguous()), expected)
    torch.testing.assert_close(gradients(qkv.contiguous(), grad_output), expected)


@backends
def test_no_padding_given_is_padding_with_zeros(backend):
    inputs = inputs_of(PADDED)
    zeros = torch.zeros(3, 2, 8)
    for result, expected in zip(
        call(PADDED, inputs, pad_qkv=None, backend=backend), call(PADDED, inputs, pad_qkv=zeros, backend=backend),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(result, expected)


@backends
def test_padding_is_attended_to_but_has_no_label(backend):
    # One real token in a window of two: half of its attention goes to the padding, all of its label comes from itself.
    qkv = torch.zeros(1, 1, 1, 3, 1, 8)
    qkv[..., 2, :, :] = 2.0
    share = torch.full((1, 1, 1, 1), 0.25)
    pad_qkv = torch.zeros(3, 1, 8)
    output, mixed = tlk.window_attention(qkv, share, window_size=(1, 2), pad_qkv=pad_qkv, backend=backend)
    torch.testing.assert_close(output, torch.ones(1, 1, 1, 1, 8))
    torch.testing.assert_close(mixed, share)


@backends
@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=lambda case: case.name)
def test_what_is_no_number_reaches_the_labels_that_it_mixes(backend, case):
    inputs = inputs_of(case)
    inputs["bias"][0, 0, 0] = float("nan")
    output, share = call(case, inputs, backend=backend)
    # In each window the first query, where that is not padding.
    assert share.isnan().any(-1).equal(output.isnan().flatten(3).any(-1))
    assert 1 < share.isnan().any(-1).sum() <= 2 * case.windows.count()


@backends
@pytest.mark.parametrize("sources", [1, 9], ids=["fused", "dense"])
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_query_that_sees_only_padding_keeps_its_residual(backend, sources, has_residual):
    # The first window has a token and padding, and its bias lets the token see the padding alone.
    share, residual = torch.rand(2, 1, 1, 1, sources).unbind(0)
    bias = torch.tensor([[float("-inf"), 0.0], [0.0, 0.0]])
    _, mixed = tlk.window_attention(
        torch.randn(1, 1, 1, 3, 2, 8), share, residual if has_residual else None, window_size=(1, 2), bias=bias,
        pad_qkv=torch.randn(3, 2, 8), backend=backend,
    )  # fmt: skip
    assert torch.equal(mixed, residual if has_residual else torch.zeros_like(residual))


@backends
@pytest.mark.parametrize("shift", [(1, 2), (0, 2)])
def test_tokens_that_a_shift_brings_together_see_each_other_with_a_score_that_is_lower_by_100(backend, shift):
    # In the last window, where all regions meet, a bias of 100 between them undoes that.
    windows = Windows((6, 8), (3, 4), shift)
    qkv, share = torch.randn(1, 6, 8, 3, 2, 8), torch.rand(1, 6, 8, 1)
    regions, tokens = windows.regions()[-1], windows.token_numbers()[-1]
    bias = 100.0 * (regions[:, None] != regions)
    ours = tlk.window_attention(qkv, share, window_size=(3, 4), shift=shift, bias=bias, backend=backend)
    expected = tlk.attention_qkv(qkv.flatten(1, 2)[:, tokens], share.flatten(1, 2)[:, tokens], backend="reference")
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result.flatten(1, 2)[:, tokens], wanted, rtol=1e-4, atol=1e-5)


@backends
def test_a_table_of_relative_positions_is_a_bias(backend):
    table = torch.randn(5 * 7, 2, requires_grad=True)
    index = swin_transformer.get_relative_position_index(3, 4)
    gathered = table[index.view(-1)].view(12, 12, 2).permute(2, 0, 1)
    inputs = inputs_of(PLAIN)
    results = [call(PLAIN, inputs, bias=bias, backend=backend)[0] for bias in (table, gathered)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(output, table, inputs["grad_output"])[0] for output in results]
    torch.testing.assert_close(*gradients)


@backends
@pytest.mark.parametrize("queries", [1, 12])
def test_a_bias_of_one_head_serves_all(backend, queries):
    inputs = inputs_of(PLAIN)
    bias = torch.randn(queries, 12, requires_grad=True)
    whole = bias.detach().expand(2, 12, 12).clone().requires_grad_()
    output, expected = (call(PLAIN, inputs, bias=each, backend=backend)[0] for each in (bias, whole))
    torch.testing.assert_close(output, expected)
    (gradient,) = torch.autograd.grad(output, bias, inputs["grad_output"])
    (parts,) = torch.autograd.grad(expected, whole, inputs["grad_output"])
    torch.testing.assert_close(gradient, parts.sum_to_size(queries, 12))


# torch


@backends
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(backend, padded):
    map_size = (5, 6) if padded else (6, 6)
    qkv = torch.randn(2, *map_size, 3, 2, 8, requires_grad=True)
    pad_qkv = torch.randn(3, 2, 8, requires_grad=True) if padded else None
    bias = torch.randn(1, 2, 9, 9, requires_grad=True)
    labels = [torch.rand(2, *map_size, 2) for _ in range(2)] if padded else [None, None]
    result = torch.library.opcheck(
        torch.ops.tlalign_kernels.window_attention.default,
        (qkv, pad_qkv, *labels, bias, None, (3, 3), (1, 0), 0.25, 0.0, backend),
    )
    assert set(result.values()) == {"SUCCESS"}


@backends
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph_at_the_first_call(backend, dynamic):
    inputs = inputs_of(PADDED)

    def step(qkv, pad_qkv, bias):
        output, share = call(PADDED, inputs, qkv=qkv * 2, pad_qkv=pad_qkv, bias=bias, backend=backend)
        return output.sin(), share + 1

    leaves = [inputs[name].clone().requires_grad_() for name in ("qkv", "pad_qkv", "bias")]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*leaves)
    eager = step(*leaves)
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(output.sum(), leaves) for output, _ in (compiled, eager)]
    torch.testing.assert_close(*gradients)


@backends
def test_nothing_of_the_size_of_the_scores_is_saved(backend):
    case = Case("memory", batch=1, heads=1, head_dim=8, windows=Windows((32, 32), (16, 16), (8, 8)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        run_operator(case, inputs_of(case), backend)
    assert saved
    assert max(shape.numel() for shape in saved) < 4 * 256 * 256


def test_the_gradient_has_the_layout_of_the_projection():
    qkv = torch.randn(2, 6, 8, 3, 2, 8, requires_grad=True)
    output, _ = tlk.window_attention(qkv, window_size=(3, 4), shift=(1, 2))
    assert output.is_contiguous()
    assert type(output.grad_fn.next_functions[0][0]).__name__ == "AccumulateGrad"
    assert torch.autograd.grad(output.sum(), qkv)[0].is_contiguous()


def test_autocast_casts_tokens_and_never_labels():
    inputs = inputs_of(PADDED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, share = call(PADDED, inputs)
    assert (output.dtype, share.dtype) == (torch.bfloat16, torch.float32)
    expected = call(PADDED, inputs_of(PADDED, torch.bfloat16))
    assert torch.equal(output, expected[0])
    assert torch.equal(share, expected[1])


# Errors

BAD_CALLS = [
    ({"qkv": torch.randn(2, 7, 9, 3, 8)}, ValueError, r"qkv: expected shape \(B, Ht, Wt, 3, H, D\), got"),
    ({"qkv": torch.randn(2, 7, 9, 2, 2, 8)}, ValueError, r"qkv: expected shape \(B, Ht, Wt, 3, H, D\), got"),
    ({"qkv": [1.0]}, TypeError, "qkv: expected a tensor, got list"),
    ({"window_size": (4,)}, ValueError, r"window_size: expected two integers of at least 1, got \(4,\)"),
    ({"window_size": 4}, ValueError, "window_size: expected two integers of at least 1, got 4"),
    ({"window_size": (4.0, 4.0)}, ValueError, r"window_size: expected two integers of at least 1, got \(4.0, 4.0\)"),
    ({"window_size": (4, 4.5)}, ValueError, r"window_size: expected two integers of at least 1, got \(4, 4.5\)"),
    ({"window_size": (0, 4)}, ValueError, "window_size: expected two integers of at least 1"),
    ({"window_size": (4, 0)}, ValueError, "window_size: expected two integers of at least 1"),
    ({"shift": (-1, 0)}, ValueError, "shift: expected two integers of at least 0"),
    ({"shift": (0, -1)}, ValueError, "shift: expected two integers of at least 0"),
    ({"shift": (4, 0)}, ValueError, r"shift: expected less than the window of \(4, 4\), got \(4, 0\)"),
    ({"shift": (0, 4)}, ValueError, r"shift: expected less than the window of \(4, 4\), got \(0, 4\)"),
    ({"share": torch.rand(2, 63, 2)}, ValueError, r"share: expected shape \(2, 7, 9, S\), got \(2, 63, 2\)"),
    ({"share": torch.rand(2, 7, 9, 2).half()}, TypeError, "share: expected torch.float32, got torch.float16"),
    ({"residual": torch.rand(2, 7, 9, 1)}, ValueError, "residual: expected shape"),
    ({"residual": torch.rand(2, 9, 7, 2)}, ValueError, r"residual: expected shape \(2, 7, 9, 2\)"),
    ({"share": None}, ValueError, "residual: expected None without a share"),
    ({"bias": torch.randn(50, 2)}, ValueError, r"bias: expected shape \(49, 2\), got \(50, 2\)"),
    ({"bias": torch.randn(3, 16, 16)}, ValueError, "bias: expected a shape broadcastable"),
    ({"bias": torch.randn(2, 2, 16, 16)}, ValueError, "bias: expected a table or a shape broadcastable"),
    ({"bias": torch.ones(2, 16, 16).long()}, TypeError, "bias: expected one of "),
    ({"pad_qkv": [1.0]}, TypeError, "pad_qkv: expected a tensor, got list"),
    ({"pad_qkv": torch.randn(3, 8, 2)}, ValueError, r"pad_qkv: expected shape \(3, 2, 8\), got \(3, 8, 2\)"),
    ({"pad_qkv": torch.randn(3, 2, 8).half()}, TypeError, "pad_qkv: expected torch.float32 as qkv, got torch.float16"),
    ({"pad_qkv": torch.randn(3, 2, 8, device="meta")}, ValueError, "pad_qkv: expected on cpu as the other tensors"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a value in"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(PADDED, inputs_of(PADDED), **changes)


def test_shapes_are_known_on_the_meta_device():
    qkv, share = torch.randn(2, 5, 4, 3, 2, 8, device="meta"), torch.rand(2, 5, 4, 1, device="meta")
    output, share = tlk.window_attention(qkv, share, window_size=(3, 3), shift=(1, 0))
    assert (output.shape, share.shape) == ((2, 5, 4, 2, 8), (2, 5, 4, 1))


def test_sizes_may_be_integers_of_numpy_and_tensors_lie_elsewhere_than_by_default():
    arguments = torch.randn(1, 4, 6, 3, 2, 8), torch.rand(1, 4, 6, 1)
    expected = tlk.window_attention(*arguments, window_size=(4, 4), shift=(2, 0), backend="reference")
    with torch.device("meta"):
        size, shift = (np.int64(4), 4), (np.int32(2), 0)
        result = tlk.window_attention(*arguments, window_size=size, shift=shift, backend="reference")
    assert all(map(torch.equal, result, expected))
