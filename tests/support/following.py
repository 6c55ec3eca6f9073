"""What every model that is followed has to show, whatever its family, and what dense computations of labels share."""

import contextlib
import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, set_reentrant_ckpt
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import tlalign_kernels as tlk
from tlalign_kernels import MixedTarget, mixed_cross_entropy
from tlalign_kernels.selftest import ROUNDING

CLASSES = 10


def randomised(model):
    """Weights large enough that attention is not flat."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def stem(model):
    return model.embeds if hasattr(model, "embeds") else model.patch_embed


def small_plain(name, **options):
    """A timm model of few, small blocks and 3 x 2 patches, with weights large enough that attention is not flat."""
    with torch.device("meta"):
        model = timm.create_model(name, **{**options, "depth": 1})
    stride = stem(model).feat_ratio(as_scalar=False)
    if not isinstance(stem(model).proj, nn.Identity):  # else the stem's width is the model's
        options = {"embed_dim": 96, "num_heads": 4, **options}
    image_size = (3 * stride[0], 2 * stride[1])
    model = timm.create_model(name, **{"depth": 2, "img_size": image_size, "num_classes": CLASSES, **options})
    return randomised(model).eval()


def images_and_target(size, batch=3, dtype=torch.float32):
    """Mixed images of some pixels; the third is all of the other source."""
    height, width = size
    boxes = torch.tensor([[0, 0, height // 2, width], [1, 3, height - 2, width // 2], [0, 0, height, width]])
    target = MixedTarget.from_boxes(torch.randint(0, CLASSES, (batch, 2)), boxes[:batch, None], (height, width))
    return torch.randn(batch, 3, height, width, dtype=dtype), target


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _existing(found):
    return [gradient for gradient in found if gradient is not None]


def assert_within_bound(ours, own, exact):
    """The errors of ours against float64 are at most twice those of timm, plus a rounding of the largest value."""
    floor = ROUNDING[torch.float32] * max(float(tensor.detach().abs().max()) for tensor in exact)
    for our, timms, truth in zip(ours, own, exact, strict=True):
        error, allowed = (
            float((our - truth).detach().abs().max()),
            2 * float((timms - truth).detach().abs().max()) + floor,
        )
        assert error <= allowed, (tuple(truth.shape), error, allowed)


def check_followed(model, images, target, blocks):
    """Patched, a model computes what it did, carries labels that are labels, and can be given back."""
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    exact = copy.deepcopy(model).double()
    exact_logits = exact(images.double())
    exact_gradients = gradients(exact, exact_logits.square().sum())
    del exact
    logits = model(images)
    own_gradients = gradients(model, logits.square().sum())

    assert tlk.patch_model(model) is model
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), logits)
    with_target, aligned = model(images, target=target, collect_layers=True)
    assert_within_bound([with_target], [logits], [exact_logits])
    our_gradients = gradients(model, with_target.square().sum())
    assert [gradient is None for gradient in our_gradients] == [gradient is None for gradient in own_gradients]
    assert_within_bound(*(_existing(found) for found in (our_gradients, own_gradients, exact_gradients)))

    assert len(aligned.layer_shares) == blocks
    assert aligned.ratio.shape == (3, 1)
    assert aligned.ratio.dtype == torch.float32
    assert not aligned.ratio.requires_grad
    assert torch.equal(aligned.classes, target.classes)
    for share in (*aligned.layer_shares, aligned.ratio):
        assert share.min() >= 0
        assert share.max() <= 1 + 1e-6
    torch.testing.assert_close(aligned.ratio[2], torch.ones(1), rtol=0, atol=1e-6)
    constant = MixedTarget.from_ratio(target.classes, torch.full((3, 1), 0.3))
    torch.testing.assert_close(model(images, target=constant)[1].ratio, torch.full((3, 1), 0.3), rtol=0, atol=1e-6)

    tlk.unpatch_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("label_") for module in model.modules() for name in vars(module))
    assert torch.equal(model(images), logits)
    return aligned


# Ways to run a model


def step(model, images, target):
    logits, aligned = model(images, target=target)
    loss = mixed_cross_entropy(logits, aligned, smoothing=0.1)
    return aligned.ratio, gradients(model, loss)


def assert_same(result, ratio, expected, rtol=1e-4):
    torch.testing.assert_close(result[0], ratio, rtol=0, atol=1e-6)
    for ours, theirs in zip(result[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * float(theirs.abs().max()) + 1e-8)


def check_checkpointing(model, images, target, blocks):
    """Activation checkpointing, of either kind, changes nothing."""
    expected = step(model, images, target)
    model.set_grad_checkpointing()
    original, modes = torch.utils.checkpoint.checkpoint, []

    def recording(*arguments, use_reentrant):
        modes.append(use_reentrant)
        return original(*arguments, use_reentrant=use_reentrant)

    for reentrant in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.checkpoint, "checkpoint", recording)
            try:
                set_reentrant_ckpt(reentrant)
                model.zero_grad()
                logits, aligned = model(images.clone().requires_grad_(), target=target, collect_layers=True)
                mixed_cross_entropy(logits, aligned, smoothing=0.1).backward()
            finally:
                set_reentrant_ckpt(False)
        assert modes == [reentrant] * blocks
        assert not any(share.requires_grad for share in (aligned.ratio, *aligned.layer_shares))
        assert_same((aligned.ratio, [p.grad for p in model.parameters()]), *expected, rtol=1e-6)
        modes.clear()
    model.set_grad_checkpointing(False)


def check_compiles(model, images, target):
    """A model compiles into one graph that computes the same."""
    expected = step(model, images, target)
    torch._dynamo.reset()
    assert_same(step(torch.compile(model, fullgraph=True, backend="aot_eager"), images, target), *expected)


def assert_drops_alike(model, images, target):
    """With and without a target the same is dropped, of attentions, MLPs, ..."""
    logits = []
    for options in ({}, {"target": target}):
        torch.manual_seed(1)
        result = model(images, **options)
        logits.append(result[0] if options else result)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4 * float(logits[0].detach().abs().max()))


def check_stochastic_depth(model, size, compiles=False):
    """Asked to, labels stay where the last block drops its attention; all else is as it was, to the bit."""
    images = torch.randn(8, 3, *size)
    target = MixedTarget.from_masks(torch.randint(0, CLASSES, (8, 2)), torch.rand(8, 1, *size))
    last = tlk.patch_model(model.train()).label_blocks(model)[-1]
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.5
    assert_drops_alike(model, images, target)
    drop_path = last.drop_path1 if hasattr(last, "drop_path1") else last.drop_path
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.5 if module is drop_path else 0.0

    def run(model):
        torch.manual_seed(1)
        logits, aligned = model(images, target=target, collect_layers=True)
        return logits, aligned, gradients(model, mixed_cross_entropy(logits, target))

    outputs = []
    with drop_path.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits, paper, expected = run(model)
    dropped = (outputs[0].flatten(1) == 0).all(dim=1)
    assert 0 < dropped.sum() < 8
    evaluated = run(model.eval())[1]

    tlk.patch_model(model, stochastic_depth=True)
    assert torch.equal(run(model.eval())[1].ratio, evaluated.ratio)
    ours, aligned, found = run(model.train())
    assert torch.equal(ours, logits)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    (before, share), of_paper = aligned.layer_shares[-2:], paper.layer_shares[-1]
    assert torch.equal(share[dropped], before[dropped])
    assert torch.equal(share[~dropped], of_paper[~dropped])
    assert (of_paper - before)[dropped].abs().max() > 1e-4

    if compiles:
        torch._dynamo.reset()
        _, compiled, gradients_compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
        assert_same((compiled.ratio, gradients_compiled), aligned.ratio, expected)
    with contextlib.suppress(AssertionError):  # of models that have none
        model.set_grad_checkpointing()
    _, checkpointed, gradients_checkpointed = run(model)
    assert_same((checkpointed.ratio, gradients_checkpointed), aligned.ratio, expected, rtol=0)


def check_attention_dropout(model, images, target):
    """Dropout of attention weights, the model's only one, acts in training alone, and wherever timm's acts."""
    logits = model(images)
    tlk.patch_model(model)
    torch.testing.assert_close(model(images, target=target)[0], logits, rtol=1e-4, atol=1e-5)
    assert (model.train()(images, target=target)[0] - logits).abs().max() > 1e-3
    attentions = [module for module in model.modules() if hasattr(module, "attn_drop")]
    for fused, training in itertools.product((True, False), repeat=2):
        model.train(training)
        for attention in attentions:
            attention.attn_drop.train(not training)
            if not fused and hasattr(attention, "fused_attn"):
                attention.fused_attn = False
        theirs, ours = model(images), model(images, target=target)[0]
        drops = [bool((each - logits).abs().max() > 1e-3) for each in (theirs, ours)]
        assert drops[0] == drops[1], (fused, training)


class Adapted(nn.Module):
    """A layer with another one beside it, as adapters of low rank are."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.adapter = base_layer, copy.deepcopy(base_layer)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.adapter(x)


