"""Losses against a mixture, compared with those of a dense target."""

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.utils._python_dispatch import TorchDispatchMode

from tlalign_kernels import MixedTarget, mixed_binary_cross_entropy, mixed_cross_entropy


def random_target(batch, classes, sources=1):
    ratio = torch.rand(batch, sources + 1)
    return MixedTarget.from_ratio(
        torch.randint(0, classes, (batch, sources + 1)), (ratio / ratio.sum(1, keepdim=True))[:, 1:]
    )


DENSE_LOSSES = {
    mixed_cross_entropy: SoftTargetCrossEntropy(),
    mixed_binary_cross_entropy: torch.nn.BCEWithLogitsLoss(),
}


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("classes", "sources"), [(10, 1), (10, 4), (1000, 1), (21841, 1)])
def test_loss_and_gradient_equal_those_of_the_dense_target(loss, smoothing, classes, sources):
    logits = (3 * torch.randn(8, classes)).requires_grad_()
    target = random_target(8, classes, sources)
    ours = loss(logits, target, smoothing)
    # The dense loss in float64: in float32 and 21841 classes its own gradient is off by 1e-5 of its largest value.
    exact = logits.detach().double().requires_grad_()
    theirs = DENSE_LOSSES[loss](exact, target.to_dense(classes, smoothing).double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    (our_gradient,), (their_gradient,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, exact)
    # PyTorch's softmax of so many classes is itself off by up to 4e-6 with the vectors of some processors.
    torch.testing.assert_close(
        our_gradient.double(), their_gradient, rtol=0, atol=3e-6 * float(their_gradient.abs().max())
    )


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_loss_of_dense_labels_equals_that_of_their_mean(loss):
    labels = torch.rand(4, 6, 2, 3).softmax(dim=1)
    logits = torch.randn(4, 6)
    expected = DENSE_LOSSES[loss](logits, labels.mean(dim=(2, 3)) * 0.9 + 0.1 / 6)
    torch.testing.assert_close(loss(logits, MixedTarget.from_dense(labels), 0.1), expected)


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_loss_of_logits_in_float64_is_computed_in_float64(loss):
    logits = torch.randn(4, 7, dtype=torch.float64)
    target = MixedTarget.from_ratio(random_target(4, 7).classes, torch.rand(4, 1, dtype=torch.float64))
    expected = DENSE_LOSSES[loss](logits, target.to_dense(7))
    torch.testing.assert_close(loss(logits, target), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_loss_of_half_precision_logits_is_computed_in_float32(loss):
    logits = (10 * torch.randn(8, 1000)).bfloat16()
    target = random_target(8, 1000)
    result = loss(logits, target)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(logits.float(), target), rtol=0, atol=0)
    # Nor is what a gradient is a difference of rounded before.
    few, target = torch.randn(64, 3).bfloat16().requires_grad_(), random_target(64, 3)
    gradients = [torch.autograd.grad(loss(each, target), few)[0] for each in (few, few.float())]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_loss_of_half_precision_logits_against_dense_labels_is_computed_in_float32(loss):
    logits, target = (10 * torch.randn(8, 100)).bfloat16(), MixedTarget.from_dense(torch.full((8, 100, 2, 2), 0.01))
    torch.testing.assert_close(loss(logits, target), loss(logits.float(), target), rtol=0, atol=0)


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_second_derivative_is_that_of_the_dense_loss(loss, smoothing):
    logits, target = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), random_target(4, 7, 2)
    dense = target.to_dense(7, smoothing).double()
    vector = torch.randn_like(logits)

    def product(value):
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        return torch.autograd.grad((gradient * vector).sum(), logits)[0]

    torch.testing.assert_close(product(loss(logits, target, smoothing)), product(DENSE_LOSSES[loss](logits, dense)))


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_gradient_comes_in_the_dtype_of_the_logits_and_scales_with_the_loss(loss):
    logits, target = torch.randn(4, 7, requires_grad=True), random_target(4, 7)
    (gradient,) = torch.autograd.grad(loss(logits, target, 0.1), logits)
    half = logits.detach().bfloat16().requires_grad_()
    (scaled,) = torch.autograd.grad(-8 * loss(half, target, 0.1), half)
    assert scaled.dtype == torch.bfloat16
    torch.testing.assert_close(scaled.float(), -8 * gradient, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_compiled_loss_has_the_same_gradient(loss):
    logits, target = torch.randn(4, 7, requires_grad=True), random_target(4, 7)
    compiled = torch.compile(lambda logits: loss(logits, target, 0.1), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits, target, 0.1), logits)
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_target_gets_no_gradient(loss):
    # A share that went through reentrant checkpointing requires one.
    logits, target = torch.randn(4, 7, requires_grad=True), random_target(4, 7)
    ratio = target.ratio.requires_grad_()
    assert torch.autograd.grad(loss(logits, target), (logits, ratio), allow_unused=True)[1] is None
    labels = torch.full((4, 7, 1, 1), 1 / 7, requires_grad=True)
    dense = MixedTarget.from_dense(labels)
    assert torch.autograd.grad(loss(logits, dense), (logits, labels), allow_unused=True)[1] is None


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_transforms_of_torch_func_see_the_gradient(loss):
    logits, target = torch.randn(4, 7, requires_grad=True), random_target(4, 7)
    (expected,) = torch.autograd.grad(loss(logits, target, 0.1), logits)
    gradient = torch.func.grad(lambda logits: loss(logits, target, 0.1))(logits.detach())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    jacobian = torch.func.jacrev(lambda logits: torch.stack((loss(logits, target, 0.1), logits.sum())))(logits.detach())
    torch.testing.assert_close(jacobian, torch.stack((expected, torch.ones_like(expected))))


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_losses_of_several_models_are_computed_at_once(loss):
    logits, target = torch.randn(3, 4, 7), random_target(4, 7)
    losses = torch.func.vmap(lambda logits: loss(logits, target, 0.1))(logits)
    torch.testing.assert_close(losses, torch.stack([loss(each, target, 0.1) for each in logits]))


