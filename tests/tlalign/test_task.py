"""The training task: which target its loss uses, for each way to train."""

import copy

import pytest
import timm
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import tlalign_kernels as tlk
from tlalign.config import TrainConfig, load_recipe
from tlalign.mixing import CutMix
from tlalign.task import AlignedClassificationTask, create_mixing

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


def mix(images, classes, seed=0):
    return CutMix(mode="elem", seed=seed)(images, classes)


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
    torch.testing.assert_close(result["ratio_change"], (aligned.ratio - target.ratio).abs().mean())
    assert result["ratio_change"] > 1e-3
    plain = SoftTargetCrossEntropy()(logits, target.to_dense(CLASSES, 0.1))
    assert (result["loss"] - plain).abs() > 1e-4


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


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss: expected one of ce, bce, got 'mse'"):
        AlignedClassificationTask(make_model(), loss="mse")


@pytest.mark.parametrize(
    ("method", "kinds"),
    [("cutmix", {"boxes"}), ("tl-align", {"boxes"}), ("mixup", {"ratio"}), ("mixup-cutmix", {"boxes", "ratio"})],
)
def test_each_method_mixes_as_its_name_says(method, kinds):
    strategy = create_mixing(TrainConfig(**load_recipe("digits") | {"method": method}))
    targets = [strategy(*make_batch())[1] for _ in range(20)]
    assert {"ratio" if target.boxes is None else "boxes" for target in targets} == kinds


def test_method_none_does_not_mix():
    assert create_mixing(TrainConfig(**load_recipe("digits") | {"method": "none"})) is None
