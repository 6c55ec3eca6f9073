"""Patched DaViT: logits and gradients are timm's, labels are those of a dense computation."""

import following
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import tlalign_kernels as tlk

# Maps of 9 x 7, 5 x 4 and 3 x 2 tokens, beyond which windows of 4 x 4 reach, and the pixels of the last cells.
SIZE = (34, 27)
WINDOW = 4
NAMES = ["davit_tiny", "davit_base_fl"]  # the second merges with overlap, and names its blocks
OTHERS = {"head_norm_first": True, "qkv_bias": False, "cpe_act": True, "attn_types": ("channel", "spatial")}


def small(name="davit_tiny", **options):
    options = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 2, 1), "window_size": WINDOW, **options}
    return following.randomised(timm.create_model(name, num_classes=options.pop("num_classes", 10), **options)).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, OTHERS])
def test_is_followed(name, options):
    aligned = following.check_followed(small(name, **options), *following.images_and_target(SIZE), blocks=4)
    assert [tuple(share.shape[1:3]) for share in aligned.layer_shares] == [(9, 7), (5, 4), (5, 4), (3, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("davit*"))
def test_every_name_is_followed(name):
    with torch.device("meta"):
        depths = [len(stage.blocks) for stage in timm.create_model(name).stages]
    dims, heads = (8, 16, 32, 64), (1, 2, 4, 8)
    model = small(name, depths=depths, embed_dims=dims, num_heads=heads)
    following.check_followed(model, *following.images_and_target(SIZE), blocks=sum(depths))


def dense_oracle(model, images, labels, residual):
    """Logits, and labels of the tokens after the last block, from the weights and the labels of the pixels."""
    weights = following.Weights(model)
    x = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
    x = weights.conv(x, "stem.conv", stride=4, padding=3)
    x = weights.norm(x.permute(0, 2, 3, 1), "stem.norm")
    labels = following.pooled(labels, *(following.cells(pixels, 4, partial=True) for pixels in labels.shape[1:3]))
    for index, stage in enumerate(model.stages):
        name = f"stages.{index}"
        if index:
            x = weights.norm(x, f"{name}.downsample.norm").permute(0, 3, 1, 2)
            if stage.downsample.even_k:
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            x = weights.conv(x, f"{name}.downsample.conv", stride=2, padding=0 if stage.downsample.even_k else 1)
            x = x.permute(0, 2, 3, 1)
            labels = following.pooled(
                labels, *(following.cells(tokens, 2, partial=True) for tokens in labels.shape[1:3])
            )
        for spatial, channel in stage.blocks:
            of_block = next(own for own, module in model.named_modules() if module is spatial)
            x = encoded(weights, x, f"{of_block}.cpe1")
            y = weights.norm(x, f"{of_block}.norm1")
            heads = spatial.num_heads
            attended, mixed = following.attend_in_windows(weights, f"{of_block}.attn.qkv", y, labels, heads, WINDOW)
            labels = (mixed + labels) / 2 if residual else mixed
            x = encoded(weights, x + weights.linear(attended, f"{of_block}.attn.proj"), f"{of_block}.cpe2")
            hidden = F.gelu(weights.linear(weights.norm(x, f"{of_block}.norm2"), f"{of_block}.mlp.fc1"))
            x = x + weights.linear(hidden, f"{of_block}.mlp.fc2")
            x = channel(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # mixes no tokens but by its encodings
    x = weights.norm(x.mean(dim=(1, 2)), "head.norm")
    return weights.linear(x, "head.fc"), labels.flatten(1, 2)


def encoded(weights, x, name):
    """A map (B, Ht, Wt, channels) with the encoding of its positions."""
    encoding = weights.conv(x.permute(0, 3, 1, 2), f"{name}.proj", padding=1, groups=x.shape[3])
    return x + encoding.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("name", "size", "residual"), [("davit_tiny", SIZE, True), ("davit_tiny", (64, 64), False), (NAMES[1], SIZE, True)]
)
def test_labels_equal_thousand_class_labels_in_float64(name, size, residual):
    model = small(name, num_classes=1000).double()
    following.check_thousand_classes(model, size, dense_oracle, residual)


def test_checkpointing_changes_nothing():
    # Each block of windows and each of channels.
    following.check_checkpointing(tlk.patch_model(small()), *following.images_and_target(SIZE), blocks=8)


def test_compiles_into_one_graph():
    following.check_compiles(tlk.patch_model(small(depths=(1, 1, 1))), *following.images_and_target(SIZE))


def test_adapters_are_followed():
    # Merging without overlap, timm asks the convolution itself for its kernel.
    following.check_adapters(small("davit_base_fl"), *following.images_and_target(SIZE))


def test_labels_may_stay_where_an_attention_is_dropped():
    following.check_stochastic_depth(small(depths=(1, 1, 2), drop_path_rate=0.5), SIZE)


def test_layers_choose_the_blocks_that_align():
    following.check_layers(small(), *following.images_and_target(SIZE), blocks=4)


def test_labels_stay_float32_under_autocast():
    following.check_labels_under_autocast(tlk.patch_model(small()), *following.images_and_target(SIZE))


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small(), *following.images_and_target(SIZE))
    with pytest.raises(ValueError, match=r"layers: expected none, since no block can align, got \[0\]"):
        tlk.patch_model(small(attn_types=("channel",)), layers=[0])


@pytest.mark.parametrize(
    ("where", "replacement"),
    [
        ("stem.conv", nn.Conv2d(3, 8, 4, 4)),
        ("stages.1.downsample.conv", nn.Conv2d(8, 16, 4, 2)),
        ("stages.1.blocks.1.0.attn", nn.Flatten()),
        ("stages.1.blocks.1.0.attn.softmax", nn.Softmax(1)),
        ("stages.2.blocks.0.1", nn.Flatten()),
        ("head", nn.Flatten()),
    ],
)
def test_other_parts_are_refused_by_name(where, replacement):
    following.check_refused(small(), where, replacement)
