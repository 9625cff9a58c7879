"""Speech models: from sound to words with times, with faster-whisper or a speech pipeline of transformers."""

import copy
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .speech import UNSPACED, Word
from .speech_hints import hint_titles, within
from .speech_sound import FILE_CHUNK_S, LIVE_CHUNK_S, RATE, Block, FileSound, LiveSound, SoundCounts, chunks

logger = logging.getLogger(__name__)

# A language detected with lower probability is detected again in the next chunk.
_SURE_OF_LANGUAGE = 0.7
# Minimum mean probability of the hints in a segment. In unclear speech a model repeats hints whose probability without
# hints is 0.00 to 0.01. For spoken hints the mean was at least 0.3, although 0.01 for some of the words.
_LEAST_OF_HINTS = 0.05
_AROUND_A_WORD = " \t\n.,!?;:\"'()"
# Full scale is 1; a speaker is about a hundred times as loud.
_SILENCE = 1e-3
_INSTALL = "install it: pip install faster-whisper."

Transcriber = Callable[[np.ndarray], list[Word]]
"""Function from sound `(n,)` float32 at 16 kHz to its words, with times from its start."""


class WhisperTranscriber:
    """
    A faster-whisper model: int8 on a CPU, with voice activity detection.

    Args:
        name: A folder, a Hub id, or a size such as "base".
        language: A code such as "zh" or "en"; "auto" detects it, and keeps it once the detection is certain.
        device: As in torch; by default a GPU if CTranslate2 finds one.

    Raises:
        ValueError: faster-whisper is not installed, the model cannot be loaded, or does not support the language.
    """

    def __init__(self, name: str, language: str = "auto", device: str | None = None):
        try:
            from ctranslate2 import get_cuda_device_count
            from faster_whisper import WhisperModel
        except ImportError:
            raise ValueError(f"The speech model {name} needs faster-whisper; {_INSTALL}") from None
        kind, _, number = (device or ("cuda" if get_cuda_device_count() else "cpu")).partition(":")
        # CTranslate2 supports only these two of torch's devices.
        kind = "cuda" if kind == "cuda" else "cpu"
        try:
            self.model = WhisperModel(name, kind, int(number or 0), "int8" if kind == "cpu" else "auto")
        except (RuntimeError, ValueError, OSError) as error:
            raise _not_loaded(name, error) from error
        known = self.model.supported_languages
        if language != "auto" and language not in known:
            raise _unknown_language(name, language, known)
        self.name, self.language = name, None if language == "auto" else language
        self._titles: list[str] = []
        # Of a language.
        self._hints: dict[str, str] = {}

    def expecting(self, titles: Iterable[str]) -> "WhisperTranscriber":
        """
        A transcriber with the same model and the words of these titles as its only hints.

        Args:
            titles: Titles of the shop.
        """
        other = copy.copy(self)
        other._titles, other._hints = list(titles), {}
        return other

    def hints(self, language: str) -> str:
        """The hints for a language: titles joined with commas, as many as fit into Whisper's prompt."""
        if language not in self._hints:
            # faster-whisper would cut a longer text inside a word.
            most = self.model.max_length // 2 - 1
            self._hints[language] = within(hint_titles(self._titles, language), most, self._num_tokens)
        return self._hints[language]

    def _num_tokens(self, text: str) -> int:
        return len(self.model.hf_tokenizer.encode(f" {text}", add_special_tokens=False).ids)

    def __call__(self, samples: np.ndarray) -> list[Word]:
        language = self.language
        segments, info = self._transcribe(samples, language)
        if language is None and info.language_probability >= _SURE_OF_LANGUAGE and self.hints(info.language):
            # Segments are computed on demand, so this costs little.
            language = info.language
            segments, _ = self._transcribe(samples, language)
        hints = set(self.hints(language).replace(",", " ").split()) if language else set()
        words: list[Word] = []
        for segment in segments:
            parts = [(Word(float(w.start), float(w.end), w.word), float(w.probability)) for w in segment.words or ()]
            words += without_echo(whole_words(parts), hints)
        if self.language is None and words and info.language_probability >= _SURE_OF_LANGUAGE:
            self.language = info.language
        return words

    def _transcribe(self, samples: np.ndarray, language: str | None) -> tuple:
        return self.model.transcribe(
            samples,
            language=language,
            # Without speech there is no transcript, so hints cannot be repeated.
            vad_filter=True,
            word_timestamps=True,
            # Otherwise an error would affect the following chunks.
            condition_on_previous_text=False,
            hotwords=self.hints(language) or None if language else None,
        )


class PipelineTranscriber:
    """
    A speech model of transformers with word times: a Whisper model, or a CTC model.

    Args:
        name: A folder or a Hub id.
        language: As [`WhisperTranscriber`], for Whisper. A CTC model has one fixed language and takes no setting.
        device: Device of torch; by default a GPU if available.

    Raises:
        ValueError: the model cannot be loaded, or does not support this language or any language setting.
    """

    def __init__(self, name: str, language: str = "auto", device: str | None = None):
        import torch
        from transformers import pipeline

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.pipeline = pipeline("automatic-speech-recognition", model=name, device=device)
        except (RuntimeError, ValueError, OSError, KeyError, ImportError) as error:
            raise _not_loaded(name, error) from error
        codes = getattr(getattr(self.pipeline.model, "generation_config", None), "lang_to_id", None) or {}
        known = sorted(code.strip("<|>") for code in codes)
        if language != "auto" and language not in known:
            raise _unknown_language(name, language, known)
        self.name, self.language = name, None if language == "auto" else language

    def __call__(self, samples: np.ndarray) -> list[Word]:
        if np.abs(samples).max(initial=0.0) < _SILENCE:
            return []
        generate = {} if self.language is None else {"generate_kwargs": {"language": self.language}}
        sound = {"raw": samples, "sampling_rate": RATE}
        heard = self.pipeline(sound, return_timestamps="word", **generate)
        words = []
        for part in heard.get("chunks") or ():
            start_s, end_s = part["timestamp"]
            start_s = 0.0 if start_s is None else float(start_s)
            # Whisper gives no end for the last word.
            words.append(Word(start_s, len(samples) / RATE if end_s is None else float(end_s), part["text"]))
        if getattr(self.pipeline, "type", None) != "seq2seq_whisper":
            return words
        return [word for word, _ in whole_words((word, 1.0) for word in words)]


