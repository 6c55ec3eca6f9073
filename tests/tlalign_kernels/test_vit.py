"""Patched vision transformers: logits and gradients are timm's, labels are those of a dense computation."""

import copy
import subprocess
import sys
from pathlib import Path

import following
import numpy as np
import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from following import assert_same, gradients, randomised, step
from following import small_plain as small
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.hybrid_embed import HybridEmbed
from timm.models import checkpoint
from torch.fx.experimental.proxy_tensor import make_fx

import tlalign_kernels as tlk
from tlalign_kernels import MixedTarget, mixed_cross_entropy
from tlalign_kernels.patch import unfollowable_reason

# A name for each way in which models differ; the slow test has all names.
SAMPLE = {
    "vit_tiny_patch16_224": "class token",
    "vit_base_patch32_clip_quickgelu_224": "norm before the blocks, QuickGELU",
    "vit_base_patch16_siglip_224": "attention pooling, no class token",
    "vit_base_patch16_siglip_gap_224": "average pooling, no class token",
    "vit_small_patch16_36x1_224": "layer scale",
    "vit_small_patch16_18x2_224": "parallel attentions",
    "vit_base_patch16_xp_224": "MLP beside the attention",
    "vit_pwee_patch16_reg1_gap_256": "MLP beside the attention, fused output projection",
    "vit_base_patch16_rpn_224": "norm after the attention",
    "vit_medium_patch16_reg4_gap_256": "register tokens and average pooling",
    "vit_small_patch14_reg4_dinov2": "class and register tokens",
    "vit_giant_patch14_dinov2": "packed SwiGLU",
    "aimv2_large_patch14_224": "RMS norm, SwiGLU",
    "deit_tiny_patch16_224": "DeiT",
    "deit3_small_patch16_224": "DeiT III",
    "deit_tiny_distilled_patch16_224": "distillation token",
    "vit_small_resnet26d_224": "hybrid",
    "vit_base_mci_224": "convolutional stem",
    "vitamin_small_224": "ViTamin",
}


def is_vit(name):
    return timm.model_entrypoint(name).__module__ in {
        "timm.models.vision_transformer",
        "timm.models.vision_transformer_hybrid",
        "timm.models.deit",
        "timm.models.vitamin",
    }


def images_and_target(model, batch=3):
    return following.images_and_target(model.patch_embed.img_size, batch, dtype=next(model.parameters()).dtype)


def relative(error, scale):
    return float((error.detach().double() - scale.detach().double()).abs().max() / scale.detach().double().abs().max())


def check_followed(name):
    model = small(name)
    images, target = images_and_target(model)
    return target, following.check_followed(model, images, target, blocks=2)


@pytest.mark.parametrize("name", SAMPLE)
def test_each_family_is_followed(name):
    target, aligned = check_followed(name)
    assert (aligned.ratio - target.ratio)[:2].abs().max() > 1e-4


@pytest.mark.slow
def test_all_but_differential_attention_is_followed():
    followed, refused = [], {}
    for name in filter(is_vit, timm.list_models()):
        with torch.device("meta"):
            reason = unfollowable_reason(timm.create_model(name, depth=1))
        if reason is None:
            check_followed(name)
            followed.append(name)
        else:
            refused[name] = reason
    assert len(followed) == 203
    assert all("Diff" in reason for reason in refused.values()), refused


# Labels


