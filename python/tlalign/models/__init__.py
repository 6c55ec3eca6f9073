"""Models of the paper that timm lacks; importing a family registers it with timm, and its followers."""

from tlalign.models import pvt

__all__ = ["pvt"]
