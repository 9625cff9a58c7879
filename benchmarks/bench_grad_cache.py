"""Peak memory of a training step: the plain step at growing batches, and GradCache at a larger batch.

    python benchmarks/bench_grad_cache.py
    python benchmarks/bench_grad_cache.py --device cuda --size vit_b_32 --precision bf16 --plain 64 128 256

One JSON line per step, each in its own process, so that the peak memory is separate. Memory counts from a state with
model, gradients and batch. On a GPU the batch of GradCache is in main memory and is moved in chunks; the batch of the
plain step is on the device. `bound_mb` is the expected maximum of GradCache: the measured peak of the plain step on a
batch of one chunk, plus `kept_mb`, computed from sizes (training_rice/grad_cache.py). `loss_difference` is relative to
the plain step on the same batch.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from plain import measure
from transformers import CLIPVisionConfig

from modeling_rice import RiceConfig, RiceModel
from training_rice.grad_cache import GradCache

LOSSES = {
    "icl": {"use_decoder": False},
    "icl_pmd_all": {"matching_negatives": "all", "use_reconstruction": False},
    "icl_pmd_pfr": {"matching_negatives": "hardest"},
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch_size", type=int, default=4096, help="pairs of GradCache's large step")
    add("--plain", type=int, nargs="+", default=[64, 256, 1024], help="pairs of plain steps, also run with GradCache")
    add("--chunk", type=int, default=64, help="pairs per chunk, at least 4")
    add("--frames", type=int, default=2, help="frames per clip")
    add("--losses", nargs="+", choices=LOSSES, default=["icl", "icl_pmd_pfr"])
    add("--size", choices=measure.SIZES, default="tiny")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--pair_memory", type=int, default=32, help="MB for intermediate results of the decoder's pairs")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--measure", choices=("plain", "grad_cache"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.chunk, *options.plain) < 4 or options.frames < 1:
        parser.error("batches and --chunk must be at least 4, for three hard negatives, and --frames at least 1")
    return options


def make_batch(size: int, frames: int, side: int) -> dict[str, torch.Tensor]:
    """Random pictures in half precision, to save memory; the model casts them."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(size, 3, side, side, generator=generator).half(),
        "pixel_values_videos": torch.randn(size, frames, 3, side, side, generator=generator).half(),
    }


def measure_step(options: argparse.Namespace) -> dict[str, object]:
    """Seconds, peak memory and loss of one step in this process."""
    device, side, batch_size = options.device, options.measure, options.batch_size
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vision, settings = measure.SIZES[options.size]
    settings = settings | LOSSES[options.losses[0]] | {"decoder_dropout": 0.0, "logit_scale_init_value": 10.0}
    model = RiceModel(RiceConfig(vision_config=CLIPVisionConfig(**vision), **settings)).to(device).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def autocast():
        kind = device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16) if options.precision == "bf16" else nullcontext()

    def to_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in batch.items()}

    cache = GradCache(options.chunk, autocast, to_device, options.pair_memory * 2**20)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if side == "grad_cache":
            return cache(model, batch).loss
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    image_size = model.config.vision_config.image_size
    # The first step selects kernels.
    step(to_device(make_batch(4, options.frames, image_size)))
    batch = make_batch(batch_size, options.frames, image_size)
    if side == "plain":
        batch = to_device(batch)
    with measure.PeakMemory(device) as peak:
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(batch)
        measure.synchronize(device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    kept = cache.kept_bytes(model.config, batch_size) if side == "grad_cache" else {}
    return {
        "side": side,
        "losses": options.losses[0],
        "batch_size": batch_size,
        "chunk": options.chunk if side == "grad_cache" else None,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "clips_per_second": round(batch_size / seconds, 2),
        "peak_memory_mb": round(peak.bytes / 2**20, 1),
        "kept_mb": round(sum(kept.values()) / 2**20, 1) if kept else None,
        "loss": loss.item(),
    } | measure.machine(device)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.measure:
        print(json.dumps(measure_step(options)))
        return
    plain_sizes = sorted({options.chunk, *options.plain})
    for losses in options.losses:
        plain: dict[int, dict] = {}
        steps = [("plain", size) for size in plain_sizes]
        steps += [("grad_cache", size) for size in sorted({*plain_sizes[1:], options.batch_size})]
        for side, size in steps:
            command = [sys.executable, __file__, *arguments, "--losses", losses, "--batch_size", str(size)]
            result = subprocess.run([*command, "--measure", side], capture_output=True, text=True)
            if result.returncode:
                # A step that does not fit into memory is a result, too.
                error = result.stderr.strip().splitlines()[-1:] or ["killed"]
                row = {"side": side, "losses": losses, "batch_size": size, "error": error[0][:200]}
            else:
                row = json.loads(result.stdout.splitlines()[-1])
                if side == "plain":
                    plain[size] = row
                elif options.chunk in plain:
                    row["bound_mb"] = round(plain[options.chunk]["peak_memory_mb"] + row["kept_mb"], 1)
                if side == "grad_cache" and size in plain:
                    row["loss_difference"] = abs(row["loss"] - plain[size]["loss"])
            settings = {name: getattr(options, name) for name in ("size", "frames", "precision")}
            print(json.dumps({"benchmark": "grad_cache"} | settings | row), flush=True)


if __name__ == "__main__":
    main()
