"""Patched Swin Transformers: logits and gradients are timm's, labels are those of a dense computation."""

import copy

import following
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import nn

import tlalign_kernels as tlk
from tlalign_kernels import MixedTarget, mixed_cross_entropy
from tlalign_kernels.models import swin

MODULES = {"timm.models.swin_transformer", "timm.models.swin_transformer_v2", "timm.models.swin_transformer_v2_cr"}
NAMES = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in MODULES]
# A name for each way in which models differ; the slow test has all names.
SAMPLE = {
    "swin_tiny_patch4_window7_224": "relative positions in a table",
    "swin_s3_tiny_224": "windows differ between stages",
    "swinv2_tiny_window8_256": "cosine attention, continuous relative positions",
    "swinv2_base_window12to16_192to256": "positions of the windows of the pretraining",
    "swinv2_cr_tiny_224": "v2-CR",
    "swinv2_cr_small_ns_224": "a norm after each stage",
    "swinv2_cr_giant_224": "a norm after each six blocks",
}
FAMILIES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]


def small(name, image_size=(36, 20), **options):
    """A timm model of few, small blocks, with weights large enough that attention is not flat.

    With the default size maps are 9 x 5 and 5 x 3 for windows of 4: padded, shifted along both axes and along one.
    """
    defaults = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "window_size": 4, "num_classes": 10}
    return following.randomised(timm.create_model(name, **{**defaults, "img_size": image_size, **options})).eval()


def images_and_target(model):
    return following.images_and_target(model.patch_embed.img_size, dtype=next(model.parameters()).dtype)


def relative(ours, own):
    return float((ours - own).detach().abs().max() / own.detach().abs().max())


def check_followed(name):
    # Four stages, in their sizes: windows of some names differ, some cover the map, some are padded.
    options = {"depths": (2, 1, 6 if "giant" in name or "huge" in name else 2, 1), "num_heads": (2, 2, 4, 4)}
    with torch.device("meta"):
        full = timm.create_model(name)
    windows = [stage.blocks[0].window_size for stage in (full.stages if "_cr_" in name else full.layers)]
    model = small(name, (56, 40), window_size=windows, **options)
    images, target = images_and_target(model)
    aligned = following.check_followed(model, images, target, blocks=sum(options["depths"]))
    sizes = [(14, 10), (7, 5), (4, 3), (2, 2)]
    expected = [(3, *size, 1) for size, depth in zip(sizes, options["depths"], strict=True) for _ in range(depth)]
    assert [tuple(share.shape) for share in aligned.layer_shares] == expected
    return target, aligned


@pytest.mark.parametrize("name", SAMPLE)
def test_each_kind_is_followed(name):
    target, aligned = check_followed(name)
    assert (aligned.ratio - target.ratio)[:2].abs().max() > 1e-4


@pytest.mark.slow
def test_all_37_names_are_followed():
    assert len(NAMES) == 37
    for name in NAMES:
        check_followed(name)


# Labels


def cut(tokens, window):
    """A map (B, rows, columns, ...), a multiple of the window, as a list of windows (B, N, ...)."""
    return [
        tokens[:, top : top + window[0], left : left + window[1]].flatten(1, 2)
        for top in range(0, tokens.shape[1], window[0])
        for left in range(0, tokens.shape[2], window[1])
    ]


def join(windows, window, size):
    across = size[1] // window[1]
    parts = [part.unflatten(1, window) for part in windows]
    rows = [torch.cat(parts[start : start + across], dim=2) for start in range(0, len(parts), across)]
    return torch.cat(rows, dim=1)


def painted_regions(size, window, shift):
    """Numbers (1, rows, columns) of the regions of a shifted map, painted one over the other."""
    regions, number = torch.zeros(1, *size), 0
    for down in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for across in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            regions[:, down, across] = number
            number += 1
    return regions


