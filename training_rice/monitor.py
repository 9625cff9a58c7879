"""Monitoring of a run besides its losses: in-batch accuracy, speed, waiting for data, memory, and a summary."""

import platform
import time
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import TrainerCallback

try:
    import resource
except ImportError:
    resource = None


def in_batch_accuracy(logits: Tensor, product_ids: Tensor | None = None) -> Tensor:
    """
    Share of rows whose best score is in a correct column.

    Args:
        logits (`(B, B)` or `(B, 1 + K)`): Scores. The correct column is the diagonal of a square matrix, else the
        first. product_ids (`(B,)` int64, *optional*): In a square matrix, columns of the row's product are correct as
        well.

    Returns:
        Scalar in 0..1.
    """
    best = logits.detach().float().argmax(dim=1)
    if logits.shape[0] != logits.shape[1]:
        return (best == 0).float().mean()
    if product_ids is None:
        return (best == torch.arange(len(best), device=best.device)).float().mean()
    return (product_ids[best] == product_ids).float().mean()


class StepClock(TrainerCallback):
    """
    Seconds of training and of waiting for data between two logs. Validation and saving do not count.

    On a GPU a step ends when the Trainer has read its loss, which happens at each step.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.seconds = self.waited = 0.0
        self.batches = 0
        self._start = 0.0

    def start(self) -> None:
        """Starts waiting; call it before a step requests its batches."""
        self._start = time.perf_counter()

    def got(self, batches: int) -> None:
        """Ends waiting; call it when the batches have arrived."""
        self.waited += time.perf_counter() - self._start
        self.batches += batches

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._start


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """
    Peak memory so far in 2^30 bytes: `memory_gb` of this process without its loader workers (not on Windows), and
    `gpu_memory_gb` of its GPU if it has one.
    """
    memory = {}
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory["memory_gb"] = peak / (2**30 if platform.system() == "Darwin" else 2**20)
    if device.type == "cuda":
        memory["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory


def run_figures(log_history: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means and maxima over all logs of a run, also before an interruption: `clips_per_second`, `memory_gb` etc."""
    logs = [entry for entry in log_history if "clips_per_second" in entry]
    figures = {}
    kinds = {"clips_per_second": _mean, "data_wait_share": _mean, "memory_gb": max, "gpu_memory_gb": max}
    for name, kind in kinds.items():
        if values := [entry[name] for entry in logs if name in entry]:
            figures[name] = kind(values)
    if logs:
        figures["nonfinite_steps"] = logs[-1]["nonfinite_steps"]
    return figures


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Name in the table, key in the results, format.
_SUMMARY = (
    ("seconds of training since the start or the last continuation", "train_runtime", "{:.0f}"),
    ("clips per second", "clips_per_second", "{:.2f}"),
    ("share of time waiting for data", "data_wait_share", "{:.1%}"),
    ("peak memory per process, GB", "memory_gb", "{:.2f}"),
    ("peak GPU memory, GB", "gpu_memory_gb", "{:.2f}"),
    ("training loss (mean)", "train_loss", "{:.4f}"),
    ("steps left out (loss or gradient not finite)", "nonfinite_steps", "{:.0f}"),
    ("files left out (unreadable)", "unreadable_media", "{:.0f}"),
    ("validation R@1, embedding", "eval_embedding_R@1", "{:.1%}"),
    ("validation R@1, matching", "eval_matching_R@1", "{:.1%}"),
    ("validation R@1, fused", "eval_fused_R@1", "{:.1%}"),
    ("fusion weight (fitted on validation)", "eval_fusion_weight", "{:g}"),
    ("text weight (fitted on validation)", "eval_text_score_weight", "{:g}"),
    ("text weight in the fused score (fitted on validation)", "eval_fused_text_weight", "{:g}"),
)


def summary_table(metrics: dict[str, float]) -> str:
    """The summary of a run in two columns, without figures that were not measured."""
    rows = [(name, form.format(metrics[key])) for name, key, form in _SUMMARY if key in metrics]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
