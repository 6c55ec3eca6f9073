"""Patching: what it changes, what it leaves alone, and what it refuses."""

import copy
import functools
import inspect
import io
from functools import partial

import following
import pytest
import timm
import torch
from timm.models import vision_transformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import tlalign_kernels as tlk
from tlalign_kernels import LabelFollower, MixedTarget, patch
from tlalign_kernels.models import vit


def vit_tiny(**options):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=10, **options
    )


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def target():
    return MixedTarget.from_boxes(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[[0, 0, 16, 20]]] * 2), (32, 32))


@pytest.fixture
def registry(monkeypatch):
    """Undoes what a test registers."""
    monkeypatch.setattr(patch, "_followers", dict(patch._followers))
    monkeypatch.setattr(patch, "_originals", dict(patch._originals))


def snapshot(model):
    return [(name, type(module), dict(vars(module))) for name, module in model.named_modules()]


def test_patching_is_idempotent_and_replaces_options():
    model = tlk.patch_model(vit_tiny())
    once = snapshot(model)
    assert snapshot(tlk.patch_model(model)) == once
    tlk.patch_model(model, layers=[1], residual=False, backend="reference")
    assert type(model.blocks[0]) is vision_transformer.Block
    assert type(model.blocks[1]) is vit.AlignedBlock
    assert (model.blocks[1].label_residual, model.blocks[1].attn.label_backend) == (False, "reference")
    tlk.patch_model(model, method="transmix")
    assert (model.label_method, model.blocks[1].label_residual) == ("transmix", False)
    assert snapshot(tlk.patch_model(model)) == once


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32}),
        ("vit_base_patch16_siglip_224", {"depth": 0, "img_size": 32}),  # attention pooling
        ("swin_tiny_patch4_window7_224", {"depths": (1,), "img_size": 32}),
        ("davit_tiny", {"depths": (1,), "embed_dims": (32,), "num_heads": (1,)}),
    ],
)
def test_each_attention_takes_the_backend_that_is_asked_for(name, options, images, target):
    model = tlk.patch_model(timm.create_model(name, num_classes=10, **options), backend="cuda")
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not support this call"):
        model(images, target=target)


def test_unpatching_restores_everything():
    model = vit_tiny()
    before = snapshot(model)
    assert snapshot(tlk.unpatch_model(model)) == before
    assert snapshot(tlk.unpatch_model(tlk.patch_model(model))) == before


def test_classes_of_timm_are_not_touched():
    forwards = {cls: cls.forward for cls in patch._followers}
    tlk.patch_model(vit_tiny())
    assert forwards == {cls: cls.forward for cls in patch._followers}
    assert type(vit_tiny()) is vision_transformer.VisionTransformer


def test_a_refused_model_is_left_as_it_was():
    model = vit_tiny()
    model.blocks[1].attn = nn.MultiheadAttention(48, 3)
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.attn: can't follow labels through .*MultiheadAttention"):
        tlk.patch_model(model)
    assert snapshot(model) == before
    tlk.patch_model(model, layers=[0])


def test_a_patched_model_is_left_as_it_was_by_options_that_are_refused():
    model = tlk.patch_model(vit_tiny(global_pool="avg", class_token=False))
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers"):
        tlk.patch_model(model, layers=[2])
    with pytest.raises(NotImplementedError, match="method: TransMix"):
        tlk.patch_model(model, method="transmix")
    assert snapshot(model) == before


def test_saved_models_follow_labels(images, target):
    model = tlk.patch_model(vit_tiny())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(images, target=target)[1].ratio, model(images, target=target)[1].ratio)
    plain = vit_tiny()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images), model(images))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet18", "model: .*resnet.ResNet"),
        ("vit_dwee_patch16_reg1_gap_256", r"blocks\.0\.attn: .*DiffAttention"),
        ("vit_dpwee_patch16_reg1_gap_256", r"blocks\.0: .*DiffParallelScalingBlock"),
        ("cait_xxs24_224", "model: .*Cait"),
    ],
)
def test_models_that_cannot_be_followed_are_refused_by_name(name, module):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(NotImplementedError, match=module):
        tlk.patch_model(model)
    assert "can't follow labels through" in patch.unfollowable_reason(model)


