"""The training task: which target its loss uses, for each way to train."""

import copy
import dataclasses
import functools
import sys

import pytest
import timm
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tlalign_kernels as tlk
from tlalign.config import PATCH_MIXING, TrainConfig, UsageError, load_recipe
from tlalign.mixing import CutMix
from tlalign.networks import align_targets
from tlalign.task import AlignedClassificationTask, create_mixing
from tlalign.teacher import Teacher

CLASSES = 7


def make_model(name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    model = timm.create_model(
        name, img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES, drop_path_rate=0.0
    )
    # Random attention is nearly uniform, and aligned ratios nearly the original ones.
    for block in model.blocks:
        block.attn.qkv.weight.data *= 20
    return model


def make_batch(size=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def digits(**values):
    return TrainConfig(**load_recipe("digits") | values)


def mix(images, classes, seed=0):
    return CutMix(mode="elem", seed=seed)(images, classes)


def test_all_blocks_that_are_sharded_are_compiled(monkeypatch):
    model = tlk.patch_model(
        timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=10, num_heads=2, drop_path_rate=0.5)
    )
    task = AlignedClassificationTask(model)
    monkeypatch.setattr("tlalign.task.fully_shard", lambda module, **_: module)
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend="eager"))
    images, target = mix(torch.randn(4, 3, 32, 32), torch.arange(4))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        task.shard("float32", compile=True)
        task(images, target)
        model.eval()(images)