def check_adapters(model, images, target):
    """Whatever acts on what projections and convolutions give, acts on padding too; logits stay those of timm."""
    tlk.patch_model(model)
    layers = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]

    def shifted(module, inputs, output):
        return output + 0.1 if type(module) in (nn.Linear, nn.Conv2d) else None

    with register_module_forward_hook(shifted):
        torch.testing.assert_close(model(images, target=target)[0], model(images), rtol=1e-4, atol=1e-5)
    hooks = [module.register_forward_hook(shifted) for _, module in layers]
    torch.testing.assert_close(model(images, target=target)[0], model(images), rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()
    for _, module in layers:
        module.forward = lambda x, own=module.forward: own(x) + 0.1
    torch.testing.assert_close(model(images, target=target)[0], model(images), rtol=1e-4, atol=1e-5)
    for _, module in layers:
        del module.forward
    for name, module in layers:
        model.set_submodule(name, Adapted(module))
    torch.testing.assert_close(model(images, target=target)[0], model(images), rtol=1e-4, atol=1e-5)


def check_labels_under_autocast(model, images, target):
    """Labels stay float32, and the ratio goes where it goes without autocast, as near as bfloat16 can tell."""
    expected = model(images, target=target)[1].ratio
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, aligned = model(images, target=target, collect_layers=True)
    assert {share.dtype for share in (aligned.ratio, *aligned.layer_shares)} == {torch.float32}
    error, moved = ((other - expected).abs().max() for other in (aligned.ratio, target.ratio))
    assert error <= min(2.0**-8, moved / 2)


def check_layers(model, images, target, blocks):
    """`layers` chooses blocks over all stages: in the others labels stay; `residual` averages with those before."""
    own_class = type(tlk.patch_model(model).label_blocks(model)[0])
    tlk.patch_model(model, layers=[1, -1])
    assert type(model.label_blocks(model)[0]) in own_class.__mro__[1:]
    _, aligned = model(images, target=target, collect_layers=True)
    _, nowhere = tlk.patch_model(model, layers=[])(images, target=target, collect_layers=True)
    changed = [
        not torch.equal(share, unaligned)
        for share, unaligned in zip(aligned.layer_shares, nowhere.layer_shares, strict=True)
    ]
    assert changed == [index > 0 for index in range(blocks)]
    averaged, attended = (
        tlk.patch_model(model, layers=[-1], residual=residual)(images, target=target, collect_layers=True)[1]
        for residual in (True, False)
    )
    expected = (attended.layer_shares[-1] + nowhere.layer_shares[-1]) / 2
    torch.testing.assert_close(averaged.layer_shares[-1], expected, rtol=0, atol=1e-6)
    assert (averaged.layer_shares[-1] - attended.layer_shares[-1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"layers: expected block indices from -{blocks} to {blocks - 1}"):
        tlk.patch_model(model, layers=[blocks])


def check_refused(model, where, replacement):
    """A model with another module somewhere is refused, by the name of that place."""
    model.set_submodule(where, replacement)
    with pytest.raises(NotImplementedError, match=f"^{where}: "):
        tlk.patch_model(model)


def check_intermediates(model, images):
    """`forward_intermediates` of a patched model is timm's."""
    expected = model.forward_intermediates(images, intermediates_only=True)
    patched = tlk.patch_model(model).forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(ours, own) for ours, own in zip(patched, expected, strict=True))


def check_errors(model, images, target):
    """What does not belong together is refused with a reason."""
    tlk.patch_model(model)
    with pytest.raises(ValueError, match="collect_layers: expected False without a target"):
        model(images, collect_layers=True)
    with pytest.raises(ValueError, match="target: expected a batch of 2 images, got 3"):
        model(images[:2], target=target)
    with pytest.raises(ValueError, match="images: expected at least one with a target, got none"):
        model(images[:0], target=target)
    with pytest.raises(TypeError, match="target: expected a MixedTarget, got Tensor"):
        model(images, target=torch.rand(3, CLASSES))
    model.reset_classifier(CLASSES, global_pool="")
    with pytest.raises(NotImplementedError, match=r"global_pool: labels are defined for .*, got ''"):
        model(images, target=target)
    with pytest.raises(NotImplementedError, match=r"global_pool: labels are defined for .*, got ''"):
        tlk.patch_model(model)


# Dense computations


class Weights:
    """The weights of a model, by name, applied by PyTorch's functions."""

    def __init__(self, model):
        self.named = dict(model.state_dict())

    def linear(self, x, name):
        return F.linear(x, self.named[f"{name}.weight"], self.named.get(f"{name}.bias"))

    def norm(self, x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], self.named[f"{name}.weight"], self.named[f"{name}.bias"], eps)

    def conv(self, x, name, **options):
        return F.conv2d(x, self.named[f"{name}.weight"], self.named[f"{name}.bias"], **options)


