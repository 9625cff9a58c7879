"""Write the speech of the clips of a data set into its rows.

Training and evaluation then use the same kind of text as streams. DATA is a folder of shop_clips, whose clip files get
`asr`, or of LPR4M, whose test_videoid_asr is written. Sound comes from the clips' videos, or from files in --sound:
CLIP_ID.mp4 (.wav, ...), or for LPR4M one file per livestream, LIVE_ID.mp4, from which the clip id selects a part. The
same command resumes an interrupted run. DATA/transcripts.jsonl holds the model, the language, the hints and the
transcript of each clip. Clips with ASR keep it, unless --overwrite is given.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .options import HINTS, add_hints

TRANSCRIPTS = "transcripts.jsonl"
SPLITS = ("train", "validation", "test")
_FORMAT = {"format": "rice transcripts", "version": 1}
_LISTED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of shop_clips or LPR4M")
    add("--asr", required=True, metavar="MODEL", help="folder, id or size of a faster-whisper model, or a speech "
        "model of transformers")  # fmt: skip
    add("--language", default="auto", help="language of the speech, such as zh or en; auto detects it in each clip "
        "(default: %(default)s)")  # fmt: skip
    add_hints(parser)
    add("--splits", nargs="+", choices=SPLITS, help="splits of shop_clips (default: all); LPR4M has only test")
    add("--sound", metavar="DIR", type=Path, help="folder of video or sound files, named after clips or livestreams")
    add("--overwrite", action="store_true", help="replace existing ASR, and transcripts of another model")
    add("--device", help="such as cpu or cuda; default: cuda if available")


@dataclass(frozen=True)
class Clip:
    """
    A clip of a data set: the place of its sound, in seconds of a file (`None`: no sound), its current ASR, and its
    livestream, "" for none.
    """

    clip_id: str
    path: str | None
    start_s: float
    end_s: float
    asr: str
    live_id: str = ""


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: the data, the model or a folder does not exist.
        ValueError: one of them cannot be used, or there are transcripts of another model.
        OSError: a file cannot be written.
    """
    from data_rice.lpr4m.lpr4m import Lpr4m
    from data_rice.shop_clips.shop_clips import ShopClips
    from data_rice.views import resolve

    from .stream.speech_hints import expect_titles
    from .stream.speech_models import load_transcriber

    if options.sound is not None and not options.sound.is_dir():
        raise FileNotFoundError(f"--sound {options.sound} is not a folder; name a folder of sound files.")
    kind, root, _ = resolve(options.data, None)
    if kind not in (Lpr4m, ShopClips):
        raise ValueError(f"{options.data} has no rows with ASR; give a folder of shop_clips or LPR4M.")
    parts = _shop_parts(root, options) if kind is ShopClips else _lpr4m_parts(root, options)
    titles = {} if options.asr_hints == "none" else parts[0].titles()
    transcriber = load_transcriber(options.asr, options.language, options.device)
    _, count = expect_titles(transcriber, chain(*titles.values()), options.asr_hints)
    header = {**_FORMAT, "model": options.asr, "language": options.language, "hints": HINTS[not count]}
    transcripts = Transcripts(Path(root) / TRANSCRIPTS, header, options.overwrite)
    for part in parts:
        clips = part.clips()
        _hear(clips, part.split, transcripts, transcriber, options, titles)
        part.write({clip.clip_id: text for clip in clips if (text := transcripts.text(part.split, clip)) is not None})
    print(f"{transcripts.path} holds the model, the language, the hints and the transcripts")