def test_sharded_batch_norms_learn_in_bfloat16_and_their_statistics_are_averaged(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    task = AlignedClassificationTask(model, align=False)
    task.setup_ema(decay=0.75)
    images, classes = torch.randn(4, 3, 64, 64), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(task)(images, classes)["loss"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (1,)))
        monkeypatch.setattr("tlalign.task.fully_shard", shard)
        task.shard("bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            loss = task(images, classes)["loss"]
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
        assert all(each.grad.to_local().isfinite().all() for each in model.parameters())
        task.update_ema()
        torch.testing.assert_close(task.trainable_module_ema.module.bn1.running_mean, model.bn1.running_mean / 4)
    finally:
        torch.distributed.destroy_process_group()


def test_without_alignment_the_loss_is_timms_on_the_dense_target():
    model = make_model()
    images, target = mix(*make_batch())
    result = AlignedClassificationTask(model, align=False, smoothing=0.1)(images, target)
    expected = SoftTargetCrossEntropy()(model(images), target.to_dense(CLASSES, 0.1))
    torch.testing.assert_close(result["loss"], expected)
    assert "ratio_change" not in result


def test_with_alignment_the_loss_is_timms_on_the_dense_aligned_target():
    model = tlk.patch_model(make_model())
    images, target = mix(*make_batch())
    result = AlignedClassificationTask(model, smoothing=0.1)(images, target)
    logits, aligned = model(images, target=target)
    torch.testing.assert_close(result["output"], logits)
    torch.testing.assert_close(result["loss"], SoftTargetCrossEntropy()(logits, aligned.to_dense(CLASSES, 0.1)))
    torch.testing.assert_close(result["ratio_change"], aligned.ratio - target.ratio)
    assert result["ratio_change"].abs().mean() > 1e-3
    plain = SoftTargetCrossEntropy()(logits, target.to_dense(CLASSES, 0.1))
    assert (result["loss"] - plain).abs() > 1e-4


@pytest.mark.parametrize("align", [True, False])
def test_token_labels_over_all_classes_can_be_trained_on(align):
    model = make_model()
    images, _ = make_batch()
    target = tlk.MixedTarget.from_dense(torch.randn(6, CLASSES, 4, 4).mul(3).softmax(dim=1))
    if align:
        tlk.patch_model(model)
    result = AlignedClassificationTask(model, align=align, smoothing=0.1)(images, target)
    result["loss"].backward()
    logits, of_image = model(images, target=target) if align else (model(images), target)
    expected = of_image.to_dense(CLASSES, 0.1)
    torch.testing.assert_close(result["loss"], SoftTargetCrossEntropy()(logits, expected))
    mean = target.token_labels.mean(dim=(2, 3)) * 0.9 + 0.1 / CLASSES
    assert torch.allclose(expected, mean) != align
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_binary_loss_is_timms():
    model = tlk.patch_model(make_model())
    images, target = mix(*make_batch())
    result = AlignedClassificationTask(model, loss="bce", smoothing=0.1)(images, target)
    logits, aligned = model(images, target=target)
    torch.testing.assert_close(result["loss"], BinaryCrossEntropy(smoothing=0)(logits, aligned.to_dense(CLASSES, 0.1)))


@pytest.mark.parametrize(
    ("loss", "criterion"),
    [("ce", LabelSmoothingCrossEntropy(0.1)), ("bce", BinaryCrossEntropy(smoothing=0.1))],
)
def test_without_mixing_the_loss_is_timms_on_class_ids(loss, criterion):
    model = make_model()
    images, classes = make_batch()
    result = AlignedClassificationTask(model, align=False, loss=loss, smoothing=0.1)(images, classes)
    torch.testing.assert_close(result["loss"], criterion(model(images), classes))
    model.head.weight.data *= 30
    with torch.autocast("cpu", torch.bfloat16):
        task = AlignedClassificationTask(model, align=False, loss=loss, smoothing=0.1)
        result = task(images, classes)
    assert result["output"].dtype == torch.bfloat16
    torch.testing.assert_close(result["loss"], criterion(result["output"].float(), classes))


def test_mixing_depends_on_seed_step_and_rank_only():
    images, classes = make_batch()

    def loss(step, rank=0, seed=0):
        task = AlignedClassificationTask(make_model(), CutMix(), align=False, seed=seed, rank=rank)
        task.start_step(step)
        return task(images, classes)["loss"].item()

    assert loss(3) == loss(3)
    assert len({loss(3), loss(4), loss(3, rank=1), loss(3, seed=1)}) == 4


def test_mixed_in_the_task_or_before_it_is_the_same():
    images, classes = make_batch()
    model = tlk.patch_model(make_model())
    task = AlignedClassificationTask(model, CutMix(mode="elem"), seed=5)
    task.start_step(2)
    inside = task(images, classes)["loss"]
    strategy = CutMix(mode="elem")
    strategy.reseed(5, 2, 0)
    assert torch.equal(inside, AlignedClassificationTask(model)(*strategy(images, classes))["loss"])


def test_distilled_training_averages_the_losses_of_both_tokens():
    model = tlk.patch_model(make_model("deit_tiny_distilled_patch16_224"))
    model.set_distilled_training(True)
    images, target = mix(*make_batch())
    model.train()
    result = AlignedClassificationTask(model)(images, target)
    (logits, logits_dist), (aligned, aligned_dist) = model(images, target=target)
    losses = tlk.mixed_cross_entropy(logits, aligned), tlk.mixed_cross_entropy(logits_dist, aligned_dist)
    torch.testing.assert_close(result["loss"], sum(losses) / 2)
    torch.testing.assert_close(result["output"], logits)
    changes = torch.cat([aligned.ratio, aligned_dist.ratio]) - target.ratio.repeat(2, 1)
    torch.testing.assert_close(result["ratio_change"], changes)
    assert (aligned.ratio - aligned_dist.ratio).abs().max() > 1e-4
    images, classes = make_batch()
    losses = [LabelSmoothingCrossEntropy(0.1)(logits, classes) for logits in model(images)]
    result = AlignedClassificationTask(model, smoothing=0.1)(images, classes)
    torch.testing.assert_close(result["loss"], sum(losses) / 2)


def test_checkpoints_hold_timms_keys_and_the_averaged_model_aligns_too():
    model = make_model()
    keys = set(model.state_dict())
    task = AlignedClassificationTask(tlk.patch_model(model), verbose=False)
    task.setup_ema(decay=0.5)
    for ema, name in ((False, "state_dict"), (True, "state_dict_ema")):
        assert set(task.get_checkpoint_state(ema=ema)[name]) == keys
    images, target = mix(*make_batch())
    averaged = task.get_eval_model(ema=True).module
    assert torch.equal(averaged(images, target=target)[1].ratio, model(images, target=target)[1].ratio)
    copy.deepcopy(task)


def test_an_unknown_loss_and_a_smoothing_that_leaves_nothing_are_refused():
    with pytest.raises(ValueError, match="loss: expected one of ce, bce, got 'mse'"):
        AlignedClassificationTask(make_model(), loss="mse")
    with pytest.raises(ValueError, match="smoothing: expected 0 to less than 1, got 1"):
        AlignedClassificationTask(make_model(), smoothing=1)


@pytest.mark.parametrize(
    ("mixing", "kinds"),
    [
        ("cutmix", {"boxes"}),
        ("mixup", {"ratio"}),
        ("mixup-cutmix", {"boxes", "ratio"}),
        ("resizemix", {"boxes"}),
        *((name, {"masks"}) for name in ("random", "block", "fmix", "tokenmix")),
    ],
)
def test_each_mixing_mixes_as_its_name_says(mixing, kinds):
    strategy = create_mixing(digits(mixing=mixing))
    targets = [strategy(*make_batch())[1] for _ in range(20)]
    found = {"boxes" if t.boxes is not None else "masks" if t.masks is not None else "ratio" for t in targets}
    assert found == kinds


@pytest.mark.parametrize("target", ["ratio", "tl-align", "token-labels", "transmix", "teacher"])
@pytest.mark.parametrize(
    "mixing", ["cutmix", "random", "block", "fmix", "resizemix", "tokenmix", "attentive-cutmix", "puzzlemix"]
)
def test_every_spatial_mixing_combines_with_every_target(mixing, target):
    images, classes = make_batch(8)
    teacher = Teacher(make_model(), patch_size=4)
    config = digits(mixing=mixing, target=target, teacher_checkpoint="somewhere")
    model = make_model()
    if config.aligns:
        align_targets(model, config)
    strategy = create_mixing(config, model, teacher)
    task = AlignedClassificationTask(
        model, strategy, align=config.aligns, teacher=teacher if config.teacher_labels else None, seed=7
    )
    task.start_step(3)
    result = task(images, classes)
    strategy.reseed(7, 3, 0)
    mixed, mixed_target = strategy(images, classes)
    plain = tlk.mixed_cross_entropy(model(mixed), mixed_target)
    assert mixed_target.ratio.max() > 0
    if target == "ratio":
        torch.testing.assert_close(result["loss"], plain)
    else:
        assert result["ratio_change"].abs().max() > 1e-3


def test_options_of_the_configuration_reach_the_strategy():
    config = digits(cutmix_alpha=0.3, mix_patch_size=5, mix_prob=0.4, mix_mode="pair")
    for mixing in ("random", "block", "fmix", "tokenmix", "resizemix"):
        strategy = create_mixing(dataclasses.replace(config, mixing=mixing))
        assert (strategy.prob, strategy.mode) == (0.4, "pair")
        if mixing in PATCH_MIXING:
            assert strategy.patch_size == 5
        if mixing in ("random", "block", "fmix"):
            assert strategy.alpha == 0.3
    options = {"mixup_alpha": 0.6, "mix_switch_prob": 0.7, "box_grid": 5}
    both = {"mixup_alpha": 0.6, "cutmix_alpha": 0.3, "switch_prob": 0.7, "box_grid": 5}
    expected = {"cutmix": {"alpha": 0.3, "box_grid": 5}, "mixup": {"alpha": 0.6}, "mixup-cutmix": both}
    for mixing, found in expected.items():
        strategy = create_mixing(dataclasses.replace(config, mixing=mixing, **options))
        assert vars(strategy).items() >= found.items()


def test_mixing_none_does_not_mix():
    assert create_mixing(digits(mixing="none")) is None


def test_a_missing_package_is_a_usage_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=r"mixing: SaliencyMix needs OpenCV.*tlalign-kernels\[saliency\]"):
        create_mixing(digits(mixing="saliencymix"))


