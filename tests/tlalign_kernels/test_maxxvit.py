"""Patched MaxViT and CoAtNet: logits and gradients are timm's, labels are those of a dense computation."""

import following
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import maxxvit
from torch import nn

import tlalign_kernels as tlk

# Maps of 16 x 24 tokens to 2 x 3, and partitions of 2 x 3.
SIZE = (64, 96)
# Biases of all three kinds, both orders of heads, heads of both kinds, blocks of all kinds; how many attentions.
NAMES = {
    "maxvit_tiny_tf_224": 10,
    "maxvit_rmlp_tiny_rw_256": 10,
    "maxvit_tiny_pm_256": 5,
    "maxxvitv2_nano_rw_256": 5,
    "coatnet_bn_0_rw_224": 3,
    "coatnet_rmlp_0_rw_224": 3,
    "coatnext_nano_rw_224": 3,
}


def small(name, depths=(1, 1, 2, 1), **options):
    sizes = {"img_size": SIZE, "embed_dim": (8, 16, 32, 32), "stem_width": 8, "transformer_dim_head": 8}
    options = {"num_classes": following.CLASSES, "depths": depths, **sizes, **options}
    model = timm.create_model(name, **options)
    for module in model.modules():
        # Convolutions with such weights would amplify any rounding.
        if isinstance(module, maxxvit.AttentionCl | maxxvit.Attention2d):
            following.randomised(module)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_is_followed(name):
    aligned = following.check_followed(small(name), *following.images_and_target(SIZE), blocks=NAMES[name])
    assert aligned.layer_shares[-1].shape == (3, 2, 3, 1)


def test_partitions_of_maps_with_channels_first_are_followed():
    model = small("maxvit_rmlp_pico_rw_256", transformer_use_nchw_attn=True)
    following.check_followed(model, *following.images_and_target(SIZE), blocks=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models(["max*vit*", "coatne*"]))
def test_every_name_is_followed(name):
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=0)
    model = small(name, [min(2, len(stage.blocks)) for stage in own.stages])
    kinds = maxxvit.PartitionAttentionCl | maxxvit.ParallelPartitionAttention | maxxvit.TransformerBlock2d
    blocks = sum(isinstance(module, kinds) for module in model.modules())
    following.check_followed(model, *following.images_and_target(SIZE), blocks=blocks)


def dense_oracle(model, images, labels, residual):
    """Logits of timm's own model, and labels (B, N, 1000) by the attention matrices that it computes."""
    matrices, hooks = {}, []
    for attention in model.modules():
        if isinstance(attention, maxxvit.AttentionCl | maxxvit.Attention2d):
            attention.fused_attn = False
            keep = lambda module, inputs, output, of=attention: matrices.update({of: inputs[0].mean(dim=1)})  # noqa: E731
            hooks.append(attention.attn_drop.register_forward_hook(keep))
    logits = model(images)
    for hook in hooks:
        hook.remove()

    def halved(labels):
        return following.pooled(labels, *(following.cells(tokens, 2, partial=True) for tokens in labels.shape[1:3]))

    def averaged(mixed, labels):
        return (mixed + labels) / 2 if residual else mixed

    labels = halved(labels)
    for stage in model.stages:
        labels = halved(labels)
        for block in stage.blocks:
            if isinstance(block, maxxvit.TransformerBlock2d):
                mixed = matrices[block.attn] @ labels.flatten(1, 2)
                labels = averaged(mixed.view_as(labels), labels)
            elif isinstance(block, maxxvit.ParallelMaxxVitBlock):
                size = block.attn.partition_size
                kinds = (block.attn.attn_block, "block"), (block.attn.attn_grid, "grid")
                mixed = [dense_partitions(matrices[attention], labels, size, kind) for attention, kind in kinds]
                labels = averaged(sum(mixed) / 2, labels)
            elif isinstance(block, maxxvit.MaxxVitBlock):
                parts = [] if block.attn_block is None else [(block.attn_block, "block")]
                for part, kind in [*parts, (block.attn_grid, "grid")]:
                    mixed = dense_partitions(matrices[part.attn], labels, part.partition_size, kind)
                    labels = averaged(mixed, labels)
    return logits, labels.flatten(1, 2)


