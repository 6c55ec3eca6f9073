"""The CUDA kernels on a GPU; without one their code for sm_80, launched as a call would, executed by ptxvm."""

import contextlib
import ctypes
import mmap
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tlalign_kernels as tlk
from tlalign_kernels import extension, selftest
from tlalign_kernels.backends import Problem, cuda, triton
from tlalign_kernels.backends.devices import asked_once
from tlalign_kernels.selftest import Case, draw_inputs, make_inputs
from tlalign_kernels.windows import Windows

# It brings along what disassembles.
pytest.importorskip("triton")
import triton_offline

HAS_KERNELS = hasattr(extension.compiled, "cuda_attention_forward")
ON_GPU = HAS_KERNELS and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
DEVICE = "cuda" if ON_GPU else "cpu"

# One worker of `pytest -n`, which compiles the sources once.
pytestmark = [] if ON_GPU else [pytest.mark.xdist_group("cuda"), pytest.mark.minutes]
CAN_EXECUTE = shutil.which("nvcc") is not None and triton_offline.PTXVM.exists()
offline = pytest.mark.skipif(not CAN_EXECUTE, reason="needs nvcc and ptxvm")
executed = pytest.mark.skipif(not CAN_EXECUTE and not ON_GPU, reason="needs a GPU, or nvcc and ptxvm")
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


NAMES = ["attention_forward", *(f"attention_backward_{name}" for name in ("head", "queries", "keys", "bias", "hopper"))]


def record(patch, kernels=None, blocks=None):
    """Has launches executed here where there is no GPU: their blocks, or those that `blocks` says.

    Their kernels are added to a list.
    """
    if ON_GPU:
        return
    import cuda_offline

    def execute(launch, tensors):
        if kernels is not None:
            kernels.append(launch.kernel)
        options = {} if blocks is None else dict(ctas=[(block, 0, 0) for block in blocks(launch)])
        cuda_offline.execute(launch, tensors, **options)

    cuda_offline.record(patch, execute)


def check(
    monkeypatch, case, dtype, change=lambda inputs: None, lay_out=lambda inputs: {}, backward=("queries", "keys")
):
    """Compares output, share and gradients with the reference; `change` changes the inputs in place.

    `lay_out` gives some of them once more, of the same numbers, as the kernels are to find them in memory.
    `backward`: the kernels that are to be executed, if there are more than 64 queries or keys.
    Returns the kernels that were executed here.
    """
    kernels = []

    def draw_changed(*arguments):
        inputs = draw_inputs(*arguments)
        change(inputs)
        return inputs

    # Casting and moving to a device keep no strides.
    def run_laid_out(case, inputs, backend, seed, run=selftest.run_operator):
        return run(case, {**inputs, **lay_out(inputs)} if backend == "cuda" else inputs, backend, seed)

    with monkeypatch.context() as patch:
        record(patch, kernels)
        patch.setattr(selftest, "draw_inputs", draw_changed)
        patch.setattr(selftest, "run_operator", run_laid_out)
        checks = selftest.compare(case, dtype, "cuda", DEVICE)
    assert [check for check in checks if not check.passed] == []
    if ON_GPU:
        return kernels
    is_small = max(case.queries, case.keys) <= 64 if case.windows is None else case.windows.tokens() <= 144
    if is_small:
        names = {"attention_forward", "attention_backward_head"}
    else:
        names = {"attention_forward", *(f"attention_backward_{name}" for name in backward)}
    has_gradient = any(check.tensor == "gradient of bias" for check in checks)
    # Small windows sum it while they do all else.
    if has_gradient and not (is_small and case.windows):
        names |= {"attention_backward_bias"}
    assert {name for name in NAMES if any(name in kernel for kernel in kernels)} == names
    return kernels


ONE = Case("one", batch=1, heads=1)


def check_on_hopper(monkeypatch, case, dtype, **options):
    """`check` on a GPU of any kind, with images enough for Hopper's kernels; without one, as if on a Hopper."""
    if ON_GPU:
        return check(monkeypatch, replace(case, batch=400 // case.heads), dtype, **options)
    import cuda_offline

    with cuda_offline.on_hopper():
        return check(monkeypatch, case, dtype, **options)


@executed
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("queries", "keys"), [(130, 20), (49, 49), (70, 130), (20, 256), (20, 300)])
def test_head_dims_are_within_the_bound(monkeypatch, dtype, head_dim, queries, keys):
    heads = 2 if queries > keys else 1  # what is kept of each head is of its queries
    check(monkeypatch, replace(ONE, heads=heads, queries=queries, keys=keys, head_dim=head_dim), dtype)


@executed
@pytest.mark.parametrize(
    "tokens", [1, 15, 16, 17, 32, 33, 49, 56, 57, 64, 65, 128, 129, 192, 193, 196, 197, 198, 200, 201, 256, 257, 577]
)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_lengths_are_within_the_bound(monkeypatch, tokens, head_dim):
    check(monkeypatch, replace(ONE, queries=tokens, keys=tokens, head_dim=head_dim, packed=True), BFLOAT16)


@executed
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        # More heads than two stages of three blocks.
        (BFLOAT16, dict(heads=7, queries=197, keys=197, packed=True)),
        (BFLOAT16, dict(batch=2, heads=4, queries=208, keys=193)),
        (BFLOAT16, dict(heads=6, queries=193, keys=200)),
        # The older kernels have scales that are not positive.
        (BFLOAT16, dict(heads=6, queries=196, keys=196, scale=-0.3)),
        # So they have one query more than a block has for few keys.
        (BFLOAT16, dict(heads=6, queries=209, keys=193)),
        (FLOAT16, dict(batch=2, heads=3, queries=208, keys=193, sources=2)),
        (FLOAT16, dict(heads=6, queries=193, keys=200, sources=2)),
        # More keys than one step takes: the last of them has few, some or all; fewer queries than two warpgroups take.
        (BFLOAT16, dict(heads=6, queries=256, keys=256, packed=True)),
        (BFLOAT16, dict(heads=2, queries=257, keys=257, packed=True)),
        (FLOAT16, dict(heads=4, queries=60, keys=577, sources=2)),
    ],
    ids=str,
)
def test_heads_on_hopper_are_within_the_bound(monkeypatch, dtype, sizes):
    case = replace(ONE, head_dim=64, **sizes)
    is_served = case.scale is None and (case.queries <= 208 or case.keys > 200)
    on_hopper = dtype == BFLOAT16 and case.keys <= 200 and is_served
    kernels = check_on_hopper(monkeypatch, case, dtype, backward=["hopper"] if on_hopper else ["queries", "keys"])
    assert ON_GPU or any("attention_forward_hopper" in kernel for kernel in kernels) == is_served