def attend(query, key, value, heads):
    """A.V (B, Nq, channels) and the mean of A over the heads (B, Nq, Nk), of (B, N, channels)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    attention = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, dim=-1)
    return (attention @ value).transpose(1, 2).flatten(2), attention.mean(dim=1)


def attend_in_windows(weights, qkv, tokens, labels, heads, window):
    """What the tokens and the labels of a map (B, Ht, Wt, channels) become, window by window.

    `qkv` is the name of the projection. Padding is attended to, and has no label.
    """
    height, width = tokens.shape[1:3]
    below, beside = -height % window, -width % window
    real = torch.ones(1, height, width, 1, dtype=tokens.dtype)
    tokens, labels, real = (F.pad(each, (0, 0, 0, beside, 0, below)) for each in (tokens, labels, real))
    attended, mixed = torch.zeros_like(tokens), torch.zeros_like(labels)
    for y0 in range(0, height, window):
        for x0 in range(0, width, window):
            where = (slice(None), slice(y0, y0 + window), slice(x0, x0 + window))
            projected = weights.linear(tokens[where].flatten(1, 2), qkv).chunk(3, dim=-1)
            output, attention = attend(*projected, heads)
            share = attention @ labels[where].flatten(1, 2) / (attention @ real[where].flatten(1, 2))
            attended[where], mixed[where] = (each.unflatten(1, (window, window)) for each in (output, share))
    return attended[:, :height, :width], mixed[:, :height, :width]


def materialised_attention(model, images):
    """Attention matrices (B, N, N) of timm's own blocks, averaged over the heads, and the logits."""
    matrices, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        keep = lambda module, inputs, output: matrices.append(inputs[0].mean(dim=1))  # noqa: E731
        hooks.append(block.attn.attn_drop.register_forward_hook(keep))
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return matrices, logits