def test_unknown_modules_inside_blocks_are_refused():
    class MixesTokens(nn.Linear):
        def forward(self, x):
            return super().forward(x).roll(1, dims=1)

    for where, replacement in [
        ("mlp.fc1", MixesTokens(48, 192)),
        ("ls1", nn.Conv1d(17, 17, 1)),
        ("norm1", nn.BatchNorm1d(17)),
        ("mlp", nn.Softmax(dim=1)),
    ]:
        model = vit_tiny()
        model.blocks[0].set_submodule(where, replacement)
        with pytest.raises(NotImplementedError, match=rf"blocks\.0\.{where}: can't follow labels through"):
            tlk.patch_model(model)


def test_stems_that_attend_are_refused():
    model = vit_tiny()
    model.patch_embed.norm = timm.layers.Attention(48, num_heads=3)
    with pytest.raises(NotImplementedError, match=r"patch_embed\.norm: can't follow labels through Attention"):
        tlk.patch_model(model)
    model.patch_embed = nn.Conv2d(3, 48, 8, 8)
    with pytest.raises(NotImplementedError, match="patch_embed: can't follow labels through Conv2d"):
        tlk.patch_model(model)


def test_subclasses_are_not_taken_for_their_base():
    class MyAttention(timm.layers.Attention):
        pass

    with pytest.raises(NotImplementedError, match=r"blocks\.0\.attn: .*MyAttention"):
        tlk.patch_model(vit_tiny(attn_layer=MyAttention))


def test_a_changed_forward_is_noticed(monkeypatch):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x

    monkeypatch.setattr(vision_transformer.Block, "forward", forward)
    with pytest.raises(NotImplementedError, match=r"Block\.forward: expected the source with digest"):
        tlk.patch_model(vit_tiny())


def test_a_forward_without_source_has_no_digest():
    names = {}
    exec("def forward(self, x): return x", names)
    assert patch.source_digest(names["forward"]) == "no source"


def set_forward(module):
    """As wrappers do."""
    module.forward = functools.partial(module.forward)


@pytest.mark.parametrize("where", ["", "blocks.1", "blocks.1.attn"])
def test_a_forward_set_on_a_module_is_noticed(where):
    model = vit_tiny()
    set_forward(model.get_submodule(where))
    with pytest.raises(NotImplementedError, match=rf"{where or 'model'}\.forward: .* before it is wrapped"):
        tlk.patch_model(model)
    model.get_submodule(where).forward = vit_tiny().get_submodule(where).forward
    with pytest.raises(NotImplementedError, match=rf"{where or 'model'}\.forward: .* before it is wrapped"):
        tlk.patch_model(model)


def test_another_method_set_on_a_module_is_noticed():
    model = vit_tiny()
    model.forward_features = functools.partial(model.forward_features)
    with pytest.raises(NotImplementedError, match=r"model\.forward_features: .* before it is wrapped"):
        tlk.patch_model(model)


def parametrize_positions(model):
    parametrize.register_parametrization(model, "pos_embed", nn.Identity())


@pytest.mark.parametrize(
    ("where", "change"), [("", set_forward), ("blocks.1", set_forward), ("", parametrize_positions)]
)
def test_a_module_that_was_changed_since_is_not_unpatched(where, change, images, target):
    model = tlk.patch_model(vit_tiny())
    change(model.get_submodule(where))
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{where or 'model'}: expected .* as it was when patched"):
        tlk.unpatch_model(model)
    assert snapshot(model) == before
    assert model(images, target=target)[1].ratio.shape == (2, 1)


SMALL = {
    "vit_tiny_patch16_224": dict(img_size=32, patch_size=8, embed_dim=48, depth=4),
    "vit_small_patch16_rope_mixed_224": dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=4),
    "beit_base_patch16_224": dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2),
    "vit_relpos_medium_patch16_cls_224": dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2),
    "xcit_tiny_12_p8_224": dict(img_size=32, embed_dim=48, num_heads=3, depth=2, eta=0.5),
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, patch_size=2, window_size=5, embed_dim=32, depths=(2, 2), num_heads=(2, 4)
    ),
    "pit_ti_224": dict(img_size=32, patch_size=8, stride=4, base_dims=(8, 8, 8), depth=(1, 1, 2)),
    "pvt_v2_b0": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "twins_svt_small": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "davit_tiny": dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), window_size=4),
    "maxvit_tiny_tf_224": dict(img_size=32, embed_dim=(16, 32), depths=(1, 1), stem_width=8, transformer_dim_head=8,
                               transformer_window_size=4),
    "coatnet_0_rw_224": dict(img_size=32, embed_dim=(16, 32), depths=(1, 2), block_type="CT", stem_width=8,
                             transformer_dim_head=8),
}  # fmt: skip


