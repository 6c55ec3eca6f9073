"""How kernels sum the gradients of a bias over images."""

from __future__ import annotations


def images_of_sum(batch: int, bias_images: int, tiles: int) -> int:
    """Images whose gradients of a bias one program adds up: so many that about 1024 programs are at work.

    It follows from the shape alone, so that the order of the sum, and with it the bits, are the same everywhere.

    Args:
        batch: Images.
        bias_images: Images of the bias: 1 or `batch`.
        tiles: Programs that the gradient of one image takes.
    """
    return 1 if bias_images == batch else -(-batch // max(1, min(batch, 1024 // tiles)))
