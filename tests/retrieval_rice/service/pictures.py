"""What is sent to the service."""

from tests.retrieval_rice.conftest import draw, png


def frame_files(number: int) -> list[tuple]:
    """Two frames that show the picture of a number, for httpx."""
    return [("frames", (f"{angle}.png", png(draw(number).rotate(angle)))) for angle in (0, 5)]


__all__ = ["draw", "frame_files", "png"]
