"""Patched PVT v2: logits and gradients are timm's, labels are those of a dense computation."""

import following
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import tlalign_kernels as tlk
from tlalign_kernels import MixedTarget

# No stage divides by the stride of the next, nor by the reduction of its keys.
SIZE = (72, 56)
NAMES = ["pvt_v2_b0", "pvt_v2_b2_li"]


def small(name, depths=(1, 2, 1, 1), **options):
    options = {"embed_dims": (8, 16, 40, 64), "depths": depths, "num_classes": following.CLASSES, **options}
    return following.randomised(timm.create_model(name, **options)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_is_followed(name):
    images, target = following.images_and_target(SIZE)
    aligned = following.check_followed(small(name), images, target, blocks=5)
    assert (aligned.ratio - target.ratio)[:2].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("pvt_v2*"))
def test_every_name_is_followed(name):
    own = timm.create_model(name, num_classes=0).depths
    following.check_followed(small(name, own), *following.images_and_target(SIZE), blocks=sum(own))


def dense_oracle(model, images, labels, residual):
    """Logits, and labels of the tokens after the last block, from the weights and the labels of the pixels."""
    weights, x = following.Weights(model), images
    for number, stage in enumerate(model.stages):
        stride, padding, name = (2, 1, f"stages.{number}.downsample") if number else (4, 3, "patch_embed")
        x = weights.conv(x, f"{name}.proj", stride=stride, padding=padding)
        size = x.shape[2:]
        bounds = (following.cells(tokens, stride, partial=True) for tokens in labels.shape[1:3])
        labels = following.pooled(labels, *bounds).flatten(1, 2)
        x = weights.norm(x.flatten(2).transpose(1, 2), f"{name}.norm")
        for index, block in enumerate(stage.blocks):
            name = f"stages.{number}.blocks.{index}"
            keys = queries = weights.norm(x, f"{name}.norm1", 1e-6)
            key_labels = labels
            if f"{name}.attn.sr.weight" in weights.named:
                keys, key_labels = keys.transpose(1, 2).unflatten(2, size), labels.unflatten(1, size)
                step = weights.named[f"{name}.attn.sr.weight"].shape[-1]
                bounds = [following.cells(tokens, step, partial=False) for tokens in size]
                if step == 1:
                    bounds = [[(i * tokens // 7, -(-(i + 1) * tokens // 7)) for i in range(7)] for tokens in size]
                    keys = following.pooled(keys.permute(0, 2, 3, 1), *bounds).permute(0, 3, 1, 2)
                keys = weights.conv(keys, f"{name}.attn.sr", stride=step).flatten(2).transpose(1, 2)
                keys = weights.norm(keys, f"{name}.attn.norm")
                keys = F.gelu(keys) if step == 1 else keys
                key_labels = following.pooled(key_labels, *bounds).flatten(1, 2)
            projected = (
                weights.linear(queries, f"{name}.attn.q"),
                *weights.linear(keys, f"{name}.attn.kv").chunk(2, dim=-1),
            )
            attended, attention = following.attend(*projected, block.attn.num_heads)
            mixed = attention @ key_labels
            labels = (mixed + labels) / 2 if residual else mixed
            x = x + weights.linear(attended, f"{name}.attn.proj")
            hidden = weights.linear(weights.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")
            hidden = hidden.transpose(1, 2).unflatten(2, size)
            hidden = F.relu(hidden) if step == 1 else hidden
            hidden = weights.conv(hidden, f"{name}.mlp.dwconv", padding=1, groups=hidden.shape[1])
            x = x + weights.linear(F.gelu(hidden.flatten(2).transpose(1, 2)), f"{name}.mlp.fc2")
        x = weights.norm(x, f"stages.{number}.norm", 1e-6).transpose(1, 2).unflatten(2, size)
        labels = labels.unflatten(1, size)
    return weights.linear(x.mean(dim=(2, 3)), "head"), labels.flatten(1, 2)


@pytest.mark.parametrize(
    ("name", "size", "residual"),
    [("pvt_v2_b0", SIZE, True), ("pvt_v2_b0", (64, 64), False), ("pvt_v2_b2_li", SIZE, True)],
)
def test_shares_equal_thousand_class_labels_in_float64(name, size, residual):
    model = small(name, num_classes=1000).double()
    following.check_thousand_classes(model, size, dense_oracle, residual)


def test_dense_labels_and_three_sources_are_followed():
    model = tlk.patch_model(small("pvt_v2_b0"))
    images, _ = following.images_and_target((64, 96), batch=2)
    boxes = torch.tensor([[[0, 0, 37, 90], [10, 20, 64, 96]]]).expand(2, -1, -1)
    target = MixedTarget.from_boxes(torch.tensor([[0, 1, 2], [5, 3, 9]]), boxes, (64, 96))
    share = target.token_share((16, 24), (4, 4))
    labels = torch.zeros(2, 384, following.CLASSES)
    labels.scatter_(2, target.classes[:, None].expand(-1, 384, -1), torch.cat((1 - share.sum(-1, True), share), -1))
    dense = MixedTarget.from_dense(labels.transpose(1, 2).unflatten(2, (16, 24)))
    aligned = [model(images, target=given)[1].to_dense(following.CLASSES) for given in (target, dense)]
    torch.testing.assert_close(*aligned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing(name):
    model = tlk.patch_model(small(name).train())
    following.check_checkpointing(model, *following.images_and_target(SIZE), blocks=5)


@pytest.mark.parametrize(("name", "checkpointing"), [("pvt_v2_b0", True), ("pvt_v2_b2_li", False)])
def test_compiles_into_one_graph(name, checkpointing):
    model = tlk.patch_model(small(name, depths=(1, 1), embed_dims=(8, 16)).train())
    model.set_grad_checkpointing(checkpointing)
    following.check_compiles(model, *following.images_and_target(SIZE))


def test_attention_dropout_acts_in_training_alone():
    following.check_attention_dropout(small("pvt_v2_b0", attn_drop_rate=0.5), *following.images_and_target(SIZE))


def test_adapters_are_followed():
    following.check_adapters(small("pvt_v2_b0"), *following.images_and_target(SIZE))


def test_labels_may_stay_where_an_attention_is_dropped():
    following.check_stochastic_depth(small("pvt_v2_b0", depths=(1, 1, 1, 2), drop_path_rate=0.5), SIZE)


def test_layers_choose_the_blocks_that_align():
    following.check_layers(small("pvt_v2_b0"), *following.images_and_target(SIZE), blocks=5)


def test_labels_stay_float32_under_autocast():
    following.check_labels_under_autocast(tlk.patch_model(small("pvt_v2_b2_li")), *following.images_and_target(SIZE))


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small("pvt_v2_b0"), *following.images_and_target(SIZE))


@pytest.mark.parametrize(
    ("where", "replacement"),
    [
        ("stages.0.blocks.0.attn.sr", nn.Conv2d(8, 8, 8, 8, padding=4)),
        ("stages.0.blocks.0.attn.sr", nn.AvgPool2d(8)),
        ("stages.1.downsample.proj", nn.Conv2d(8, 16, 3, 2, padding=0)),
        ("patch_embed.proj", nn.Conv2d(3, 8, 7, 4, padding=3, dilation=2)),
    ],
)
def test_other_reductions_and_embeddings_are_refused_by_name(where, replacement):
    model = small("pvt_v2_b0")
    model.set_submodule(where, replacement)
    with pytest.raises(NotImplementedError, match=f"{where}: "):
        tlk.patch_model(model)
