"""A shop's images, encoded once into a LanceDB table for search."""

from .answers import Answer, Hit
from .gallery import GalleryIndex

__all__ = ["Answer", "GalleryIndex", "Hit"]
