"""The demo page: choose or upload a clip, rank the shop's products, and show heat maps of a pair."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..quota import FolderQuota, UploadGate, temporary_folder
from .page import Clip, Demo, Pair, Recognition, caption, said_pieces, table_rows

MAX_VISITORS = 64
"""Maximum number of visitors whose clips are kept (a few megabytes each); the oldest one is dropped."""

COLUMN_WIDTHS = ["4%", "24%", "26%", "10%", "8%", "9%", "9%", "10%"]
COLUMNS = ["#", "product", "title", "confidence", "score", "embedding", "matching", "alignment"]
NO_BOXES = "(only drawn: this model does not use boxes)"
CSS = """footer { display: none !important; }
#answer { font-size: 1.15em; }
#ranking .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
#ranking img { height: auto; aspect-ratio: 1; }
#ranking .caption-label { position: static; max-width: 100%; border: 0; text-align: left; white-space: normal; }
.grid-wrap { min-height: 0 !important; max-height: none !important; }
#scores * { font-family: inherit !important; }"""
INTRODUCTION = """# RICE: which product is this clip presenting?
Choose an example or upload a clip. RICE ranks the pictures of a shop for it. Click a picture in the ranking: bright
parts of the frames correspond to it."""


def _told(function: Callable) -> Callable:
    """Shows a user error as one sentence on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(escape(" ".join(str(error).split())), print_exception=False) from error

    return wrapped


class Callbacks:
    """Handlers of the page's events; each returns the new values of components."""

    def __init__(self, demo: Demo):
        self.demo = demo

    def shop(self, live_id: str) -> list:
        """Example pictures of a shop."""
        return self.demo.example_pictures(live_id)

    def example(self, live_id: str, boxes: str, place: int) -> tuple:
        """As `show`, for an example."""
        return self.show(self.demo.recognise(self.demo.example(live_id, place), live_id, boxes=boxes))

    def upload(self, files: list[str] | str | None, live_id: str, boxes: str, asr: str) -> tuple:
        """As `show`, for uploaded files, which are deleted afterwards."""
        clip: Clip = self.demo.upload([files] if isinstance(files, str) else files or [], live_id)
        return self.show(self.demo.recognise(clip, live_id, asr or "", boxes))

    def boxes(self, recognition: Recognition | None, boxes: str) -> tuple | dict:
        """As `show`, for the current clip with other boxes."""
        if recognition is None:
            return gr.skip()
        return self.show(self.demo.recognise(recognition.clip, recognition.live_id, boxes=boxes))

    def show(self, recognition: Recognition) -> tuple:
        """State, answer, frames, ranked pictures, table and text; and the heat map of the first hit, see `pair`."""
        hits, row = recognition.answer.hits, recognition.row
        relevant = row.get("relevant") or []
        pictures = [
            (self.demo.picture(hit.image_id), caption(hit, rank, relevant, recognition.rank_without_words(hit)))
            for rank, hit in enumerate(hits, 1)
        ]
        marked = said_pieces(recognition)
        heat = (None, None, [], "")
        if self.demo.explains:
            try:
                heat = self.pair(recognition, 0)
            except ValueError as error:
                # The ranking is valid, even if the first picture was deleted after the shop was encoded.
                heat = (None, None, [], escape(f"There is no heat map: {error}"))
        return (
            recognition,
            answer_words(recognition, self.demo.index.calibration is not None),
            self.demo.frames(recognition),
            # A new ranking must not keep the selection of the previous one.
            gr.Gallery(value=pictures, selected_index=None),
            table_rows(recognition),
            marked or [("(no speech)", None)],
            *heat,
        )

    def pair(self, recognition: Recognition | None, place: int) -> tuple:
        """State, picture with its grid, frames with heat, and their description, for one hit."""
        if recognition is None:
            raise ValueError("Choose or upload a clip first.")
        pair = self.demo.pair(recognition, place)
        return (pair, *self._heat(pair, None))

    def patch(self, pair: Pair | None, point: list[float] | None) -> tuple:
        """Picture, frames and description for one patch of the picture, or for all patches (`None`)."""
        if pair is None:
            raise ValueError("Choose a product first.")
        return self._heat(pair, None if point is None else self.demo.patch_at(pair, point))

    def _heat(self, pair: Pair, patch: tuple[int, int] | None) -> tuple:
        picture, frames = self.demo.heat(pair, patch)
        which = "All patches" if patch is None else f"The patch in row {patch[0] + 1}, column {patch[1] + 1}"
        meaning = "are most similar to it" if pair.maps.is_alignment else "reconstruct it"
        words = f"{which} of <b>{escape(pair.title)}</b>: bright patches {meaning}."
        return picture, frames, words


