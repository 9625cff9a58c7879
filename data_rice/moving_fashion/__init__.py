"""MovingFashion: the builder for its published files, and the command that extracts its frames once."""

from .moving_fashion import MovingFashion, MovingFashionConfig

__all__ = ["MovingFashion", "MovingFashionConfig"]