class DenseOracle(following.Weights):
    """Labels of every token as distributions over classes, by materialised attention, from a model's weights alone."""

    def __init__(self, model, family, window, always_partition):
        super().__init__(model)
        self.family, self.window, self.always_partition = family, window, always_partition

    def position_bias(self, name, window):
        # timm computes positions in float32 whatever the model is in.
        rows, columns = (torch.arange(size).float() for size in window)
        places = torch.cartesian_prod(rows, columns).view(-1, 2)
        apart = places[:, None] - places[None]
        if self.family == "v1":
            numbers = (apart[..., 0] + window[0] - 1) * (2 * window[1] - 1) + apart[..., 1] + window[1] - 1
            return self.named[f"{name}.relative_position_bias_table"][numbers.long()].permute(2, 0, 1)
        if self.family == "v2":
            apart = apart / torch.tensor(window).sub(1).clamp(min=1) * 8
            apart = apart.sign() * (apart.abs() + 1).log2() / 3
            hidden = self.linear(apart.double(), f"{name}.cpb_mlp.0").relu()
            return 16 * self.linear(hidden, f"{name}.cpb_mlp.2").sigmoid().permute(2, 0, 1)
        apart = (apart.sign() * (apart.abs() + 1).log()).double()
        return self.linear(self.linear(apart, f"{name}.meta_mlp.fc1").relu(), f"{name}.meta_mlp.fc2").permute(2, 0, 1)

    def attention_of(self, tokens, name, bias, heads):
        """Matrices (B, H, N, N) and values (B, H, N, D) of a window (B, N, channels)."""
        qkv = self.linear(tokens, f"{name}.qkv")
        if self.family == "v2":
            q_bias, v_bias = self.named[f"{name}.q_bias"], self.named[f"{name}.v_bias"]
            qkv = qkv + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        if self.family == "v1":
            scores = query @ key.mT / query.shape[-1] ** 0.5
        else:
            scale = self.named[f"{name}.logit_scale"].view(-1, 1, 1).exp().clamp(max=100)
            lengths = query.norm(dim=-1)[..., :, None] * key.norm(dim=-1)[..., None, :]
            # Padding has no length where there is no bias; its cosine is 0.
            scores = scale * (query @ key.mT) / lengths.clamp(min=1e-12)
        return scores + bias, value

    def attend(self, x, labels, name, window, shift, heads):
        size = x.shape[1:3]
        padded = tuple(-(-tokens // step) * step for tokens, step in zip(size, window, strict=True))

        def rolled_and_padded(tokens):
            filled = tokens.new_zeros(tokens.shape[0], *padded, tokens.shape[3])
            filled[:, : size[0], : size[1]] = tokens.roll((-shift[0], -shift[1]), (1, 2))
            return cut(filled, window)

        regions = cut(painted_regions(padded, window, shift), window)
        bias = self.position_bias(name, window)
        attended, mixed = [], []
        for tokens, of_tokens, real, region in zip(
            *map(rolled_and_padded, (x, labels, torch.ones_like(x[..., :1]))), regions, strict=True
        ):
            scores, value = self.attention_of(tokens, name, bias, heads)
            attention = (scores - 100 * (region[:, None, :, None] != region[:, None, None, :])).softmax(dim=-1)
            attended.append((attention @ value).transpose(1, 2).flatten(2))
            of_real = attention.mean(dim=1) * real.mT
            mixed.append(of_real @ of_tokens / of_real.sum(dim=-1, keepdim=True))
        attended, mixed = (
            join(parts, window, padded)[:, : size[0], : size[1]].roll(shift, (1, 2)) for parts in (attended, mixed)
        )
        return self.linear(attended, f"{name}.proj"), mixed

    def block(self, x, labels, name, window, shift, heads):
        attended, mixed = self.attend(
            self.norm(x, f"{name}.norm1") if self.family == "v1" else x, labels, f"{name}.attn", window, shift, heads
        )
        x = x + (attended if self.family == "v1" else self.norm(attended, f"{name}.norm1"))
        hidden = self.norm(x, f"{name}.norm2") if self.family == "v1" else x
        hidden = self.linear(F.gelu(self.linear(hidden, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        x = x + (hidden if self.family == "v1" else self.norm(hidden, f"{name}.norm2"))
        if f"{name}.norm3.weight" in self.named:
            x = self.norm(x, f"{name}.norm3")
        return x, (mixed + labels) / 2

    def merge(self, x, labels, name):
        rows, columns = ((tokens + 1) // 2 for tokens in x.shape[1:3])
        filled = x.new_zeros(x.shape[0], 2 * rows, 2 * columns, x.shape[3])
        filled[:, : x.shape[1], : x.shape[2]] = x
        x = torch.cat([filled[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        x = (
            self.norm(self.linear(x, f"{name}.reduction"), f"{name}.norm")
            if self.family == "v2"
            else self.linear(self.norm(x, f"{name}.norm"), f"{name}.reduction")
        )
        means = [
            labels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
            for row in range(rows)
            for column in range(columns)
        ]
        return x, torch.stack(means, dim=1).unflatten(1, (rows, columns))

    def __call__(self, images, labels):
        """Logits, label of the image, and the labels after each block."""
        x = self.conv(images, "patch_embed.proj", stride=2).permute(0, 2, 3, 1)
        x = self.norm(x, "patch_embed.norm")
        stages, of_blocks = "stages" if self.family == "cr" else "layers", []
        for stage, heads in enumerate((2, 4)):
            if stage > 0:
                x, labels = self.merge(x, labels, f"{stages}.{stage}.downsample")
            for block in range(2):
                size = x.shape[1:3]
                fits = [not self.always_partition and t <= w for t, w in zip(size, self.window, strict=True)]
                window = [t if fit else w for t, w, fit in zip(size, self.window, fits, strict=True)]
                shift = [0 if fit or block % 2 == 0 else w // 2 for w, fit in zip(self.window, fits, strict=True)]
                x, labels = self.block(x, labels, f"{stages}.{stage}.blocks.{block}", window, shift, heads)
                of_blocks.append(labels)
        if self.family != "cr":
            x = self.norm(x, "norm")
        return self.linear(x.mean(dim=(1, 2)), "head.fc"), labels.mean(dim=(1, 2)), of_blocks


@pytest.mark.parametrize("family", ["v1", "v2", "cr"])
@pytest.mark.parametrize(
    ("image_size", "window", "always_partition"),
    [((16, 16), (4, 4), False), ((16, 32), (4, 4), False), ((18, 10), (4, 4), False), ((14, 22), (5, 2), True)],
    ids=["square", "not square", "padded", "padded, windows beyond the map"],
)
def test_shares_equal_thousand_class_labels_in_float64(family, image_size, window, always_partition):
    name = dict(zip(("v1", "v2", "cr"), FAMILIES, strict=True))[family]
    options = {"window_size": window, "always_partition": always_partition, "patch_size": 2, "num_classes": 1000}
    model = small(name, image_size, **options).double()
    classes = torch.tensor([[1, 998], [3, 3], [500, 2]])
    height, width = image_size
    box = torch.tensor([[[3, 1, height, 7]], [[0, 0, 6, 5]], [[5, 2, height - 2, width]]])
    pixels = torch.zeros(3, height, width, 1000, dtype=torch.float64)
    for image, (y0, x0, y1, x1) in enumerate(box[:, 0].tolist()):
        pixels[image, ..., classes[image, 0]] = 1
        pixels[image, y0:y1, x0:x1] = F.one_hot(classes[image, 1], 1000).double()
    token_labels = pixels.unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(-2, -1))
    images = torch.randn(3, 3, height, width, dtype=torch.float64)
    oracle = DenseOracle(model, family, window, always_partition)
    logits, expected, of_blocks = oracle(images, token_labels)
    # The oracle's attention is timm's.
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-10)

    target = MixedTarget.from_boxes(classes, box, image_size)
    ours, aligned = tlk.patch_model(model)(images, target=target, collect_layers=True)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-10)
    assert aligned.ratio.dtype == torch.float64
    torch.testing.assert_close(aligned.to_dense(1000), expected, rtol=0, atol=1e-10)
    for image in (0, 2):  # the classes of the second are the same
        for share, labels in zip(aligned.layer_shares, of_blocks, strict=True):
            of_class = labels[image, ..., classes[image, 1]]
            torch.testing.assert_close(share[image, ..., 0], of_class, rtol=0, atol=1e-10)
        assert abs(expected[image, classes[image, 1]] - target.ratio[image, 0]) > 1e-3

    _, dense = model(images, target=MixedTarget.from_dense(token_labels.permute(0, 3, 1, 2)))
    torch.testing.assert_close(dense.to_dense(1000), expected, rtol=0, atol=1e-10)


BLOCKS = {
    "v1": (swin_transformer.SwinTransformerBlock, swin.AlignedSwinTransformerBlock, swin.AlignedWindowAttention),
    "v2": (
        swin_transformer_v2.SwinTransformerV2Block,
        swin.AlignedSwinTransformerV2Block,
        swin.AlignedWindowAttentionV2,
    ),
    "cr": (
        swin_transformer_v2_cr.SwinTransformerV2CrBlock,
        swin.AlignedSwinTransformerV2CrBlock,
        swin.AlignedWindowMultiHeadAttention,
    ),
}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize(
    ("made_for", "given", "window", "shifted", "always_partition"),
    [
        ((8, 8), (8, 8), (4, 4), (2, 2), False),
        ((8, 10), (8, 10), (4, 4), (2, 2), False),
        ((3, 10), (3, 10), (3, 4), (0, 2), False),
        ((10, 3), (10, 3), (4, 3), (2, 0), False),
        ((4, 4), (4, 4), (4, 4), (0, 0), False),
        ((3, 3), (3, 3), (3, 3), (0, 0), False),
        ((3, 10), (3, 10), (4, 4), (2, 2), True),
        ((4, 4), (4, 4), (4, 4), (2, 2), True),
        ((8, 8), (3, 5), (4, 4), (2, 2), False),
        ((3, 8), (9, 7), (3, 4), (0, 2), False),
        ((3, 3), (7, 2), (3, 3), (0, 0), False),
    ],
)
def test_windows_and_masks_are_those_of_timm(family, made_for, given, window, shifted, always_partition):
    """Of static masks and, where a map is not the one that the block was made for, of dynamic ones."""
    original, follower, attention_follower = BLOCKS[family]
    size = {"feat_size" if family == "cr" else "input_resolution": made_for}
    block = following.randomised(
        original(
            16,
            num_heads=2,
            window_size=(4, 4),
            shift_size=(2, 2),
            always_partition=always_partition,
            dynamic_mask=made_for != given,
            dtype=torch.float64,
            **size,
        )
    ).eval()
    assert (tuple(block.window_size), tuple(block.shift_size)) == (window, shifted)
    if family != "v1":
        block.attn.logit_scale.data[0] = 5.0  # above the limit of log(100)
    tokens = torch.randn(2, *given, 16, dtype=torch.float64)
    expected = block(tokens)
    own = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
    block.__class__, block.attn.__class__ = follower, attention_follower
    assert torch.equal(block(tokens), expected)
    ours, share = block(tokens, share=torch.full((2, *given, 1), 0.3, dtype=torch.float64))
    assert relative(ours, expected) < 1e-12
    torch.testing.assert_close(share, torch.full_like(share, 0.3), rtol=0, atol=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in own)
    for gradient, timms in zip(torch.autograd.grad(ours.square().sum(), list(block.parameters())), own, strict=True):
        torch.testing.assert_close(gradient, timms, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_may_stay_where_an_attention_is_dropped(name):
    following.check_stochastic_depth(small(name, drop_path_rate=0.5), (36, 20))


def test_layers_choose_the_blocks_that_align():
    model = small(FAMILIES[0], (32, 32))
    images, target = images_and_target(model)
    first = target.token_share((8, 8), (4, 4)).unflatten(1, (8, 8))
    _, everywhere = tlk.patch_model(model)(images, target=target, collect_layers=True)
    _, chosen = tlk.patch_model(model, layers=[1, -1])(images, target=target, collect_layers=True)
    assert torch.equal(chosen.layer_shares[0], first)
    assert not torch.equal(everywhere.layer_shares[0], first)
    assert not torch.equal(chosen.layer_shares[1], first)
    # Patches are merged in any case.
    merged = chosen.layer_shares[1].unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(chosen.layer_shares[2], merged)
    assert not torch.allclose(chosen.layer_shares[3], merged)
    assert type(model.layers[0].blocks[0]) is swin_transformer.SwinTransformerBlock
    assert type(model.layers[1].blocks[1]) is swin.AlignedSwinTransformerBlock
    without = tlk.patch_model(model, layers=[])(images, target=target)[1]
    torch.testing.assert_close(without.ratio, target.ratio, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="layers: expected block indices from -4 to 3"):
        tlk.patch_model(model, layers=[4])


@pytest.mark.parametrize("name", FAMILIES)
def test_without_residual_labels_are_only_attended(name):
    model = small(name).double()
    images, target = images_and_target(model)
    _, with_residual = tlk.patch_model(model)(images, target=target, collect_layers=True)
    _, without = tlk.patch_model(model, residual=False)(images, target=target, collect_layers=True)
    first = target.token_share((9, 5), (4, 4), torch.float64).unflatten(1, (9, 5))
    torch.testing.assert_close(with_residual.layer_shares[0], (without.layer_shares[0] + first) / 2)
    assert not torch.allclose(without.layer_shares[0], first)


# Options of the models


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (FAMILIES[0], {"qkv_bias": False}),
        (FAMILIES[0], {"head_dim": 12}),
        (FAMILIES[1], {"qkv_bias": False}),
        (FAMILIES[1], {"pretrained_window_sizes": (8, 6)}),
        (FAMILIES[2], {"sequential_attn": True}),
        (FAMILIES[2], {"window_size": None, "window_ratio": 2}),
        (FAMILIES[2], {"extra_norm_period": 2, "init_values": None}),
        *((name, {"window_size": ((2, 3), (3, 2))}) for name in FAMILIES),
        *((name, {"attn_drop_rate": 0.2, "drop_path_rate": 0.0}) for name in FAMILIES),
    ],
)
def test_options_are_followed(name, options):
    model = small(name, **options).double()
    images, target = images_and_target(model)
    logits = model(images)
    assert relative(tlk.patch_model(model)(images, target=target)[0], logits) < 1e-11
    if "attn_drop_rate" in options:
        model.train()
        with torch.random.fork_rng():
            again = [(torch.manual_seed(3), model(images, target=target)[0])[1] for _ in range(2)]
        assert torch.equal(*again)
        assert relative(again[0], logits) > 1e-3


def test_a_separate_bias_of_the_projection_is_followed():
    model = small(FAMILIES[1]).double()
    images, target = images_and_target(model)
    for block in (*model.layers[0].blocks, *model.layers[1].blocks):
        block.attn.qkv_bias_separate = True
    logits = model(images)
    own = following.gradients(model, logits.square().sum())
    ours, _ = tlk.patch_model(model)(images, target=target)
    assert relative(ours, logits) < 1e-11
    for gradient, timms in zip(following.gradients(model, ours.square().sum()), own, strict=True):
        torch.testing.assert_close(gradient, timms, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_image_size_is_followed_where_the_model_allows_it(name):
    model = tlk.patch_model(small(name, dynamic_img_size=True).double())
    for size in ((36, 20), (12, 40), (52, 28)):
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[5, 0, 12, 20]]]), size)
        ours, aligned = model(images, target=target, collect_layers=True)
        assert relative(ours, model(images)) < 1e-11
        assert aligned.layer_shares[0].shape == (1, size[0] // 4, size[1] // 4, 1)


def test_pixels_that_v2_cr_crops_have_no_label():
    model = tlk.patch_model(small(FAMILIES[2], dynamic_img_size=True).double(), layers=[])
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[0, 16, 18, 19]]]), (18, 19))
    _, aligned = model(torch.randn(1, 3, 18, 19, dtype=torch.float64), target=target)
    assert target.ratio > 0.1
    assert aligned.ratio == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_input_size_can_be_set_after_patching(name):
    model = small(name).double()
    plain = copy.deepcopy(model)
    tlk.patch_model(model)
    for options in ({"img_size": (28, 44)}, {"window_size": ((3, 2), 4)}, {"always_partition": True}):
        plain.set_input_size(**options)
        model.set_input_size(**options)
        images, target = images_and_target(model)
        assert relative(model(images, target=target)[0], plain(images)) < 1e-11


