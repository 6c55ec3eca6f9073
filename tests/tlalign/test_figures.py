"""Charts: each line, bar and map is of what its legend says."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from training import record

from tlalign import curves
from tlalign.analysis import figures
from tlalign.analysis.presence import PresenceOfLayer
from tlalign.analysis.ratios import MixingRatios, TokenPaths
from tlalign.analysis.rollout import Rollout
from tlalign.pictures import _name_layers, draw_token_labels
from tlalign_kernels import MixedTarget, patch_model


@pytest.fixture
def drawn(monkeypatch):
    """Calls what draws a chart, and returns its axes."""

    def draw(function, *arguments):
        found = []
        module = figures if function.__module__ == figures.__name__ else curves
        monkeypatch.setattr(module, "_save", lambda figure, path: found.append(figure))
        function(*arguments, None)
        return found[0].axes

    return draw


def first_values(axis):
    return {line.get_label(): float(line.get_ydata()[0]) for line in axis.lines}


def test_lines_of_charts_are_of_the_method_that_their_legend_names(drawn):
    of_images = [torch.full((2,), value) for value in (0.1, 0.2, 0.9)]
    by_layer = [torch.full((2, 3), value) for value in (0.3, 0.4, 0.5, 0.6)]
    ratios = MixingRatios(*of_images, *by_layer)
    (axis,) = drawn(figures.draw_ratio_by_layer, ratios)
    expected = {"CutMix": 0.1, "TransMix": 0.2, "TL-Align": 0.3, "by similarity": 0.4}
    assert first_values(axis) == pytest.approx(expected)
    (axis,) = drawn(figures.draw_image_error, ratios)
    assert first_values(axis) == pytest.approx({"CutMix": 0.3, "TransMix": 0.2, "TL-Align": 0.1})
    (axis,) = drawn(figures.draw_patch_error, ratios)
    assert first_values(axis) == pytest.approx({"CutMix, TransMix (labels stay)": 0.6, "TL-Align": 0.5})


def test_tokens_and_the_box_are_drawn_where_they_are(drawn):
    places = torch.tensor([[0.25, 0.5], [0.5, 0.75], [0.75, 0.25]])
    values = [torch.full((3, 2), value) for value in (0.1, 0.2, 0.3)]
    picture, *axes = drawn(
        figures.draw_token_paths, np.zeros((20, 20, 3)), (1, 2, 5, 9), TokenPaths(tuple("abc"), places, *values)
    )
    (box,) = picture.lines
    assert (min(box.get_xdata()), max(box.get_xdata()), min(box.get_ydata()), max(box.get_ydata())) == (
        1.5,
        8.5,
        0.5,
        4.5,
    )
    assert [text.xy for text in picture.texts] == [(10, 5), (15, 10), (5, 15)]
    for axis in axes:
        assert first_values(axis) == pytest.approx({"TL-Align": 0.1, "as before": 0.2, "by similarity": 0.3})


def test_a_rollout_is_drawn_of_the_patches_without_the_class_token(drawn):
    head = torch.tensor([[0.6, 0.1, 0.2, 0.05, 0.05]])
    axes = drawn(figures.draw_rollout, np.zeros((1, 4, 4, 3)), Rollout(None, head, (2, 2)), "class token")
    np.testing.assert_allclose(axes[1].images[0].get_array(), [[0.4, 0.8], [0.2, 0.2]], rtol=1e-6)


def test_boxes_of_presence_are_the_quantiles_that_the_caption_names(drawn):
    layer = PresenceOfLayer()
    layer.add(torch.linspace(0.5, 1.5, 1001)[None], has_class_token=True)
    (axis,) = drawn(figures.draw_presence, [layer], torch.ones(3, 3))
    box = axis.patches[0].get_path().vertices[:, 1]
    assert (box.min(), box.max()) == pytest.approx((0.75, 1.25), rel=0.01)
    (diamond,) = [line for line in axis.lines if line.get_marker() == "D"]
    assert diamond.get_xydata().tolist() == [[1, 0.5]]
    ends = sorted(float(y) for line in axis.lines[:2] for y in line.get_ydata())
    assert ends == pytest.approx([0.55, 0.75, 1.25, 1.45], rel=0.01)


@pytest.mark.parametrize("highest", [1.05, 1.9, 4.0, 30.0])
@pytest.mark.parametrize("lowest", [0.0, 0.03, 0.6, 0.97])
def test_an_axis_of_presence_has_ticks(drawn, lowest, highest):
    layer = PresenceOfLayer()
    unseen = torch.zeros(30)  # which no logarithm shows
    layer.add(torch.cat((unseen, torch.linspace(lowest, highest, 101)))[None], has_class_token=False)
    (axis,) = drawn(figures.draw_presence, [layer], torch.ones(3, 3))
    least, greatest = axis.get_ylim()
    assert 0 < least < 1 < greatest
    assert sum(least <= tick <= greatest for tick in axis.yaxis.get_majorticklocs()) > 1


def test_the_log_and_the_checkpoints_are_told_apart_over_training(drawn):
    (axis,) = drawn(figures.draw_training, [(1, 0.1), (2, 0.2)], [(0, 0.3), (2, 0.4)])
    log, checkpoints = axis.lines
    assert log.get_label().startswith("log") and log.get_ydata().tolist() == [0.1, 0.2]
    assert checkpoints.get_label().startswith("checkpoints") and checkpoints.get_xydata().tolist() == [
        [0, 0.3],
        [2, 0.4],
    ]


def test_bars_of_random_weights_are_hatched(drawn):
    rows = [("a", "last.pth.tar", 0.1), ("a", "random_patches.pth", 0.1), ("a", "random weights", 0.2)]
    (axis,) = drawn(figures.draw_rmse_by_model, rows)
    assert [bool(bar.get_hatch()) for bar in axis.patches] == [False, False, True]
    assert [bar.get_width() for bar in axis.patches] == [0.1, 0.1, 0.2]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        f"{name}\n({weights})" for name, weights, _ in rows
    ]


def test_curves_are_of_the_columns_that_their_labels_name(drawn):
    numbers = {"loss": 1.0, "eval_loss": 2.0, "top1": 3.0, "top1_ema": 4.0, "lr": 5.0, "ratio_change": 6.0}
    times = {"data_seconds": 0.001, "forward_seconds": 0.002, "backward_seconds": 0.004}
    axes = drawn(curves.draw_curves, [record(1, **numbers, **times), record(2, **numbers, **times)])
    shown = [first_values(axis) for axis in axes[:2]]
    assert shown == [{"training": 1, "held-out": 2}, {"model": 3, "average (EMA)": 4}]
    assert [line.get_ydata()[0] for axis in axes[2:4] for line in axis.lines] == [5, 6]
    assert axes[4].patches[0].get_data().edges.tolist() == [0.5, 1.5, 2.5]
    stairs = {each.get_label(): (each.get_data().baseline[0], each.get_data().values[0]) for each in axes[4].patches}
    assert {k: tuple(map(float, v)) for k, v in stairs.items()} == {
        "data": (0, 1),
        "forward": (1, 3),
        "backward": (3, 7),
    }


def test_curves_of_a_run_have_no_panel_and_no_line_of_what_it_does_not_know(drawn):
    axes = drawn(curves.draw_curves, [record(1, ratio_change=None, top1_ema=None)])
    assert [len(axis.lines) for axis in axes] == [2, 1, 1, 0]  # the last is of times


def test_a_comparison_shows_the_metric_and_both_losses(drawn):
    records = [record(epoch, top1=1.0, top1_ema=2.0, loss=3.0, eval_loss=4.0) for epoch in (1, 2)]
    top1, loss, eval_loss = drawn(curves.draw_comparison, {"$a": records, "_b": records[:1]})
    for axis, value in ((top1, 2), (loss, 3), (eval_loss, 4)):
        assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, value], [2, value]], [[1, value]]]
        assert axis.get_xlim()[1] > 2
    assert [text.get_text() for text in top1.figure.legends[0].texts] == [r"\$a", "_b"]


def test_methods_are_drawn_with_mean_and_standard_deviation(drawn):
    accuracy, time = drawn(curves.draw_methods, {"b": [97.0, 99.0], "a": [98.0]}, {"b": None, "a": 1.25})
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["b", "a"] and accuracy.yaxis_inverted()
    bars, of_one_seed = accuracy.containers
    assert not of_one_seed.has_xerr
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in time.patches] == [(1, 1.25)]
    assert [text.get_text() for text in time.texts] == ["1.25"]
    ((start, end),) = [segment[:, 0] for segment in bars.lines[2][0].get_segments()]
    assert (start, end) == pytest.approx((98 - math.sqrt(2), 98 + math.sqrt(2)))


def test_token_labels_are_drawn_of_the_images_the_box_and_the_model(monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: saved.append(figure))
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    images = torch.rand(4, 3, 16, 16)
    draw_token_labels(
        model, (images - mean) / std, torch.arange(4), None, mean.flatten().tolist(), std.flatten().tolist(), columns=2
    )
    axes = np.array(saved[0].axes[:-1]).reshape(-1, 2)
    for column in range(2):
        own, partner, mixed, before, after = (axis.images[0].get_array() for axis in axes[:, column])
        np.testing.assert_allclose(own, images[column].permute(1, 2, 0), atol=1e-6)
        np.testing.assert_allclose(partner, images[3 - column].permute(1, 2, 0), atol=1e-6)
        (box,) = axes[2, column].patches
        y0, x0 = round(box.get_y() + 0.5), round(box.get_x() + 0.5)
        y1, x1 = round(y0 + box.get_height()), round(x0 + box.get_width())
        covered = torch.zeros(16, 16)
        covered[y0:y1, x0:x1] = 1
        assert 0.2 < covered.mean() < 0.6 and (y0, y1) != (x0, x1)
        pasted = torch.where(covered.bool(), images[3 - column], images[column])
        np.testing.assert_allclose(mixed, pasted.permute(1, 2, 0), atol=1e-6)
        np.testing.assert_allclose(before, covered.view(4, 4, 4, 4).mean(dim=(1, 3)), atol=1e-6)
        target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[y0, x0, y1, x1]]]), (16, 16))
        patched = patch_model(copy.deepcopy(model)).eval()
        _, aligned = patched((pasted[None] - mean) / std, target=target, collect_layers=True)
        np.testing.assert_allclose(after, aligned.layer_shares[-1][0, 1:, 0].view(4, 4), atol=1e-5)
        label = f"mixing ratio {covered.mean():.2f}\n$\\rightarrow$ aligned {aligned.ratio.item():.2f}"
        assert [axis.get_xlabel() for axis in axes[3:, column]] == [f"{covered.mean():.2f}", label]
        # Dots are where it is the partner's for the most part, which is blue.
        (dots,) = axes[3, column].lines
        np.testing.assert_array_equal(dots.get_xydata()[:, ::-1], np.argwhere(before > 0.5))
        red, _, blue, _ = axes[3, column].images[0].cmap(1.0)
        assert blue > red
    assert [axis.get_ylabel() for axis in axes[:, 0]][-2:] == ["token labels\nbefore", "token labels\nafter alignment"]
    # As a run aligns, and of each pair one image.
    maps = draw_token_labels(model, images, torch.arange(4), None, [0.5] * 3, [0.5] * 3, alignment={"layers": []})
    assert len(maps[0]) == 2
    np.testing.assert_array_equal(maps[2], maps[0])


def test_rows_of_token_labels_name_the_blocks_or_stages_before_them():
    shares = [torch.zeros(1, side, side, 1) for side in (4, 4, 2)]
    assert _name_layers(shares, (-2, 0)) == {0: "after block 1", 1: "after block 2", 2: "after block 3\n(the last)"}
    assert list(_name_layers(shares, (1, 0))) == [0, 1, 2]
    assert _name_layers(shares, None) == {1: "after stage 1", 2: "after stage 2\n(the last)"}
