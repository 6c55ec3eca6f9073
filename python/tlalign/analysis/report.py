"""`tlalign analyze`: runs all analyses of a model over a data set, and writes pictures, tables and a page."""

from __future__ import annotations

import itertools
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from tlalign.analysis import figures
from tlalign.analysis.blocks import has_class_token, is_distilled, map_size, pooling_of, prefix_tokens
from tlalign.analysis.page import Picture, Section, Table, write_page
from tlalign.analysis.presence import QUANTILES, PresenceOfLayer, convolution_presence, quantiles, token_presence
from tlalign.analysis.ratios import (
    LayerRatios,
    MixedBatch,
    MixingRatios,
    RatioFollower,
    collect_ratios,
    target_rmse,
    token_paths,
)
from tlalign.analysis.rollout import attention_rollout
from tlalign.analysis.subject import (
    RANDOM,
    TABLE_1,
    Subject,
    create_subject,
    create_subject_of_table_1,
)
from tlalign.checkpoints import folder_classes_of, load_metadata
from tlalign.config import ALIGNED_TARGETS, AnalyzeConfig, UsageError, disk_errors_as, load_config_file
from tlalign.data import load_images
from tlalign.evaluation import autocast
from tlalign.networks import load_weights, set_weights
from tlalign.pictures import draw_token_labels
from tlalign.progress import OutputConsole
from tlalign.runs import LOG_FILE, config_beside, read_log, write_csv

# A picture of maps has so many images side by side, of the first batch or of some more.
_COLUMNS, _IMAGES_OF_MAPS = 4, 20


