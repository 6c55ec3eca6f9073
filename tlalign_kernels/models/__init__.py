"""How labels pass through the blocks of each model family; importing a family registers its followers."""

from tlalign_kernels.models import swin, vit

__all__ = ["swin", "vit"]