def far_below_zero(inputs):
    """All scores of the first query are: keys that pad the last tile must not take part in its maximum."""
    inputs["key"] = inputs["query"][:, :, :1].expand_as(inputs["key"]) * -20.0


def far_below_the_first(inputs):
    """Scores of the first query are, in all steps of keys but the first."""
    inputs["key"][:, :, :64] = inputs["query"][:, :, :1] * 20.0


def far_below_the_last(inputs):
    """Scores of the first query are, so that it would miss the last key, one of so many."""
    inputs["key"][:, :, -1:] = inputs["query"][:, :, :1]


@executed
@pytest.mark.parametrize(
    ("keys", "change"),
    # The last step has one key more than two and than five tiles of it.
    [(197, far_below_zero), (300, far_below_the_first), (256 + 33, far_below_the_last), (256 + 81, far_below_the_last)],
)
def test_scores_on_hopper_are_within_the_bound(monkeypatch, keys, change):
    is_short = keys <= 200
    case = replace(ONE, heads=6, queries=197 if is_short else 20, keys=keys, head_dim=64)
    options = dict(change=change, backward=["hopper"] if is_short else ["queries", "keys"])
    kernels = check_on_hopper(monkeypatch, case, BFLOAT16, **options)
    assert ON_GPU or any("attention_forward_hopper" in kernel for kernel in kernels)


@executed
@pytest.mark.parametrize("keys", [50, 65, 257])  # one more than a block has of two sources, and a step of three
@pytest.mark.parametrize("sources", [1, 2, 3, 8])
@pytest.mark.parametrize("residual", [True, False])
def test_sources_are_within_the_bound(monkeypatch, keys, sources, residual):
    case = Case("sources", batch=2, heads=2, queries=20, keys=keys, head_dim=32, sources=sources, residual=residual)
    check(monkeypatch, case, FLOAT16)


@executed
@pytest.mark.parametrize(("head_dim", "sources", "bias_scale"), [(80, 2, 0.0), (128, 3, 0.0), (128, 8, 1.0)])
def test_sources_of_wide_heads_are_within_the_bound(monkeypatch, head_dim, sources, bias_scale):
    case = replace(ONE, queries=20, keys=50, head_dim=head_dim, sources=sources, bias_scale=bias_scale)
    check(monkeypatch, case, BFLOAT16)