def answer_words(recognition: Recognition, calibrated: bool) -> str:
    """The answer in one or two sentences of HTML."""
    answer, clip = recognition.answer, recognition.clip
    hit, times = answer.hits[0], answer.timings
    title = f"<b>{escape(hit.title or hit.image_id)}</b>"
    share = f"{100 * answer.confidence:.0f} %"
    words = (
        f"Not sure, or no product of this shop (most likely: {title}, {share})"
        if answer.no_product
        else f"{title}, {share}"
    )
    relevant = clip.row.get("relevant") or []
    if relevant:
        rank = next((i for i, other in enumerate(answer.hits, 1) if other.image_id in relevant), None)
        place = f"rank {rank}" if rank else f"not among the first {len(answer.hits)}"
        words += f" · the right product: {place}"
    details = [
        f"frames read and encoded in {recognition.encode_ms:.0f} ms, shop searched in {times['search_ms']:.1f} ms"
    ]
    if recognition.boxes == "detector":
        found = sum(box is not None for box in recognition.row["boxes"])
        details.insert(0, f"boxes detected: {found}, in {recognition.detect_ms:.0f} ms")
    if recognition.silent:
        before = recognition.rank_without_words(hit)
        details.insert(0, "rank 1 without speech too" if before == "1" else f"without speech: rank {before}")
    if times.get("match_ms"):
        details.append(f"matched in {times['match_ms']:.1f} ms")
    if not calibrated:
        details.append("the confidence is not calibrated: index the shop with validation clips to calibrate it")
    if clip.note:
        details.append(escape(clip.note))
    return f'<div id="answer">{words}</div><small>{" · ".join(details)}</small>'


def _gallery(heading: str, name: str, columns: int = 5, value: list | None = None) -> gr.Gallery:
    gr.Markdown(heading)
    look = {"show_label": False, "height": "auto", "object_fit": "contain", "buttons": []}
    return gr.Gallery(value, columns=columns, elem_id=name, allow_preview=False, interactive=False, **look)


