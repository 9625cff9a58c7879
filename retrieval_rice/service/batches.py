"""Batches of clips: clips that arrive within a few milliseconds are encoded together."""

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from hub_rice.cores import PICTURES_PER_CORE, map_on_cores

from ..index import Answer
from ..recogniser import Recogniser

_FRAMES_AT_ONCE = 64


@dataclass
class Clip:
    """
    A clip after reading.

    Args:
        frames: Frames from the model's processor, each `(3, H, W)`.
        asr: Speech of the clip, "" for none.
        live_id: The livestream to search, `None` for the whole index.
        top_k: Maximum number of hits.
    """

    frames: list[torch.Tensor]
    asr: str = ""
    live_id: str | None = None
    top_k: int = 10


@dataclass
class Answered:
    """An answer with milliseconds per step: "wait_ms", and for the batch "encode_ms" and "search_ms"."""

    answer: Answer
    timings: dict[str, float]
    batch_size: int


@dataclass
class _Waiting:
    clip: Clip
    since: float = field(default_factory=time.perf_counter)
    done: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batches:
    """
    Answers clips in batches of those that arrive within a few milliseconds. The next batch is collected while one is
    computed. Call it inside an event loop; `run` is a task of the loop.

    Args:
        recogniser: Recogniser with model and index, without boxes.
        most: Maximum number of clips in a batch.
        wait_s: Seconds that the first clip of a batch waits for others.
    """

    def __init__(self, recogniser: Recogniser, most: int = 16, wait_s: float = 0.005):
        self.recogniser, self.most, self.wait_s = recogniser, most, wait_s
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        # One batch at a time, because a second one would only slow down the first.
        self._thread = ThreadPoolExecutor(1, "recognition")

    async def answer(self, clip: Clip) -> Answered:
        """
        Raises:
            ValueError: the model or the index refuses the clip.
        """
        waiting = _Waiting(clip)
        self._waiting.put_nowait(waiting)
        return await waiting.done

    async def run(self) -> None:
        """Processes batches until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            # Nothing is computed for a disconnected client.
            batch = [one for one in batch if not one.done.cancelled()]
            if not batch:
                continue
            started = time.perf_counter()
            try:
                found = await loop.run_in_executor(self._thread, self._answers, [one.clip for one in batch])
            except Exception as error:
                # Any error belongs to these clips; later clips are answered.
                found = [error] * len(batch)
            for one, result in zip(batch, found):
                if one.done.done():
                    continue
                if isinstance(result, Exception):
                    one.done.set_exception(result)
                else:
                    result.timings["wait_ms"] = 1000 * (started - one.since)
                    one.done.set_result(result)

    def close(self) -> None:
        """Ends the thread after its current batch."""
        self._thread.shutdown(wait=False)

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._waiting.get()]
        end = time.perf_counter() + self.wait_s
        while len(batch) < self.most:
            left = end - time.perf_counter()
            try:
                if left <= 0:
                    batch.append(self._waiting.get_nowait())
                else:
                    batch.append(await asyncio.wait_for(self._waiting.get(), left))
            except (TimeoutError, asyncio.QueueEmpty):
                break
        return batch

    @torch.no_grad()
    def _answers(self, clips: Sequence[Clip]) -> list[Answered]:
        start = time.perf_counter()
        encoded = encode(self.recogniser, clips)
        encode_ms = 1000 * (time.perf_counter() - start)
        answers: list[Answered | None] = [None] * len(clips)
        # `top_k` changes the number of candidates, on which scores and confidences depend.
        for top_k in dict.fromkeys(clip.top_k for clip in clips):
            rows = [row for row, clip in enumerate(clips) if clip.top_k == top_k]
            lives = [clips[row].live_id for row in rows]
            group = encoded if len(rows) == len(clips) else encoded[rows]
            start = time.perf_counter()
            found = self.recogniser.index.search(group, lives, top_k=top_k, rerank=self.recogniser.rerank)
            search_ms = 1000 * (time.perf_counter() - start)
            for row, answer in zip(rows, found):
                answers[row] = Answered(answer, {"encode_ms": encode_ms, "search_ms": search_ms}, len(clips))
        return answers


def encode(recogniser: Recogniser, clips: Sequence[Clip]) -> Any:
    """`RiceClips` with one row per clip, equal to `model.encode_clips` of the processor's outputs for each clip."""
    model, counts = recogniser.model, [len(clip.frames) for clip in clips]
    frames = torch.stack([frame for clip in clips for frame in clip.frames]).to(model.device)
    size = _FRAMES_AT_ONCE
    if model.device.type == "cpu":
        size = min(PICTURES_PER_CORE, math.ceil(len(frames) / torch.get_num_threads()))
    parts = list(map_on_cores(model.encode_frames, frames.split(size), model.device))
    mask = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
    text = {}
    if any(clip.asr for clip in clips):
        text = recogniser.processor(asr=[clip.asr for clip in clips])
        text = {name: value.to(model.device) for name, value in text.items()}
    return model.pool_frames(type(parts[0]).cat(parts), mask.to(model.device), **text)


def frame_tensor(recogniser: Recogniser, picture: Any) -> torch.Tensor:
    """A frame as model input, `(3, H, W)`."""
    return recogniser.processor(videos=[[picture]])["pixel_values_videos"][0, 0]