# Ways to run a model


def without_dropout(model):
    """In training mode, but for what draws random numbers, so that runs can be compared."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            module.eval()
    return model


@pytest.fixture(params=FAMILIES)
def run(request):
    """A patched model with its images, target, aligned ratio and gradients when run eagerly."""
    model = without_dropout(tlk.patch_model(small(request.param).train()))
    images, target = images_and_target(model)
    return model, images, target, *following.step(model, images, target)


def assert_same(result, ratio, expected, rtol=1e-4):
    torch.testing.assert_close(result[0], ratio, rtol=0, atol=1e-6)
    # Some gradients are nothing but rounding: a normalisation takes no notice of the bias before it.
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for ours, theirs in zip(result[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_followed(name):
    model = small(name)
    following.check_adapters(model, *images_and_target(model))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_adapters_are_followed_where_biases_of_swin_v2_are_none_or_apart(qkv_bias):
    model = small("swinv2_tiny_window8_256", qkv_bias=qkv_bias)
    for module in model.modules():
        if isinstance(module, swin_transformer_v2.WindowAttention):
            module.qkv_bias_separate = True

    class Shifted(following.Adapted):
        def forward(self, x):
            return super().forward(x) + 0.1  # a projection that has no bias gives it to padding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "Adapted", Shifted)
        following.check_adapters(model, *images_and_target(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_dropout_acts_where_timms_does(name):
    model = small(name, attn_drop_rate=0.5, drop_path_rate=0.0)
    following.check_attention_dropout(model, *images_and_target(model))


def test_checkpointing_changes_nothing(run):
    following.check_checkpointing(*run[:3], blocks=4)


def test_checkpointing_repeats_the_dropout_of_the_position_bias():
    model = tlk.patch_model(small(FAMILIES[2], attn_drop_rate=0.1).train())
    images, target = images_and_target(model)
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        logits, aligned = model(images, target=target)
        model.zero_grad()
        mixed_cross_entropy(logits, aligned).backward()
        results.append((aligned.ratio, [p.grad.clone() for p in model.parameters()]))
    assert_same(results[1], *results[0], rtol=0)


def check_compiles(name, checkpointing, **options):
    model = without_dropout(tlk.patch_model(small(name, depths=(0, 2)).train()))
    images, target = images_and_target(model)
    expected = following.step(model, images, target)
    model.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    assert_same(following.step(torch.compile(model, fullgraph=True, **options), images, target), *expected)


@pytest.mark.parametrize(
    ("name", "checkpointing"), [(FAMILIES[0], False), (FAMILIES[0], True), (FAMILIES[1], True), (FAMILIES[2], False)]
)
def test_compiles_into_one_graph(name, checkpointing):
    check_compiles(name, checkpointing, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_with_inductor(name):
    check_compiles(name, checkpointing=False)


def test_autocast_errors_are_those_of_timm(run):
    model, images, target, _, expected = run
    following.check_labels_under_autocast(model, images, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, aligned = model(images, target=target)
        own_logits = model(images)
    ours, own = (
        following.gradients(model, mixed_cross_entropy(found, aligned, smoothing=0.1)) for found in (logits, own_logits)
    )
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for our, timms, exact in zip(ours, own, expected, strict=True):
        of_timm, size = float((timms - exact).abs().max()), float(exact.abs().max())
        # Some gradients are nothing but rounding.
        allowed = 8 * of_timm + 2.0**-5 * size + 5e-4 * largest
        assert float((our - exact).abs().max()) <= allowed


def test_copies_follow_labels(run):
    model, images, target, ratio, expected = run
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
    assert_same(following.step(copied, images, target), ratio, expected, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_intermediates_is_untouched(name):
    model = small(name)
    following.check_intermediates(model, images_and_target(model)[0])


def test_blocks_can_be_used_in_a_model_of_ones_own():
    attention = swin.AlignedWindowAttention(32, num_heads=2, window_size=4)
    tokens, share = torch.randn(2, 6, 8, 32), torch.rand(2, 6, 8, 1)
    mixed_tokens, mixed = attention(tokens, share=share, residual=share, shift=(2, 2))
    assert mixed_tokens.shape == tokens.shape
    assert mixed.shape == share.shape
    merged, mixed = swin.AlignedPatchMerging(32)(tokens[:, :5], share=share[:, :5])
    assert merged.shape == (2, 3, 4, 64)
    torch.testing.assert_close(mixed[:, 2, 1], share[:, 4, 2:4].mean(dim=1))


# Errors


def test_bad_arguments_are_refused():
    model = tlk.patch_model(small(FAMILIES[0]))
    images, _ = images_and_target(model)
    with pytest.raises(TypeError, match="target: expected a MixedTarget, got Tensor"):
        model(images, target=torch.rand(3, 10))
    with pytest.raises(ValueError, match="token_labels: expected a map of"):
        model(images, target=MixedTarget.from_dense(torch.full((3, 2, 4, 4), 0.5)))
    with pytest.raises(ValueError, match="collect_layers: expected False without a target"):
        model(images, collect_layers=True)
    tokens, share = torch.randn(3, 4, 4, 16), torch.rand(3, 4, 4, 1)
    with pytest.raises(ValueError, match="mask: expected None with a share"):
        model.layers[0].blocks[0].attn(tokens, torch.zeros(1, 16, 16), share=share)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_do_not_fit_are_refused(name):
    target = MixedTarget.from_ratio(torch.tensor([[0, 1]]), torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match=r"images: expected \(36, 20\) pixels, got \(40, 20\)"):
        tlk.patch_model(small(name))(torch.randn(1, 3, 40, 20), target=target)
    if "_cr_" not in name:
        model = tlk.patch_model(small(name, strict_img_size=False))
        with pytest.raises(ValueError, match=r"images: expected multiples of the patches of \(4, 4\), got \(38, 20\)"):
            model(torch.randn(1, 3, 38, 20), target=target)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_has_no_label_is_refused(name):
    for pooling in ("max", "avgmax", ""):
        with pytest.raises(NotImplementedError, match="global_pool: labels are defined for 'avg' pooling"):
            tlk.patch_model(small(name, global_pool=pooling))
    model = small(name)
    images, target = images_and_target(model)
    tlk.patch_model(model).reset_classifier(10, global_pool="max")
    with pytest.raises(NotImplementedError, match="got 'max'"):
        model(images, target=target)
    for where, module, message in [
        ("head", nn.Flatten(), "head: can't follow labels through Flatten"),
        ("patch_embed", nn.Conv2d(3, 16, 4, 4), "patch_embed: can't follow labels through Conv2d"),
        ("patch_embed.norm", timm.layers.Attention(16, 2), r"patch_embed\.norm: can't follow labels through Attention"),
        (
            "patch_embed.norm",
            timm.layers.NonLocalAttn(16),
            r"patch_embed\.norm: can't follow labels through NonLocalAttn",
        ),
        ("patch_embed", timm.layers.PatchEmbedWithSize(36, 4), "patch_embed: can't follow labels through PatchEmbedWi"),
        ("{blocks}.0.attn.softmax", nn.Softmax(dim=-2), r"attn\.softmax: can't follow labels through Softmax"),
        ("{blocks}.0.mlp", nn.Softmax(dim=1), r"blocks\.0\.mlp: can't follow labels through"),
        ("{blocks}.1.norm1", nn.BatchNorm2d(9), r"blocks\.1\.norm1: can't follow labels through"),
    ]:
        model = small(name)
        if "softmax" in where and "_cr_" in name:
            continue  # has no such module
        model.set_submodule(where.format(blocks=("stages" if "_cr_" in name else "layers") + ".0.blocks"), module)
        with pytest.raises(NotImplementedError, match=message):
            tlk.patch_model(model)