def test_cross_entropy_makes_one_tensor_of_the_size_of_the_logits_each_way():
    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.large = []  # kept alive, so that no two have the same address

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() > 100:
                self.large.append(result)
            return result

        def tensors(self):
            return {tensor.data_ptr() for tensor in self.large}

    logits, target = torch.randn(8, 1000, requires_grad=True), random_target(8, 1000)
    with Sizes() as forward:
        loss = mixed_cross_entropy(logits, target, 0.1)
    with Sizes() as backward:
        (gradient,) = torch.autograd.grad(loss, logits)
    assert len(forward.tensors() - {logits.data_ptr()}) == 1
    assert backward.tensors() == {gradient.data_ptr()}


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_the_mean_over_no_images_is_no_number(loss):
    target = MixedTarget.from_ratio(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 1))
    assert loss(torch.zeros(0, 5), target).isnan()


BAD_CALLS = [
    ({"logits": torch.zeros(2, 5).long()}, TypeError, "logits: expected a floating tensor, got torch.int64"),
    ({"logits": (torch.zeros(2, 5), torch.zeros(2, 5))}, TypeError, "logits: expected a floating tensor, got tuple"),
    ({"logits": torch.zeros(3, 5)}, ValueError, r"logits: expected shape \(2, C\), got \(3, 5\)"),
    ({"logits": torch.zeros(5)}, ValueError, "logits: expected shape"),
    ({"logits": torch.zeros(2, 4)}, ValueError, "target.classes: expected ids below 4, got 4"),
    ({"logits": torch.zeros(2, 5, device="meta")}, ValueError, "target: expected on the device of logits"),
    ({"target": torch.zeros(2, 5)}, TypeError, "target: expected a MixedTarget, got Tensor"),
    ({"smoothing": -0.1}, ValueError, "smoothing: expected a value in"),
    ({"smoothing": None}, TypeError, "smoothing: expected a number, got NoneType"),
    ({"target": MixedTarget.from_dense(torch.full((2, 4, 1, 1), 0.25))}, ValueError, "logits: expected 4 classes"),
]


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_nothing_is_smoothed_unless_asked(loss):
    logits, target = torch.randn(2, 5), MixedTarget.from_ratio(torch.tensor([[0, 4], [1, 2]]), torch.rand(2, 1))
    torch.testing.assert_close(loss(logits, target), DENSE_LOSSES[loss](logits, target.to_dense(5)))


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
def test_bad_arguments_are_refused(loss, changes, error, message):
    target = MixedTarget.from_ratio(torch.tensor([[0, 4], [1, 2]]), torch.tensor([[0.5], [0.25]]))
    with pytest.raises(error, match=message):
        loss(**{"logits": torch.zeros(2, 5), "target": target, **changes})


@pytest.mark.parametrize("loss", DENSE_LOSSES, ids=lambda loss: loss.__name__)
def test_compiles_with_dynamic_sizes(loss):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 6):
        logits, target = torch.randn(batch, 10), random_target(batch, 10)
        torch.testing.assert_close(compiled(logits, target), loss(logits, target))