def run_step(task, images, classes):
    """Result of a step of seed 3; CutMix as it drew there, and what it made of the images."""
    task.start_step(5)
    result = task(images, classes)
    strategy = CutMix(mode="elem")
    strategy.reseed(3, 5, 0)
    return result, strategy, *strategy(images, classes)


def test_a_teacher_s_target_takes_the_place_of_the_ratio():
    images, classes = make_batch()
    model = make_model()
    teacher = Teacher(make_model())
    task = AlignedClassificationTask(model, CutMix(mode="elem"), align=False, teacher=teacher, seed=3)
    result, strategy, mixed, target = run_step(task, images, classes)
    taught = teacher.target(strategy, images, target)
    torch.testing.assert_close(result["loss"], tlk.mixed_cross_entropy(model(mixed), taught))
    assert torch.equal(result["ratio_change"], taught.ratio - target.ratio)
    assert result["ratio_change"].abs().max() > 1e-3
    assert set(task.state_dict()) == set(AlignedClassificationTask(model, align=False).state_dict())
    task.train()
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())


def test_token_labels_of_a_teacher_are_aligned():
    images, classes = make_batch()
    model, teacher = tlk.patch_model(make_model()), Teacher(make_model(), patch_size=4)
    task = AlignedClassificationTask(model, CutMix(mode="elem"), teacher=teacher, smoothing=0.1, seed=3)
    result, strategy, mixed, target = run_step(task, images, classes)
    labels = teacher.token_labels(strategy, images, target)
    logits, aligned = model(mixed, target=labels)
    torch.testing.assert_close(result["loss"], tlk.mixed_cross_entropy(logits, aligned, 0.1))
    change = (aligned.to_dense(CLASSES) - labels.to_dense(CLASSES)).abs().sum(dim=1, keepdim=True) / 2
    torch.testing.assert_close(result["ratio_change"], change)
    assert change.max() > 1e-3


def test_options_reach_the_strategies_that_look_at_images():
    config = digits(cutmix_alpha=0.3, mix_prob=0.4, mix_mode="pair", teacher_checkpoint="somewhere")
    for mixing in ("saliencymix", "puzzlemix", "attentive-cutmix"):
        strategy = create_mixing(dataclasses.replace(config, mixing=mixing), make_model(), Teacher(make_model()))
        assert (strategy.prob, strategy.mode) == (0.4, "pair")
        assert mixing == "attentive-cutmix" or strategy.alpha == 0.3