class Transcripts:
    """
    The file of transcripts: a header with model and language, and one line per transcribed clip; the last line of a
    clip counts. `before` of a line is the replaced ASR.

    Raises:
        ValueError: the file is of another model or language without `overwrite`, or is not a file of transcripts.
    """

    def __init__(self, path: Path, header: dict, overwrite: bool):
        from data_rice.files import cut_torn_line, write_atomically

        self.path = path
        if path.is_file():
            cut_torn_line(path)
        before, lines = self._read() if path.is_file() and path.stat().st_size else (header, [])
        # Files of earlier versions have no hints.
        before = {"hints": HINTS[1], **before}
        if before != header and not overwrite:
            raise ValueError(
                f"{path} was begun with {_settings(before)}; give --overwrite to transcribe again with "
                f"{_settings(header)}."
            )
        if before != header:
            # The original ASR of the rows is kept.
            lines = [{**line, "asr": None} for line in lines]
        if before != header or not path.is_file() or not path.stat().st_size:
            write_atomically(path, "".join(map(_json_line, [header, *lines])))
        self.known = {(line["split"], line["clip_id"]): line for line in lines}

    def _read(self) -> tuple[dict, list[dict]]:
        from data_rice.parsing import read_json_lines, row_error

        (_, header), *rows = read_json_lines(self.path)
        if header.get("format") != _FORMAT["format"]:
            raise ValueError(f"{self.path} is not a file of transcripts; move it away.")
        for number, line in rows:
            if not {"split", "clip_id", "asr", "before"} <= line.keys():
                raise row_error(self.path, number, "this is not a transcript; remove the line.")
        return header, [line for _, line in rows]

    def text(self, split: str, clip: Clip) -> str | None:
        """The transcript of a clip; `None` if it has none, or if its ASR has changed since."""
        entry = self.known.get((split, clip.clip_id), {})
        return entry.get("asr") if clip.asr in (entry.get("asr"), entry.get("before")) else None

    def add(self, split: str, clip: Clip, asr: str, language: str | None) -> None:
        """Writes the transcript of a clip at once."""
        line = {"split": split, "clip_id": clip.clip_id, "asr": asr, "language": language, "before": clip.asr}
        self.known[split, clip.clip_id] = line
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_json_line(line))


def _settings(header: dict) -> str:
    return f"the model {header.get('model')}, the language {header.get('language')} and the hints {header['hints']}"


def _json_line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def _hear(
    clips: list[Clip],
    split: str,
    transcripts: Transcripts,
    transcriber,
    options: argparse.Namespace,
    titles: dict[str, list[str]],
) -> None:
    from tqdm.auto import tqdm

    from processing_rice.video_container_rice import open_container

    from .stream.speech import join_words
    from .stream.speech_hints import expect_titles
    from .stream.speech_models import Listener
    from .stream.speech_sound import FILE_CHUNK_S, FileSound

    counts = {"heard": 0, "silent": 0, "earlier": 0, "kept": 0, "without sound": 0}
    failures: list[str] = []
    ear, shop = transcriber, None
    for clip in tqdm(clips, desc=f"transcribing {split}", unit="clip", disable=None):
        if transcripts.text(split, clip) is not None:
            counts["earlier"] += 1
            continue
        if clip.asr and not options.overwrite:
            counts["kept"] += 1
            continue
        if clip.path is None:
            counts["without sound"] += 1
            continue
        if options.language == "auto":
            ear.language = None
        if clip.live_id != shop:
            shop = clip.live_id
            ear, _ = expect_titles(transcriber, titles.get(shop, ()))
        sound = FileSound(clip.path, clip.start_s, clip.end_s, open_container)
        try:
            asr = join_words(Listener(sound, ear, FILE_CHUNK_S))
        except (ValueError, OSError, RuntimeError) as error:
            failures.append(f"{clip.clip_id} ({' '.join(str(error).split())})")
            continue
        if not sound.has_sound:
            counts["without sound"] += 1
            continue
        counts["heard" if asr else "silent"] += 1
        transcripts.add(split, clip, asr, getattr(ear, "language", None))
    words = {"heard": "transcribed", "earlier": "transcribed earlier", "kept": "with their own ASR"}
    told = [f"{count} {words.get(name, name)}" for name, count in counts.items() if count]
    print(f"{split}: {len(clips)} clips; {', '.join(told) or 'none transcribed'}")
    for failure in failures[:_LISTED]:
        print(f"not read: {failure}")
    if len(failures) > _LISTED:
        print(f"... {len(failures)} in total could not be read; the same command tries them again")


def _sound_files(folder: Path | None) -> dict[str, str]:
    """The files of a folder by their names without suffix."""
    if folder is None:
        return {}
    return {path.stem: str(path) for path in sorted(folder.iterdir(), reverse=True) if path.is_file()}


