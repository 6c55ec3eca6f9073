"""What is analysed: a model with its weights, and held-out images that are always the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from timm.utils import random_seed
from torch import Tensor, nn

from tlalign.analysis.blocks import blocks_of, following
from tlalign.analysis.ratios import MixedBatch, mix_batches
from tlalign.config import AnalyzeConfig, UsageError
from tlalign.data import DataSets, create_eval_loader, resolve_image_config, sampled
from tlalign.evaluation import prepare_device
from tlalign.networks import check_image_size, create_model, load_weights, set_weights
from tlalign.pictures import pixels

# The models of the paper's Table 1.
TABLE_1 = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "pvt_tiny", "pvt_small",
    "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224",
)  # fmt: skip
_WEIGHT_FILES = (".pth", ".pth.tar", ".pt", ".safetensors", ".bin")
# What is said of weights that are not from a checkpoint.
RANDOM = "random weights"


class Subject:
    """A model that is analysed, and its images.

    Args:
        config: What the model is, and which images it is analysed on.
        data: The data sets.
        model: The model, on the device of the configuration.
        weights: What its weights are.
        alignment: How labels are aligned in it, as for `patch_model`.

    Attributes:
        image_config: Size and normalisation of the images.

    Raises:
        UsageError: If labels can't be followed through the model, or it has no such blocks or takes no such images.
    """

    def __init__(self, config: AnalyzeConfig, data: DataSets, model: nn.Module, weights: str, **alignment: Any) -> None:
        self.config = config
        self.data = data
        self.model = model.eval()
        self.weights = weights
        self.alignment = alignment
        self.device = next(model.parameters()).device
        self.image_config = resolve_image_config(config, model)
        try:
            blocks = len(blocks_of(following(model, **alignment)))
        except NotImplementedError as error:
            raise UsageError(f"model: {str(error).removeprefix('model: ')}") from error
        except ValueError as error:
            raise UsageError(str(error)) from error
        if any(not -blocks <= layer < blocks for layer in config.map_layers or ()):
            raise UsageError(f"map_layers: expected blocks from {-blocks} to {blocks - 1}, got {config.map_layers}")
        check_image_size(model, self.image_config["input_size"])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and class ids, always the same: from all over the held-out ones, of shards the first."""
        taken, count = 0, self.config.images
        data = sampled(self.data.held_out, count)
        config = dataclasses.replace(self.config, num_classes=None)  # images may have classes that are not the model's
        for images, classes in create_eval_loader(data, config, self.image_config, self.device):
            yield images[: count - taken], classes[: count - taken]
            taken += len(images)
            if taken >= count:
                return

    def mixed(self) -> Iterator[MixedBatch]:
        """The same images, mixed by CutMix, always in the same way."""
        return mix_batches(self.batches(), self.config.seed)

    def pixels(self, images: Tensor) -> np.ndarray:
        """Images before they were normalised for this model; see `tlalign.pictures.pixels`."""
        return pixels(images, self.image_config["mean"], self.image_config["std"])


def create_subject(config: AnalyzeConfig, data: DataSets, checkpoint: Path | None) -> Subject:
    """The model of a configuration.

    Args:
        config: What the model is, and which images it is analysed on.
        data: The data sets.
        checkpoint: Its weights, averaged ones if it holds any; None for random ones.

    Raises:
        UsageError: If the weights are not of this model, or labels can't be followed through it.
    """
    random_seed(config.seed)
    model = create_model(config, data.num_classes)
    if checkpoint is not None:
        set_weights("checkpoint", checkpoint, load_weights("checkpoint", checkpoint), model, config.model)
    weights, model = checkpoint.name if checkpoint else RANDOM, model.to(prepare_device(config))
    return Subject(config, data, model, weights, layers=config.layers, residual=config.residual)


def create_subject_of_table_1(name: str, config: AnalyzeConfig, data: DataSets) -> Subject:
    """A model of the paper's Table 1, with the weights that `table1_weights` has of it, else random ones.

    timm adapts the weights to the channels of the images.

    Raises:
        UsageError: If the weights are not of this model.
    """
    config = dataclasses.replace(config, model=name, model_kwargs={}, img_size=None, map_layers=None)
    random_seed(config.seed)
    file = _weight_file(config.table1_weights, name)
    # Of 1000 classes as the published weights, so that timm checks that all of them fit; no label depends on it.
    weights = None if file is None else load_weights("table1_weights", file)
    overrides = {} if file is None else {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
    model = create_model(config, 1000, **overrides)
    return Subject(config, data, model.to(prepare_device(config)), RANDOM if file is None else file.name)


def _weight_file(folder: str | None, name: str) -> Path | None:
    if folder is None:
        return None
    return next((path for end in _WEIGHT_FILES if (path := Path(folder) / f"{name}{end}").is_file()), None)
