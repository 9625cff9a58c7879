"""The mini LPR4M: a small livestreaming product recognition set, rendered on the spot in LPR4M's own raw layout."""

from .writer import RENDERER_VERSION, render_mini_lpr4m

__all__ = ["RENDERER_VERSION", "render_mini_lpr4m"]
