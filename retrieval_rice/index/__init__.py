"""A shop's images, encoded once into a LanceDB table and searched for ever."""

from .answers import Answer, Hit
from .gallery import GalleryIndex

__all__ = ["Answer", "GalleryIndex", "Hit"]
