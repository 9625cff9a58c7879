"""Paths of the pictures of LPR4M's clips and shops, in the LPR750K tree or in img2dataset's output."""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from processing_rice.media_rice import MediaError, image_header

from .. import folders
from .index import MediaIndex, index_path, shard_folders
from .layout import frame_order


def training_video_folders(root: str) -> list[str]:
    """Return the ``training_video*`` folders of the data folder, sorted by name."""
    found = glob.glob(os.path.join(glob.escape(root), "training_video*"))
    return sorted(folder for folder in found if os.path.isdir(folder))


def first_size(paths: Sequence[str]) -> tuple[int, int] | None:
    """Return (width, height) of the first path whose header can be read, or None."""
    for path in paths:
        try:
            return image_header(path)[1:]
        except MediaError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class ClipMedia:
    """The frames of one clip.

    Attributes:
        paths: one per frame id, even if the file does not exist.
        found: whether any folder or shard holds frames of the clip.
        original_size: (width, height) of the frames before img2dataset resized them, or None if it did not.
    """

    paths: list[str]
    found: bool
    original_size: tuple[int, int] | None = None

    def pixel_size(self) -> tuple[int, int] | None:
        """Return the (width, height) to which the clip's pixel boxes refer, or None if no frame can be read."""
        return self.original_size or (first_size(self.paths) if self.found else None)


class Lpr4mMedia:
    """Paths of LPR4M's pictures: img2dataset's file if there is one, else that of the LPR750K tree.

    The ``training_video_*`` folders are listed once. The shards of img2dataset are looked up in a `MediaIndex`.

    Args:
        root: the data folder.
        cache_dir: folder of the index.
        media_dirs: output folders of img2dataset; those below ``ROOT/img2dataset`` when None.
        check_links: refuse links that lead out of the data folder. Only the first frame of a training clip is checked,
            because a data set has hundreds of millions of frames.

    Raises:
        ValueError: a folder holds a link that leads out of it.
    """

    def __init__(self, root: str, cache_dir: str, media_dirs: Sequence[str] | None = None, check_links: bool = True):
        self.root = root
        self.check_links = check_links
        self.index: MediaIndex | None = None
        folders = list(media_dirs) if media_dirs is not None else shard_folders(root)
        if folders:
            self.index = MediaIndex(index_path(cache_dir, folders))
            self.index.update(folders)
        self.video_folders = training_video_folders(root)
        self._folder_of_clip = self._find_clips()

    def _find_clips(self) -> Mapping[str, str]:
        folder_of_clip: dict[str, str] = {}
        for folder in self.video_folders:
            for clip_id in folders.list_names(folder, folders=True, root=self.root):
                folder_of_clip.setdefault(clip_id, folder)
        return folder_of_clip

    @property
    def shard_problems(self) -> list[tuple[str, str]]:
        """Shards of img2dataset that are left out, as ``(path, reason)``."""
        return self.index.problems if self.index else []

    def training_clip(self, clip_id: str, frame_ids: Sequence[str]) -> ClipMedia:
        """Return the frames of a training clip."""
        places = self.index.find(frame_ids) if self.index else {}
        fallback = self.video_folders[0] if self.video_folders else os.path.join(self.root, "training_video_00")
        folder = os.path.join(self._folder_of_clip.get(clip_id, fallback), clip_id)
        paths = [
            places[frame_id].path if frame_id in places else f"{folder}{os.sep}{frame_id}.jpg"
            for frame_id in frame_ids
        ]
        if paths and frame_ids[0] not in places:
            self._check_link(paths[0])
        sizes = (place.original_size for place in places.values() if place.original_size)
        return ClipMedia(paths, bool(places) or clip_id in self._folder_of_clip, next(sizes, None))

    def training_image(self, image_id: str) -> str:
        """Return the path of a training image."""
        return self._picture(image_id, os.path.join(self.root, "training_image"))

    def gallery_image(self, live_id: str, image_id: str) -> str:
        """Return the path of a test image."""
        return self._picture(image_id, os.path.join(self.root, "gallery", live_id))

    def _picture(self, image_id: str, folder: str) -> str:
        place = self.index.find([image_id]).get(image_id) if self.index else None
        return place.path if place else self._check_link(os.path.join(folder, f"{image_id}.jpg"))

    def _check_link(self, path: str) -> str:
        # The test for a link comes first, because resolving every path would take far longer.
        if self.check_links and os.path.islink(path):
            folders.check_link(path, os.path.dirname(path), self.root)
        return path

    def query_frames(self, clip_id: str) -> dict[str, str]:
        """Return frame id -> path of the existing frames of a test clip, in time order.

        No list names the frames of test clips, so they are those in the clip's folder, or fetched under its id.
        """
        folder = os.path.join(self.root, "query", clip_id)
        names = folders.list_names(folder, root=self.root)
        frames = {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}
        if self.index:
            frames |= {frame_id: place.path for frame_id, place in self.index.find_frames(clip_id).items()}
        return dict(sorted(frames.items(), key=lambda item: frame_order(item[0])))

    def missing_query_frame(self, clip_id: str, frame_id: str) -> str:
        """Return the path at which a missing frame of a test clip is expected."""
        return os.path.join(self.root, "query", clip_id, f"{frame_id}.jpg")
