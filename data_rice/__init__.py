"""Data sets of clips and shop images, all of which become the one row described in docs/data.md."""

from .lpr4m import Lpr4m
from .shop_clips import ShopClips
from .views import gallery_scope, load_dataset_view

__all__ = ["Lpr4m", "ShopClips", "gallery_scope", "load_dataset_view"]