def blocks_of_last(count, images, launches):
    """What executes the blocks of the last few images, and all of what is laid out for all; notes the launches."""

    def blocks_of(launch):
        blocks = launch.grid[0]
        launches.append((launch.kernel, blocks))
        return range(0 if "pack" in launch.kernel else blocks - count * (blocks // images), blocks)

    return blocks_of


def check_turns(launches, blocks, have_all_heads):
    """Checks that so many blocks computed attention, and that they averaged the shares if each had all heads."""
    if not ON_GPU:
        assert [of_launch for kernel, of_launch in launches if "attention_forward" in kernel] == [blocks]
        assert any("average_heads" in kernel for kernel, _ in launches) != have_all_heads
        assert not any("pack_labels" in kernel for kernel, _ in launches)


@executed
@pytest.mark.parametrize("keys", [20, 40])
@pytest.mark.parametrize(("images", "heads", "sources"), [(820, 5, 1), (2048, 2, 1), (2048, 2, 2)])
def test_blocks_take_heads_in_turn(monkeypatch, keys, images, heads, sources):
    # So many images that a block has two heads, or the last one of five. The last two images are executed.
    case = Case("turns", images, heads, 20, keys, 32, sources=sources)
    inputs = make_inputs(case, DEVICE, BFLOAT16)
    launches = []

    with monkeypatch.context() as patch:
        record(patch, blocks=blocks_of_last(2, images, launches))
        tensors = [inputs[name] for name in ("query", "key", "value", "share", "residual")]
        output, share = tlk.attention(*tensors, backend="cuda")
    check_turns(launches, images * -(-heads // 2), heads == 2)
    exact = [tensor[-2:].double() for tensor in tensors]
    expected, expected_share = tlk.attention(*exact, backend="reference")
    plain = torch.softmax(tensors[0][-2:] @ tensors[1][-2:].mT * 32**-0.5, -1) @ tensors[2][-2:]
    bound = 2 * (plain - expected).abs().max() + selftest.ROUNDING[BFLOAT16] * expected.abs().max()
    assert (output[-2:] - expected).abs().max() <= bound
    assert (share[-2:] - expected_share).abs().max() <= selftest.ROUNDING[BFLOAT16]


@executed
@pytest.mark.parametrize(("images", "heads"), [(820, 5), (2048, 2)])
def test_blocks_take_heads_in_turn_in_which_a_query_may_see_no_key(monkeypatch, images, heads):
    # A block has both heads and counts those that see a key, or two or the last of five. The last image is executed.
    inputs = make_inputs(Case("turns", images, heads, 20, 40, 32), DEVICE, BFLOAT16)
    mask = torch.rand(1, heads, 20, 40, device=DEVICE) > 0.3
    mask[:, 0, 3] = mask[:, :, 5] = False
    bias = torch.randn(1, heads, 20, 40, device=DEVICE)
    launches = []

    with monkeypatch.context() as patch:
        record(patch, blocks=blocks_of_last(1, images, launches))
        tensors = [inputs[name] for name in ("query", "key", "value", "share", "residual")]
        output, share = tlk.attention(*tensors, bias=bias, mask=mask, backend="cuda")
    check_turns(launches, images * -(-heads // 2), heads == 2)
    exact = [tensor[-1:].double() for tensor in tensors]
    expected, expected_share = tlk.attention(*exact, bias=bias.double(), mask=mask, backend="reference")
    assert (output[-1:] - expected).abs().max() <= 2 * selftest.ROUNDING[BFLOAT16] * expected.abs().max()
    assert (share[-1:] - expected_share).abs().max() <= selftest.ROUNDING[BFLOAT16]
    assert (share[-1, 5] == inputs["residual"][-1, 5]).all()


@executed
@pytest.mark.parametrize("keys", [40, 128, 130])
@pytest.mark.parametrize("mask", [None, "causal", "rows", "additive"])
@pytest.mark.parametrize("bias_scale", [0.0, 1.0])
@pytest.mark.parametrize("sources", [1, 3])
def test_bias_and_mask_are_within_the_bound(monkeypatch, keys, mask, bias_scale, sources):
    case = Case("offsets", 1, 2, 40, keys, 32, sources, bias_scale=bias_scale, mask=mask)
    check(monkeypatch, case, BFLOAT16)


@executed
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("keys", [60, 128, 160, 192, 250, 257])
def test_head_dims_with_a_bias_and_a_mask(monkeypatch, head_dim, keys):
    case = Case("offsets", 1, 2, 70, keys, head_dim, 1 + (keys < 200), bias_scale=1.0, mask="rows")
    check(monkeypatch, case, BFLOAT16)


@executed
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(("images", "heads"), [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_a_bias_of_each_image_or_head(monkeypatch, dtype, images, heads):
    def change(inputs):
        inputs["bias"] = torch.randn(images, heads, 20, 70)
        inputs["mask"] = torch.rand(2, 1, 20, 70) > 0.3

    check(monkeypatch, Case("each", 2, 3, 20, 70, 32), dtype, change)


@executed
@pytest.mark.parametrize("images", [1, 5])
def test_gradients_of_a_bias_are_summed_in_parts(monkeypatch, images):
    # As if there were so many images that a sum takes several, unless each has its bias; the last one takes fewer.
    def change(inputs):
        inputs["bias"] = torch.randn(images, 2, 20, 70)

    monkeypatch.setattr(cuda, "images_of_sum", lambda batch, bias_images, _: 1 if bias_images == batch else 2)
    check(monkeypatch, Case("parts", 5, 2, 20, 70, 32), BFLOAT16, change)


@executed
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("keys", [40, 130, 192])
def test_scales_of_any_sign(monkeypatch, scale, keys):
    check(monkeypatch, replace(ONE, queries=40, keys=keys, head_dim=32, scale=scale), FLOAT16)


@executed
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_extreme_scores(monkeypatch, dtype, head_dim):
    case = replace(ONE, queries=20, keys=20, head_dim=head_dim)
    check(monkeypatch, case, dtype, far_below_zero)
    check(monkeypatch, replace(case, bias_scale=1e4), dtype)
    check(monkeypatch, replace(case, keys=300), dtype, far_below_the_first)


@executed
@pytest.mark.parametrize("tokens", [20, 70, 300])
def test_weights_in_float16_add_up_to_one_where_scores_are_large(monkeypatch, tokens):
    # All scores are 160000, which float32 knows to 1 / 64: what the backward recomputes from the log-sum-exp is off.
    case = replace(ONE, queries=tokens, keys=tokens, head_dim=32, scale=1.0)
    inputs = make_inputs(case, DEVICE, FLOAT16)
    inputs["query"][..., :16] = inputs["key"][..., :16] = 100.0
    inputs["query"][..., 16:] = 0.0
    inputs["bias"] = torch.zeros(1, 1, tokens, tokens, dtype=FLOAT16, device=DEVICE)
    with monkeypatch.context() as patch:
        record(patch)
        ours = selftest.run_operator(case, inputs, "cuda")
    exact = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    expected = selftest.run_operator(case, exact, "reference")
    # Of the gradient of a query, what the equal columns of the keys give is rounding alone.
    compared = dict(query=slice(16, None), key=slice(16), value=slice(None), bias=slice(None))
    for name, columns in compared.items():
        wanted, given = (of[f"gradient of {name}"][..., columns].double() for of in (expected, ours))
        assert (given - wanted).abs().max() <= 2 * selftest.ROUNDING[FLOAT16] * wanted.abs().max(), name


@executed
@pytest.mark.parametrize(("dtype", "unit"), [(BFLOAT16, 2.0**-7), (FLOAT16, 2.0**-10)], ids=str)
def test_outputs_are_rounded_to_nearest(monkeypatch, dtype, unit):
    # Means are three quarters of a unit above 1.
    query = torch.zeros(1, 1, 4, 32, dtype=dtype, device=DEVICE)
    value = torch.full_like(query, 1.0 + unit)
    value[:, :, 0] = 1.0
    with monkeypatch.context() as patch:
        record(patch)
        output, _ = tlk.attention(query, query, value, None, backend="cuda")
    assert (output == 1.0 + unit).all()


@executed
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(("keys", "sources"), [(33, 1), (33, 3), (70, 1), (300, 3)])
def test_labels_keep_the_precision_of_float32(monkeypatch, dtype, keys, sources):
    inputs = make_inputs(replace(ONE, queries=20, keys=keys, head_dim=32, heads=2), DEVICE, dtype)
    share = torch.full((1, keys, sources), 0.71237, device=DEVICE)
    with monkeypatch.context() as patch:
        record(patch)
        tensors = (inputs[name] for name in ("query", "key", "value"))
        _, mixed = tlk.attention(*tensors, share, backend="cuda")
    torch.testing.assert_close(mixed, share[:, :1].expand(-1, 20, -1), rtol=0, atol=1e-6)


@executed
@pytest.mark.parametrize("tokens", [20, 70])
def test_gradients_in_bfloat16_are_as_small_and_large_as_those_of_the_output(monkeypatch, tokens):
    case = replace(ONE, queries=tokens, keys=tokens, head_dim=32)
    inputs = make_inputs(case, DEVICE, BFLOAT16)
    with monkeypatch.context() as patch:
        record(patch)
        expected, small, large = (
            selftest.run_operator(case, {**inputs, "grad_output": inputs["grad_output"] * factor}, "cuda")
            for factor in (1, 2.0**-24, 2.0**24)
        )
    for name in ("query", "key", "value"):
        gradient = expected[f"gradient of {name}"]
        assert torch.equal(small[f"gradient of {name}"], gradient * 2.0**-24)
        assert torch.equal(large[f"gradient of {name}"], gradient * 2.0**24)


@executed
def test_finite_numbers_of_a_bias_count_as_65504_at_most(monkeypatch):
    case = Case("far", batch=1, heads=2, queries=20, keys=24, head_dim=32)
    inputs = make_inputs(case, DEVICE, BFLOAT16)
    bias = torch.zeros(1, 1, 20, 24, device=DEVICE)
    bias[..., 3, :], bias[..., 4, :], bias[..., 5, 2:] = -1e9, 1e10, torch.finfo(torch.float32).min
    record(monkeypatch)
    far, near = (
        selftest.run_operator(case, {**inputs, "bias": each}, "cuda") for each in (bias, bias.clamp(-65504, 65504))
    )
    for name, tensor in far.items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, near[name])


@executed
@pytest.mark.parametrize("keys", [20, 70])
def test_a_bias_of_minus_infinity_hides_keys_as_a_mask_does(monkeypatch, keys):
    inputs = make_inputs(Case("hidden", 1, 3, 6, keys, 32), DEVICE, BFLOAT16)
    mask = torch.rand(1, 3, 6, keys, device=DEVICE) > 0.5
    mask[:, 1, 2] = mask[:, :, 3] = False
    del inputs["grad_output"]
    with monkeypatch.context() as patch:
        record(patch)
        bias = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
        ours = tlk.attention(**{**inputs, "bias": bias}, backend="cuda")
        expected = tlk.attention(**{**inputs, "mask": mask}, backend="cuda")
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1][:, 3], inputs["residual"][:, 3])


def test_rows_that_begin_between_16_bytes_are_copied():
    wide, flat = torch.randn(2, 3, 20, 33, dtype=BFLOAT16), torch.randn(1 + 2 * 3 * 20 * 32, dtype=BFLOAT16)
    for tensor in (wide[..., 1:], wide[..., :32], flat[1:].view(2, 3, 20, 32)):
        copied = cuda._aligned(tensor)
        assert torch.equal(copied, tensor)
        assert copied.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in copied.stride()[:-1])
    whole = wide[..., :32].contiguous()
    assert cuda._aligned(whole) is whole


@pytest.mark.skipif(not HAS_KERNELS or torch.cuda.is_available(), reason="needs the kernels, and no GPU")
def test_a_driver_that_can_not_run_the_kernels_is_a_reason_against_them(monkeypatch):
    problem = Problem("cuda", BFLOAT16, 1, 1, 4, 4, 32, 1, torch.float32, False, False, 0.0, True)
    assert cuda.unsupported_reasons(problem) == []  # without a GPU tensors are fake
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_capability", lambda index: {0: (7, 5), 99: (9, 0)}[index])
    problem = problem._replace(device_index=99)
    (reason,) = cuda.unsupported_reasons(problem)
    assert re.match("device: expected one whose driver can run the kernels, which says: .*(driver|device)", reason)
    assert entered == [99]
    (reason,) = cuda.unsupported_reasons(problem._replace(device_index=0))
    assert reason == "device: expected compute capability 8.0 or newer, got (7, 5)"


@pytest.mark.skipif(not HAS_KERNELS or torch.cuda.is_available(), reason="needs the kernels, and no GPU")
def test_steps_compile_where_a_driver_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_capability", asked_once(lambda index: (9, 0)))
    monkeypatch.setattr(triton, "_capability", asked_once(lambda device: 90))

    def step(qkv, share):
        return tlk.attention_qkv(qkv * 2, share, share)

    torch._dynamo.reset()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        qkv = torch.empty(2, 50, 3, 2, 32, device="cuda", dtype=torch.float16)
        share = torch.empty(2, 50, 1, device="cuda")
        output, _ = torch.compile(step, fullgraph=True, backend="eager")(qkv, share)
    assert output.shape == (2, 50, 2, 32)


def test_images_further_apart_than_kernels_count_are_copied():
    near, far = (torch.empty_strided((2, 3, 20, 32), (stride, 640, 32, 1), device="meta") for stride in (2**29, 2**30))
    assert cuda._aligned(near) is near
    assert cuda._aligned(far).is_contiguous()
    one = far[:1]
    assert cuda._aligned(one) is one


@executed
def test_strides_along_one_image_or_head_mean_nothing(monkeypatch):
    def lay_out(inputs):
        return {name: inputs[name].as_strided((1, 1, 20, 32), (7, 5, 32, 1)) for name in ("query", "key", "value")}

    check(monkeypatch, replace(ONE, queries=20, keys=20, head_dim=32), BFLOAT16, lay_out=lay_out)


@executed
def test_a_gradient_with_zero_strides(monkeypatch):
    def change(inputs):
        inputs["grad_output"] = torch.ones_like(inputs["grad_output"])

    def lay_out(inputs):
        return {"grad_output": inputs["grad_output"].new_ones(()).expand_as(inputs["grad_output"])}

    check(monkeypatch, replace(ONE, queries=20, keys=20, head_dim=32), BFLOAT16, change, lay_out)


@executed
@pytest.mark.parametrize("keys", [50, 70, 300])  # heads in turn, one step, several
def test_no_labels(monkeypatch, keys):
    case = replace(ONE, batch=2, queries=30, keys=keys, head_dim=32)
    inputs = make_inputs(case, DEVICE, BFLOAT16)
    tensors = [inputs[name] for name in ("query", "key", "value")]
    with monkeypatch.context() as patch:
        record(patch)
        without, none = tlk.attention(*tensors, None, backend="cuda")
        output, _ = tlk.attention(*tensors, inputs["share"], backend="cuda")
    assert none is None
    assert torch.equal(without, output)


IN_WINDOWS = Case("windows", batch=1, heads=2, head_dim=32, bias_scale=1.0)


@executed
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(
    ("windows", "options"),
    [
        (Windows((14, 14), (7, 7), (0, 0)), {}),
        (Windows((14, 14), (7, 7), (3, 3)), {}),
        # Padding along both axes, and no window but has some.
        (Windows((9, 16), (7, 7), (3, 3)), dict(sources=2)),
        (Windows((5, 4), (7, 7), (0, 0)), dict(batch=2)),
        (Windows((3, 10), (8, 4), (5, 0)), dict(sources=3, residual=False, bias_scale=0.0)),
        (Windows((16, 8), (8, 8), (0, 4)), dict(sources=8, bias_scale=0.0)),
    ],
    ids=str,
)
def test_windows_are_within_the_bound(monkeypatch, dtype, windows, options):
    check(monkeypatch, replace(IN_WINDOWS, windows=windows, **options), dtype)


@executed
@pytest.mark.parametrize(
    ("windows", "sources"),
    [
        # Of 121, 128 and 192 tokens the last tile is the last that scores begin with.
        (Windows((12, 11), (11, 11), (0, 5)), 1),
        (Windows((8, 16), (8, 16), (0, 0)), 3),
        (Windows((12, 16), (12, 16), (0, 0)), 1),
        (Windows((13, 20), (12, 12), (6, 6)), 1),
        (Windows((17, 16), (16, 16), (0, 8)), 1),
        (Windows((9, 20), (9, 17), (3, 0)), 2),
        (Windows((9, 10), (9, 8), (0, 2)), 3),
        (Windows((17, 15), (16, 16), (8, 8)), 8),
        # More than a block has all of in the backward, and than a step of the forward takes.
        (Windows((5, 29), (5, 29), (2, 7)), 1),
        (Windows((18, 20), (18, 17), (9, 0)), 1),
        # One token more than some kernel takes.
        (Windows((3, 19), (3, 19), (0, 0)), 1),
        (Windows((5, 13), (5, 13), (0, 0)), 1),
        (Windows((5, 13), (5, 13), (0, 0)), 2),
        (Windows((1, 257), (1, 257), (0, 0)), 1),
        (Windows((1, 257), (1, 257), (0, 0)), 3),
    ],
    ids=str,
)
def test_windows_of_many_tokens_are_within_the_bound(monkeypatch, windows, sources):
    check(monkeypatch, replace(IN_WINDOWS, heads=1, sources=sources, windows=windows), BFLOAT16)


@executed
@pytest.mark.parametrize(("scale", "window"), [(-0.3, (4, 4)), (-0.3, (6, 11)), (-0.3, (5, 29)), (0.0, (4, 4))])
def test_windows_have_scales_of_any_sign(monkeypatch, scale, window):
    check(monkeypatch, replace(IN_WINDOWS, heads=1, scale=scale, windows=Windows((8, 11), window, (1, 3))), FLOAT16)


@executed
@pytest.mark.parametrize("window", [(4, 4), (6, 11), (5, 29)])
def test_windows_have_one_bias_for_all_heads(monkeypatch, window):
    def change(inputs):
        inputs["bias"] = inputs["bias"][:1]

    check(monkeypatch, replace(IN_WINDOWS, windows=Windows((8, 11), window, (2, 2))), BFLOAT16, change)


@executed
@pytest.mark.parametrize("window", [(4, 4), (6, 11), (5, 29)])
def test_gradients_of_a_bias_are_summed_over_windows_in_parts(monkeypatch, window):
    # As if there were more windows; the last part has fewer.
    monkeypatch.setattr(cuda, "images_of_sum", lambda *_, programs: 2)
    check(monkeypatch, replace(IN_WINDOWS, batch=3, heads=1, windows=Windows(window, window, (0, 0))), BFLOAT16)


@executed
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_query_that_sees_only_padding_keeps_its_label(monkeypatch, has_residual):
    # The lower window has two rows of tokens and two of padding, beside which all scores vanish.
    inputs = make_inputs(replace(IN_WINDOWS, windows=Windows((6, 4), (4, 4), (0, 0))), DEVICE, FLOAT16)
    inputs["qkv"][..., 0, :, :] = 1.0
    inputs["pad_qkv"][1] = 1e3
    residual = inputs["residual"] if has_residual else None
    with monkeypatch.context() as patch:
        record(patch)
        _, share = tlk.window_attention(
            inputs["qkv"], inputs["share"], residual, window_size=(4, 4), pad_qkv=inputs["pad_qkv"], backend="cuda"
        )
    assert torch.equal(share[:, 4:], residual[:, 4:] if has_residual else torch.zeros(1, 2, 4, 1, device=DEVICE))
    assert share[:, :4].min() > 0


@executed
def test_maps_and_padding_of_any_strides(monkeypatch):
    def change(inputs):
        inputs["grad_output"] = inputs["grad_output"][:, :1].expand_as(inputs["grad_output"]).clone()

    def lay_out(inputs):
        wide = torch.cat([inputs["qkv"], inputs["qkv"][:, :, :1]], 2)
        # It begins between 16 bytes.
        flat = inputs["pad_qkv"].flatten()
        pad_qkv = torch.cat([flat[:1], flat])[1:].view(inputs["pad_qkv"].shape)
        grad_output = inputs["grad_output"][:, :1].expand_as(inputs["grad_output"])
        return dict(qkv=wide[:, :, :-1], pad_qkv=pad_qkv, grad_output=grad_output)

    check(monkeypatch, replace(IN_WINDOWS, windows=Windows((5, 6), (4, 4), (2, 2))), BFLOAT16, change, lay_out)


@executed
@pytest.mark.parametrize("windows", [None, Windows((4, 8), (4, 4), (2, 2))])
def test_tensors_that_begin_between_16_bytes_are_read(monkeypatch, windows):
    def lay_out(inputs):
        moved = {}
        for name in ("query", "key", "value", "qkv", "grad_output"):
            if name in inputs:
                flat = inputs[name].flatten()
                moved[name] = torch.cat([flat[:1], flat])[1:].view(inputs[name].shape)
        return moved

    case = replace(ONE, queries=20, keys=20, head_dim=32) if windows is None else replace(IN_WINDOWS, windows=windows)
    check(monkeypatch, case, BFLOAT16, lay_out=lay_out)


@executed
@pytest.mark.parametrize(("maps", "heads", "sources"), [(205, 5, 1), (512, 2, 1), (512, 2, 2)])
def test_blocks_take_the_heads_of_a_window_in_turn(monkeypatch, maps, heads, sources):
    # So many windows that a block has two heads, or the last one of five. The last two maps are executed: what one
    # might write of its padding lies in the other.
    windows = Windows((8, 7), (4, 4), (1, 2))
    case = Case("turns", maps, heads, head_dim=32, sources=sources, bias_scale=1.0, windows=windows)
    inputs = make_inputs(case, DEVICE, BFLOAT16)
    launches = []

    options = dict(bias=inputs["bias"], window_size=windows.window_size, shift=windows.shift)
    options["pad_qkv"] = inputs["pad_qkv"]
    tensors = [inputs[name] for name in ("qkv", "share", "residual")]
    with monkeypatch.context() as patch:
        record(patch, blocks=blocks_of_last(2, maps, launches))
        output, share = tlk.window_attention(*tensors, **options, backend="cuda")
    check_turns(launches, maps * windows.count() * -(-heads // 2), heads == 2)
    options |= {name: options[name].double() for name in ("bias", "pad_qkv")}
    exact = [tensor[-2:].double() for tensor in tensors]
    expected, expected_share = tlk.window_attention(*exact, **options, backend="reference")
    assert (output[-2:] - expected).abs().max() <= 2 * selftest.ROUNDING[BFLOAT16] * expected.abs().max()
    assert (share[-2:] - expected_share).abs().max() <= selftest.ROUNDING[BFLOAT16]


@executed
def test_windows_without_labels_have_the_same_output(monkeypatch):
    windows = Windows((9, 8), (4, 4), (2, 2))
    inputs = make_inputs(replace(IN_WINDOWS, windows=windows), DEVICE, BFLOAT16)
    options = dict(window_size=(4, 4), shift=(2, 2), bias=inputs["bias"], pad_qkv=inputs["pad_qkv"], backend="cuda")
    with monkeypatch.context() as patch:
        record(patch)
        without, none = tlk.window_attention(inputs["qkv"], None, **options)
        output, _ = tlk.window_attention(inputs["qkv"], inputs["share"], **options)
    assert none is None
    assert torch.equal(without, output)


@offline
@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
def test_numbers_that_look_like_addresses_are_left_alone(monkeypatch):
    # In this page lies what the scale, as the kernels have it, and the zeros behind it would point to. So do tensors
    # where the heap is at low addresses, as that of Debian's Python, and grows past a gigabyte: then a page outside it.
    map_memory = ctypes.CDLL(None).mmap
    map_memory.restype = ctypes.c_void_p
    map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed_noreplace = 0x100000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace
    for power in range(-96, 100, 4):
        page = 0x3E829000 + (power << 23)  # a float's exponent
        if map_memory(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == page:
            break
    else:
        pytest.skip("there is something at all of these addresses")
    memory = (ctypes.c_byte * mmap.PAGESIZE).from_address(page)
    low = torch.frombuffer(memory, dtype=BFLOAT16, count=20 * 32).view(1, 1, 20, 32)

    def change(inputs):
        inputs["query"] *= 2.0**-power

    def lay_out(inputs):
        return {"query": low.copy_(inputs["query"])}

    case = Case("low", 1, 1, 20, 20, 32, scale=32**-0.5 * 2.0**power)
    check(monkeypatch, case, BFLOAT16, change=change, lay_out=lay_out)


@offline
def test_windows_are_read_once_and_written_once():
    import cuda_offline

    moved = {}

    def run(launch, tensors):
        counts = cuda_offline.execute(launch, tensors)
        moved[cuda_offline.name_of(launch.kernel)] = counts.get("cp_async_bytes", 0), counts["global_store_bytes"]

    maps, heads, dim, tokens, windows = 2, 3, 32, 64, Windows((16, 8), (8, 8), (4, 4))
    cuda_offline.record_windows(run, windows, dim, heads=heads, images=maps)
    rows = maps * windows.count() * heads * tokens
    head = rows * dim * 2
    # Q, K, V; O, the log-sum-exp, and of each head the labels with what says where there are any.
    assert moved["attention_forward"] == (3 * head, head + rows * 4 + 2 * rows * 4)
    # Q, K, V, O and dO; dQ, dK, dV and the sum of dS.
    assert moved["attention_backward_head"] == (5 * head, 3 * head + maps * windows.count() * heads * tokens**2 * 4)


@offline
def test_nothing_is_added_in_an_arbitrary_order():
    import cuda_offline

    assert [text for text in cuda_offline.ptx() if re.search(r"\s(?:atom|red)\.", text)] == []


@offline
def test_kernels_of_swin_do_not_spill():
    import cuda_offline

    launches = []
    windows = Windows((14, 14), (7, 7), (3, 3))
    cuda_offline.record_windows(lambda launch, _: launches.append(launch), windows, 32, heads=3)
    used = {cuda_offline.name_of(n.kernel): cuda_offline.resources_of(n, 80) for n in launches}
    assert {"attention_forward", "attention_backward_head"} <= used.keys()
    assert [name for name, resources in used.items() if resources["STACK"] or resources["LOCAL"]] == []


@offline
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_no_kernel_spills_anywhere(arch, tmp_path):
    import cuda_offline

    usage = cuda_offline.usage_of(arch, tmp_path)
    assert len(usage) > 200
    assert [name for name, resources in usage if resources["STACK"] or resources["LOCAL"]] == []


@offline
def test_kernels_of_hopper_do_not_spill(tmp_path):
    import cuda_offline

    usage, said = cuda_offline.usage_on_hopper(tmp_path)
    assert len(usage) == 5
    assert [name for name, resources in usage if resources["STACK"] or resources["LOCAL"]] == []
    # Where ptxas can't tell that registers are free it lets products wait for each other.
    assert "serialized" not in said


needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="built without CUDA kernels")


@needs_kernels
def test_what_is_not_supported_is_said():
    problem = Problem("cpu", torch.float32, 1, 1, 1, 1, 40, 9, torch.float32, False, False, 0.5, True)
    reasons = "; ".join(cuda.unsupported_reasons(problem))
    for word in ("device: expected cuda", "dtype", "head dimension", "at most 8 sources", "dropout"):
        assert word in reasons
    in_windows = problem._replace(windows=Windows((9, 9), (7, 7), (3, 3)))
    reasons = "; ".join(cuda.unsupported_reasons(in_windows._replace(head_dim=64)))
    assert "head dimension: expected one of [32], got 64" in reasons
    for word in ("device: expected cuda", "dtype", "at most 8 sources", "dropout"):
        assert word in reasons
    long = Problem("cpu", BFLOAT16, 2, 16, 400_000, 49, 64, 1, torch.float32, False, False, 0.0, True)
    for problem in (
        long,
        long._replace(queries=49, keys=400_000),
        long._replace(windows=Windows((800, 500), (7, 7), (0, 0)), head_dim=32, heads=32),
    ):
        assert "query, key: expected less than 2**30 elements" in "; ".join(cuda.unsupported_reasons(problem))
    assert len(cuda.unsupported_reasons(long._replace(queries=300_000))) == 1


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sizes=(1, 1, 4, 4, 40, 0)), "D: expected a head dimension that the CUDA kernels have, got 40"),
        (dict(sizes=(1, 1, 0, 4, 32, 0)), "Nq: expected at least 1"),
        (dict(sizes=(1, 1, 4, 4, 32, 9)), "S: expected at most 8 sources"),
        (dict(sizes=(2**31, 1, 4, 4, 32, 0)), "B: expected at least 1 and less than"),
        (dict(dtype="float32"), "query: expected bfloat16 or float16"),
        (dict(query=(8, 128, 32, 32)), "query: expected rows that begin at multiples of 16 bytes"),
        (dict(query=(16, 128, 32, 33)), "query: expected rows that begin at multiples of 16 bytes"),
        (dict(query=(0, 128, 32, 32)), "query: expected an address, got 0"),
        (dict(labels=0), "labels: expected an address, got 0"),
        (dict(bias=(16, "float32", 0, 0, 4, 1)), "bias_starts: expected an address, got 0"),
        (dict(scale=-1.0), "bias_starts: expected an address, got 0"),
        (dict(mask=(16, "bool", 4, 0, 0, 1), bias_starts=16), "mask_starts: expected an address, got 0"),
        (dict(sizes=(1, 1, 2**29, 4, 32, 2)), r"S \* Nq: expected at least 0 and less than 2\*\*30, got 1073741824"),
        (dict(sizes=(1, 1, 4, 2**28, 32, 8)), r"S \* Nk: expected at least 0 and less than 2\*\*30, got 2147483648"),
    ],
)
def test_native_code_checks_its_arguments(change, message):
    rows = (16, 128, 32, 32)
    arguments = dict(sizes=(1, 1, 4, 4, 32, 0), dtype="float16", query=rows, key=rows, value=rows, bias=None, mask=None)
    arguments |= dict(scale=1.0, bias_starts=0, mask_starts=0, windows=None, share=0, residual=0, labels=16)
    arguments |= dict(head_share=0, output=16, share_out=0, log_sum_exp=16)
    with pytest.raises(ValueError, match=message):
        extension.compiled.cuda_attention_forward(*{**arguments, **change}.values(), 0)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad_query=(16, 128, 32, 33)), "grad_query: expected rows that begin at multiples of 16 bytes"),
        (dict(row_terms=0), "row_terms: expected an address, got 0"),
        (dict(bias_sums=16), "bias_sums: expected none where there is no bias"),
        (dict(bias_sums=16, bias=(16, "float32", 0, 0, 4, 1), bias_heads=3), "bias_heads: expected 1 or H, got 3"),
        (dict(images_of_sum=0), "images_of_sum: expected at least 1"),
    ],
)
def test_native_code_checks_the_arguments_of_the_backward(change, message):
    rows = (16, 128, 32, 32)
    arguments = dict(sizes=(1, 1, 4, 4, 32, 0), dtype="float16", query=rows, key=rows, value=rows, bias=None, mask=None)
    arguments |= dict(scale=1.0, bias_starts=16, mask_starts=0, windows=None, grad_output=rows)
    arguments |= dict(output=16, log_sum_exp=16, row_terms=16, grad_query=rows, grad_key=rows, grad_value=rows)
    arguments |= dict(grad_padding=0, bias_sums=0, bias_heads=1, images_of_sum=1)
    with pytest.raises(ValueError, match=message):
        extension.compiled.cuda_attention_backward(*{**arguments, **change}.values(), 0)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(windows=((9, 9, 4, 4, 4, 0), 16, 16)), "shift of rows: expected less than the window"),
        (dict(windows=((9, 9, 4, 4, 0, -1), 16, 16)), "shift of columns: expected at least 0"),
        (dict(windows=((9, 0, 4, 4, 0, 0), 16, 16)), "columns of the map: expected at least 1"),
        (dict(windows=((9, 9, 4, 5, 0, 0), 16, 16)), "Nq, Nk: expected the tokens of a window"),
        (dict(sizes=(4, 1, 16, 16, 32, 0)), "B: expected a multiple of the windows of a map"),
        (dict(sizes=(9, 1, 16, 16, 64, 0)), "D: expected 32 in windows, got 64"),
        (dict(windows=((9, 9, 4, 4, 2, 0), 0, 16)), "pad_qkv: expected an address, got 0"),
        (dict(windows=((9, 9, 4, 4, 2, 0), 8, 16)), "pad_qkv: expected an address that is a multiple of 16"),
        (dict(bias_starts=0), "bias_starts: expected what the products of windows begin with"),
        (dict(bias_starts=8), "bias_starts: expected an address that is a multiple of 16"),
        (dict(bias=(16, "float32", 256, 0, 16, 1)), "bias: expected one for all windows"),
        (dict(mask=(16, "bool", 0, 0, 16, 1), mask_starts=16), "mask: expected none in windows"),
    ],
)
def test_native_code_checks_the_arguments_of_windows(change, message):
    rows = (16, 128, 32, 32)
    sizes = (9, 1, 16, 16, 32, 0)
    arguments = dict(sizes=sizes, dtype="float16", query=rows, key=rows, value=rows, bias=None, mask=None)
    arguments |= dict(scale=1.0, bias_starts=16, mask_starts=0, windows=((9, 9, 4, 4, 2, 0), 16, 16))
    arguments |= dict(share=0, residual=0, labels=16, head_share=0, output=16, share_out=0, log_sum_exp=16)
    with pytest.raises(ValueError, match=message):
        extension.compiled.cuda_attention_forward(*{**arguments, **change}.values(), 0)


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_error_of_cuda_names_the_kernel_and_its_shape():
    rows = (16, 128, 32, 32)
    with pytest.raises(RuntimeError, match="attention_forward with B, H, Nq, Nk, D, S = 1, 1, 4, 4, 32, 0: "):
        extension.compiled.cuda_attention_forward(
            (1, 1, 4, 4, 32, 0), "float16", rows, rows, rows, None, None, 1.0, 0, 0, None, 0, 0, 16, 0, 16, 0, 16, 0
        )  # fmt: skip


@needs_kernels
def test_no_kernel_spills():
    usage = triton_offline.resource_usage(extension.compiled.__file__)
    assert len(usage) > 100
    assert [name for name, resources in usage if resources["STACK"] or resources["LOCAL"]] == []
