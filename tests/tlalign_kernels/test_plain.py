"""Plain transformers other than `VisionTransformer`: Eva with rotary positions, BEiT, relative positions, NaFlexVit."""

import copy
import re

import following
import pytest
import timm
import torch
from following import gradients, materialised_attention, randomised, small_plain, stem
from timm.models import beit, eva

import tlalign_kernels as tlk
from tlalign_kernels import MixedTarget
from tlalign_kernels.patch import unfollowable_reason

FILES = ("eva", "beit", "vision_transformer_relpos", "naflexvit")
# A name for each way in which models differ, and what makes a small one of it; the slow test has all names.
SAMPLE = {
    "eva_giant_patch14_224": {},
    "eva02_tiny_patch14_224": {},  # rotary positions, SwiGLU
    "eva02_base_patch14_224": {},  # projections apart
    "eva02_enormous_patch14_clip_224": {},  # norm after the attention
    "vit_medium_patch16_rope_reg1_gap_256": {},  # register tokens
    "vit_small_patch16_rope_mixed_224": {},  # rotations of each block, which are learned
    "vit_pe_core_tiny_patch16_384": {"use_fc_norm": True},  # attention pooling
    "vit_small_patch16_dinov3": {},  # layer scale
    "vit_5b_patch16_sapiens2": {"num_kv_heads": 2},  # keys that heads share, norm of queries and keys
    "beit_base_patch16_224": {},
    "beit_large_patch16_224": {"use_shared_rel_pos_bias": True, "init_values": None},  # beside that of each block
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_base_patch16_rpn_224": {"qk_norm": True},  # norm after the attention
    "vit_relpos_base_patch16_cls_224": {},  # class token
    "vit_srelpos_small_patch16_224": {},  # one bias for all blocks
    "naflexvit_base_patch16_gap": {},  # register tokens
    "naflexvit_base_patch16_par_gap": {"rope_type": "axial", "pool_include_prefix": True, "embed_proj_type": "conv"},
    "naflexvit_base_patch16_parfac_gap": {"rope_type": "mixed"},  # rotations of each block
    "naflexvit_base_patch16_map": {"fc_norm": True},  # attention pooling
    "naflexvit_base_patch16_radio_v3": {},  # class token
    "vit_base_patch16_rope_224": {"use_naflex": True},  # of another name
}
OF_EACH_FAMILY = [
    "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224", "vit_srelpos_small_patch16_224",
    "naflexvit_base_patch16_gap",
]  # fmt: skip
WITH_CLASS_TOKEN = [
    "vit_small_patch16_rope_224", "vit_base_patch16_lingbot", "vit_relpos_base_patch16_cls_224",
    "naflexvit_base_patch16_radio_v3",
]  # fmt: skip


def image_size_of(model):
    height, width = stem(model).patch_size
    return 3 * height, 2 * width


def images_and_target(model, batch=3):
    return following.images_and_target(image_size_of(model), batch, next(model.parameters()).dtype)


def check_followed(name, **options):
    model = small_plain(name, **options)
    images, target = images_and_target(model)
    aligned = following.check_followed(model, images, target, blocks=2)
    assert (aligned.ratio - target.ratio)[:2].abs().max() > 1e-4


@pytest.mark.parametrize("name", SAMPLE)
def test_each_family_is_followed(name):
    check_followed(name, **SAMPLE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for file in FILES for name in timm.list_models(module=file)])
