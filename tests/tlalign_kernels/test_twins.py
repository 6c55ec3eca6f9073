"""Patched Twins: logits and gradients are timm's, labels are those of a dense computation."""

import following
import pytest
import timm
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

import tlalign_kernels as tlk

# Windows of 7 x 7 reach beyond the map in each stage, and no stage divides by the reduction of its keys.
SIZE = (88, 72)
NAMES = {"twins_svt_small": (2, 2, 1, 2), "twins_pcpvt_small": (1, 2, 1, 1)}


def small(name, depths=None, **options):
    depths = depths or NAMES[name]
    heads = (1, 2, 5, 8) if "pcpvt" in name else (1, 2, 3, 4)
    options = {"embed_dims": [8 * number for number in heads], "num_heads": heads, "depths": depths, **options}
    options = {"img_size": SIZE[0] // 32 * 32, "num_classes": following.CLASSES, **options}
    return following.randomised(timm.create_model(name, **options)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_is_followed(name):
    images, target = following.images_and_target(SIZE)
    aligned = following.check_followed(small(name), images, target, blocks=sum(NAMES[name]))
    assert (aligned.ratio - target.ratio)[:2].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("twins*"))
def test_every_name_is_followed(name):
    own = timm.create_model(name, num_classes=0).depths
    following.check_followed(small(name, own), *following.images_and_target(SIZE), blocks=sum(own))


def dense_oracle(model, images, labels, residual):
    """Logits, and labels of the tokens after the last block, from the weights and the labels of the pixels."""
    weights, x = following.Weights(model), images
    for stage, blocks in enumerate(model.blocks):
        stride = 2 if stage else 4
        x = weights.conv(x, f"patch_embeds.{stage}.proj", stride=stride)
        size = x.shape[2:]
        bounds = (following.cells(tokens, stride, partial=False) for tokens in labels.shape[1:3])
        labels = following.pooled(labels, *bounds).flatten(1, 2)
        x = weights.norm(x.flatten(2).transpose(1, 2), f"patch_embeds.{stage}.norm")
        for index, block in enumerate(blocks):
            name, heads = f"blocks.{stage}.{index}", block.attn.num_heads
            y = weights.norm(x, f"{name}.norm1", 1e-6)
            if f"{name}.attn.qkv.weight" in weights.named:
                maps = (each.unflatten(1, size) for each in (y, labels))
                attended, mixed = following.attend_in_windows(weights, f"{name}.attn.qkv", *maps, heads, window=7)
                attended, mixed = attended.flatten(1, 2), mixed.flatten(1, 2)
            else:
                keys, key_labels = y, labels
                if f"{name}.attn.sr.weight" in weights.named:
                    step = weights.named[f"{name}.attn.sr.weight"].shape[-1]
                    keys = weights.conv(y.transpose(1, 2).unflatten(2, size), f"{name}.attn.sr", stride=step)
                    keys = weights.norm(keys.flatten(2).transpose(1, 2), f"{name}.attn.norm")
                    bounds = (following.cells(tokens, step, partial=False) for tokens in size)
                    key_labels = following.pooled(labels.unflatten(1, size), *bounds).flatten(1, 2)
                projected = weights.linear(y, f"{name}.attn.q"), *weights.linear(keys, f"{name}.attn.kv").chunk(2, -1)
                attended, attention = following.attend(*projected, heads)
                mixed = attention @ key_labels
            labels = (mixed + labels) / 2 if residual else mixed
            x = x + weights.linear(attended, f"{name}.attn.proj")
            hidden = F.gelu(weights.linear(weights.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1"))
            x = x + weights.linear(hidden, f"{name}.mlp.fc2")
            if index == 0:
                encoded = weights.conv(
                    x.transpose(1, 2).unflatten(2, size), f"pos_block.{stage}.proj.0", padding=1, groups=x.shape[2]
                )
                x = x + encoded.flatten(2).transpose(1, 2)
        x, labels = x.transpose(1, 2).unflatten(2, size), labels.unflatten(1, size)
    x = weights.norm(x.flatten(2).transpose(1, 2), "norm", 1e-6)
    return weights.linear(x.mean(dim=1), "head"), labels.flatten(1, 2)


@pytest.mark.parametrize(
    ("name", "size", "residual"),
    [("twins_svt_small", SIZE, True), ("twins_svt_small", (56, 56), False), ("twins_pcpvt_small", SIZE, True)],
)
def test_shares_equal_thousand_class_labels_in_float64(name, size, residual):
    model = small(name, num_classes=1000).double()
    following.check_thousand_classes(model, size, dense_oracle, residual)


def test_compiles_into_one_graph():
    model = tlk.patch_model(small("twins_svt_small", depths=(2, 1), embed_dims=(8, 16)).train())
    following.check_compiles(model, *following.images_and_target((36, 44)))


def test_attention_dropout_acts_in_training_alone():
    following.check_attention_dropout(small("twins_svt_small", attn_drop_rate=0.5), *following.images_and_target(SIZE))


def test_adapters_are_followed():
    following.check_adapters(small("twins_svt_small"), *following.images_and_target(SIZE))


def test_labels_may_stay_where_an_attention_is_dropped():
    following.check_stochastic_depth(small("twins_pcpvt_small", depths=(1, 1, 1, 2), drop_path_rate=0.5), SIZE)


def test_layers_choose_the_blocks_that_align():
    following.check_layers(small("twins_svt_small"), *following.images_and_target(SIZE), blocks=7)


def test_labels_stay_float32_under_autocast():
    following.check_labels_under_autocast(tlk.patch_model(small("twins_svt_small")), *following.images_and_target(SIZE))


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small("twins_pcpvt_small"), *following.images_and_target(SIZE))


@pytest.mark.parametrize(
    ("where", "replacement"),
    [
        ("blocks.0.1.attn.sr", nn.Conv2d(8, 8, 7, 8)),
        ("patch_embeds.1.proj", nn.Conv2d(8, 16, 3, 2, padding=1)),
        ("blocks.0.0.attn", Attention(8, num_heads=1)),
    ],
)
def test_other_parts_are_refused_by_name(where, replacement):
    model = small("twins_svt_small")
    model.set_submodule(where, replacement)
    with pytest.raises(NotImplementedError, match=f"{where}: "):
        tlk.patch_model(model)


def test_encodings_that_thin_out_are_refused():
    model = small("twins_svt_small")
    model.pos_block[2].stride = 2
    with pytest.raises(NotImplementedError, match=r"pos_block\.2: can't follow labels through a stride of 2"):
        tlk.patch_model(model)
