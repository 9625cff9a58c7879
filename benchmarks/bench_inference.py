"""Encoding and scoring in torch (fp32, bf16, compiled) and onnxruntime (fp32, int8), in one run.

    python benchmarks/bench_inference.py [--size lite0] [--device cuda]

One JSON line per variant: milliseconds per shop image, per clip and per pair of a clip and an image, the largest
differences to torch in fp32, and the size of the weights. All variants get the same pixels, as frames without padding.
The ONNX files hold the encoder twice, for images and for clips; they run on the CPU only. Compiling and exporting are
not timed. For an encoder with batch norms (`--size lite0`), "folded" means folded batch norms and channels-last
layout, as in the commands. Weights are random; `rice export --int8 --evaluate` measures the recall of int8, and
bench_precision.py the effect of each precision.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from plain import measure
from torch import Tensor

from hub_rice.convolutions import speed_up
from hub_rice.export.onnx_export import export
from hub_rice.export.onnx_model import OnnxRice
from hub_rice.export.towers import towers
from processing_rice import build_processor, train_tokenizer

VARIANTS = ("torch fp32", "torch bf16", "torch compiled", "onnx fp32", "onnx int8")
FOLDED = ("torch fp32 folded", "torch bf16 folded")
Run = Callable[..., list[Tensor]]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS + FOLDED, help="default: all that the device supports")
    add("--batch_size", type=int, default=16, help="images per batch")
    add("--clips", type=int, default=2, help="clips per batch")
    add("--frames", type=int, default=10, help="frames per clip")
    add("--pairs", type=int, default=1000, help="images that one clip is scored against")
    add("--repeats", type=int, default=5, help="timed runs; the fastest one counts")
    add("--size", choices=measure.SIZES, default="vit_b_32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    options = parser.parse_args(arguments)
    if options.variants is None:
        known = VARIANTS + FOLDED * (options.size == "lite0")
        options.variants = [name for name in known if options.device == "cpu" or name.startswith("torch")]
    elif options.device != "cpu" and any(name.startswith("onnx") for name in options.variants):
        parser.error("the ONNX variants run on --device cpu only.")
    return options


def make_inputs(options: argparse.Namespace, model) -> dict[str, tuple[Tensor, ...]]:
    """Random inputs of the three parts."""
    (height, side), width = model.layout.image_size, model.config.decoder_hidden_size
    tokens = options.frames * (1 + model.config.num_patches)
    index = torch.arange(options.clips * options.frames).reshape(options.clips, options.frames)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    draws = (torch.randn(1, tokens, width), torch.randn(1, tokens, width), mask)
    inputs = {
        "image": (torch.randn(options.batch_size, 3, height, side),),
        "video": (
            torch.randn(options.clips * options.frames, 3, height, side),
            index,
            torch.ones_like(index, dtype=torch.bool),
        ),
        "pairs": (torch.randn(options.pairs, width), *draws),
    }
    return {name: tuple(tensor.to(options.device) for tensor in tensors) for name, tensors in inputs.items()}


def variants(options: argparse.Namespace, model, folder: Path) -> Iterator[tuple[str, dict[str, Run], float]]:
    """Name, function of each part, and megabytes."""
    megabytes = sum(p.nbytes for p in model.parameters()) / 1e6
    if any(name.startswith("onnx") for name in options.variants):
        side, patch = model.layout.image_size[0], getattr(model.config.vision_config, "patch_size", 32)
        processor = build_processor(train_tokenizer(["benchmark"] * 20), side, patch)
        export(model, processor, folder, int8="onnx int8" in options.variants)
    for name in options.variants:
        if name.startswith("torch") and name != "torch compiled":
            used, is_half = copy.deepcopy(model), "bf16" in name
            if name in FOLDED:
                speed_up(used)
            parts = parts_of(used.to(torch.bfloat16) if is_half else used)
            if is_half:
                parts = {part: in_half(tower) for part, tower in parts.items()}
            yield name, parts, megabytes / (2 if is_half else 1)
        elif name == "torch compiled":
            torch.compiler.reset()
            compiled = {p: torch.compile(tower, fullgraph=True, dynamic=False) for p, tower in parts_of(model).items()}
            yield name, compiled, megabytes
        else:
            onnx = OnnxRice(folder, int8=name == "onnx int8")
            ending = "_int8.onnx" if name == "onnx int8" else ".onnx"
            files = [folder / f"{part}{ending}" for part in onnx.sessions]
            parts = {part: lambda *inputs, part=part: onnx.run(part, *inputs) for part in onnx.sessions}
            yield name, parts, sum(file.stat().st_size for file in files) / 1e6


def parts_of(model) -> dict[str, Run]:
    """The measured parts, which include the encoder."""
    return {name: tower for name, tower in towers(model).items() if name != "encoder"}


def in_half(tower) -> Run:
    """Runs with features in half precision; the model casts pixels itself."""

    def run(*inputs: Tensor) -> list[Tensor]:
        if len(inputs) == 4:
            inputs = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in inputs]
        return [output.float() for output in tower(*inputs)]

    return run


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    # TensorFloat-32 would round the reference of the comparison.
    torch.set_float32_matmul_precision("highest")
    model = measure.build_model(options.size).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.to(options.device)
        inputs = make_inputs(options, model)
        expected = {name: tower(*inputs[name])[0] for name, tower in parts_of(model).items()}
        counts = {"image": options.batch_size, "video": options.clips, "pairs": options.pairs}
        for name, parts, megabytes in variants(options, model, Path(folder)):
            times, differences = {}, {}
            for part, run in parts.items():
                found = run(*inputs[part])[0]
                differences[part] = (found - expected[part]).abs().max().item()
                seconds = measure.best_seconds(lambda: run(*inputs[part]), options.repeats, options.device)
                times[part] = [1000 * value / counts[part] for value in seconds]
            row = {
                "benchmark": "inference",
                "variant": name,
                "ms_per_image": round(times["image"][0], 4),
                "ms_per_clip": round(times["video"][0], 4),
                "ms_per_pair": round(times["pairs"][0], 6),
                "cpu_ms_per_image": round(times["image"][1], 4),
                "cpu_ms_per_clip": round(times["video"][1], 4),
                "cpu_ms_per_pair": round(times["pairs"][1], 6),
                "embedding_difference": max(differences["image"], differences["video"]),
                "score_difference": differences["pairs"],
                "megabytes": round(megabytes, 1),
                "batch_size": options.batch_size,
                "clips": options.clips,
                "frames": options.frames,
                "pairs": options.pairs,
                "size": options.size,
            }
            print(json.dumps(row | measure.machine(options.device)), flush=True)


if __name__ == "__main__":
    main()