def test_all_names_are_followed(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert unfollowable_reason(model) is None
    check_followed(name, **({"num_kv_heads": 2} if "sapiens2" in name else {}))


# Labels


@pytest.mark.parametrize("name", [name for name in SAMPLE if "pe_core" not in name and not name.endswith("map")])
def test_shares_equal_thousand_class_labels_in_float64(name):
    model = small_plain(name, **SAMPLE[name]).double()
    prefix = model.num_prefix_tokens
    pooled = slice(0 if getattr(model, "pool_include_prefix", False) else prefix, None)

    def dense_oracle(model, images, pixels, _):
        matrices, logits = materialised_attention(model, images)
        height, width = stem(model).patch_size
        patches = pixels.unflatten(2, (2, width)).unflatten(1, (3, height)).mean(dim=(2, 4)).flatten(1, 2)
        labels = torch.cat((pixels.mean(dim=(1, 2))[:, None].expand(-1, prefix, -1), patches), dim=1)
        for attention in matrices:
            labels = (attention @ labels + labels) / 2
        return logits, labels

    def pool(labels):
        return labels[:, 0] if model.global_pool == "token" else labels[:, pooled].mean(dim=1)

    following.check_thousand_classes(model, image_size_of(model), dense_oracle, pool=pool)


def test_attention_pooling_takes_the_labels_of_prefix_tokens_too():
    model = tlk.patch_model(small_plain("vit_pe_core_tiny_patch16_384").double())
    images, target = images_and_target(model)
    _, aligned = model(images, target=target, collect_layers=True)
    pool, tokens = model.attn_pool, model.forward_features(images)
    assert tokens.shape[1] == 6 + model.num_prefix_tokens > 6
    query = pool.q(pool.latent).unflatten(2, (8, 12)).transpose(1, 2)
    key = pool.kv(tokens).unflatten(2, (2, 8, 12))[:, :, 0].transpose(1, 2)
    attention = torch.softmax(query @ key.transpose(2, 3) / 12**0.5, dim=-1).mean(dim=1)
    torch.testing.assert_close(aligned.ratio, (attention @ aligned.layer_shares[-1])[:, 0])


@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
def test_transmix_equals_transmix_from_a_materialised_attention_matrix(name):
    model = small_plain(name)
    images, target = images_and_target(model)
    prefix = model.num_prefix_tokens
    matrices, logits = materialised_attention(model, images)
    attention = matrices[-1][:, 0, prefix:, None]
    patches = target.token_share((3, 2), stem(model).patch_size)
    ours, aligned = tlk.patch_model(model, method="transmix")(images, target=target)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aligned.ratio, (attention * patches).sum(dim=1) / attention.sum(dim=1))
    assert (aligned.ratio - target.ratio).abs().max() > 1e-3
    model.reset_classifier(10, "avg")
    with pytest.raises(NotImplementedError, match="method: TransMix needs logits of a class token"):
        tlk.patch_model(model, method="transmix")


@pytest.mark.parametrize(
    "name",
    [
        "eva_giant_patch14_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224",
        "naflexvit_base_patch16_radio_v3", "vit_base_patch16_rope_224", "naflexvit_base_patch16_parfac_gap",
    ],
)  # fmt: skip
def test_labels_and_rotations_of_dropped_patches_go_with_them(name):
    model = small_plain(name, patch_drop_rate=0.5, **SAMPLE[name]).double().train()
    images, target = images_and_target(model)
    kept = []
    hook = model.patch_drop.register_forward_hook(lambda module, inputs, output: kept.append(output[1]))
    torch.manual_seed(1)
    matrices, logits = materialised_attention(model, images)
    hook.remove()
    labels = target.token_share((3, 2), stem(model).patch_size, torch.float64)
    labels = torch.stack([of_image[index] for of_image, index in zip(labels, kept[0], strict=True)])
    prefix = target.image_share(torch.float64)[:, None].expand(-1, model.num_prefix_tokens, -1)
    labels = torch.cat((prefix, labels), dim=1)
    for attention in matrices:
        labels = (attention @ labels + labels) / 2
    torch.manual_seed(1)
    ours, aligned = tlk.patch_model(model)(images, target=target, collect_layers=True)
    torch.testing.assert_close(ours, logits)
    assert labels.shape == (3, model.num_prefix_tokens + 3, 1)
    torch.testing.assert_close(aligned.layer_shares[-1], labels)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images, target=target)
    torch.testing.assert_close(model.eval()(images, target=target)[0], model(images))