def cells(tokens, step, partial):
    """Bounds of the cells of `step` tokens along an axis."""
    end = tokens if partial else tokens - tokens % step
    return [(start, min(start + step, tokens)) for start in range(0, end, step)]


def pooled(labels, rows, columns):
    """Means of a map of labels (B, Ht, Wt, C) over cells that are given by their bounds."""
    means = [[labels[:, y0:y1, x0:x1].mean(dim=(1, 2)) for x0, x1 in columns] for y0, y1 in rows]
    return torch.stack([torch.stack(row, dim=1) for row in means], dim=1)


def thousand_classes(size):
    """Images in float64, their target, and the label of each pixel, (B, Hi, Wi, 1000)."""
    height, width = size
    classes = torch.tensor([[1, 998], [500, 2]])
    boxes = torch.tensor([[[3, 5, height // 2 + 3, width - 9]], [[11, 0, height, width // 2]]])
    pixels = F.one_hot(classes[:, 0], 1000).double()[:, None, None].repeat(1, height, width, 1)
    for image, (y0, x0, y1, x1) in enumerate(boxes[:, 0].tolist()):
        pixels[image, y0:y1, x0:x1] = F.one_hot(classes[image, 1], 1000).double()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    return images, MixedTarget.from_boxes(classes, boxes, size), pixels


def mean_of_tokens(labels):
    return labels.mean(dim=1)


def check_thousand_classes(model, size, dense_oracle, residual=True, pool=mean_of_tokens):
    """A model's logits and labels are those of a dense computation of all classes in float64.

    `dense_oracle` makes logits and labels (B, N, 1000) of the tokens after the last block of the model, the images, the
    labels of their pixels and `residual`; `pool` makes the image's label of them.
    """
    images, target, pixels = thousand_classes(size)
    logits, labels = dense_oracle(model, images, pixels, residual)
    ours, aligned = tlk.patch_model(model, residual=residual)(images, target=target, collect_layers=True)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-10)
    assert aligned.ratio.dtype == torch.float64
    torch.testing.assert_close(aligned.to_dense(1000), pool(labels), rtol=0, atol=1e-10)
    for image, partner in enumerate(target.classes[:, 1]):
        of_tokens = labels[image, :, partner]
        torch.testing.assert_close(aligned.layer_shares[-1][image, ..., 0].flatten(), of_tokens, rtol=0, atol=1e-10)
    assert (aligned.ratio - target.ratio).abs().max() > 1e-4
