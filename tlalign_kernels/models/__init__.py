"""How labels pass through the blocks of each model family; importing a family registers its followers."""

from tlalign_kernels.models import pvt_v2, swin, twins, vit

__all__ = ["pvt_v2", "swin", "twins", "vit"]
