"""matches.png: query frames and the first five shop images with their scores; the right image has a frame."""

import os
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from data_rice.files import replacing
from processing_rice import open_image

from ..frames import clip_frames
from ..protocol import Rankings, RetrievalTask

TILE = 112
GAP = 8
FRAMES = 5
SHOWN = 5
CAPTION = 26
TITLE = 58
BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
RIGHT, WRONG, PLAIN = (22, 150, 60), (205, 40, 40), (205, 205, 205)


def choose_rows(hits: list[int], misses: list[int], num_rows: int) -> tuple[list[int], list[int]]:
    """Evenly spaced hits and misses in file order, half of each if there are enough; no randomness."""

    def spaced(items: list[int], count: int) -> list[int]:
        return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]

    num_hits = min(len(hits), max(num_rows // 2, num_rows - len(misses)))
    return spaced(hits, num_hits), spaced(misses, min(len(misses), num_rows - num_hits))


def _read(load: Callable, *arguments):
    """The result of `load`, or None for a damaged file, which is listed as a failure and becomes a grey tile."""
    try:
        return load(*arguments)
    except (ValueError, OSError):
        return None


def _tile(image: Image.Image | None) -> Image.Image:
    canvas = Image.new("RGB", (TILE, TILE), (238, 238, 238))
    if image is None:
        ImageDraw.Draw(canvas).text((TILE // 2, TILE // 2), "unreadable", FAINT, ImageFont.load_default(13), "mm")
        return canvas
    scale = TILE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    canvas.paste(small, ((TILE - small.width) // 2, (TILE - small.height) // 2))
    return canvas


def _printable(text: str) -> str:
    """`text` without characters that the built-in font cannot draw; "" if nothing readable remains."""
    kept = "".join(c for c in str(text) if " " <= c <= "ÿ").strip()
    return kept if len(kept) * 2 >= len(str(text).strip()) else ""


def _shorten(text: str, length: int = 44) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 2]}...{text[-(length // 2 - 1) :]}"


class _Row:
    """One query: frames on the left, ranking on the right, and the right image at the end if it is not included."""

    def __init__(self, task: RetrievalTask, ranked: Rankings, queries, index: int):
        self.query_id = task.query_ids[index]
        self.row = queries[index]
        self.ranking = ranked.rankings[self.query_id]
        self.scores = ranked.top_scores.get(self.query_id, [])
        self.relevant = task.relevant[self.query_id]
        self.size = len(task.gallery_of(index))
        self.rank = next((i for i, image in enumerate(self.ranking, 1) if image in self.relevant), 0)

    def caption(self) -> str:
        """Clip, category and the rank of the right image."""
        if self.rank:
            place = f"right image at rank {self.rank} of {self.size}"
        elif not self.ranking:
            place = "no ranking: the clip could not be scored"
        else:
            place = f"right image not among the first {len(self.ranking)} of {self.size}"
        return "   ".join(filter(None, [_shorten(self.query_id), _printable(self.row.get("category") or ""), place]))

    def draw(self, canvas: Image.Image, top: int, image_of: Callable[[str], dict | None]) -> None:
        draw, small = ImageDraw.Draw(canvas), ImageFont.load_default(13)
        draw.text((GAP, top + 5), self.caption(), RIGHT if self.rank == 1 else WRONG, ImageFont.load_default(14))
        y = top + CAPTION
        for i, (frame, _) in enumerate(_read(clip_frames, self.row, FRAMES) or [(None, None)]):
            canvas.paste(_tile(frame), (GAP + i * (TILE + GAP), y))
        left = GAP + FRAMES * (TILE + GAP) + 3 * GAP
        for i, image in enumerate(self.ranking[:SHOWN]):
            right = image in self.relevant
            colour = RIGHT if right else WRONG if i == 0 else PLAIN
            label = f"{i + 1}: {self.scores[i]:.3f}"
            _framed(canvas, draw, (left + i * (TILE + GAP), y), image_of(image), colour, label, small)
        if not 0 < self.rank <= SHOWN and self.relevant:
            x = left + SHOWN * (TILE + GAP) + 3 * GAP
            label = f"right, rank {self.rank}" if self.rank else "right"
            answer = self.ranking[self.rank - 1] if self.rank else self.relevant[0]
            _framed(canvas, draw, (x, y), image_of(answer), RIGHT, label, small)


def _framed(canvas, draw, corner, entry, colour, label, font) -> None:
    x, y = corner
    canvas.paste(_tile(_read(open_image, entry) if entry else None), corner)
    draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), outline=colour, width=1 if colour == PLAIN else 4)
    draw.text((x + TILE // 2, y + TILE + 5), label, INK if colour == PLAIN else colour, font, "ma")


def draw_matches(
    path: str | os.PathLike,
    task: RetrievalTask,
    ranked: Rankings,
    queries,
    gallery,
    kind: str,
    num_rows: int = 10,
) -> None:
    """Draws queries with their first five shop images into a PNG; equal results give equal pictures.

    Args:
        path: file to write.
        task: queries and galleries.
        ranked: the rankings to show.
        queries: the query view.
        gallery: the gallery view.
        kind: name of the score, for the title.
        num_rows: number of queries, half of them hits and half misses if there are enough.
    """
    hit = ranked.hits_at_1()
    hits, misses = choose_rows([i for i, h in enumerate(hit) if h], [i for i, h in enumerate(hit) if not h], num_rows)
    chosen = [_Row(task, ranked, queries, i) for i in hits + misses]
    places = {image: i for i, image in enumerate(task.image_ids)}

    def image_of(image_id: str) -> dict | None:
        return gallery[task.image_rows[places[image_id]][0]]["image"] if image_id in places else None

    height = CAPTION + TILE + 24 + GAP
    width = GAP + (FRAMES + SHOWN + 1) * (TILE + GAP) + 6 * GAP
    canvas = Image.new("RGB", (width, TITLE + max(len(chosen), 1) * height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    title = (
        f"{len(chosen)} of {len(hit)} clips by {kind} score: {len(hits)} hits, then {len(misses)} misses, "
        f"evenly spaced in file order (R@1 of all clips is {100 * hit.mean():.1f} %)"
    )
    draw.text((GAP, 8), title, INK, ImageFont.load_default(17))
    legend = "left: frames of the clip; right: first five shop images with scores; green: correct, red: wrong first"
    draw.text((GAP, 34), legend, FAINT, ImageFont.load_default(13))
    for i, row in enumerate(chosen):
        top = TITLE + i * height
        draw.line((0, top - 2, width, top - 2), fill=(225, 225, 225))
        row.draw(canvas, top, image_of)
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")
