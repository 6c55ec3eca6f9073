"""PVT: it is the published one, timm knows it, and its labels are those of a dense computation."""

import following
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

import tlalign.models
import tlalign_kernels as tlk
from tlalign.cli import main

# No stage divides by the stride of the next, nor by the reduction of its keys.
SIZE = (88, 72)


def small(depths=(1, 2, 1, 1), img_size=SIZE, name="pvt_tiny", **options):
    options = {"embed_dims": (8, 16, 40, 64), "num_classes": following.CLASSES, **options}
    model = timm.create_model(name, depths=depths, img_size=img_size, **options)
    return following.randomised(model).eval()


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "img_size": 64}])
def test_is_followed(options):
    images, target = following.images_and_target(SIZE)
    aligned = following.check_followed(small(**options), images, target, blocks=5)
    assert (aligned.ratio - target.ratio)[:2].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"])
def test_every_name_is_followed(name):
    with torch.device("meta"):
        own = [len(timm.create_model(name)._blocks(stage)) for stage in range(4)]
    following.check_followed(small(own, name=name), *following.images_and_target(SIZE), blocks=sum(own))


def dense_oracle(model, images, labels, residual):
    """Logits, and labels of the tokens after the last block, from the weights and the labels of the pixels."""
    weights, x, of_image = following.Weights(model), images, labels.mean(dim=(1, 2))[:, None]
    for stage in range(1, 5):
        stride = 4 if stage == 1 else 2
        x = weights.conv(x, f"patch_embed{stage}.proj", stride=stride)
        size = x.shape[2:]
        bounds = (following.cells(tokens, stride, partial=False) for tokens in labels.shape[1:3])
        labels = following.pooled(labels, *bounds).flatten(1, 2)
        x = weights.norm(x.flatten(2).transpose(1, 2), f"patch_embed{stage}.norm")
        position = weights.named[f"pos_embed{stage}"]
        if stage == 4:
            x = torch.cat((weights.named["cls_token"].expand(len(x), -1, -1), x), dim=1)
            labels = torch.cat((of_image, labels), dim=1)
        if position.shape[1] != x.shape[1]:
            side = int(position.shape[1] ** 0.5)
            first, position = position[:, : stage == 4], position[:, int(stage == 4) :]
            position = position.view(1, side, side, -1).permute(0, 3, 1, 2)
            position = F.interpolate(position, size, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
            position = torch.cat((first, position), dim=1)
        x = x + position
        for index, heads in enumerate([(1, 2, 5, 8)[stage - 1]] * len(getattr(model, f"block{stage}"))):
            name = f"block{stage}.{index}"
            queries = keys = weights.norm(x, f"{name}.norm1", 1e-6)
            key_labels = labels
            if stage < 4:
                step = {1: 8, 2: 4, 3: 2}[stage]
                keys = weights.conv(keys.transpose(1, 2).unflatten(2, size), f"{name}.attn.sr", stride=step)
                keys = weights.norm(keys.flatten(2).transpose(1, 2), f"{name}.attn.norm")
                bounds = (following.cells(tokens, step, partial=False) for tokens in size)
                key_labels = following.pooled(labels.unflatten(1, size), *bounds).flatten(1, 2)
            projected = (
                weights.linear(queries, f"{name}.attn.q"),
                *weights.linear(keys, f"{name}.attn.kv").chunk(2, dim=-1),
            )
            attended, attention = following.attend(*projected, heads)
            mixed = attention @ key_labels
            labels = (mixed + labels) / 2 if residual else mixed
            x = x + weights.linear(attended, f"{name}.attn.proj")
            hidden = F.gelu(weights.linear(weights.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1"))
            x = x + weights.linear(hidden, f"{name}.mlp.fc2")
        if stage < 4:
            x, labels = x.transpose(1, 2).unflatten(2, size), labels.unflatten(1, size)
    x = weights.norm(x, "norm", 1e-6)
    pooled = x[:, 0] if model.global_pool == "token" else x[:, 1:].mean(dim=1)
    return weights.linear(pooled, "head"), labels


@pytest.mark.parametrize(
    ("size", "options", "residual"),
    [
        (SIZE, {}, True),
        (SIZE, {"img_size": 64}, True),  # position embeddings are interpolated
        ((64, 64), {"img_size": 64, "global_pool": "avg"}, False),
    ],
)
def test_model_and_shares_equal_a_dense_computation_in_float64(size, options, residual):
    model = small(num_classes=1000, **options).double()

    def pool(labels):
        return labels[:, 0] if model.global_pool == "token" else labels[:, 1:].mean(dim=1)

    following.check_thousand_classes(model, size, dense_oracle, residual, pool)


def test_checkpointing_changes_nothing():
    model = tlk.patch_model(small().train())
    following.check_checkpointing(model, *following.images_and_target(SIZE), blocks=5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_into_one_graph(checkpointing):
    options = {"embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (4, 1)}
    model = tlk.patch_model(small((1, 1), (40, 36), **options).train())
    model.set_grad_checkpointing(checkpointing)
    following.check_compiles(model, *following.images_and_target((36, 44)))


def test_attention_dropout_acts_in_training_alone():
    following.check_attention_dropout(small(attn_drop_rate=0.5), *following.images_and_target(SIZE))


def test_each_rate_of_dropout_is_of_its_own_layers():
    model = small((1, 1, 1, 1), drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4)
    parts = {"head_drop": 0.1, "pos_drop": 0.2, "proj_drop": 0.3, "mlp.drop": 0.3, "attn_drop": 0.4}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            (rate,) = {rate for part, rate in parts.items() if part in name}
            assert module.p == rate, name
    model.head_drop.p = 1.0
    torch.testing.assert_close(model.train()(torch.randn(2, 3, *SIZE)), model.head.bias.expand(2, -1))


def test_labels_may_stay_where_an_attention_is_dropped():
    following.check_stochastic_depth(small(depths=(1, 1, 1, 2), drop_path_rate=0.5), SIZE)


def test_layers_choose_the_blocks_that_align():
    following.check_layers(small(), *following.images_and_target(SIZE), blocks=5)


def test_what_does_not_belong_together_is_refused():
    following.check_errors(small(), *following.images_and_target(SIZE))
    with pytest.raises(ValueError, match="img_size: expected at least a patch in each of the stages, got 16"):
        small(img_size=16)
    with pytest.raises(ValueError, match="sr_ratios: expected 1 in the last stage"):
        small(sr_ratios=(8, 4, 2, 2))
    with pytest.raises(ValueError, match="global_pool: expected 'token', 'avg' or '', got 'max'"):
        small(global_pool="max")
    with pytest.raises(NotImplementedError, match="features_only: expected False for pvt_tiny"):
        small(features_only=True)


DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2), "pvt_small": (3, 4, 6, 3), "pvt_medium": (3, 4, 18, 3), "pvt_large": (3, 8, 27, 3)
}  # fmt: skip


def published_shapes(name):
    """Names and shapes in the published checkpoints, as the authors' classification/pvt.py has them."""
    depths = DEPTHS[name]
    shapes = {"cls_token": (1, 1, 512), "norm.weight": (512,), "norm.bias": (512,)}
    shapes |= {"head.weight": (1000, 512), "head.bias": (1000,)}
    stages = zip(
        (3, 64, 128, 320), (64, 128, 320, 512), depths, (8, 8, 4, 4), (8, 4, 2, 1), (56, 28, 14, 7), strict=True
    )
    for stage, (before, dim, depth, mlp_ratio, reduction, side) in enumerate(stages, start=1):
        patch = 4 if stage == 1 else 2
        shapes[f"pos_embed{stage}"] = (1, side * side + (stage == 4), dim)
        parts = {f"patch_embed{stage}.proj": (dim, before, patch, patch), f"patch_embed{stage}.norm": (dim,)}
        for index in range(depth):
            block = {"norm1": (dim,), "attn.q": (dim, dim), "attn.kv": (2 * dim, dim), "attn.proj": (dim, dim)}
            block |= {"norm2": (dim,), "mlp.fc1": (mlp_ratio * dim, dim), "mlp.fc2": (dim, mlp_ratio * dim)}
            if reduction > 1:
                block |= {"attn.sr": (dim, dim, reduction, reduction), "attn.norm": (dim,)}
            parts |= {f"block{stage}.{index}.{part}": shape for part, shape in block.items()}
        for part, shape in parts.items():
            shapes |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("name", DEPTHS)
def test_parameters_are_those_of_the_published_checkpoints(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes(name)


def test_weights_begin_as_those_of_the_authors():
    model = timm.create_model("pvt_tiny", embed_dims=(32, 64, 160, 256), depths=(1, 1, 1, 1), num_classes=100)
    for name, value in model.named_parameters():
        if value.dim() in (2, 3):  # of linear layers, and embeddings
            assert value.std().item() == pytest.approx(0.02, rel=0.2), name


def test_checkpoints_load_also_for_other_sizes_and_classes(tmp_path):
    weights = small(img_size=96).state_dict()
    torch.save({"model": weights}, tmp_path / "pvt.pth")

    def load(**options):
        source = {"file": str(tmp_path / "pvt.pth"), "num_classes": following.CLASSES}
        arguments = {"embed_dims": (8, 16, 40, 64), "depths": (1, 2, 1, 1), "num_classes": following.CLASSES, **options}
        model = timm.create_model("pvt_tiny", pretrained=True, pretrained_cfg_overlay=source, **arguments)
        return model, model.state_dict()

    _, same = load(img_size=96)
    assert all(torch.equal(same[key], value) for key, value in weights.items())
    model, other = load(img_size=SIZE, num_classes=3, in_chans=1)
    changed = {key for key, value in weights.items() if other[key].shape != value.shape}
    assert changed == {*(f"pos_embed{n}" for n in (1, 2, 3, 4)), "patch_embed1.proj.weight", "head.weight", "head.bias"}
    # What is interpolated once and for all is what the model interpolates for images of another size.
    plain, _ = load(num_classes=3, in_chans=1, img_size=96)
    plain.head.load_state_dict(model.head.state_dict())
    images = torch.randn(2, 1, *SIZE)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("size", [(32, 128), (64, 96)])  # 8 x 32 embeddings would be 16 x 16
def test_checkpoints_of_images_that_are_not_square_load_for_their_own_size_only(tmp_path, size):
    weights = small(img_size=size).state_dict()
    torch.save(weights, tmp_path / "pvt.pth")

    def load(**options):
        source = {"file": str(tmp_path / "pvt.pth"), "num_classes": following.CLASSES}
        arguments = {"embed_dims": (8, 16, 40, 64), "depths": (1, 2, 1, 1), "num_classes": following.CLASSES, **options}
        return timm.create_model("pvt_tiny", pretrained=True, pretrained_cfg_overlay=source, **arguments).state_dict()

    same = load(img_size=size)
    assert all(torch.equal(same[key], value) for key, value in weights.items())
    if size == (64, 96):
        with pytest.raises(
            ValueError, match=r"pos_embed1: expected \(1, 1024, 8\) or that of square images, got \(1, 384"
        ):
            load(img_size=128)


def test_a_checkpoint_without_position_embeddings_is_refused():
    with pytest.raises(ValueError, match="pos_embed1: expected it in the checkpoint of a PVT, got none"):
        tlalign.models.pvt.checkpoint_filter_fn({"head.bias": torch.zeros(3)}, small())


def test_timm_finds_the_parts():
    model = small(drop_path_rate=0.4)
    blocks = tlk.patch_model(model).label_blocks(model)
    tlk.unpatch_model(model)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.no_weight_decay() == {"cls_token"}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales.keys() == set(model.parameters())
    in_order = [model.patch_embed1.proj.weight, *(block.attn.q.weight for block in blocks), model.head.weight]
    of_order = [scales[parameter] for parameter in in_order]
    assert of_order == sorted(set(of_order))

    images = torch.randn(1, 3, *SIZE)
    model.reset_classifier(3, global_pool="avg")
    assert model(images).shape == (1, 3)
    assert model.get_classifier().out_features == 3
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 1:].mean(dim=1))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), features)


def test_the_command_line_trains_it_and_draws_its_labels(tmp_path, capsys):
    model = {"patch_size": 2, "embed_dims": [8, 16], "num_heads": [1, 2], "depths": [1, 1], "sr_ratios": [4, 1]}
    options = ["--model=pvt_tiny", "--model_kwargs", str(model), "--img_size=16", "--batch_size=128", "--epochs=1"]
    assert main(["train", *options, "--warmup_epochs=0", "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "mean |aligned - original| mixing ratio" in printed
    picture = tmp_path / "run" / "token_labels.png"
    assert str(picture) in printed
    assert picture.stat().st_size > 0