def write_report(config: AnalyzeConfig, checkpoint: Path | None) -> Path:
    """Analyses a model, and writes a folder of PNG and CSV files and a page with all of them.

    Args:
        config: What the model is, which images it is analysed on, and where to write.
        checkpoint: Its weights; None for random ones.

    Returns:
        The page.

    Raises:
        UsageError: If something asked for can't be done.
    """
    console = OutputConsole()
    classes = None if checkpoint is None else folder_classes_of(checkpoint)
    subject = create_subject(config, load_images(config, classes), checkpoint)
    folder = Path(
        config.output or ("analysis" if checkpoint is None else config_beside(checkpoint).parent / "analysis")
    )
    with disk_errors_as(f"output: cannot write to the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        # Before the work is done: whether a file can be written.
        tempfile.TemporaryFile(dir=folder).close()
    logged = [] if checkpoint is None else _logged_rmse(checkpoint)
    first, ratios, presence = _follow(subject, console)
    page, title = folder / "index.html", f"What alignment does in {config.model}"
    with disk_errors_as(f"output: cannot write to the folder {folder}"):
        sections = [
            _label_maps(subject, first, folder),
            _mixing_ratio(subject, first, ratios, folder),
            _target_rmse(subject, ratios, checkpoint, logged, folder, console),
            _presence(subject, first, presence, folder),
            _rollout(subject, first, folder),
        ]
        write_page(page, title, _summary(subject, checkpoint, ratios, presence), sections)
    return page


class FirstBatch(NamedTuple):
    """What is drawn of single images is of these."""

    batch: MixedBatch
    ratios: LayerRatios


def _follow(subject: Subject, console: Console) -> tuple[FirstBatch, MixingRatios, list[PresenceOfLayer]]:
    """Sends all images through the model, batch by batch."""
    follower, presence, firsts = RatioFollower(subject.model, **subject.alignment), [], []

    def batches() -> Iterator[tuple[MixedBatch, LayerRatios]]:
        for batch in _shown_batches(console, "mixing ratio and presence", subject):
            with autocast(subject.device, subject.config.precision):
                ratios, of_tokens = follower(batch), token_presence(subject.model, batch.images)
            if not firsts:
                firsts.append(FirstBatch(batch, ratios))
                presence.extend(PresenceOfLayer() for _ in of_tokens)
            for layer, values, share in zip(presence, of_tokens, ratios.aligned, strict=True):
                layer.add(values, has_class_token(subject.model, share))
            yield batch, ratios

    ratios = collect_ratios(subject.model, batches())
    if not firsts:
        raise UsageError(f"data: expected at least two held-out images to mix, got fewer in {subject.config.data}")
    return firsts[0], ratios, presence


def _label_maps(subject: Subject, first: FirstBatch, folder: Path) -> Section:
    section = Section(
        "Label maps",
        [
            "Two images mixed by CutMix, and the label of each token: red is the image, blue with a dot the partner. "
            "Before the first block it is the part of the patch that each image covers; each block mixes labels as it "
            "mixes tokens. The number below a map is the partner's share in the label of the whole image: "
            f"that of the {_name_of_image(subject.model)}. (Figure 5 of the paper.)"
        ],
    )
    layers = _map_layers(subject.config, first.ratios.aligned)
    images, classes = _first_images(subject, _IMAGES_OF_MAPS)
    path, table = folder / "label_maps.png", folder / "label_maps.csv"
    try:
        maps = draw_token_labels(
            subject.model, images, classes, path, subject.image_config["mean"], subject.image_config["std"],
            subject.data.class_names, _COLUMNS, layers, subject.alignment,
        )  # fmt: skip
    except ValueError as error:
        section.text.append(f"Not drawn: {error}.")
        for stale in (path, table):
            stale.unlink(missing_ok=True)
        return section
    write_csv(
        table,
        ("image", "block", "row", "column", "share"),
        [
            (image, block, row, column, share)
            for block, of_block in maps.items()
            for (image, row, column), share in np.ndenumerate(of_block)
        ],
    )
    alt = (
        "Columns are mixed images. Rows: the image, its partner, the mixed image with the partner's box, and maps of "
        "token labels before the first block and after some, the last among them. Labels start as the box and blend."
    )
    section.pictures.append(Picture(path, alt, "Label of each token, layer by layer.", wide=True))
    return section


def _map_layers(config: AnalyzeConfig, shares: Sequence[Tensor]) -> Sequence[int] | None:
    """Blocks after which labels are drawn, beside the last; None for the last of each stage."""
    if config.map_layers is not None:
        return config.map_layers
    blocks = len(shares)
    has_stages = len({share.shape for share in shares}) > 1
    return None if has_stages else [math.ceil(blocks * quarter / 4) - 1 for quarter in (1, 2, 3)]


def _mixing_ratio(subject: Subject, first: FirstBatch, ratios: MixingRatios, folder: Path) -> Section:
    errors = figures.image_errors(ratios)
    patch_errors = {"kept": ratios.kept_error.nanmean(dim=0), "TL-Align": ratios.aligned_error.nanmean(dim=0)}
    of_methods = _columns("", figures.image_ratios(ratios))
    of_images, of_patches = _columns("error_", errors), _columns("patch_error_", patch_errors)
    columns = of_methods | of_images | of_patches
    head = ("block", *columns)
    rows = [(block, *values) for block, values in enumerate(zip(*columns.values(), strict=True), start=1)]
    write_csv(folder / "mixing_ratio.csv", head, rows)
    by_layer, by_image, by_patch = (
        folder / f"{name}.png" for name in ("ratio_by_layer", "ratio_error", "ratio_error_patches")
    )
    figures.draw_ratio_by_layer(ratios, by_layer)
    figures.draw_image_error(ratios, by_image)
    figures.draw_patch_error(ratios, by_patch)
    last = ", ".join(f"{name} {values[-1]:.3f}" for name, values in errors.items())
    without = "" if ratios.transmix is not None else " TransMix needs a class token in all blocks; here is none."
    return Section(
        "Mixing ratio by layer",
        [
            "How much of a mixed image is its partner's after each block. CutMix says: as many pixels as it covers, in "
            "all blocks. TransMix weights the patches by the class token's attention in the last block. TL-Align "
            f"follows the labels through all of them.{without} (Figure 4 of the paper.)",
            "The reference needs no label: with a the angle between a token of the mixed image and the same token of "
            "the image before it was mixed, and b that to the token of the partner, it is a / (a + b). Where both "
            "images have the same token it is not defined and left out, and where theirs are alike it is drawn to 1/2: "
            "distances tell methods apart, but not how well any of them does.",
            f"Mean distance from the reference after the last block: {last}.",
        ],
        [
            Picture(
                by_layer,
                _alt("Mixing ratio by block", of_methods),
                f"Mean of {len(ratios.cutmix)} mixed images ({_name_of_image(subject.model)}).",
            ),
            Picture(
                by_image,
                _alt("Distance of an image's ratio from the reference by block", of_images),
                "How far each method is from the reference, mean over images.",
            ),
            Picture(
                by_patch,
                _alt("Distance of a patch's ratio from the reference by block", of_patches),
                "The same for single patches, mean over patches and images.",
            ),
            _token_ratios(subject, first, folder),
        ],
        [Table("mixing_ratio.csv: means over images", head, rows)],
    )


def _token_ratios(subject: Subject, first: FirstBatch, folder: Path) -> Picture:
    """Draws the ratios of single tokens, and writes their numbers."""
    index, paths = token_paths(subject.model, *first)
    by_token = torch.stack((paths.kept, paths.aligned, paths.reference), dim=2).tolist()
    write_csv(
        folder / "token_ratios.csv",
        ("token", "y", "x", "block", "before", "tl_align", "by_similarity"),
        [
            (name, *place, block, *values)
            for name, place, layers in zip(paths.names, paths.places.tolist(), by_token, strict=True)
            for block, values in enumerate(layers, start=1)
        ],
    )
    path, batch = folder / "ratio_tokens.png", first.batch
    box = batch.target.boxes[index, 0].tolist()
    figures.draw_token_paths(subject.pixels(batch.mixed[index : index + 1])[0], box, paths, path)
    return Picture(
        path,
        f"A mixed image with three numbered tokens, and the ratio of each by block: {', '.join(paths.names)}.",
        "Three tokens of one image; where tokens are merged, the one that each became.",
    )


def _target_rmse(
    subject: Subject,
    ratios: MixingRatios,
    checkpoint: Path | None,
    logged: list[tuple[float, float]],
    folder: Path,
    console: Console,
) -> Section:
    config = subject.config
    rows = [(config.model, subject.weights, ratios.rmse)]
    if checkpoint is not None:
        untrained = _rmse(create_subject(config, subject.data, None), RANDOM, console)
        rows.append((config.model, RANDOM, untrained))
    compares = config.table1 or config.table1_weights is not None
    if compares:
        for name in TABLE_1:
            model = create_subject_of_table_1(name, config, subject.data)
            rows.append((name, model.weights, _rmse(model, f"{name}, {model.weights}", console)))
    write_csv(folder / "rmse.csv", ("model", "weights", "rmse"), rows)
    models = folder / "rmse_by_model.png"
    figures.draw_rmse_by_model(rows, models)
    section = Section(
        "How far targets move",
        [
            "Root mean square of the difference between the aligned mixing ratio and the original one, over the mixed "
            "images. 0 means that alignment changes nothing, as with attention that is uniform. Bars of models "
            "that were not trained are hatched. (Figure 3 of the paper.)"
        ],
        [Picture(models, "; ".join(f"{name}, {weights}: {value:.4f}" for name, weights, value in rows), "By model.")],
        [Table("rmse.csv: by model", ("model", "weights", "RMSE"), rows)],
    )
    if not compares:
        section.text.append(
            "--table1 true adds the eight models of the paper's Table 1, --table1_weights their weights."
        )
    table, training = folder / "training.csv", folder / "rmse_training.png"
    if checkpoint is None or _epoch_of(checkpoint) is None:
        for stale in (table, training):
            stale.unlink(missing_ok=True)
    else:
        measured = _over_training(subject, ratios, checkpoint, untrained, console)
        write_csv(
            table,
            ("epoch", "what", "value"),
            [(epoch, "log: training images", value) for epoch, value in logged]
            + [(epoch, f"{name}: rmse", value) for epoch, name, value in measured],
        )
        figures.draw_training(logged, [(epoch, value) for epoch, _, value in measured], training)
        alt = "; ".join(f"epoch {epoch:g}, {name}: {value:.4f}" for epoch, name, value in measured)
        caption = "RMSE over training: of checkpoints on held-out images"
        caption += ", of the log on those of each epoch." if logged else "; no log with it lies beside them."
        section.pictures.append(Picture(training, f"{caption} {alt}", caption))
        section.tables.append(
            Table("training.csv: checkpoints", ("checkpoint", "epoch", "RMSE"), [(n, e, v) for e, n, v in measured])
        )
    return section


def _over_training(
    subject: Subject, ratios: MixingRatios, checkpoint: Path, untrained: float, console: Console
) -> list[tuple[float, str, float]]:
    """Epoch, name and RMSE of random weights, a checkpoint, and the others of its run."""
    measured = {0.0: (RANDOM, untrained), _epoch_of(checkpoint): (checkpoint.name, ratios.rmse)}
    of_run = config_beside(checkpoint)
    if of_run.is_file():
        other = create_subject(subject.config, subject.data, None)
        for path in sorted(of_run.parent.glob("*.pth.tar")):
            epoch = _epoch_of(path)
            if epoch is None or epoch in measured:
                continue
            try:
                set_weights("checkpoint", path, load_weights("checkpoint", path), other.model, other.config.model)
            except UsageError as error:  # it is no checkpoint of the run
                console.print(f"left out: {error}", highlight=False, markup=False)
            else:
                measured[epoch] = (path.name, _rmse(other, path.name, console))
    return [(epoch, *measured[epoch]) for epoch in sorted(measured)]


def _logged_rmse(checkpoint: Path) -> list[tuple[float, float]]:
    """RMSE by epoch in the log of a checkpoint's run, if that aligned."""
    of_run = config_beside(checkpoint)
    log = of_run.parent / LOG_FILE
    # What other targets changed is not what is measured here.
    has_aligned = of_run.is_file() and load_config_file(of_run).get("target", "tl-align") in ALIGNED_TARGETS
    if not has_aligned or not log.is_file():
        return []
    try:
        records = read_log(log)
    except ValueError as error:
        raise UsageError(f"checkpoint: cannot read the log beside it: {error}") from error
    return [(record.epoch, record.ratio_rmse) for record in records if record.ratio_rmse is not None]


def _rmse(subject: Subject, what: str, console: Console) -> float:
    with autocast(subject.device, subject.config.precision):
        batches = _shown_batches(console, f"targets of {what}", subject)
        return target_rmse(subject.model, batches, **subject.alignment)


def _epoch_of(checkpoint: Path) -> float | None:
    """Epochs that a checkpoint was trained, of a run of tlalign to the step; None if it says nothing."""
    content = load_metadata(checkpoint)
    if "steps_per_epoch" in content:
        return content["step"] / content["steps_per_epoch"]
    epoch = content.get("epoch")
    return epoch + 1.0 if isinstance(epoch, (int, float)) else None  # timm's own count from 0


def _presence(subject: Subject, first: FirstBatch, presence: list[PresenceOfLayer], folder: Path) -> Section:
    grid = map_size(subject.model, first.ratios.aligned[0], tuple(first.batch.images.shape[-2:]))
    convolution = convolution_presence(grid, torch.full((3, 3), 1 / 9))
    spread = (convolution - 1).square().mean().sqrt().item()
    head = ("block", "least", *(f"{part:.0%}" for part in QUANTILES), "greatest", "class token", "rms of p - 1")
    rows = [
        (index, of.least, *map(of.quantile, QUANTILES), of.greatest, of.class_token, of.distance)
        for index, of in enumerate(presence, start=1)
    ]
    least, greatest = (value.item() for value in convolution.aminmax())
    rows.append(("3 x 3 convolution", least, *quantiles(convolution), greatest, None, spread))
    write_csv(folder / "presence.csv", head, rows)
    path = folder / "presence.png"
    figures.draw_presence(presence, convolution, path)
    distances = ", ".join(f"{of.distance:.2f}" for of in presence)
    return Section(
        "Token presence",
        [
            "p of a token is what all outputs of a layer take from it: the sum of its column of the attention matrix, "
            "averaged over heads. Rows sum to 1, so that its mean is 1; but a token with p above 1 gains weight in the "
            "layer and one below fades. That is why labels have to follow. (Equation 2 of the paper, with the "
            "indices as the text before it means them.)",
            "Beside it a depth-wise convolution, a mean over 3 x 3 tokens with zeros around the map: p is 1 for all "
            "tokens but those at the border, whatever the image. Other kernels have their sum in the place of 1.",
        ],
        [
            Picture(
                path,
                f"Boxes of token presence by block. Root mean square of p - 1 by block: {distances}; of the "
                f"convolution {spread:.2f}.",
                "Box: the middle half of the tokens; whiskers: 5 to 95 %; diamonds: the class token. Quantiles are "
                "good to half a per cent; tokens that nothing attends to lie below the axis.",
            )
        ],
        [Table("presence.csv: presence of tokens in unmixed images", head, rows)],
    )


def _rollout(subject: Subject, first: FirstBatch, folder: Path) -> Section:
    images = first.batch.images[:_COLUMNS]
    with autocast(subject.device, subject.config.precision):
        rollout = attention_rollout(subject.model, images)
    path, (rows, columns) = folder / "rollout.png", rollout.grid
    head = "attention pool" if pooling_of(subject.model) == "map" else _name_of_image(subject.model)
    figures.draw_rollout(subject.pixels(images), rollout, head, path)
    weights = rollout.head[:, -rows * columns :].cpu()
    write_csv(
        folder / "rollout.csv",
        ("image", "row", "column", "weight"),
        [
            (image, row, column, weights[image, row * columns + column].item())
            for image, row, column in itertools.product(range(len(images)), range(rows), range(columns))
        ],
    )
    own = " What is left to 1 it keeps of itself." if weights.sum(dim=1).min() < 1 - 1e-3 else ""
    return Section(
        "Attention rollout",
        [
            "How much of each patch arrives at what the head sees, through all blocks: the product of (A + I) / 2 over "
            "the blocks, A averaged over heads. It comes out of the same fused operator as the labels, by giving each "
            f"token a label of its own; no attention matrix is formed.{own} (tlalign.analysis.attention_rollout)"
        ],
        [
            Picture(
                path,
                f"Images, and maps of what the {head} sees of each of {rows} x {columns} patches; brighter is more.",
                f"1 is one part in {rows * columns}: the weight of a patch if all were alike and nothing else had any.",
                wide=True,
            )
        ],
    )


def _summary(
    subject: Subject, checkpoint: Path | None, ratios: MixingRatios, presence: list[PresenceOfLayer]
) -> list[str]:
    config = subject.config
    weights = f"the weights of {checkpoint}" if checkpoint is not None else "random weights: nothing here was trained"
    worst = max(range(len(presence)), key=lambda index: presence[index].distance)
    return [
        f"{config.model} with {weights}, on {len(ratios.cutmix)} held-out images of {config.data} mixed by CutMix.",
        f"Alignment moves the mixing ratio by {(ratios.target - ratios.cutmix).abs().mean():.4f} on average (root mean "
        f"square {ratios.rmse:.4f}). Tokens differ most in presence in block {worst + 1} (root mean square of p - 1: "
        f"{presence[worst].distance:.2f}).",
        *_deviations(config),
        "TL-Align: Xiao et al., Token-Label Alignment for Vision Transformers, ICCV 2023, arXiv 2210.06455.",
    ]


def _deviations(config: AnalyzeConfig) -> Iterator[str]:
    """Says in what labels are aligned otherwise than in the paper."""
    if config.layers is not None:
        blocks = ", ".join(map(str, config.layers)) or "none"
        yield f"Of its blocks, counted from 0 and negative from the end, these align labels: {blocks}."
    if not config.residual:
        yield "Labels are not averaged over residual connections."


def _first_images(subject: Subject, count: int) -> tuple[Tensor, Tensor]:
    """So many images and class ids, or all of the sample; batches of a stream may be smaller than others."""
    images, classes = [], []
    for batch in subject.batches():
        images.append(batch[0])
        classes.append(batch[1])
        if sum(map(len, classes)) >= count:
            break
    return torch.cat(images)[:count], torch.cat(classes)[:count]


def _name_of_image(model: nn.Module) -> str:
    """The tokens whose label `image_value` takes for that of the image."""
    if pooling_of(model) == "token" and prefix_tokens(model):
        return "mean of class and distillation token" if is_distilled(model) else "class token"
    if pooling_of(model) == "map":
        return "mean of the tokens, which the head weights by attention"
    return "mean of the tokens"


def _columns(prefix: str, lines: dict[str, Tensor]) -> dict[str, list[float]]:
    """The lines of a chart, (L,) each, by the names that they have as columns of a table."""
    return {prefix + re.sub(r"\W", "_", name.lower()): values.tolist() for name, values in lines.items()}


def _alt(what: str, lines: dict[str, list[float]]) -> str:
    """Describes the lines of a chart by their ends."""
    ends = [f"{name} from {values[0]:.3f} to {values[-1]:.3f}" for name, values in lines.items()]
    return f"{what}: {', '.join(ends)}."


def _shown_batches(console: Console, what: str, subject: Subject) -> Iterator[MixedBatch]:
    """Mixed batches, while it is shown how far they are: by a bar on a terminal, else a line at the end."""
    start, total = time.monotonic(), math.ceil(subject.config.images / subject.config.batch_size)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(subject.mixed(), total=total, description=what)
    if not console.is_terminal:
        console.print(f"{what}: {time.monotonic() - start:.1f} s", highlight=False, soft_wrap=True)