def test_any_image_size_is_followed_where_the_model_allows_it():
    model = small_plain("vit_small_patch16_dinov3", dynamic_img_size=True, dynamic_img_pad=True).double()
    images = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[5, 0, 32, 20]]]), (40, 56))
    logits = model(images)
    ours, aligned = tlk.patch_model(model)(images, target=target, collect_layers=True)
    torch.testing.assert_close(ours, logits)
    assert aligned.layer_shares[0].shape[1] == model.num_prefix_tokens + 3 * 4


def test_naflexvit_takes_patches_without_a_target_and_images_with_one():
    model = small_plain("naflexvit_base_patch16_gap", dynamic_img_pad=True, patch_drop_rate=0.5).double()
    images, target = images_and_target(model)
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(2)).expand(3, -1, -1)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(3, 6, -1)
    batch = {"patches": patches, "patch_coord": coordinates, "patch_valid": torch.ones(3, 6, dtype=torch.bool)}
    logits = model(batch)
    torch.testing.assert_close(model(images), logits)
    tlk.patch_model(model)
    assert torch.equal(model(batch), logits)
    for given, options in (
        (batch, {}), (patches, {"patch_coord": coordinates}), (images, {"attn_mask": images}),
        (images, {"patch_valid": batch["patch_valid"]}),
    ):  # fmt: skip
        with pytest.raises(
            NotImplementedError, match=r"x: expected images \(B, channels, Hi, Wi\) alone beside a target"
        ):
            model(given, **options, target=target)
    with pytest.raises(TypeError, match="patch_coord: expected a tensor, got a MixedTarget; give it by its name"):
        model(images, target)
    images = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[5, 0, 32, 20]]]), (40, 56))
    ours, aligned = model(images, target=target, collect_layers=True)
    torch.testing.assert_close(ours, model(images))
    assert aligned.layer_shares[0].shape[1] == model.num_prefix_tokens + 3 * 4
    model.embeds.dynamic_img_pad = False
    with pytest.raises(ValueError, match=r"images: expected multiples of the patches of \(16, 16\), got \(40, 56\)"):
        model(images, target=target)
    model.embeds = timm.layers.PatchEmbed(48, 16, 3, 96)
    with pytest.raises(NotImplementedError, match="embeds: can't follow labels through PatchEmbed"):
        tlk.patch_model(model)


