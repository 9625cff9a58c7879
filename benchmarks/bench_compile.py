"""Cost and gain of compilation: a training step and inference, plain, with a compiled encoder, and fully compiled.

    python benchmarks/bench_compile.py
    python benchmarks/bench_compile.py --size lite0 --precisions bf16 --sides plain encoder

One JSON line per precision and side: "encoder" is `model.compile_encoder()`, as with `torch_compile` in the training
arguments; "model" is `torch.compile(model)`. Seconds are CPU time, including the compiler, with an empty cache.
"compile" is the extra time of the first inference and of the first steps, on batches of two sizes with different
numbers of real frames. "step" and "inference" (images of one batch) are the fastest of several runs. Graphs and breaks
are counted over the whole measurement.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext

import torch
from bench_train_step import make_batch
from plain import measure
from torch._dynamo.utils import counters

SIDES = ("plain", "encoder", "model")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="bf16 is autocast")
    add("--size", choices=measure.SIZES, default="vit_b_32")
    add("--batch_size", type=int, default=4, help="pairs, at least 4")
    add("--frames", type=int, default=4, help="frames per clip")
    add("--backend", default="inductor", help="back end of torch.compile")
    add("--repeats", type=int, default=3, help="timed runs; the fastest one counts")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    options = parser.parse_args(arguments)
    if options.batch_size < 4:
        parser.error("--batch_size must be at least 4, for three hard negatives.")
    return options


def cpu_seconds(run: Callable[[], object], device: str) -> float:
    """CPU time of a run, including the compilers that it started."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    run()
    measure.synchronize(device)
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))


def measure_side(options: argparse.Namespace, side: str, precision: str) -> dict[str, object]:
    device = options.device
    torch.compiler.reset()
    counters.clear()
    model = measure.build_model(options.size).to(device).train()
    if precision == "bf16" and device == "cpu":
        model.set_attn_implementation("eager")
    if side == "encoder":
        model.compile_encoder(backend=options.backend)
    elif side == "model":
        model.compile(backend=options.backend)
    batches = []
    for more, padding in ((0, 0.22), (2, 0.3)):
        sizes = argparse.Namespace(batch_size=options.batch_size + more, frames=options.frames, padding=padding)
        batch = make_batch(sizes, model.layout.image_size[0])
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    losses = []

    def autocast():
        return torch.autocast(device.split(":")[0], torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(batch):
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())

    @torch.no_grad()
    def infer():
        with autocast():
            model(pixel_values=batches[0]["pixel_values"])

    def compare(run: Callable[[], object]) -> tuple[float, float]:
        """Extra seconds of the first run, and seconds of the fastest run."""
        first = cpu_seconds(run, device)
        fastest = min(cpu_seconds(run, device) for _ in range(options.repeats))
        return first - fastest, fastest

    other, own = compare(lambda: step(batches[1])), compare(lambda: step(batches[0]))
    model.eval()
    inference = compare(infer)
    return {
        "compile_seconds": round(other[0] + own[0] + inference[0], 2),
        "step_seconds": round(own[1], 4),
        "inference_ms": round(1000 * inference[1] / options.batch_size, 3),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "loss": losses[-1],
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    # One process, so that the compilers' time is counted.
    torch._inductor.config.compile_threads = 1
    settings = {name: getattr(options, name) for name in ("size", "batch_size", "frames", "backend")}
    for precision in options.precisions:
        plain = None
        for side in options.sides:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                row = measure_side(options, side, precision)
            plain = row if side == "plain" else plain
            if plain is not None and side != "plain":
                row["step_speedup"] = round(plain["step_seconds"] / row["step_seconds"], 3)
                row["inference_speedup"] = round(plain["inference_ms"] / row["inference_ms"], 3)
                row["loss_difference"] = abs(plain["loss"] - row["loss"])
            row = {"benchmark": "compile", "side": side, "precision": precision} | settings | row
            print(json.dumps(row | measure.machine(options.device)), flush=True)


if __name__ == "__main__":
    main()
