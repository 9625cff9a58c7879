"""The mini LPR4M: a small rendered data set for livestreaming product recognition, in LPR4M's raw layout."""

from .writer import RENDERER_VERSION, render_mini_lpr4m

__all__ = ["RENDERER_VERSION", "render_mini_lpr4m"]