def dense_partitions(matrices, labels, size, kind):
    """Labels that partitions attend to, one after the other; matrices (B * partitions, N, N)."""
    (height, width), (rows, columns) = labels.shape[1:3], size
    down, across = height // rows, width // columns
    mixed, matrices = torch.zeros_like(labels), matrices.unflatten(0, (len(labels), down, across))
    for y in range(down):
        for x in range(across):
            if kind == "block":
                partition = slice(None), slice(y * rows, (y + 1) * rows), slice(x * columns, (x + 1) * columns)
            else:
                partition = slice(None), slice(y, None, down), slice(x, None, across)
            tokens = labels[partition]
            mixed[partition] = (matrices[:, y, x] @ tokens.flatten(1, 2)).view_as(tokens)
    return mixed


@pytest.mark.parametrize(
    ("name", "options", "residual"),
    [
        ("maxvit_tiny_tf_224", {}, True),
        ("maxvit_rmlp_tiny_rw_256", {}, False),
        ("maxvit_rmlp_pico_rw_256", {"transformer_use_nchw_attn": True}, True),
        ("maxxvitv2_nano_rw_256", {}, True),
        ("maxvit_tiny_pm_256", {}, True),
        ("coatnet_rmlp_0_rw_224", {}, True),
    ],
)
def test_shares_equal_thousand_class_labels_in_float64(name, options, residual):
    model = small(name, num_classes=1000, **options).double()
    following.check_thousand_classes(model, SIZE, dense_oracle, residual)


@pytest.mark.parametrize(
    ("name", "options", "size", "sizes"),
    [
        ("maxvit_tiny_tf_224", {"block_type": "CCMC", "transformer_window_size": (5, 3)}, (72, 88), [(5, 6), (5, 6)]),
        ("maxvit_tiny_tf_224", {"block_type": "CCMC", "transformer_window_size": (5, 3)}, (72, 96), [(5, 6), (5, 6)]),
        ("coatnet_rmlp_0_rw_224", {"transformer_rel_pos_type": ""}, (72, 88), [(4, 5), (2, 2)]),
    ],
)
def test_maps_may_be_rounded_up_or_down(name, options, size, sizes):
    images, target = following.images_and_target(size)
    model = tlk.patch_model(small(name, depths=(1, 1, 1, 1), **options))
    logits, aligned = model(images, target=target, collect_layers=True)
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    assert [tuple(share.shape[1:3]) for share in aligned.layer_shares] == sizes
    torch.testing.assert_close(aligned.ratio[2], torch.ones(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "coatnet_rmlp_0_rw_224"])
def test_checkpointing_changes_nothing(name):
    # Convolutional blocks are computed again, too.
    following.check_checkpointing(tlk.patch_model(small(name)), *following.images_and_target(SIZE), blocks=5)


