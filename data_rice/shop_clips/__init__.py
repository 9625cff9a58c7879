"""shop_clips: the builder for your own shop, and the command that checks its folder."""

from .shop_clips import CLIP_FILES, GALLERY_FILE, ShopClips, ShopClipsConfig, carries_live_ids, read_gallery

__all__ = ["CLIP_FILES", "GALLERY_FILE", "ShopClips", "ShopClipsConfig", "carries_live_ids", "read_gallery"]