def build_demo(demo: Demo) -> gr.Blocks:
    """The page for a model and a shop; `serve` starts its server with safe settings."""
    callbacks, shops = Callbacks(demo), demo.shops
    with gr.Blocks(title="RICE", analytics_enabled=False, delete_cache=(600, int(demo.limits.keep_seconds))) as page:
        recognition = gr.State(None, time_to_live=3600)
        pair = gr.State(None, time_to_live=3600)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2):
                shop = gr.Dropdown(
                    [(name or "all pictures", name) for name in shops],
                    value=shops[0],
                    label="shop to search (livestream)",
                    visible=len(shops) > 1,
                    elem_id="shop",
                )
                boxes = gr.Radio(
                    demo.boxes,
                    value=demo.first_boxes,
                    label="boxes " + ("(the model uses only these parts)" if demo.takes_boxes else NO_BOXES),
                    visible=len(demo.boxes) > 1,
                    elem_id="boxes",
                )
                with gr.Tabs():
                    with gr.Tab("examples", visible=demo.queries is not None, id="examples"):
                        pictures = demo.example_pictures(shops[0])
                        examples = _gallery("Clips of this shop; click one", "examples", 4, pictures)
                    with gr.Tab("upload", id="upload"):
                        limits, hears = demo.limits, demo.transcriber is not None
                        gr.Markdown(
                            f"Pictures (up to {limits.max_files}) or one video of at most {limits.max_seconds:g} s, "
                            f"{limits.max_bytes / 1e6:g} MB in total. Files are read into memory and deleted at once."
                            + (f" The first {limits.max_sound_seconds:g} s of sound are transcribed." * hears)
                        )
                        files = gr.File(file_count="multiple", type="filepath", label="clip", elem_id="files")
                        instead = ", replaces the transcript" * hears
                        asr = gr.Textbox(label=f"speech of the clip (optional{instead})", max_length=2000)
                        start = gr.Button("recognise", variant="primary", elem_id="recognise")
                gr.Markdown("**Speech** of the clip; words of the first product's title are marked")
                said = gr.HighlightedText(
                    show_label=False, show_whitespaces=True, show_inline_category=False, elem_id="said"
                )
            with gr.Column(scale=3):
                answer = gr.HTML("<div id='answer'>No clip yet.</div>")
                frames = _gallery("**Frames** that the model uses", "frames")
                ranking = _gallery("**Products** of the shop, best first (✓: the right one); click one", "ranking")
        with gr.Row(visible=demo.explains):
            with gr.Column(scale=1):
                gr.Markdown("**Product**; click one of its patches")
                picture = gr.Image(show_label=False, interactive=False, buttons=[], height=260, elem_id="picture")
                every = gr.Button("all patches", size="sm", elem_id="every")
            with gr.Column(scale=3):
                heat = _gallery("**Heat map**: the patches of the clip that correspond to it", "heat")
                words = gr.HTML(elem_id="words")
        with gr.Accordion("scores", open=True):
            table = gr.Dataframe(
                headers=COLUMNS,
                datatype="str",
                interactive=False,
                wrap=True,
                column_widths=COLUMN_WIDTHS,
                max_height=1000,
                elem_id="scores",
            )

        results = [recognition, answer, frames, ranking, table, said, pair, picture, heat, words]

        def choose_example(live_id: str, source: str, event: gr.SelectData):
            return callbacks.example(live_id, source, event.index)

        def choose_hit(state, event: gr.SelectData):
            return callbacks.pair(state, event.index)

        def choose_patch(state, event: gr.SelectData):
            return callbacks.patch(state, event.index)

        # One request at a time, for all events.
        queue = {"concurrency_id": "demo", "concurrency_limit": 1}
        private = {"api_visibility": "private", "show_progress": "minimal", **queue}
        shop.change(_told(callbacks.shop), shop, examples, **private)
        examples.select(_told(choose_example), [shop, boxes], results, **private)
        boxes.input(_told(callbacks.boxes), [recognition, boxes], results, **private)
        start.click(_told(callbacks.upload), [files, shop, boxes, asr], results, **private).then(
            lambda: None, None, files, **private
        )
        if demo.explains:
            ranking.select(_told(choose_hit), recognition, [pair, picture, heat, words], **private)
            picture.select(_told(choose_patch), pair, [picture, heat, words], **private)
            every.click(_told(lambda state: callbacks.patch(state, None)), pair, [picture, heat, words], **private)
    return page


@contextmanager
def upload_folder() -> Iterator[str]:
    """A temporary folder for all uploads and shown pictures; it is deleted at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with temporary_folder("rice-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def serve(demo: Demo, host: str = "127.0.0.1", port: int | None = None, block: bool = True) -> gr.Blocks:
    """
    Starts the page's server, which processes one request at a time. Call it inside `upload_folder`.

    Args:
        demo: Content of the page.
        host: Address to listen on; "0.0.0.0" is reachable from other machines.
        port: By default the first free port from 7860.
        block: Wait until the server is interrupted.

    Returns:
        The page; `local_url` is its address, `close()` stops it.

    Raises:
        OSError: the port is in use.
    """
    page = build_demo(demo)
    page.queue(max_size=16)
    quota = FolderQuota(demo.folder, demo.limits.max_total_bytes, demo.limits.keep_seconds)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        # Not even if the environment requests it.
        share=False,
        max_file_size=demo.limits.max_bytes,
        app_kwargs={"middleware": [Middleware(UploadGate, limits=demo.limits, quota=quota)]},
        state_session_capacity=MAX_VISITORS,
        # The theme's own fonts would be downloaded.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        ssr_mode=False,
        quiet=True,
    )
    if block:
        print(f"the demo is at {page.local_url}; press Ctrl-C to stop it", flush=True)
        page.block_thread()
    return page
