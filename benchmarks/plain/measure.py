"""Models of a size, seconds, and peak memory."""

import ctypes
import math
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_rice import RiceConfig, RiceModel

SIZES = {
    "vit_b_32": ({"image_size": 224, "patch_size": 32}, {}),
    # The timm version, from the extra `encoder`.
    "lite0": ({"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0"}, {}),
    "tiny": (
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        {"projection_dim": 32},
    ),
}


def build_model(size: str, seed: int = 0) -> RiceModel:
    """A model with the older variant's architecture, without dropout, and random weights that affect the scores."""
    torch.manual_seed(seed)
    vision, settings = SIZES[size]
    vision = {"model_type": "clip_vision_model", **vision}
    model = RiceModel(RiceConfig(vision_config=vision, decoder_dropout=0.0, **settings))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
    return model


def best_seconds(run: Callable[[], object], repeats: int, device: str) -> tuple[float, float]:
    """
    Minimum wall-clock seconds, and minimum CPU seconds over all threads, of `repeats` runs after one warm-up run.
    Compare CPU time, which other programs on the machine affect little.
    """
    times = []
    for _ in range(repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        times.append((time.perf_counter() - start, time.process_time() - cpu_start))
    wall, cpu = zip(*times[1:], strict=True)
    return min(wall), min(cpu)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class PeakMemory:
    """Peak memory of a block of code in bytes, beyond the memory at its start: `with PeakMemory(device) as p`."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            _forget_peak()
            self._start = _resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _resident("VmHWM")
        self.bytes = max(0, peak - self._start)


def _forget_peak() -> None:
    """Returns freed memory and resets the kernel's high-water mark, if the system allows it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass


def _resident(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def machine(device: str) -> dict[str, object]:
    """The machine and versions of a measurement."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    row: dict[str, object] = {"device": device, "torch": torch.__version__}
    if device.startswith("cuda"):
        return row | {"gpu": torch.cuda.get_device_name()}
    return row | {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
