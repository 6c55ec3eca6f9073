"""Patched XCiT: logits and gradients are timm's, labels are those of a dense computation."""

import following
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import cait
from torch import nn

import tlalign_kernels as tlk

# A map of 6 x 7 tokens, the last of whose rows reach beyond the image.
SIZE = (44, 56)


def small(name="xcit_tiny_12_p8_224", **options):
    options = {"img_size": 48, "embed_dim": 48, "num_heads": 3, "depth": 2, "eta": 0.5, **options}
    return following.randomised(timm.create_model(name, num_classes=options.pop("num_classes", 10), **options)).eval()


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"tokens_norm": False, "use_pos_embed": False}])
def test_is_followed(options):
    aligned = following.check_followed(small(**options), *following.images_and_target(SIZE), blocks=2)
    assert aligned.layer_shares[-1].shape == (3, 43, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("xcit*"))
def test_every_name_is_followed(name):
    following.check_followed(small(name), *following.images_and_target(SIZE), blocks=2)


def dense_labels(model, images, labels, method):
    """Logits of timm's own model, and labels (B, N, 1000) by the attention that it computes."""
    matrices, hooks = [], []
    for module in model.modules():
        if isinstance(module, cait.ClassAttn):
            module.fused_attn = False
            keep = lambda module, inputs, output: matrices.append(inputs[0].mean(dim=1)[:, 0])  # noqa: E731
            hooks.append(module.attn_drop.register_forward_hook(keep))
    logits = model(images)
    for hook in hooks:
        hook.remove()
    patches = following.pooled(labels, *(following.cells(pixels, 8, partial=True) for pixels in labels.shape[1:3]))
    patches = patches.flatten(1, 2)
    if method == "transmix":
        weights = matrices[-1][:, 1:]
        return logits, (weights[:, :, None] * patches).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    of_class = labels.mean(dim=(1, 2))
    for matrix in matrices:
        tokens = torch.cat((of_class[:, None], patches), dim=1)
        of_class = ((matrix[:, :, None] * tokens).sum(dim=1) + of_class) / 2
    return logits, of_class


@pytest.mark.parametrize("method", ["tl-align", "transmix"])
def test_labels_equal_thousand_class_labels_in_float64(method):
    model = small(num_classes=1000).double()
    images, target, pixels = following.thousand_classes(SIZE)
    logits, labels = dense_labels(model, images, pixels, method)
    ours, aligned = tlk.patch_model(model, method=method)(images, target=target)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(aligned.to_dense(1000), labels, rtol=0, atol=1e-10)
    assert (aligned.ratio - target.ratio).abs().max() > 1e-4


def test_checkpointing_changes_nothing():
    following.check_checkpointing(tlk.patch_model(small()), *following.images_and_target(SIZE), blocks=4)


def test_compiles_into_one_graph():
    following.check_compiles(tlk.patch_model(small(depth=1)), *following.images_and_target(SIZE))


def test_attention_dropout_acts_in_training_alone():
    model = small(attn_drop_rate=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True: None  # which acts in training, too
    following.check_attention_dropout(model, *following.images_and_target(SIZE))


def test_adapters_are_followed():
    following.check_adapters(small(), *following.images_and_target(SIZE))


def test_labels_may_stay_where_an_attention_is_dropped():
    model = small(cls_attn_layers=3)
    model.cls_attn_blocks[-1].drop_path1 = DropPath(0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True: None
    following.check_stochastic_depth(model, SIZE)


def test_layers_choose_the_blocks_that_align():
    following.check_layers(small(cls_attn_layers=3), *following.images_and_target(SIZE), blocks=3)


def test_labels_stay_float32_under_autocast():
    following.check_labels_under_autocast(tlk.patch_model(small()), *following.images_and_target(SIZE))


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small(), *following.images_and_target(SIZE))


@pytest.mark.parametrize(
    ("where", "replacement"),
    [
        ("patch_embed", nn.Conv2d(3, 48, 8, 8)),
        ("blocks.1", nn.Conv2d(48, 48, 1)),
        ("cls_attn_blocks.0.attn", nn.Flatten()),
    ],
)
def test_other_parts_are_refused_by_name(where, replacement):
    following.check_refused(small(), where, replacement)


def test_a_model_without_its_class_token_is_refused():
    images, target = following.images_and_target(SIZE)
    model = tlk.patch_model(small())
    model.prune_intermediate_layers(1)
    with pytest.raises(NotImplementedError, match=r"global_pool: labels are defined for .*, got ''"):
        model(images, target=target)
