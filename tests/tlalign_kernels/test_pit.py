"""Patched PiT: logits and gradients are timm's, labels are those of a dense computation."""

import following
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import tlalign_kernels as tlk

# 7 x 5 patches of 16 pixels, 8 pixels apart, then 4 x 3 and 2 x 2 tokens: cells reach beyond both maps.
SIZE = (64, 50)
DEPTHS = (1, 2, 1)


def small(name="pit_ti_224", **options):
    options = {"img_size": SIZE, "base_dims": (8, 8, 8), "heads": (2, 4, 8), "depth": DEPTHS, **options}
    return following.randomised(timm.create_model(name, num_classes=options.pop("num_classes", 10), **options)).eval()


@pytest.mark.parametrize("name", ["pit_ti_224", "pit_ti_distilled_224"])
def test_is_followed(name):
    aligned = following.check_followed(small(name), *following.images_and_target(SIZE), blocks=4)
    prefix = 2 if "distilled" in name else 1
    assert [share.shape[1] - prefix for share in aligned.layer_shares] == [35, 12, 12, 4]
    assert (aligned.ratio - following.images_and_target(SIZE)[1].ratio)[:2].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("pit*"))
def test_every_name_is_followed(name):
    depths = [len(stage.blocks) for stage in timm.create_model(name, num_classes=0).transformers]
    following.check_followed(small(name, depth=depths), *following.images_and_target(SIZE), blocks=sum(depths))


def dense_oracle(model, images, labels, residual):
    """Logits, and labels of the tokens after the last block, from the weights and the labels of the pixels."""
    weights, patch, stride = following.Weights(model), 16, 8
    x = weights.conv(images, "patch_embed.conv", stride=stride) + model.pos_embed
    starts = [range(0, pixels - patch + 1, stride) for pixels in labels.shape[1:3]]
    prefix = labels.mean(dim=(1, 2))[:, None].expand(-1, model.num_tokens, -1)
    labels = following.pooled(labels, *([(start, start + patch) for start in along] for along in starts))
    tokens = model.cls_token.expand(len(x), -1, -1)
    for stage, transformer in enumerate(model.transformers):
        name = f"transformers.{stage}"
        if stage:
            x = weights.conv(x, f"{name}.pool.conv", stride=2, padding=1, groups=x.shape[1])
            tokens = weights.linear(tokens, f"{name}.pool.fc")
            labels = following.pooled(
                labels, *(following.cells(tokens, 2, partial=True) for tokens in labels.shape[1:3])
            )
        size, count = x.shape[2:], tokens.shape[1]
        x = torch.cat((tokens, x.flatten(2).transpose(1, 2)), dim=1)
        labels = torch.cat((prefix, labels.flatten(1, 2)), dim=1)
        for index in range(len(transformer.blocks)):
            block = f"{name}.blocks.{index}"
            projected = weights.linear(weights.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
            attended, attention = following.attend(*projected, heads=model.heads[stage])
            labels = (attention @ labels + labels) / 2 if residual else attention @ labels
            x = x + weights.linear(attended, f"{block}.attn.proj")
            hidden = F.gelu(weights.linear(weights.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + weights.linear(hidden, f"{block}.mlp.fc2")
        last = labels
        tokens, x = x[:, :count], x[:, count:].transpose(1, 2).unflatten(2, size)
        prefix, labels = labels[:, :count], labels[:, count:].unflatten(1, size)
    tokens = weights.norm(tokens, "norm", 1e-6)
    heads = ["head", "head_dist"][:count]
    logits = sum(weights.linear(tokens[:, index], head) for index, head in enumerate(heads)) / count
    return logits, last


@pytest.mark.parametrize(
    ("name", "residual"), [("pit_ti_224", True), ("pit_ti_224", False), ("pit_ti_distilled_224", True)]
)
def test_labels_equal_thousand_class_labels_in_float64(name, residual):
    model = small(name, num_classes=1000).double()
    pool = lambda labels: labels[:, : model.num_tokens].mean(dim=1)  # noqa: E731
    following.check_thousand_classes(model, SIZE, dense_oracle, residual, pool)


def test_distilled_training_has_a_label_for_each_head():
    model = small("pit_ti_distilled_224")
    images, target = following.images_and_target(SIZE)
    _, mean = tlk.patch_model(model)(images, target=target)
    model.set_distilled_training()
    logits, labels = model.train()(images, target=target)
    assert [part.shape for part in logits] == [(3, following.CLASSES)] * 2
    torch.testing.assert_close((labels[0].ratio + labels[1].ratio) / 2, mean.ratio)
    assert not torch.equal(labels[0].ratio, labels[1].ratio)


def test_dense_labels_are_those_of_strides():
    images, target = following.images_and_target((64, 48))
    of_strides = target.token_share((8, 6), (8, 8)).mT.unflatten(2, (8, 6))
    dense = tlk.MixedTarget.from_dense(torch.cat((1 - of_strides, of_strides), dim=1))
    model = tlk.patch_model(small())
    expected, ours = (model(images, target=each)[1] for each in (target, dense))
    ratio = torch.cat((1 - expected.ratio, expected.ratio), dim=1)
    torch.testing.assert_close(ours.to_dense(2), ratio, rtol=0, atol=1e-6)


def test_compiles_into_one_graph():
    following.check_compiles(tlk.patch_model(small(depth=(1, 1, 1))), *following.images_and_target(SIZE))


def test_attention_dropout_acts_in_training_alone():
    following.check_attention_dropout(small(attn_drop_rate=0.5), *following.images_and_target(SIZE))


def test_adapters_are_followed():
    following.check_adapters(small(), *following.images_and_target(SIZE))


def test_labels_may_stay_where_an_attention_is_dropped():
    following.check_stochastic_depth(small(depth=(1, 1, 2), drop_path_rate=0.5), SIZE)


def test_layers_choose_the_blocks_that_align():
    following.check_layers(small(), *following.images_and_target(SIZE), blocks=4)


def test_labels_stay_float32_under_autocast():
    following.check_labels_under_autocast(tlk.patch_model(small()), *following.images_and_target(SIZE))


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small(), *following.images_and_target(SIZE))


@pytest.mark.parametrize("size", [(72, 50), (8, 8)])
def test_other_sizes_than_the_position_embeddings_are_refused(size):
    model = tlk.patch_model(small())
    with pytest.raises(ValueError, match=r"images: expected \(64, 50\) pixels, got"):
        model(torch.randn(3, 3, *size), target=following.images_and_target(size)[1])


def test_transmix_is_refused():
    with pytest.raises(NotImplementedError, match="method: TransMix is not defined for patches that are pooled"):
        tlk.patch_model(small(), method="transmix")


@pytest.mark.parametrize(
    ("where", "replacement"),
    [
        ("patch_embed.conv", nn.Conv2d(3, 16, 16, 6)),
        ("patch_embed.conv", nn.Conv2d(3, 16, 16, 8, padding=4)),
        ("transformers.1.pool.conv", nn.Conv2d(16, 32, 2, 2, groups=16)),
        ("transformers.2.blocks.0.attn", nn.Flatten()),
    ],
)
def test_other_parts_are_refused_by_name(where, replacement):
    following.check_refused(small(), where, replacement)