@pytest.mark.parametrize(
    ("name", "types"), [("maxvit_tiny_tf_224", "M"), ("maxvit_tiny_pm_256", ("PM",)), ("coatnet_rmlp_0_rw_224", "CT")]
)
def test_compiles_into_one_graph(name, types):
    widths = (8,) * len(types)
    model = small(name, (1,) * len(types), embed_dim=widths, block_type=types, img_size=32, transformer_window_size=4)
    following.check_compiles(tlk.patch_model(model), *following.images_and_target((32, 32)))


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "coatnet_rmlp_0_rw_224"])
def test_attention_dropout_acts_in_training_alone(name):
    model = small(name, transformer_attn_drop=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True: None  # which acts in training, too
    following.check_attention_dropout(model, *following.images_and_target(SIZE))


@pytest.mark.parametrize("name", ["maxvit_rmlp_tiny_rw_256", "coatnet_rmlp_0_rw_224"])
def test_adapters_are_followed(name):
    following.check_adapters(small(name), *following.images_and_target(SIZE))


def test_labels_may_stay_where_an_attention_is_dropped():
    # The last block is one that pools no map.
    following.check_stochastic_depth(small("coatnet_rmlp_0_rw_224", depths=(1, 1, 1, 2), drop_path_rate=0.5), SIZE)


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "maxvit_tiny_pm_256", "coatnet_rmlp_0_rw_224"])
def test_where_all_is_dropped_labels_may_stay_everywhere(name):
    images, target = following.images_and_target(SIZE)
    model = small(name, drop_path_rate=0.5).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 1 - 1e-9
    # timm never drops a first block.
    blocks = enumerate(tlk.patch_model(model).label_blocks(model))
    later = [index for index, block in blocks if isinstance(block.drop_path1, DropPath)]
    paper, dropped, nowhere = (
        tlk.patch_model(model, **options)(images, target=target)[1].ratio
        for options in ({"layers": later}, {"layers": later, "stochastic_depth": True}, {"layers": []})
    )
    torch.testing.assert_close(dropped, nowhere, rtol=0, atol=1e-6)
    assert (paper - nowhere).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "maxvit_tiny_pm_256", "coatnet_rmlp_0_rw_224"])
def test_layers_choose_the_blocks_that_align(name):
    following.check_layers(small(name), *following.images_and_target(SIZE), blocks=NAMES[name])


def test_labels_stay_float32_under_autocast():
    for name in ("maxvit_tiny_tf_224", "coatnet_rmlp_0_rw_224"):
        following.check_labels_under_autocast(tlk.patch_model(small(name)), *following.images_and_target(SIZE))


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small("maxvit_tiny_tf_224"), *following.images_and_target(SIZE))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "maxvit_tiny_tf_224",
            (68, 96),
            r"images: expected maps that partitions of \(2, 3\) tokens divide, got \(17, 24\)",
        ),
        (
            "coatnet_rmlp_0_rw_224",
            (80, 96),
            r"images: expected \(4, 6\) tokens to attend to each other, .* got \(5, 6\)",
        ),
    ],
)
def test_images_of_another_size_are_refused(name, size, message):
    images, target = following.images_and_target(size)
    with pytest.raises(ValueError, match=message):
        tlk.patch_model(small(name))(images, target=target)


@pytest.mark.parametrize(
    ("name", "where", "replacement"),
    [
        ("maxvit_tiny_tf_224", "stem", nn.Conv2d(3, 8, 2, 2)),
        ("maxvit_tiny_tf_224", "stages.0.blocks.0.conv", nn.Conv2d(8, 8, 3, 2, 1)),
        ("maxvit_tiny_tf_224", "head", nn.Flatten()),
        ("maxvit_tiny_tf_224", "stages.0.blocks.0.attn_grid.norm2", nn.BatchNorm2d(16)),
        ("coatnet_rmlp_0_rw_224", "stages.2.blocks.1.norm1", nn.LayerNorm(6)),
        ("coatnet_rmlp_0_rw_224", "stages.2.blocks.1.norm2", nn.LayerNorm(6)),
        ("coatnet_rmlp_0_rw_224", "stages.2.blocks.1.mlp", nn.Conv2d(32, 32, 3, padding=1)),
        ("coatnet_rmlp_0_rw_224", "stages.2.blocks.1.attn.qkv", nn.Conv2d(32, 96, 3, padding=1)),
        ("coatnet_rmlp_0_rw_224", "stages.2.blocks.1.attn.proj", nn.Conv2d(32, 32, 3, padding=1)),
    ],
)
def test_other_parts_are_refused_by_name(name, where, replacement):
    model = small(name)
    model.set_submodule(where, replacement)
    with pytest.raises(NotImplementedError, match=f"^{where}: "):
        tlk.patch_model(model)