def replace_blocks(model, replacement):
    blocks = {id(block) for block in model.label_blocks(model)}
    for container in list(model.modules()):
        for name, child in container.named_children():
            if id(child) in blocks:
                setattr(container, name, replacement(child))


@pytest.mark.parametrize("name", SMALL)
def test_blocks_that_are_wrapped_one_by_one_follow_labels(name, images, target):
    model = following.randomised(timm.create_model(name, num_classes=10, **SMALL[name])).eval()
    _, nowhere = tlk.patch_model(model, layers=[])(images, target=target, collect_layers=True)
    _, expected = tlk.patch_model(model, layers=[0, -1])(images, target=target, collect_layers=True)
    assert not torch.equal(expected.layer_shares[0], nowhere.layer_shares[0])
    for wrap in (partial(torch.compile, backend="eager"), checkpoint_wrapper):
        wrapped = copy.deepcopy(model)
        replace_blocks(wrapped, wrap)
        _, aligned = wrapped(images, target=target, collect_layers=True)
        assert torch.equal(aligned.ratio, expected.ratio)
        assert all(torch.equal(*pair) for pair in zip(aligned.layer_shares, expected.layer_shares, strict=True))
    replace_blocks(model, lambda block: nn.Identity())
    with pytest.raises(TypeError, match="model: expected modules that were there when it was patched, got Identity"):
        model(images, target=target)


def other_attention(model):
    model.blocks[1].attn = timm.layers.Attention(48, num_heads=3)


def other_pooling(model):
    model.attn_pool = timm.layers.AttentionPoolLatent(48, num_heads=3)


def other_dropout(model):
    model.patch_drop = timm.layers.PatchDropout(0.5)


@pytest.mark.parametrize("replace", [other_attention, other_pooling, other_dropout])
def test_parts_that_came_later_are_refused_with_a_target(replace, images, target):
    options = {"global_pool": "map", "class_token": False} if replace is other_pooling else {}
    model = tlk.patch_model(vit_tiny(**options))
    replace(model)
    model(images)
    with pytest.raises(TypeError, match=r"model: expected modules that were there when it was patched, got .*; patch"):
        model(images, target=target)
    tlk.patch_model(model)(images, target=target)


class TracedLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, classes, ratio):
        logits, aligned = self.model(images, target=tlk.MixedTarget.from_ratio(classes, ratio))
        return tlk.mixed_cross_entropy(logits, aligned), aligned.ratio


