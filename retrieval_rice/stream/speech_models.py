"""Speech models: from sound to words with times, with faster-whisper or a speech pipeline of transformers."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .speech import Word
from .speech_sound import FILE_CHUNK_S, LIVE_CHUNK_S, RATE, Block, FileSound, LiveSound, SoundCounts, chunks

logger = logging.getLogger(__name__)

# A language detected with lower probability is detected again in the next chunk.
_SURE_OF_LANGUAGE = 0.7
# Full scale is 1; a speaker is some hundred times as loud.
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

    def __call__(self, samples: np.ndarray) -> list[Word]:
        segments, info = self.model.transcribe(
            samples,
            language=self.language,
            vad_filter=True,
            word_timestamps=True,
            # Otherwise an error would affect the following chunks.
            condition_on_previous_text=False,
        )
        words = [Word(float(w.start), float(w.end), w.word) for segment in segments for w in segment.words or ()]
        if self.language is None and words and info.language_probability >= _SURE_OF_LANGUAGE:
            self.language = info.language
        return words


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
        return words


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
            raise ValueError(f"{name} holds no speech model: it has no config.json.")
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is not valid JSON ({error}); fetch the model again.") from None
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name} with a speech model.")
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
