"""How labels pass through the blocks of each model family; importing a family registers its followers."""

from tlalign_kernels.models import beit, davit, eva, maxxvit, naflexvit, pit, pvt_v2, relpos, swin, twins, vit, xcit

__all__ = ["beit", "davit", "eva", "maxxvit", "naflexvit", "pit", "pvt_v2", "relpos", "swin", "twins", "vit", "xcit"]
