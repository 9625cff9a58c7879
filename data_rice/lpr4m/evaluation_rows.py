"""The published test files of LPR4M as query, gallery and detection rows."""

from os import path as osp

from .. import parsing
from ..builder import ProblemLog
from ..detection import detection_row
from ..features import clip_row
from . import layout
from .media import Lpr4mMedia


class EvaluationRows:
    """The published test files, read once for one view."""

    def __init__(self, root: str, gallery_images: str, media: Lpr4mMedia, problems: ProblemLog):
        self.root = root
        self.media = media
        self.problems = problems
        self.files = {what: layout.one_annotation_file(root, name) for what, name in layout.TEST_FILES.items()}
        self.gallery = self._read_gallery(gallery_images)

    def _read_gallery(self, gallery_images: str) -> dict[str, list[str]]:
        """Return live id -> ids of the images in use, in the published order without repeats."""
        file = self.files["gallery"]
        gallery = layout.read_id_lists(file, "live id")
        for live_id, image_ids in gallery.items():
            gallery[live_id] = list(dict.fromkeys(image_ids))
            if len(gallery[live_id]) != len(image_ids):
                self.problems.add(live_id, file, None, "of livestreams that list an image twice; the first one counts")
        if gallery_images == "all":
            return gallery
        listed = layout.annotation_files(self.root, layout.MAIN_IMAGES_FILE)
        if listed:
            main = layout.read_main_images(listed[0])
        elif any(layout.shot_number(image_id) is not None for ids in gallery.values() for image_id in ids):
            main = {image_id for ids in gallery.values() for image_id in ids if layout.shot_number(image_id) == "0"}
        else:
            return gallery
        return {live_id: [image_id for image_id in ids if image_id in main] for live_id, ids in gallery.items()}

    def gallery_rows(self):
        """Yield the gallery rows, livestream by livestream in the published order."""
        titles = layout.read_id_table(self.files["title"], 2, "image id")
        for live_id, image_ids in self.gallery.items():
            for image_id in image_ids:
                yield {
                    "image_id": image_id,
                    "live_id": live_id,
                    "image": self.media.gallery_image(live_id, image_id),
                    "title": titles.get(image_id, [""])[0],
                }

    def query_rows(self):
        """Yield the query rows in the order of the ground truth file."""
        asr = layout.read_id_table(self.files["asr"], 2, "clip id")
        boxes = layout.read_test_boxes(self.files["boxes"], self.problems)
        attributes = self._attributes()
        for clip_id, image_ids in layout.read_id_lists(self.files["relevant"], "clip id").items():
            live_id = self._live_id(clip_id, self.files["relevant"])
            relevant = self._relevant(clip_id, live_id, image_ids)
            frames, frame_boxes = self._frames(clip_id, boxes.get(clip_id, {}))
            category, scale, duration, number = attributes.get(clip_id, [""] * 4)
            clip = clip_row(
                clip_id=clip_id,
                live_id=live_id,
                product_id=layout.product_id_of(relevant[0]) if relevant else "",
                frames=frames,
                boxes=frame_boxes,
                asr=asr.get(clip_id, [""])[0],
                category=category,
                product_scale=scale,
                visible_duration=duration,
                product_number=number,
            )
            yield {**clip, "relevant": relevant}

    def detection_rows(self, empty_frames: bool):
        """Yield one row per annotated frame, in file order; with ``empty_frames`` also frames without a box."""
        attributes = self._attributes()
        for clip_id, frames in layout.read_test_boxes(self.files["boxes"], self.problems).items():
            live_id = self._live_id(clip_id, self.files["boxes"])
            paths = self.media.query_frames(clip_id)
            if any(frame_id not in paths for frame_id in frames):
                reason = "kept although some of their frames with boxes are missing"
                self.problems.add(clip_id, self.files["boxes"], None, reason)
            for frame_id, boxes in frames.items():
                if boxes or empty_frames:
                    yield detection_row(
                        frame_id=frame_id,
                        clip_id=clip_id,
                        live_id=live_id,
                        image=paths.get(frame_id) or self.media.missing_query_frame(clip_id, frame_id),
                        boxes=boxes,
                        category=attributes.get(clip_id, [""])[0],
                        split="test",
                    )

    def _attributes(self) -> dict[str, list[str]]:
        files = layout.annotation_files(self.root, layout.ATTRIBUTES_FILE)
        return layout.read_id_table(files[0], 5, "clip id") if files else {}

    def _live_id(self, clip_id: str, file: str) -> str:
        try:
            return layout.live_id_of(clip_id)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; repair the entry.") from None

    def _relevant(self, clip_id: str, live_id: str, image_ids: list[str]) -> list[str]:
        """Return the gallery images of the annotated products, or the annotated ids if the gallery has none."""
        gallery = self.gallery.get(live_id)
        if not gallery:
            raise ValueError(
                f"{self.files['gallery']}: the livestream {live_id} of the clip {clip_id} has an empty gallery; "
                'add its images, or use gallery_images="all" if only main images are missing.'
            )
        products = {layout.product_id_of(image_id) for image_id in image_ids}
        relevant = [image_id for image_id in gallery if layout.product_id_of(image_id) in products]
        if not relevant:
            reason = "kept although no relevant image is in their gallery, so they count as misses"
            self.problems.add(clip_id, self.files["relevant"], None, reason)
        return relevant or image_ids

    def _frames(self, clip_id: str, boxes: dict[str, list[list[float]]]):
        """Return a test clip's frame paths and boxes."""
        frames = self.media.query_frames(clip_id)
        if not frames:
            # The boxes name some frames. With their paths, the reader of the row can report what is missing.
            names = sorted(boxes, key=layout.frame_order)
            frames = {frame_id: self.media.missing_query_frame(clip_id, frame_id) for frame_id in names}
            reason = "kept although all of their frames are missing, so they count as misses"
            self.problems.add(clip_id, osp.join(self.root, "query", clip_id), None, reason)
        return list(frames.values()), [parsing.enclosing_box(boxes.get(frame_id, [])) for frame_id in frames]