def dense_oracle(model, images, labels, _):
    """Logits, and labels of the tokens after the last block, from the weights and the labels of the pixels."""
    weights = following.Weights(model)
    x = weights.conv(images, "patch_embed.proj", stride=8).flatten(2).transpose(1, 2)
    named = weights.named
    prefix = [named[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in named]
    x = torch.cat((*prefix, x), dim=1) + named["pos_embed"]
    of_image, of_tokens = labels.mean(dim=(1, 2)), token_labels(labels).flatten(1, 2)
    labels = torch.cat((of_image[:, None].expand(-1, len(prefix), -1), of_tokens), dim=1)
    for i, block in enumerate(model.blocks):
        projected = weights.linear(weights.norm(x, f"blocks.{i}.norm1", 1e-6), f"blocks.{i}.attn.qkv")
        attended, attention = following.attend(*projected.chunk(3, dim=-1), block.attn.num_heads)
        labels = (attention @ labels + labels) / 2
        x = x + weights.linear(attended, f"blocks.{i}.attn.proj")
        hidden = F.gelu(weights.linear(weights.norm(x, f"blocks.{i}.norm2", 1e-6), f"blocks.{i}.mlp.fc1"))
        x = x + weights.linear(hidden, f"blocks.{i}.mlp.fc2")
    x = weights.norm(x, "norm", 1e-6)
    if len(prefix) == 2:
        return (weights.linear(x[:, 0], "head") + weights.linear(x[:, 1], "head_dist")) / 2, labels
    return weights.linear(x[:, 0], "head"), labels


def token_labels(pixels):
    return pixels.unflatten(2, (5, 8)).unflatten(1, (5, 8)).mean(dim=(2, 4))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_shares_equal_thousand_class_labels_in_float64(name):
    model = randomised(timm.create_model(name, img_size=40, patch_size=8, embed_dim=48, depth=4)).double().eval()
    heads = 2 if "distilled" in name else 1
    following.check_thousand_classes(model, (40, 40), dense_oracle, pool=lambda labels: labels[:, :heads].mean(dim=1))

    images, target, pixels = following.thousand_classes((40, 40))
    _, aligned = model(images, target=target)
    dense = MixedTarget.from_dense(token_labels(pixels).permute(0, 3, 1, 2))
    _, dense_aligned = model(images, target=dense)
    torch.testing.assert_close(dense_aligned.to_dense(1000), aligned.to_dense(1000), rtol=0, atol=1e-10)


def last_attention(model, images):
    """The attention matrix (B, N, N) of the last block of a plain ViT, averaged over its heads."""
    attention, inputs = model.blocks[-1].attn, []
    hook = attention.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(images)
    hook.remove()
    qkv = attention.qkv(inputs[0]).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    return torch.softmax(qkv[0] @ qkv[1].transpose(2, 3) * attention.scale, dim=-1).mean(dim=1)


def targets_of_each_kind(target):
    """Targets for a model of 3 x 2 patches and three images, from one by boxes: by masks, ratio, ..."""
    size = target.image_size
    return {
        "boxes": target,
        "masks": MixedTarget.from_masks(target.classes, torch.rand(3, 1, *size)),
        "ratio": MixedTarget.from_ratio(target.classes, torch.rand(3, 1)),
        "three sources": MixedTarget.from_masks(torch.randint(0, 10, (3, 3)), torch.rand(3, 2, *size) / 2),
        "dense": MixedTarget.from_dense(torch.rand(3, 10, 3, 2).softmax(dim=1)),
    }


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_transmix_equals_transmix_from_a_materialised_attention_matrix(name):
    model = small(name)
    images, target = images_and_target(model)
    prefix = model.num_prefix_tokens
    attention = last_attention(model, images)[:, 0, prefix:, None]
    logits = model(images)
    tlk.patch_model(model, method="transmix")
    for kind, mixed in targets_of_each_kind(target).items():
        patches = mixed.token_share((3, 2), model.patch_embed.patch_size)
        expected = (attention * patches).sum(dim=1) / attention.sum(dim=1)
        ours, aligned = model(images, target=mixed, collect_layers=True)
        torch.testing.assert_close(aligned.image_share(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, logits)
        # No label is moved before the last block.
        assert torch.equal(aligned.layer_shares[0][:, prefix:], patches)
        if kind != "ratio":
            assert (expected - mixed.image_share()).abs().max() > 1e-3


def test_transmix_leaves_labels_of_a_class_token_that_sees_no_patch():
    model = tlk.patch_model(small("vit_tiny_patch16_224"), method="transmix")
    images, target = images_and_target(model)
    _, aligned = model(images, target=target, is_causal=True)
    assert torch.equal(aligned.ratio, target.ratio)


def test_transmix_misses_a_last_block_that_was_pruned():
    model = tlk.patch_model(small("vit_tiny_patch16_224"), method="transmix")
    images, target = images_and_target(model)
    model.prune_intermediate_layers([0], prune_head=False)
    with pytest.raises(ValueError, match="model: the last of its blocks is another"):
        model(images, target=target)
    _, aligned = tlk.patch_model(model, method="transmix")(images, target=target)
    assert (aligned.ratio - target.ratio).abs().max() > 1e-4


def test_transmix_misses_a_class_token_that_is_no_longer_read():
    model = tlk.patch_model(small("vit_tiny_patch16_224"), method="transmix")
    images, target = images_and_target(model)
    model.reset_classifier(10, "avg")
    with pytest.raises(NotImplementedError, match="method: TransMix needs logits of a class token"):
        model(images, target=target)


def test_transmix_misses_a_distillation_token_that_may_be_dropped():
    model = small("deit_tiny_distilled_patch16_224", patch_drop_rate=0.5)
    with pytest.raises(NotImplementedError, match="patch_drop: expected none in a distilled model for TransMix"):
        tlk.patch_model(model, method="transmix")
    tlk.patch_model(model)
    tlk.patch_model(small("deit_tiny_distilled_patch16_224"), method="transmix")


def test_alignment_in_the_last_block_without_residual_restricted_to_patches_is_transmix():
    model = small("vit_tiny_patch16_224")
    images, target = images_and_target(model)
    to_itself = last_attention(model, images)[:, 0, :1]
    aligned = tlk.patch_model(model, layers=[-1], residual=False)(images, target=target)[1].ratio
    restricted = (aligned - to_itself * target.ratio) / (1 - to_itself)
    transmix = tlk.patch_model(model, method="transmix")(images, target=target)[1].ratio
    torch.testing.assert_close(transmix, restricted, rtol=0, atol=1e-6)
    assert (transmix - aligned).abs().max() > 1e-4


def test_transmix_of_a_distilled_model_has_a_target_for_each_token():
    model = small("deit_tiny_distilled_patch16_224")
    images, target = images_and_target(model)
    attention = last_attention(model, images)[:, :2, 2:]
    shares = target.token_share((3, 2), model.patch_embed.patch_size)
    expected = (attention @ shares / attention.sum(dim=2, keepdim=True)).unbind(1)
    tlk.patch_model(model, method="transmix")
    torch.testing.assert_close(model(images, target=target)[1].ratio, sum(expected) / 2, rtol=0, atol=1e-6)
    model.set_distilled_training(True)
    for ours, theirs in zip(model.train()(images, target=target)[1], expected, strict=True):
        torch.testing.assert_close(ours.ratio, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transmix_gives_the_gradients_of_the_model_itself(checkpointing):
    model = small("vit_tiny_patch16_224").double()
    images, target = images_and_target(model)
    expected = gradients(model, model(images).square().sum())
    tlk.patch_model(model, method="transmix").set_grad_checkpointing(checkpointing)
    logits, aligned = model.train()(images, target=target)
    assert not aligned.ratio.requires_grad
    for ours, theirs in zip(gradients(model, logits.square().sum()), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_medium_patch16_reg4_gap_256"])
def test_alignment_in_no_block_is_the_mixing_ratio(name):
    model = tlk.patch_model(small(name), layers=[])
    images, target = images_and_target(model)
    for mixed in targets_of_each_kind(target).values():
        aligned = model(images, target=mixed)[1]
        torch.testing.assert_close(aligned.image_share(), mixed.image_share(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_medium_patch16_reg4_gap_256", "vit_base_patch16_siglip_224"])
def test_transmix_without_a_class_token_is_refused(name):
    model = small(name)
    with pytest.raises(NotImplementedError, match="method: TransMix needs logits of a class token, got global_pool"):
        tlk.patch_model(model, method="transmix")
    assert not any(isinstance(module, tlk.LabelFollower) for module in model.modules())


def test_parallel_attentions_and_attention_beside_an_mlp_average_over_their_residual():
    model = tlk.patch_model(small("vit_small_patch16_18x2_224", depth=1).double())
    images, target = images_and_target(model)
    first = model._enter(images, target)[1]
    _, aligned = model(images, target=target, collect_layers=True)
    attentions = parallel_attentions(model, images)
    expected = (first + attentions[0] @ first + attentions[1] @ first) / 3
    torch.testing.assert_close(aligned.layer_shares[0], expected)


@pytest.mark.parametrize("residual", [True, False])
def test_of_parallel_attentions_those_that_are_dropped_may_count_for_nothing(residual):
    model = small("vit_small_patch16_18x2_224", depth=1).double().train()
    images = torch.randn(16, 3, 48, 32, dtype=torch.float64)
    target = MixedTarget.from_masks(torch.randint(0, 10, (16, 2)), torch.rand(16, 1, 48, 32))
    factors = []
    for branch in model.blocks[0].attns:
        branch.drop_path = timm.layers.DropPath(0.5)
        branch.drop_path.register_forward_hook(lambda module, inputs, output: factors.append(output[:, 0, 0]))
    torch.manual_seed(1)
    logits = model(images)
    kept = torch.stack(factors, dim=1) != 0
    assert len({tuple(row) for row in kept.tolist()}) == 4
    tlk.patch_model(model, residual=residual, stochastic_depth=True)
    torch.manual_seed(1)
    ours, aligned = model(images, target=target, collect_layers=True)
    assert relative(ours, logits) < 1e-11
    first = model._enter(images, target)[1]
    mixed = [attention @ first for attention in parallel_attentions(model, images)]
    for image, of_branches in enumerate(kept.tolist()):
        paths = [share[image] for share, is_kept in zip(mixed, of_branches, strict=True) if is_kept]
        paths += [first[image]] if residual or not paths else []
        torch.testing.assert_close(aligned.layer_shares[0][image], sum(paths) / len(paths))


def parallel_attentions(model, images):
    """Attention matrices (B, N, N) of the parallel attentions of the first block, averaged over the heads."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    attentions = []
    for branch in model.blocks[0].attns:
        qkv = branch.attn.qkv(branch.norm(tokens)).unflatten(-1, (3, 4, 24)).permute(2, 0, 3, 1, 4)
        attentions.append(torch.softmax(qkv[0] @ qkv[1].transpose(2, 3) / 24**0.5, dim=-1).mean(dim=1))
    return attentions


@pytest.mark.parametrize("include_prefix", [False, True])
def test_average_pooling_averages_the_labels_of_the_tokens_it_averages(include_prefix):
    model = tlk.patch_model(small("vit_medium_patch16_reg4_gap_256", pool_include_prefix=include_prefix))
    images, target = images_and_target(model)
    _, aligned = model(images, target=target, collect_layers=True)
    pooled = aligned.layer_shares[-1][:, 0 if include_prefix else 4 :]
    assert pooled.shape[1] == (10 if include_prefix else 6)
    assert torch.equal(aligned.ratio, pooled.mean(dim=1))
    assert not torch.allclose(aligned.ratio, aligned.layer_shares[-1][:, 4 if include_prefix else 0 :].mean(dim=1))


def test_attention_pooling_takes_the_labels_that_it_attends_to():
    model = tlk.patch_model(small("vit_base_patch16_siglip_224").double())
    images, target = images_and_target(model)
    _, aligned = model(images, target=target, collect_layers=True)
    pool = model.attn_pool
    tokens = model.norm(model.blocks(model._pos_embed(model.patch_embed(images))))
    query = pool.q(pool.latent).view(1, 1, 4, 24).transpose(1, 2)
    key = pool.kv(tokens).view(3, 6, 2, 4, 24)[:, :, 0].transpose(1, 2)
    attention = torch.softmax(query @ key.transpose(2, 3) / 24**0.5, dim=-1).mean(dim=1)
    torch.testing.assert_close(aligned.ratio, (attention @ aligned.layer_shares[-1])[:, 0])
    assert not torch.allclose(aligned.ratio, aligned.layer_shares[-1].mean(dim=1))


@pytest.mark.parametrize(
    "options",
    [
        {"latent_len": 2, "pool_type": "avg", "qk_norm": True},
        {"feat_size": 6, "pos_embed": "abs", "out_features": 0},
    ],
    ids=["several latents, norms", "positions, no MLP"],
)
def test_options_of_attention_pooling_are_followed(options):
    pool = randomised(AttentionPoolLatent(32, num_heads=4, **options).double())
    tokens, mask = torch.randn(3, 6, 32, dtype=torch.float64), torch.arange(6) != 4
    allowed = mask.expand(3, 1, pool.latent_len, 6)
    expected = pool(tokens, attn_mask=allowed)
    x = tokens if pool.pos_embed is None else tokens + pool.pos_embed
    query = pool.q_norm(pool.q(pool.latent).unflatten(2, (4, 8)).transpose(1, 2))
    key = pool.k_norm(pool.kv(x).unflatten(2, (2, 4, 8))[:, :, 0].transpose(1, 2))
    scores = (query @ key.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    pool.__class__ = tlk.models.vit.AlignedAttentionPoolLatent
    # Of tokens that are sources of their own, the label is what is attended to.
    ours, share = pool(tokens, attn_mask=allowed, share=torch.eye(6, dtype=torch.float64).expand(3, -1, -1))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(share, scores.softmax(dim=-1).mean(dim=(1, 2)))


def test_latents_that_are_not_pooled_are_refused():
    model = small("vit_base_patch16_siglip_224")
    model.attn_pool.pool = ""
    with pytest.raises(NotImplementedError, match="attn_pool: can't follow labels through pool_type ''"):
        tlk.patch_model(model)


def test_heads_that_no_backend_has_are_refused():
    with pytest.raises(NotImplementedError, match=r"blocks.0.attn: expected a head dimension of 8 to 256, got 264"):
        tlk.patch_model(small("vit_tiny_patch16_224", embed_dim=264, num_heads=1))
    for model, name in (
        (small("vit_tiny_patch16_224", num_heads=24), "blocks.0.attn"),
        (small("vit_base_patch16_siglip_224", num_heads=24, depth=0), "attn_pool"),
        (timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, num_heads=(4, 4), depths=(1, 1)), "attn"),
        (timm.create_model("twins_svt_small", embed_dims=(8, 16, 32, 64), num_heads=(2, 4, 4, 4)), "attn"),
        (timm.create_model("pvt_v2_b0", embed_dims=(8, 16, 32, 64), num_heads=(2, 4, 4, 4)), "attn"),
    ):
        with pytest.raises(NotImplementedError, match=rf"{name}: expected a head dimension of 8 to 256, got 4"):
            tlk.patch_model(model)
        assert not any(isinstance(module, tlk.LabelFollower) for module in model.modules())


@pytest.mark.parametrize(("made_for", "pixels"), [(100, 100), (70, 64), (100, 320), (250, 250), (33, 33), (33, 100)])
def test_patches_of_a_convolving_stem_are_its_stride_apart(made_for, pixels):
    # 32, but timm takes 100 pixels in 4 tokens for one of 25.
    model = timm.create_model("vit_small_r26_s32_224", depth=1, img_size=made_for, dynamic_img_size=True)
    box = torch.tensor([[[16, 0, pixels - 4, min(40, pixels)]]])
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), box, (pixels, pixels))
    _, aligned = tlk.patch_model(model.eval(), layers=[])(
        torch.zeros(1, 3, pixels, pixels), target=target, collect_layers=True
    )
    inside = torch.zeros(pixels, pixels)
    inside[16 : pixels - 4, :40] = 1
    cells = [[part.mean() for part in rows.split(32, dim=1)] for rows in inside.split(32)]
    share = aligned.layer_shares[0][0, 1:, 0]
    torch.testing.assert_close(share, torch.tensor(cells).flatten())


def test_a_stem_of_another_stride_is_refused_where_it_pads():
    model = timm.create_model("vit_small_r26_s32_224", depth=1, img_size=96)
    backbone = torch.nn.Conv2d(3, 8, 3, stride=3, padding=1)
    model.patch_embed = HybridEmbed(backbone, img_size=100, embed_dim=model.embed_dim, output_fmt="NHWC")
    model.pos_embed = None
    target = MixedTarget.from_ratio(torch.tensor([[0, 1]]), torch.tensor([[0.5]]))
    with pytest.raises(NotImplementedError, match=r"patch_embed: expected tokens \(2, 2\) .*got \(34, 34\)"):
        tlk.patch_model(model.eval())(torch.zeros(1, 3, 100, 100), target=target)


def test_layers_choose_the_blocks_that_align():
    model = small("vit_tiny_patch16_224", depth=4)
    images, target = images_and_target(model)
    _, everywhere = tlk.patch_model(model)(images, target=target, collect_layers=True)
    _, late = tlk.patch_model(model, layers=[-1, 2])(images, target=target, collect_layers=True)
    first = model._enter(images, target)[1]
    assert torch.equal(late.layer_shares[0], first)
    assert torch.equal(late.layer_shares[1], first)
    assert not torch.equal(late.layer_shares[2], first)
    assert not torch.equal(late.layer_shares[3], late.layer_shares[2])
    assert not torch.equal(everywhere.layer_shares[0], first)
    assert type(model.blocks[0]) is timm.models.vision_transformer.Block
    assert torch.equal(tlk.patch_model(model, layers=[])(images, target=target)[1].ratio, target.ratio)
    for same in (torch.tensor([-1, 2]), np.array([-1, 2])):
        _, as_tensor = tlk.patch_model(model, layers=same)(images, target=target)
        assert torch.equal(as_tensor.ratio, late.ratio)
    for wrong in ([4], [-5], ["1"], torch.tensor([0.5])):
        with pytest.raises(ValueError, match="layers: expected block indices from -4 to 3"):
            tlk.patch_model(model, layers=wrong)


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_base_patch16_xp_224"])
def test_layers_and_residual_are_chosen_in_blocks_of_each_kind(name):
    model = small(name)
    following.check_layers(model, *images_and_target(model), blocks=2)


def test_without_residual_labels_are_only_attended():
    model = small("vit_tiny_patch16_224", depth=1).double()
    images, target = images_and_target(model)
    _, with_residual = tlk.patch_model(model)(images, target=target, collect_layers=True)
    _, without = tlk.patch_model(model, residual=False)(images, target=target, collect_layers=True)
    first = model._enter(images, target)[1]
    torch.testing.assert_close(with_residual.layer_shares[0], (without.layer_shares[0] + first) / 2)
    assert not torch.allclose(without.layer_shares[0], first)


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_36x1_224", "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224"],
    ids=["layer scale", "norm after the attention", "MLP beside the attention"],
)
def test_labels_may_stay_where_an_attention_is_dropped(name):
    following.check_stochastic_depth(small(name, drop_path_rate=0.5), (48, 32), compiles="36x1" in name)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch16_18x2_224",
        "vit_base_patch16_xp_224",
        "vit_base_patch16_rpn_224",
        "vit_base_patch16_siglip_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_all_that_drops_drops_as_in_timms_model(name):
    rates = dict(drop_rate=0.2, pos_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.5)
    model = tlk.patch_model(small(name, **rates).train())
    following.assert_drops_alike(model, *images_and_target(model))


def test_labels_of_dropped_patches_go_with_them():
    model = small("vit_tiny_patch16_224", patch_drop_rate=0.5, depth=0, pos_drop_rate=0.0).train()
    images, _ = images_and_target(model)
    # Without blocks the share of a token is that of its patch; mark each patch by a share of its own.
    marks = torch.arange(6).view(1, 6) / 10
    masks = marks.view(1, 1, 3, 1, 2, 1).expand(3, 1, 3, 16, 2, 16).reshape(3, 1, 48, 32)
    target = MixedTarget.from_masks(torch.zeros(3, 2, dtype=torch.int64), masks)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    tlk.patch_model(model)
    share = []
    head = model._aligned_head
    model._aligned_head = lambda x, s: share.append(s) or head(x, s)
    model(images, target=target)
    tokens = model._pos_embed(model.patch_embed(images))
    assert seen[0].shape[1] == 4
    for image in range(3):
        for position in range(4):
            distance = (tokens[image] - seen[0][image, position]).abs().amax(dim=-1)
            came_from = int(distance.argmin())
            assert distance[came_from] == 0
            expected = marks.mean() if came_from == 0 else marks[0, came_from - 1]
            torch.testing.assert_close(share[0][image, position, 0], expected, rtol=0, atol=1e-6)
    model.eval()(images, target=target)
    assert (seen[-1].shape[1], share[-1].shape[1]) == (7, 7)


@pytest.mark.parametrize("size", [(48, 32), (40, 56), (33, 47)])
def test_any_image_size_is_followed_where_the_model_allows_it(size):
    model = small("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True).double()
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[5, 0, 32, 20]]]), size)
    logits = model(images)
    ours, aligned = tlk.patch_model(model)(images, target=target, collect_layers=True)
    assert relative(ours, logits) < 1e-11
    assert aligned.layer_shares[0].shape[1] == 1 + -(-size[0] // 16) * -(-size[1] // 16)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"])
@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_attention_masks_are_passed_on(kind, name):
    model = small(name).double()
    images, target = images_and_target(model)
    allowed = (torch.rand(1, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
    additive = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    options = {"bool": {"attn_mask": allowed}, "additive": {"attn_mask": additive}, "causal": {"is_causal": True}}[kind]
    logits = model(images, **options)
    tlk.patch_model(model)
    assert torch.equal(model(images, **options), logits)
    ours, aligned = model(images, target=target, **options)
    assert relative(ours, logits) < 1e-11
    if kind == "additive":
        own, patched = (torch.autograd.grad(out.square().sum(), additive)[0] for out in (logits, ours))
        torch.testing.assert_close(patched, own)
    if kind == "causal":  # the class token comes first and sees only itself
        torch.testing.assert_close(aligned.ratio, target.image_share(torch.float64))
        with pytest.raises(ValueError, match="attn_mask: expected None with is_causal=True"):
            model(images, target=target, attn_mask=allowed, is_causal=True)


def test_attention_dropout_acts_where_timms_does():
    model = small("vit_tiny_patch16_224", attn_drop_rate=0.5)
    following.check_attention_dropout(model, *images_and_target(model))


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}, {"attn_drop_rate": 0.2}])
def test_options_of_the_attention_are_followed(options):
    model = small("vit_tiny_patch16_224", **options).double()
    images, target = images_and_target(model)
    logits = model(images)
    ours, _ = tlk.patch_model(model)(images, target=target)
    assert relative(ours, logits) < 1e-11
    if "attn_drop_rate" in options:
        model.train()
        assert relative(model(images, target=target)[0], logits) > 1e-2


def test_what_acts_on_keys_alone_is_followed():
    model = small("vit_tiny_patch16_224")
    images, target = images_and_target(model)
    model.blocks[0].attn.k_norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    logits = model(images)
    torch.testing.assert_close(tlk.patch_model(model)(images, target=target)[0], logits, rtol=1e-4, atol=1e-5)


def test_gated_attention_is_followed():
    attention = randomised(timm.layers.Attention(64, num_heads=4, gated=True, qkv_bias=True))
    tokens, share = torch.randn(2, 9, 64), torch.rand(2, 9, 1)
    expected = attention(tokens)
    attention.__class__ = tlk.models.vit.AlignedAttention
    torch.testing.assert_close(attention(tokens, share=share, residual=share)[0], expected)


def test_distilled_training_gives_a_pair():
    model = small("deit_tiny_distilled_patch16_224").double().train()
    model.set_distilled_training()
    images, target = images_and_target(model)
    own = model(images)
    logits, aligned = tlk.patch_model(model)(images, target=target, collect_layers=True)
    for ours, timms in zip(logits, own, strict=True):
        assert relative(ours, timms) < 1e-11
    assert torch.equal(aligned[0].ratio, aligned[0].layer_shares[-1][:, 0])
    assert torch.equal(aligned[1].ratio, aligned[0].layer_shares[-1][:, 1])
    _, together = model.eval()(images, target=target)
    torch.testing.assert_close(together.ratio, (aligned[0].ratio + aligned[1].ratio) / 2)


def test_three_sources_are_followed():
    model = small("vit_tiny_patch16_224")
    images, _ = images_and_target(model)
    boxes = torch.tensor([[[0, 0, 20, 20], [10, 10, 48, 32]]]).expand(3, -1, -1)
    target = MixedTarget.from_boxes(torch.tensor([[0, 1, 2]] * 3), boxes, (48, 32))
    _, aligned = tlk.patch_model(model)(images, target=target)
    _, dense = model(images, target=MixedTarget.from_dense(_dense_tokens(target)))
    torch.testing.assert_close(aligned.to_dense(10), dense.to_dense(10), rtol=0, atol=1e-6)


def _dense_tokens(target):
    share = target.token_share((3, 2), (16, 16))
    labels = torch.zeros(3, 6, 10)
    labels[..., 0], labels[..., 1:3] = 1 - share.sum(-1), share
    return labels.transpose(1, 2).reshape(3, 10, 3, 2)


# Ways to run a model

NAMES = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]


@pytest.fixture(params=NAMES)
def run(request):
    """A patched model with its images, target, aligned ratio and gradients when run eagerly."""
    model = tlk.patch_model(small(request.param, depth=3).train())
    images, target = images_and_target(model)
    return model, images, target, *step(model, images, target)


def test_checkpointing_changes_nothing(run):
    following.check_checkpointing(*run[:3], blocks=3)


def test_blocks_that_are_left_out_are_checkpointed_too():
    model = tlk.patch_model(small("vit_tiny_patch16_224").train(), layers=[-1])
    following.check_checkpointing(model, *images_and_target(model), blocks=len(model.blocks))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_into_one_graph(run, checkpointing):
    model, images, target, ratio, expected = run
    model.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, aligned = compiled(images, target=target)
    assert isinstance(aligned, MixedTarget)
    result = aligned.ratio, gradients(model, mixed_cross_entropy(logits, aligned, smoothing=0.1))
    assert_same(result, ratio, expected)


def test_a_new_target_does_not_compile_again():
    model = tlk.patch_model(small("vit_tiny_patch16_224").train())
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ratios = []
    for size in (8, 20, 32):
        images, target = images_and_target(model)
        target = MixedTarget.from_boxes(target.classes, torch.tensor([[[0, 0, size, size]]] * 3), (48, 32))
        ratios.append(compiled(images, target=target)[1].ratio)
        torch.testing.assert_close(ratios[-1], model(images, target=target)[1].ratio, rtol=0, atol=1e-6)
    assert counter.frame_count == 1
    assert not torch.equal(ratios[0], ratios[1])


@pytest.mark.parametrize("strict", [False, True])
def test_targets_may_be_made_in_what_is_compiled_or_exported(strict):
    class Aligned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tlk.patch_model(small("vit_tiny_patch16_224"))

        def forward(self, images, classes, boxes):
            return self.model(images, target=MixedTarget.from_boxes(classes, boxes, (48, 32)))[1].to_dense(10)

    aligned = Aligned()
    images, target = images_and_target(aligned.model)
    inputs = images, target.classes, target.boxes
    expected = aligned(*inputs)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(aligned, fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert torch.equal(torch.export.export(aligned, inputs, strict=strict).module()(*inputs), expected)
    with torch.no_grad():
        assert torch.equal(make_fx(aligned)(*inputs)(*inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_with_inductor(run, checkpointing):
    model, images, target, ratio, expected = run
    model.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    assert_same(step(torch.compile(model, fullgraph=True), images, target), ratio, expected)


def test_autocast_errors_are_those_of_timm(run):
    model, images, target, _, expected = run
    following.check_labels_under_autocast(model, images, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, aligned = model(images, target=target)
    ours = gradients(model, mixed_cross_entropy(logits, aligned, smoothing=0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own_logits = model(images)
    own = gradients(model, mixed_cross_entropy(own_logits, aligned, smoothing=0.1))
    for ours_, own_, exact in zip(ours, own, expected, strict=True):
        allowed = 2 * float((own_ - exact).abs().max()) + 2.0**-7 * float(exact.abs().max())
        assert float((ours_ - exact).abs().max()) <= allowed


def test_copies_follow_labels(run):
    model, images, target, ratio, expected = run
    copied = timm.utils.ModelEmaV3(model).module
    assert_same(step(copied.train().requires_grad_(), images, target), ratio, expected, rtol=0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.blocks[0].attn.qkv.weight.zero_()
    assert_same(step(copied, images, target), ratio, expected, rtol=0)
    assert torch.equal(copy.deepcopy(copied)(images, target=target)[1].ratio, ratio)


@pytest.mark.minutes
@pytest.mark.parametrize(
    "compiled",
    [
        ["vit_tiny_patch16_224"],
        pytest.param(
            ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0"], marks=pytest.mark.slow
        ),
    ],
    ids=["vit", "others"],
)
def test_distributed_wrappers_change_nothing(compiled):
    worker = Path(__file__).parents[1] / "support" / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, *compiled]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("passed") == 2, result.stdout


def test_forward_intermediates_is_untouched():
    model = small("vit_tiny_patch16_224")
    following.check_intermediates(model, images_and_target(model)[0])


def test_blocks_can_be_used_in_a_model_of_ones_own():
    block = tlk.models.vit.AlignedBlock(64, 4, attn_layer=tlk.models.vit.AlignedAttention)
    tokens, share = torch.randn(2, 9, 64), torch.rand(2, 9, 1)
    mixed_tokens, mixed = checkpoint(block, tokens, None, False, share)
    assert mixed.shape == share.shape
    torch.testing.assert_close(mixed_tokens, block(tokens))


# Errors


def test_bad_targets_are_refused():
    model = tlk.patch_model(small("vit_tiny_patch16_224"))
    images, target = images_and_target(model)
    for wrong, error, message in [
        (torch.rand(3, 10), TypeError, "target: expected a MixedTarget, got Tensor"),
        (images_and_target(model, batch=2)[1], ValueError, "target: expected a batch of 3 images, got 2"),
        (target.to("meta"), ValueError, "target: expected on the device of the images"),
        (
            MixedTarget.from_boxes(target.classes, target.boxes // 2, (24, 16)),
            ValueError,
            r"target: expected boxes or masks for images of \(48, 32\) pixels, got \(24, 16\)",
        ),
        (MixedTarget.from_dense(torch.full((3, 2, 4, 4), 0.5)), ValueError, "token_labels: expected a map of"),
    ]:
        with pytest.raises(error, match=message):
            model(images, target=wrong)
    with pytest.raises(TypeError, match="images: expected a tensor, got list"):
        model([images], target=target)
    with pytest.raises(ValueError, match="images: expected 4 dimensions"):
        model(images[0], target=target)
    with pytest.raises(ValueError, match="images: expected at least one with a target, got none"):
        model(images[:0], target=MixedTarget.from_ratio(target.classes[:0], torch.zeros(0, 1)))
    with pytest.raises(TypeError, match="attn_mask: expected a tensor, got a MixedTarget; give it by its name"):
        model(images, target)
    with pytest.raises(ValueError, match="collect_layers: expected False without a target"):
        model(images, collect_layers=True)


def test_images_that_do_not_fit_the_patches_are_refused():
    target = MixedTarget.from_ratio(torch.tensor([[0, 1]]), torch.tensor([[0.5]]))
    model = tlk.patch_model(small("vit_tiny_patch16_224", dynamic_img_size=True))
    with pytest.raises(ValueError, match=r"images: expected multiples of the patches of \(16, 16\), got \(50, 32\)"):
        model(torch.randn(1, 3, 50, 32), target=target)
    model = tlk.patch_model(small("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match=r"images: expected \(48, 32\) pixels, got \(64, 32\)"):
        model(torch.randn(1, 3, 64, 32), target=target)


def test_poolings_without_a_label_are_refused():
    for pooling in ("max", "avgmax", "", "prr"):
        with pytest.raises(NotImplementedError, match="global_pool: labels are defined for"):
            tlk.patch_model(small("vit_medium_patch16_reg4_gap_256", global_pool=pooling))
    model = tlk.patch_model(small("vit_medium_patch16_reg4_gap_256"))
    model.reset_classifier(10, global_pool="max")
    images, target = images_and_target(model)
    with pytest.raises(NotImplementedError, match="got 'max'"):
        model(images, target=target)
