"""Data sets of clips and shop images. Every builder yields the rows described in docs/data.md."""

from .lazy_rows import LazyRows
from .lpr4m import Lpr4m
from .moving_fashion import MovingFashion
from .shop_clips import ShopClips
from .streaming import StreamingView, open_dataset_view, stream_dataset_view
from .views import gallery_scope, load_dataset_view

__all__ = [
    "LazyRows",
    "Lpr4m",
    "MovingFashion",
    "ShopClips",
    "StreamingView",
    "gallery_scope",
    "load_dataset_view",
    "open_dataset_view",
    "stream_dataset_view",
]
