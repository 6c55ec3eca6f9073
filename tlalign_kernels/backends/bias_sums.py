"""How kernels sum the gradients of a bias over images."""

from __future__ import annotations


def images_of_sum(batch: int, bias_images: int, tiles: int, programs: int = 1024) -> int:
    """Images whose gradients of a bias one program adds up: so many that about `programs` are at work.

    It follows from the shape alone, so that the order of the sum, and with it the bits, are the same everywhere.

    Args:
        batch: Images; windows count as such.
        bias_images: Images of the bias: 1 or `batch`.
        tiles: Programs that the gradient of one image takes.
        programs: How many are to be at work: more of small ones, of which a GPU holds many.
    """
    return 1 if bias_images == batch else -(-batch // max(1, min(batch, programs // tiles)))