@pytest.mark.parametrize("name", ["vit_base_patch16_rope_224", "naflexvit_base_patch16_gap"])
def test_blocks_of_naflexvit_may_be_wrapped(name):
    model = tlk.patch_model(small_plain(name, **SAMPLE[name]))
    images, target = images_and_target(model)
    expected = model(images, target=target)
    torch._dynamo.reset()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    logits, aligned = model(images, target=target)
    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(aligned.ratio, expected[1].ratio)


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_attention_masks_are_passed_on(kind):
    model = small_plain("vit_small_patch16_rope_224").double()
    images, target = images_and_target(model)
    allowed = (torch.rand(1, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
    additive = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    options = {"bool": {"attn_mask": allowed}, "additive": {"attn_mask": additive}, "causal": {"is_causal": True}}[kind]
    logits = model(images, **options)
    tlk.patch_model(model)
    assert torch.equal(model(images, **options), logits)
    ours, aligned = model(images, target=target, **options)
    torch.testing.assert_close(ours, logits)
    if kind == "causal":  # the class token comes first and sees only itself
        torch.testing.assert_close(aligned.ratio, target.image_share(torch.float64))


def check_attention(attention, position, dtype=torch.float64, **tolerance):
    tokens, share = torch.randn(2, 9, 64, dtype=dtype), torch.rand(2, 9, 1)
    attention = randomised(attention.to(dtype))
    expected = attention(tokens, position)
    attention.__class__ = tlk.patch._followers[type(attention)]
    torch.testing.assert_close(attention(tokens, position, share=share, residual=share)[0], expected, **tolerance)


class Widening(torch.nn.Module):
    """A norm whose result has a wider dtype, which timm's attention brings back where it rotates."""

    def forward(self, x):
        return x.float()


def test_options_of_the_attentions_are_followed():
    rope, bias = torch.randn(8, 32, dtype=torch.float64), torch.randn(4, 9, 9, dtype=torch.float64)
    options = dict(dim=64, num_heads=4)
    norms = dict(norm_layer=torch.nn.LayerNorm, qk_norm=True, scale_norm=True, gated=True)
    check_attention(eva.EvaAttention(qkv_bias_separate=True, scale_norm=False, **options), rope)
    check_attention(eva.EvaAttention(qkv_bias=False, rotate_half=True, **norms, **options), rope)
    check_attention(eva.AttentionRope(qkv_fused=False, num_kv_heads=1, **norms, **options), rope)
    widening = eva.EvaAttention(scale_norm=False, **options)
    widening.q_norm = widening.k_norm = Widening()
    check_attention(widening, rope.float(), torch.bfloat16, rtol=2**-6, atol=2**-6)
    check_attention(beit.Attention(qkv_bias=True, qkv_bias_separate=True, **options), bias)
    check_attention(beit.Attention(**options), None)


# Ways to run a model


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_checkpointing_and_compilation_change_nothing(name):
    model = tlk.patch_model(small_plain(name))  # in evaluation: the network of relative positions has dropout
    images, target = images_and_target(model)
    following.check_checkpointing(model, images, target, blocks=2)
    following.check_compiles(model, images, target)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", *OF_EACH_FAMILY[1:], "vit_relpos_base_patch16_rpn_224"])
def test_labels_may_stay_where_an_attention_is_dropped(name):
    model = small_plain(name, drop_path_rate=0.5)
    following.check_stochastic_depth(model, image_size_of(model))


@pytest.mark.parametrize("name", ["eva02_enormous_patch14_clip_224", "vit_pe_core_tiny_patch16_384", *OF_EACH_FAMILY])
def test_all_that_drops_drops_as_in_timms_model(name):
    rates = {} if "relpos" in name else {"pos_drop_rate": 0.2}
    model = tlk.patch_model(small_plain(name, drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.5, **rates).train())
    following.assert_drops_alike(model, *images_and_target(model))


@pytest.mark.parametrize("name", ["eva02_enormous_patch14_clip_224", *OF_EACH_FAMILY])
def test_dropout_autocast_and_layers_are_as_in_other_models(name):
    options = {} if "relpos" in name else {"pos_drop_rate": 0.0}
    model = small_plain(name, attn_drop_rate=0.5, **options)
    images, target = images_and_target(model)
    following.check_attention_dropout(copy.deepcopy(model), images, target)
    following.check_labels_under_autocast(tlk.patch_model(model), images, target)
    following.check_layers(model, images, target, blocks=2)


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_what_does_not_belong_together_is_refused(name):
    model = small_plain(name)
    following.check_errors(model, *images_and_target(model))
    with pytest.raises(NotImplementedError, match=re.escape("blocks.0.attn: expected a head dimension of 8 to 256")):
        tlk.patch_model(small_plain(name, num_heads=24))


@pytest.mark.parametrize("name", ["vit_pe_core_tiny_patch16_384", *OF_EACH_FAMILY])
def test_what_is_beside_projections_counts_as_in_timms_model(name):
    model = small_plain(name)
    following.check_adapters(model, *images_and_target(model))


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_forward_intermediates_is_untouched(name):
    model = small_plain(name)
    following.check_intermediates(model, images_and_target(model)[0])


def test_learned_rotations_and_biases_have_gradients():
    for name, parameter in (
        ("vit_small_patch16_rope_mixed_224", "rope.freqs"),
        ("beit_base_patch16_224", "blocks.1.attn.relative_position_bias_table"),
        ("vit_srelpos_small_patch16_224", "shared_rel_pos.mlp.fc1.weight"),
    ):
        model = small_plain(name)
        images, target = images_and_target(model)
        logits, _ = tlk.patch_model(model)(images, target=target)
        names = [name for name, _ in model.named_parameters()]
        assert gradients(model, logits.square().sum())[names.index(parameter)].abs().max() > 0
