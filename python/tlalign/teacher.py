"""What a trained network finds in images: activation maps to mix by, and targets by what is seen of what it finds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlalign.mixing import MixingStrategy
from tlalign.mixing.patches import patch_grid
from tlalign.mixing.strategy import check_integer
from tlalign_kernels import MixedTarget


class Teacher:
    """A trained timm model that says where in an image its class is; no weights are shipped.

    No module, so that neither training nor checkpoints of the model that learns from it have a part in it.

    Args:
        model: A trained timm model, which is set to evaluation and frozen. Its features must form a map: a
            convolutional network, a vision transformer with its tokens on a grid, or a hierarchical one; others raise
            a ValueError when they see images.
        patch_size: Side in pixels of the patches that `token_labels` labels: that of the tokens of the model that
            learns from them, or a divisor of it.
    """

    def __init__(self, model: nn.Module, patch_size: int = 16) -> None:
        self.model = model.eval().requires_grad_(False)
        self.patch_size = check_integer("patch_size", patch_size, least=1)

    def activation(self, images: Tensor) -> Tensor:
        """Mean over channels of the last feature map, as `AttentiveCutMix` takes it.

        Args:
            images: (B, channels, Hi, Wi).

        Returns:
            (B, h, w) float32.
        """
        return self._features(images).float().mean(dim=-1)

    @torch.no_grad()
    def class_scores(self, images: Tensor) -> Tensor:
        """Probabilities of the classes in each cell of the last feature map: the head applied to each cell alone.

        Args:
            images: (B, channels, Hi, Wi).

        Returns:
            (B, h, w, classes) float32, each cell of sum 1.
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
        return self.model.forward_head(cells).float().softmax(dim=1).view(batch, rows, columns, -1)

    def class_activation(self, images: Tensor, classes: Tensor) -> Tensor:
        """How the probability of an image's class is spread over its map.

        Args:
            images: (B, channels, Hi, Wi).
            classes: int64 (B,).

        Returns:
            (B, h, w) float32, each map of sum 1.

        Raises:
            ValueError: If the teacher knows fewer classes; on the CPU only, for others would be waited for.
        """
        scores = self.class_scores(images)
        if classes.device.type == "cpu" and int(classes.max()) >= scores.shape[3]:
            raise ValueError(f"classes: expected ids below the teacher's {scores.shape[3]}, got {int(classes.max())}")
        chosen = scores.take_along_dim(classes[:, None, None, None], dim=3)[..., 0]
        # A class may be so improbable that all of its probabilities are 0; then no cell shows more of it than others.
        chosen = chosen.clamp(min=torch.finfo(chosen.dtype).tiny)
        return chosen / chosen.sum(dim=(1, 2), keepdim=True)

    def target(self, mixing: MixingStrategy, images: Tensor, target: MixedTarget) -> MixedTarget:
        """The target of TokenMix (arXiv 2207.08409): how much of each image's class activation is seen in the mix.

        With the sums a and b of what is seen of the map of the image and of its partner, the ratio is b / (a + b). (The
        authors' code takes a and b as they are, which do not sum to 1.)

        Args:
            mixing: The strategy that mixed the images.
            images: (B, channels, Hi, Wi) before they were mixed.
            target: What `mixing` made of them.

        Returns:
            A target without a place in space.
        """
        maps = self.class_activation(images, target.classes[:, 0])
        own, partner = mixing.visible_parts(maps, target, tuple(images.shape[-2:]))
        return MixedTarget.from_ratio(target.classes, (partner / (own + partner))[:, None])

    def token_labels(self, mixing: MixingStrategy, images: Tensor, target: MixedTarget) -> MixedTarget:
        """Labels of all classes for each token (Token Labeling, arXiv 2104.10858), mixed as the pixels were.

        A patch has the mean, over its pixels, of the class probabilities in the cell of the teacher's map that each
        pixel came from. (The paper keeps the five most probable classes of maps made beforehand.)

        Args:
            mixing: The strategy that mixed the images.
            images: (B, channels, Hi, Wi) before they were mixed; `patch_size` divides their sides.
            target: What `mixing` made of them.

        Returns:
            A dense target.

        Raises:
            ValueError: If patches don't fill the images, or are fewer than two.
        """
        scores, image_size = self.class_scores(images), tuple(images.shape[-2:])
        patches = patch_grid(image_size, self.patch_size)
        own, partner = mixing.shown_pixels(tuple(scores.shape[1:3]), target, image_size, patches)
        scores = scores.flatten(1, 2)
        # In half precision the labels of a token would not sum to 1.
        with torch.autocast(images.device.type, enabled=False):
            labels = (own @ scores + partner @ scores.flip(0)) / self.patch_size**2
        return MixedTarget.from_dense(labels.mT.unflatten(2, patches))

    @property
    def _has_tokens(self) -> bool:
        return hasattr(self.model, "num_prefix_tokens")

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """The last feature map, (B, h, w, channels)."""
        features = self.model.forward_features(images)
        # NaFlexViT's name, and all others'.
        stem = getattr(self.model, "embeds", None) or getattr(self.model, "patch_embed", None)
        if self._has_tokens and hasattr(stem, "dynamic_feat_size"):
            features = features[:, self.model.num_prefix_tokens :]
            return features.unflatten(1, stem.dynamic_feat_size(tuple(images.shape[-2:])))
        if features.dim() != 4:
            raise ValueError(
                f"model: expected features of shape (B, channels, h, w), got {tuple(features.shape)} of "
                f"{type(self.model).__name__}"
            )
        return features if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