@dataclass
class _ShopPart:
    """The clips of a split of shop_clips."""

    root: str
    split: str
    file: str
    sound: dict[str, str]

    def clips(self) -> list[Clip]:
        return [clip for _, clip in self._rows()]

    def _rows(self) -> Iterator[tuple[dict, Clip]]:
        from data_rice import parsing
        from data_rice.paths import MediaRoot
        from data_rice.shop_clips.shop_clips import id_value, optional_id, text_value, video_range

        media = MediaRoot(self.root)
        for line, row in parsing.read_json_lines(self.file):
            try:
                clip_id = id_value(row, "query_id")
                video, start_s, end_s = video_range(media, row)
                asr, live_id = text_value(row, "asr"), optional_id(row, "live_id")
            except ValueError as error:
                raise parsing.row_error(self.file, line, f"{error}; repair the row.") from None
            path = video or self.sound.get(clip_id)
            yield row, Clip(clip_id, path, max(start_s, 0.0), end_s if end_s > 0 else math.inf, asr, live_id)

    def titles(self) -> dict[str, list[str]]:
        """Livestream -> titles of its images; the key is "" if the gallery is one shop."""
        from data_rice.shop_clips.shop_clips import read_gallery

        titles: dict[str, list[str]] = {}
        for image in read_gallery(self.root).values():
            titles.setdefault(image["live_id"], []).append(image["title"])
        return titles

    def write(self, texts: dict[str, str]) -> None:
        """Writes the transcripts into the rows; everything else stays the same."""
        from data_rice.files import write_atomically

        if texts:
            rows = (
                row | ({"asr": texts[clip.clip_id]} if clip.clip_id in texts else {}) for row, clip in self._rows()
            )
            write_atomically(self.file, "".join(map(_json_line, rows)))


def _shop_parts(root: str, options: argparse.Namespace) -> list[_ShopPart]:
    from data_rice.shop_clips.shop_clips import CLIP_FILES

    files = {split: os.path.join(root, CLIP_FILES[split]) for split in options.splits or SPLITS}
    there = {split: file for split, file in files.items() if os.path.isfile(file)}
    missing = [CLIP_FILES[split] for split in files if split not in there]
    if not there or (options.splits and missing):
        raise FileNotFoundError(f"{root} has no {' and no '.join(missing)}; write the clips of each split there.")
    sound = _sound_files(options.sound)
    return [_ShopPart(root, split, file, sound) for split, file in there.items()]


@dataclass
class _Lpr4mPart:
    """The test clips of LPR4M."""

    root: str
    sound: dict[str, str]
    split: str = "test"

    def clips(self) -> list[Clip]:
        from data_rice.lpr4m import layout

        relevant = layout.read_id_lists(
            layout.one_annotation_file(self.root, layout.TEST_FILES["relevant"]), "clip id"
        )
        own = self._own()
        return [self._clip(clip_id, own.get(clip_id, "")) for clip_id in relevant]

    def _own(self) -> dict[str, str]:
        from data_rice.lpr4m import layout

        rows = layout.read_id_table(layout.one_annotation_file(self.root, layout.TEST_FILES["asr"]), 2, "clip id")
        return {clip_id: columns[0] for clip_id, columns in rows.items()}

    def _clip(self, clip_id: str, asr: str) -> Clip:
        from data_rice.lpr4m.layout import live_id_of

        live_id = live_id_of(clip_id)
        if clip_id in self.sound:
            return Clip(clip_id, self.sound[clip_id], 0.0, math.inf, asr, live_id)
        start, end = clip_id.removeprefix(f"{live_id}-").split("-")
        if not start.isdigit() or not end.isdigit():
            return Clip(clip_id, None, 0.0, math.inf, asr)
        return Clip(clip_id, self.sound.get(live_id), int(start) / 1000, int(end) / 1000, asr, live_id)

    def titles(self) -> dict[str, list[str]]:
        """Livestream -> titles of its images, if both files exist."""
        from data_rice.lpr4m import layout

        files = [layout.annotation_files(self.root, layout.TEST_FILES[kind]) for kind in ("title", "gallery")]
        if not all(files):
            return {}
        titles = layout.read_id_table(files[0][0], 2, "image id")
        lives = layout.read_id_lists(files[1][0], "live id")
        return {live_id: [titles.get(image_id, [""])[0] for image_id in ids] for live_id, ids in lives.items()}

    def write(self, texts: dict[str, str]) -> None:
        """Writes the transcripts into the ASR table of the test clips; other rows stay the same."""
        from data_rice.files import write_atomically
        from data_rice.lpr4m import layout

        if texts:
            rows = self._own() | texts
            file = layout.one_annotation_file(self.root, layout.TEST_FILES["asr"])
            write_atomically(file, "".join(f"{clip_id}\t{asr}\n" for clip_id, asr in rows.items()))


def _lpr4m_parts(root: str, options: argparse.Namespace) -> list[_Lpr4mPart]:
    if options.sound is None:
        raise ValueError(
            "LPR4M has frames without sound; --sound names a folder with a video or sound file per clip or livestream."
        )
    if options.splits not in (None, ["test"]):
        raise ValueError("--splits of LPR4M must be test, because its training list already holds ASR.")
    return [_Lpr4mPart(root, _sound_files(options.sound))]