def _not_loaded(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"The speech model {name} cannot be loaded ({reason}).")


def _unknown_language(name: str, language: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    if not known:
        return ValueError(f"The speech model {name} has no language setting; leave it out, or use auto.")
    return ValueError(
        f"The speech model {name} does not know the language {language!r} (it knows: {', '.join(known)})."
    )


def load_transcriber(name: str, language: str = "auto", device: str | None = None) -> Any:
    """
    A speech model by its folder, Hub id or size.

    Args:
        name: A faster-whisper (CTranslate2) model, or a speech model of transformers; its config decides which.
        language: A code such as "zh" or "en", or "auto".
        device: Device of torch.

    Returns:
        A `Transcriber` with `name` and `language` (given or detected).

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the model does not exist, or a required package is not installed.
    """
    if os.path.isdir(name):
        config = Path(name) / "config.json"
        if not config.is_file():
            raise ValueError(f"{name} holds no speech model, because it has no config.json; name another folder.")
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is not valid JSON ({error}); fetch the model again.") from None
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name} with a speech model; check the path.")
    else:
        values = _hub_config(name)
    kind = PipelineTranscriber if "model_type" in values else WhisperTranscriber
    return kind(name, language, device)


def _hub_config(name: str) -> dict:
    """The config of a model on the Hub; the sizes of faster-whisper have none."""
    if "/" not in name:
        return {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


class Listener:
    """
    Transcribes sound as it arrives; a source of words for [`Hearing`].

    Args:
        blocks: A `FileSound` or a `LiveSound`.
        transcriber: Transcribes them, see [`load_transcriber`].
        chunk_s: Maximum seconds per transcription.

    Attributes:
        heard_s: Time in seconds before which all words are known.
    """

    def __init__(self, blocks: Any, transcriber: Transcriber, chunk_s: float):
        self.blocks, self.transcriber, self.chunk_s = blocks, transcriber, chunk_s
        self.heard_s = -math.inf

    @property
    def counts(self) -> SoundCounts:
        """Counts of the sound."""
        return self.blocks.counts

    def stop(self) -> None:
        """Stops the transcription."""
        self.blocks.stop()

    def __iter__(self) -> Iterator[Word]:
        for chunk in chunks(self.blocks, self.chunk_s):
            yield from words_of(chunk, self.transcriber)
            self.heard_s = chunk.end_s
        self.heard_s = math.inf


def whole_words(parts: Iterable[tuple[Word, float]]) -> list[tuple[Word, float]]:
    """
    Joins Whisper's parts of words with their probabilities: a word begins with a space, and "t-shirt" comes as " t"
    and "-shirt". A word gets the minimum probability of its parts. In scripts without spaces the parts are not joined.
    """
    words: list[tuple[Word, float]] = []
    for word, probability in parts:
        before, least = words[-1] if words else (None, 1.0)
        if before is None or _begins_a_word(before.text, word.text):
            words.append((word, probability))
        else:
            joined = Word(before.start_s, max(before.end_s, word.end_s), before.text + word.text)
            words[-1] = (joined, min(least, probability))
    return words


def without_echo(words: list[tuple[Word, float]], hints: set[str]) -> list[Word]:
    """
    The words of a segment without those that the model only repeats from its hints.

    Args:
        words: Words with their probabilities from the sound alone, without hints.
        hints: Words of the hints in lower case.
    """
    expected = [word.text.lower().strip(_AROUND_A_WORD) in hints for word, _ in words]
    likely = [probability for (_, probability), is_hint in zip(words, expected) if is_hint]
    echo = likely and sum(likely) / len(likely) < _LEAST_OF_HINTS
    return [word for (word, _), is_hint in zip(words, expected) if not (echo and is_hint)]


def _begins_a_word(before: str, text: str) -> bool:
    return text[:1].isspace() or before[-1:].isspace() or bool(UNSPACED.match(before[-1:]) and UNSPACED.match(text))


def words_of(chunk: Block, transcriber: Transcriber) -> list[Word]:
    """The words of a chunk of sound, on the stream's clock."""
    words = transcriber(chunk.samples)
    return [Word(chunk.start_s + word.start_s, chunk.start_s + word.end_s, word.text) for word in words]


def listen(stream: Any, transcriber: Transcriber, notify: Callable[[str], None] = logger.warning) -> Listener | None:
    """
    The transcription of an open stream, to be created before its frames are read; `None` if it has no sound.

    Args:
        stream: From `open_stream`.
        transcriber: See [`load_transcriber`].
        notify: Called with one sentence if sound of a live source is skipped.
    """
    if not getattr(stream, "has_sound", False):
        return None
    if not stream.is_recording:
        stream.sound = LiveSound(notify)
        return Listener(stream.sound, transcriber, LIVE_CHUNK_S)
    return Listener(FileSound(stream.source, opener=stream.opener), transcriber, FILE_CHUNK_S)
