"""What a trained network finds in images: activation maps to mix by, and targets by what of them is seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlalign.mixing import MixingStrategy
from tlalign_kernels import MixedTarget


class Teacher:
    """A trained timm model that says where in an image its class is; no weights are shipped.

    No module, so that neither training nor checkpoints of the model that learns from it have a part in it.

    Args:
        model: A trained timm model, which is set to evaluation and frozen. Its features must form a map: a
            convolutional network, a vision transformer with its tokens on a grid, or a hierarchical one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def activation(self, images: Tensor) -> Tensor:
        """Mean over channels of the last feature map, as `AttentiveCutMix` takes it.

        Args:
            images: (B, C, Hi, Wi).

        Returns:
            (B, h, w) float32.
        """
        return self._features(images).float().mean(dim=-1)

    @torch.no_grad()
    def class_activation(self, images: Tensor, classes: Tensor) -> Tensor:
        """How the probability of an image's class is spread over its map: the head applied to each cell alone.

        Args:
            images: (B, C, Hi, Wi).
            classes: int64 (B,).

        Returns:
            (B, h, w) float32, each map of sum 1.
        """
        features = self._features(images)
        batch, rows, columns, channels = features.shape
        cells = features.reshape(-1, channels)
        # The head pools what it is given: of one cell alone, in the model's own layout, every pooling gives that cell.
        if self._has_tokens:
            cells = cells[:, None].expand(-1, self.model.num_prefix_tokens + 1, -1)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            cells = cells[:, None, None]
        else:
            cells = cells[:, :, None, None]
        scores = self.model.forward_head(cells).float().softmax(dim=1).view(batch, rows * columns, -1)
        if int(classes.max()) >= scores.shape[2]:
            raise ValueError(f"classes: expected ids below the teacher's {scores.shape[2]}, got {int(classes.max())}")
        chosen = scores.gather(2, classes[:, None, None].expand(-1, rows * columns, 1)).view(batch, rows, columns)
        return chosen / chosen.sum(dim=(1, 2), keepdim=True)

    def target(self, mixing: MixingStrategy, images: Tensor, target: MixedTarget) -> MixedTarget:
        """The target of TokenMix (arXiv 2207.08409): how much of each image's class activation is seen in the mix.

        With the sums a and b of what is seen of the map of the image and of its partner, the ratio is b / (a + b). (The
        authors' code takes a and b as they are, which do not sum to 1.)

        Args:
            mixing: The strategy that mixed the images.
            images: (B, C, Hi, Wi) before they were mixed.
            target: What `mixing` made of them.

        Returns:
            A target without a place in space.
        """
        maps = self.class_activation(images, target.classes[:, 0])
        own, partner = mixing.visible_parts(maps, target)
        return MixedTarget.from_ratio(target.classes, (partner / (own + partner))[:, None])

    @property
    def _has_tokens(self) -> bool:
        return hasattr(self.model, "num_prefix_tokens")

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """The last feature map, (B, h, w, channels)."""
        features = self.model.forward_features(images)
        if self._has_tokens:
            features = features[:, self.model.num_prefix_tokens :]
            return features.unflatten(1, self.model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))
        if features.dim() != 4:
            raise ValueError(
                f"model: expected features of shape (B, channels, h, w), got {tuple(features.shape)} of "
                f"{type(self.model).__name__}"
            )
        return features if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
