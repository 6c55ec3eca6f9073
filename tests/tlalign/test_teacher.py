"""Teachers: their maps of a model's own features, and the target by what of them is seen."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import tlalign.models  # noqa: F401 (timm learns of PVT)
from tlalign.mixing import BlockWise, CutMix, FMix, MixUp, PuzzleMix, RandomPatches, ResizeMix, TokenMix
from tlalign.teacher import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "test_resnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 16},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 1, "embed_dim": 24},
    "vit_medium_patch16_reg4_gap_256": {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 1, "embed_dim": 24},
    "naflexvit_base_patch16_gap": {"depth": 1, "embed_dim": 24, "num_heads": 3},
}


class KnownMaps(Teacher):
    """A teacher whose class activation is given."""

    def __init__(self, maps):
        self.maps = maps / maps.sum(dim=(1, 2), keepdim=True)

    def class_activation(self, images, classes):
        return self.maps


class KnownScores(Teacher):
    """A teacher whose class probabilities (B, h, w, classes) are given."""

    def __init__(self, scores, patch_size):
        self.scores, self.patch_size = scores, patch_size

    def class_scores(self, images):
        return self.scores


def head_of_cell(model, features, row, column):
    """A cell of the features (B, channels), and the logits of a map of that cell alone."""
    if features.dim() == 3:
        prefix = model.num_prefix_tokens
        cell = features[:, prefix + row * math.isqrt(features.shape[1] - prefix) + column]
        return cell, model.forward_head(cell[:, None].repeat(1, prefix + 1, 1))
    if type(model).__name__ == "SwinTransformer":
        return features[:, row, column], model.forward_head(features[:, row : row + 1, column : column + 1])
    return features[:, :, row, column], model.forward_head(features[:, :, row : row + 1, column : column + 1])


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_of_the_model_s_own_features_and_head(name):
    model = timm.create_model(name, num_classes=5, **MODELS[name])
    teacher = Teacher(model)
    images, classes = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 4])
    activation, spread = teacher.activation(images), teacher.class_activation(images, classes)
    side = 4 if hasattr(model, "num_prefix_tokens") else 2
    assert activation.shape == spread.shape == (3, side, side)
    torch.testing.assert_close(spread.sum(dim=(1, 2)), torch.ones(3))
    features, scores = model.forward_features(images), []
    for row, column in ((0, 1), (1, 0)):
        cell, logits = head_of_cell(model, features, row, column)
        torch.testing.assert_close(activation[:, row, column], cell.mean(dim=1))
        scores.append(logits.softmax(1)[torch.arange(3), classes])
    torch.testing.assert_close(spread[:, 0, 1] / spread[:, 1, 0], scores[0] / scores[1])
    assert not torch.allclose(scores[0], scores[1])


@pytest.mark.parametrize("make", [CutMix, FMix, TokenMix, BlockWise, RandomPatches], ids=lambda make: make.__name__)
def test_the_target_is_what_is_seen_of_each_map(make):
    options = {} if make in (CutMix, FMix) else {"patch_size": 4}
    strategy = make(mode="elem", seed=1, **options)
    images, classes = torch.randn(6, 3, 16, 16), torch.arange(6)
    maps = torch.rand(6, 4, 4)
    teacher = KnownMaps(maps)
    mixed, target = strategy(images, classes)
    foreign = (mixed == images.flip(0)).all(1).float()
    density = teacher.maps.repeat_interleave(4, 1).repeat_interleave(4, 2) / 16
    own, partner = (density * (1 - foreign)).sum((1, 2)), (density.flip(0) * foreign).sum((1, 2))
    ours = teacher.target(strategy, images, target)
    torch.testing.assert_close(ours.ratio[:, 0], partner / (own + partner), rtol=0, atol=1e-6)
    assert torch.equal(ours.classes, target.classes)
    assert (ours.ratio - target.ratio).abs().max() > 1e-3


def test_maps_without_a_preference_give_the_mixing_ratio():
    images, classes = torch.randn(4, 3, 16, 16), torch.arange(4)
    for strategy in (CutMix(seed=2), MixUp(seed=2), FMix(seed=2)):
        target = strategy(images, classes)[1]
        ours = KnownMaps(torch.ones(4, 4, 4)).target(strategy, images, target)
        torch.testing.assert_close(ours.ratio, target.ratio, rtol=0, atol=1e-6)


def test_of_a_resized_partner_all_is_seen():
    images, classes = torch.randn(5, 3, 16, 16), torch.arange(5)
    strategy = ResizeMix(seed=3)
    target = strategy(images, classes)[1]
    teacher = KnownMaps(torch.rand(5, 4, 4))
    y0, x0, y1, x1 = target.boxes[0, 0].tolist()
    density = teacher.maps.repeat_interleave(4, 1).repeat_interleave(4, 2) / 16
    own = 1 - density[:, y0:y1, x0:x1].sum((1, 2))
    expected = 1 / (1 + own)
    expected[2] = 0  # the image in the middle is not mixed
    torch.testing.assert_close(teacher.target(strategy, images, target).ratio[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("cells", [(8, 4), (2, 4)])
@pytest.mark.parametrize(
    "make", [CutMix, MixUp, FMix, TokenMix, BlockWise, RandomPatches, PuzzleMix], ids=lambda make: make.__name__
)
def test_labels_of_tokens_are_mixed_as_pixels_that_show_them_would_be(make, cells, mode):
    options = {"patch_size": 4} if make in (TokenMix, BlockWise, RandomPatches) else {}
    if make is PuzzleMix:
        saliency = torch.rand(5, 16, 16) ** 4
        # Saliency alone decides: pixels don't (gamma), nor does the drawn ratio, which may be near 0 (eta).
        options = {"saliency": lambda images, classes: saliency, "gamma": 0.0, "eta": 0.0}
    first, second = (make(mode=mode, seed=5, **options) for _ in range(2))
    images, classes = torch.randn(5, 3, 16, 16), torch.arange(5)
    scores = torch.randn(5, *cells, 6).mul(3).softmax(dim=-1)
    target = first(images, classes)[1]
    labels = KnownScores(scores, 4).token_labels(first, images, target).token_labels
    shown = scores.permute(0, 3, 1, 2).repeat_interleave(16 // cells[0], 2).repeat_interleave(16 // cells[1], 3)
    expected = F.avg_pool2d(second(shown, classes)[0], 4)
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-6)
    assert (labels - F.avg_pool2d(shown, 4))[:2].abs().max() > 0.01


def test_labels_of_a_resized_partner_are_those_of_where_its_pixels_came_from():
    images, classes = torch.randn(4, 3, 16, 16), torch.arange(4)
    strategy = ResizeMix(mode="elem", seed=3)
    target = strategy(images, classes)[1]
    scores = torch.randn(4, 4, 2, 3).softmax(dim=-1)
    expected = torch.zeros(4, 3, 2, 2)
    for index, (y0, x0, y1, x1) in enumerate(target.boxes[:, 0].tolist()):
        for row in range(16):
            for column in range(16):
                if y0 <= row < y1 and x0 <= column < x1:
                    down, right = (row + 0.5 - y0) / (y1 - y0), (column + 0.5 - x0) / (x1 - x0)
                    label = scores[3 - index, int(down * 4), int(right * 2)]
                else:
                    label = scores[index, row // 4, column // 8]
                expected[index, :, row // 8, column // 8] += label / 64
    labels = KnownScores(scores, 8).token_labels(strategy, images, target).token_labels
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-6)


def test_activation_of_features_in_half_precision_is_averaged_in_float32():
    features = torch.rand(2, 3, 3, 50).bfloat16()
    teacher = Teacher(torch.nn.Identity())
    teacher._features = lambda images: features
    assert torch.equal(teacher.activation(torch.zeros(2, 3, 9, 9)), features.float().mean(dim=-1))


def test_labels_of_tokens_are_distributions_under_autocast():
    images, strategy = torch.randn(4, 3, 16, 16), CutMix(seed=2)
    target = strategy(images, torch.arange(4))[1]
    teacher = KnownScores(torch.randn(4, 3, 3, 9).softmax(dim=-1), 4)
    plain = teacher.token_labels(strategy, images, target).token_labels
    with torch.autocast("cpu", torch.bfloat16):
        labels = teacher.token_labels(strategy, images, target).token_labels
    assert torch.equal(labels, plain)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4, 4, 4), rtol=0, atol=1e-6)


def test_patches_that_do_not_fill_the_image_are_refused():
    images, strategy = torch.randn(2, 3, 16, 16), CutMix()
    target = strategy(images, torch.arange(2))[1]
    with pytest.raises(ValueError, match="patch_size: expected a divisor of the sides"):
        KnownScores(torch.full((2, 2, 2, 4), 0.25), 5).token_labels(strategy, images, target)
    with pytest.raises(ValueError, match="patch_size: expected at least 1, got 0"):
        Teacher(timm.create_model("test_resnet"), patch_size=0)


def test_values_of_classes_are_not_waited_for_on_an_accelerator():
    scores, classes = torch.full((3, 2, 2, 5), 0.2, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    assert KnownScores(scores, None).class_activation(None, classes).shape == (3, 2, 2)


def test_models_and_classes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="classes: expected ids below the teacher's 5, got 5"):
        Teacher(timm.create_model("test_resnet", num_classes=5)).class_activation(
            torch.randn(1, 3, 32, 32), torch.tensor([5])
        )
    for name in ("mixer_s32_224", "xcit_nano_12_p16_224", "pvt_tiny"):
        model = timm.create_model(name, img_size=64)
        with pytest.raises(ValueError, match=rf"model: expected features of shape .* of {type(model).__name__}"):
            Teacher(model).activation(torch.randn(1, 3, 64, 64))


def test_a_class_that_the_teacher_sees_nowhere_is_spread_evenly():
    scores = torch.zeros(2, 3, 4, 5)
    scores[..., 1] = 1
    maps = KnownScores(scores, 16).class_activation(torch.zeros(2, 3, 48, 64), torch.tensor([0, 1]))
    torch.testing.assert_close(maps, torch.full((2, 3, 4), 1 / 12))
