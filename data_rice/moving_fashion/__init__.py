"""MovingFashion: the builder of its published files, and the command that extracts its frames once."""

from .moving_fashion import MovingFashion, MovingFashionConfig

__all__ = ["MovingFashion", "MovingFashionConfig"]
