"""Timing of a model during evaluation."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

STEPS = {"image": "encode one image", "clip": "encode one clip", "search": "score one clip against its gallery"}


@dataclass
class TimedRetriever:
    """
    Wraps a retriever and measures the time of encoding and scoring.

    Args:
        retriever: A retriever for `evaluation_rice.retrieval.retrieve`.
    """

    retriever: Any
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STEPS, 0))

    def __getattr__(self, name: str) -> Any:
        # Unpickling in a loader's worker reads attributes before `retriever` is set.
        if name.startswith("__") or name == "retriever":
            raise AttributeError(name)
        return getattr(self.retriever, name)

    def encode_gallery(self, inputs: Any) -> Any:
        """As the retriever."""
        return self._timed("image", self.retriever.encode_gallery, inputs)

    def encode_clips(self, inputs: Any) -> Any:
        """As the retriever."""
        return self._timed("clip", self.retriever.encode_clips, inputs)

    def scores(self, clips: Any, gallery: Any) -> Any:
        """As the retriever."""
        return self._timed("search", self.retriever.scores, clips, gallery, count=len(clips))

    def _timed(self, step: str, function, *arguments, count: int | None = None) -> Any:
        start = self._now()
        result = function(*arguments)
        self.seconds[step] += self._now() - start
        self.counts[step] += len(result) if count is None else count
        return result

    def _now(self) -> float:
        if getattr(getattr(self.retriever, "device", None), "type", "cpu") == "cuda":
            torch.cuda.synchronize(self.retriever.device)
        # The loader's workers compute descriptors and report their time.
        return time.perf_counter() + sum(getattr(self.retriever, "loader_seconds", {}).values())

    def summary(self) -> dict[str, Any]:
        """
        Milliseconds per step, `{"image_ms", "clip_ms", "search_ms"}`, without decoding, with `device` and `threads`. A
        gallery that is scored in several chunks counts a clip once per chunk.
        """
        milliseconds = {
            f"{step}_ms": 1000 * self.seconds[step] / count for step, count in self.counts.items() if count
        }
        device = str(getattr(self.retriever, "device", "cpu"))
        return {**milliseconds, "device": device, "threads": torch.get_num_threads()}
