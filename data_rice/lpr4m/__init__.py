"""LPR4M: the builder for its published files, and the commands that fetch, prepare and verify it."""

from .lpr4m import Lpr4m, Lpr4mConfig

__all__ = ["Lpr4m", "Lpr4mConfig"]