@pytest.mark.parametrize("name", SMALL)
def test_what_was_exported_takes_any_number_of_images(name):
    def inputs(batch):
        return torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch, 2)), torch.rand(batch, 1)

    model = timm.create_model(name, num_classes=10, drop_path_rate=0.5, **SMALL[name])
    loss = TracedLoss(tlk.patch_model(following.randomised(model).eval(), stochastic_depth=True))
    with torch.no_grad():
        exported = torch.export.export(loss, inputs(2), dynamic_shapes=({0: torch.export.Dim.AUTO},) * 3).module()
        others = inputs(5)
        for result, expected in zip(exported(*others), loss(*others), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_hooks_of_leaves_act_as_in_timms_model(name, images, target):
    model = tlk.patch_model(following.randomised(timm.create_model(name, num_classes=10, **SMALL[name])).eval())
    skipped = ("attn_drop", "softmax")  # which have no tensor to act on
    leaves = [
        module for path, module in model.named_modules() if not list(module.children()) and not path.endswith(skipped)
    ]
    for module in leaves:
        module.register_forward_hook(lambda module, inputs, output: 1.01 * output + 0.01)
    logits = model(images)
    torch.testing.assert_close(
        model(images, target=target)[0], logits, rtol=1e-4, atol=1e-4 * float(logits.detach().abs().max())
    )


def test_a_module_is_not_bare_where_something_else_takes_part_in_a_call():
    linear = nn.Linear(2, 2)
    assert patch.is_bare(linear, nn.Linear)
    for register in (
        linear.register_forward_hook,
        linear.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        hook = register(lambda *_: None)
        assert not patch.is_bare(linear, nn.Linear)
        hook.remove()
    set_forward(linear)
    assert not patch.is_bare(linear, nn.Linear)


@pytest.mark.parametrize("part", ["attention", "block", "checkpointed block"])
def test_hooks_that_take_labels_away_are_told_of_them(part, images, target):
    model = tlk.patch_model(vit_tiny())
    model.set_grad_checkpointing(part == "checkpointed block")
    module = model.blocks[0].attn if part == "attention" else model.blocks[0]
    hook = module.register_forward_pre_hook(lambda module, inputs: inputs[0])
    model(images)
    with pytest.raises(
        TypeError, match=rf"{type(module).__name__}: expected \(tokens, share\), got Tensor; with a tar"
    ):
        model(images, target=target)
    hook.remove()
    module.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    model(images, target=target)


def test_what_is_set_on_a_model_since_it_was_patched_is_refused_with_a_target(images, target):
    model = tlk.patch_model(vit_tiny())
    features = model.forward_features
    model.forward_features = lambda *given, **options: 2 * features(*given, **options)
    with pytest.raises(NotImplementedError, match=r"forward_features: expected that of timm\.models\.vision"):
        model(images, target=target)
    model.forward_features = features
    model(images, target=target)
    model.blocks[0].attn.attn_drop = nn.Hardtanh()
    with pytest.raises(NotImplementedError, match="attn_drop: expected a Dropout, got Hardtanh"):
        model(images, target=target)


@pytest.mark.parametrize("name", SMALL)
def test_all_that_drops_drops_as_in_timms_model(name, images, target):
    # Swin's projection drops of a map what timm's drops of its windows: other numbers of the same distribution.
    # DaViT's does not drop.
    rates = dict(drop_rate=0.2, drop_path_rate=0.5)
    if not any(family in name for family in ("swin", "maxvit", "coatnet", "davit")):
        rates["proj_drop_rate"] = 0.2
    model = following.randomised(timm.create_model(name, num_classes=10, **SMALL[name], **rates))
    following.assert_drops_alike(tlk.patch_model(model.train()), images, target)


def test_tokens_of_16_bits_stay_so_where_labels_do_not_pass_dropped_attention(images, target):
    model = tlk.patch_model(vit_tiny(drop_path_rate=0.5).bfloat16().train(), stochastic_depth=True)
    logits, aligned = model(images.bfloat16(), target=target)
    assert (logits.dtype, aligned.ratio.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", SMALL)
def test_defaults_may_be_given_by_position_as_exporters_do(name, images):
    model = tlk.patch_model(timm.create_model(name, **SMALL[name]).eval())
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    assert torch.equal(model(images, *(parameter.default for parameter in parameters)), model(images))


@pytest.mark.parametrize("wrap", [fully_shard, DistributedDataParallel])
def test_distributed_models_are_refused(wrap, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = {"mesh": init_device_mesh("cpu", (1,))} if wrap is fully_shard else {}
        wrapped = wrap(tlk.patch_model(vit_tiny()), **options)
        for change in (tlk.patch_model, tlk.unpatch_model):
            with pytest.raises(ValueError, match="expected a model that is not compiled or wrapped"):
                change(wrapped)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", ["compile", "compile in place", "data parallel", "script", "compiled block"])
def test_wrapped_models_are_refused(wrap):
    model = tlk.patch_model(vit_tiny())
    if wrap == "compile":
        wrapped = torch.compile(model)
    elif wrap == "compile in place":
        wrapped = model
        wrapped.compile()
    elif wrap == "data parallel":
        wrapped = nn.DataParallel(model)
    elif wrap == "script":
        wrapped = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    else:
        model.blocks[1] = torch.compile(model.blocks[1])
        wrapped = model
    for change in (tlk.patch_model, tlk.unpatch_model):
        with pytest.raises(ValueError, match="expected a model that is not compiled or wrapped"):
            change(wrapped)
    assert "not compiled or wrapped" in patch.unfollowable_reason(wrapped)


def test_a_block_that_is_run_twice_is_chosen_as_a_whole(images, target):
    model = vit_tiny()
    model.blocks.append(model.blocks[0])
    with pytest.raises(ValueError, match="layers: expected all or none of the indices of a block that is run several"):
        tlk.patch_model(model, layers=[0])
    _, aligned = tlk.patch_model(model, layers=[0, 2])(images, target=target, collect_layers=True)
    first, second, third = aligned.layer_shares
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        tlk.patch_model("vit_tiny_patch16_224")
    with pytest.raises(NotImplementedError, match=r"model: can't follow labels through timm\.\S+\.Block; models that"):
        tlk.patch_model(vit_tiny().blocks[0])
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        tlk.patch_model(vit_tiny(), backend="fast")
    with pytest.raises(ValueError, match="method: expected one of tl-align, transmix, got 'cutmix'"):
        tlk.patch_model(vit_tiny(), method="cutmix")
    with pytest.raises(TypeError, match="layers: expected an iterable of block indices, got 1"):
        tlk.patch_model(vit_tiny(), layers=1)
    for name, flag in (("residual", "no"), ("residual", None), ("stochastic_depth", 1)):
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got {flag!r}"):
            tlk.patch_model(vit_tiny(), **{name: flag})
    for options in ({"layers": [1]}, {"residual": False}, {"stochastic_depth": True}):
        with pytest.raises(ValueError, match="layers, residual, stochastic_depth: expected none of them"):
            tlk.patch_model(vit_tiny(), method="transmix", **options)


@pytest.mark.parametrize("name", ["", "blocks.0.attn"])
def test_a_wrapper_that_was_taken_off_leaves_a_model_as_it_was(images, target, name):
    # Of accelerate's a module keeps its own forward, set on itself.
    model = vit_tiny()
    for change in (tlk.patch_model, tlk.patch_model, tlk.unpatch_model):
        module = model.get_submodule(name)
        module.forward = module.forward
        assert "forward" not in change(model).get_submodule(name).__dict__
    expected = model(images)
    torch.testing.assert_close(tlk.patch_model(model)(images, target=target)[0], expected)


# Modules of one's own


class GatedMlp(nn.Module):
    """An MLP that acts on each token alone, which only its author knows."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x):
        return self.fc(x).sigmoid() * x


class RollingBlock(nn.Module):
    """Mixes each token with the one before it."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        return (self.fc(x) + self.fc(x).roll(1, dims=1)) / 2


class AlignedRollingBlock(LabelFollower, RollingBlock):
    """Mixes labels like tokens."""

    def forward(self, x, attn_mask=None, is_causal=False, share=None):
        x = super().forward(x)
        return x if share is None else (x, (share + share.roll(1, dims=1)) / 2)


def test_a_pointwise_module_can_be_registered(registry, images, target):
    model = vit_tiny()
    model.blocks[0].mlp = GatedMlp(48)
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.mlp: .*register"):
        tlk.patch_model(model)
    tlk.register(GatedMlp, None)
    logits = model(images)
    torch.testing.assert_close(tlk.patch_model(model)(images, target=target)[0], logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_can_be_registered(registry, images, target, checkpointing):
    model = vit_tiny()
    model.blocks[0] = RollingBlock(48)
    tlk.register(RollingBlock, AlignedRollingBlock)
    logits = model(images)
    model.set_grad_checkpointing(checkpointing)
    ours, aligned = tlk.patch_model(model)(images, target=target, collect_layers=True)
    torch.testing.assert_close(ours, logits)
    first = model._enter(images, target)[1]
    assert torch.equal(aligned.layer_shares[0], (first + first.roll(1, dims=1)) / 2)
    assert not torch.equal(aligned.layer_shares[1], aligned.layer_shares[0])
    assert type(tlk.unpatch_model(model).blocks[0]) is RollingBlock


def test_followers_are_checked(registry):
    for follower in (nn.Linear, RollingBlock, LabelFollower, AlignedRollingBlock(4)):
        with pytest.raises(TypeError, match="follower: expected a subclass of LabelFollower and RollingBlock, or None"):
            tlk.register(RollingBlock, follower)
    with pytest.raises(TypeError, match=r"module_class: expected a subclass of torch\.nn\.Module"):
        tlk.register(int, None)
    tlk.register(RollingBlock, AlignedRollingBlock)
    tlk.register(RollingBlock, AlignedRollingBlock)
    with pytest.raises(TypeError, match="follower: expected one of its own for Module, got AlignedRollingBlock"):
        tlk.register(nn.Module, AlignedRollingBlock)
