"""From photographs of a shop to encodings: `rice index` in fp32, bf16 and int8, and a user's code with CLIP.

    python benchmarks/bench_index.py [--photographs 300] [--pixels 960] [--threads 2]

One JSON line per side, each measured in a fresh process, from the files to the finished index or tensor; imports,
loading the model and exporting are not timed. All sides get the same JPEG files and, but for int8, the same random
weights of ViT-B/32. `transformers` is `CLIPImageProcessor` and `CLIPVisionModelWithProjection` in batches of pictures
opened by PIL. CPU time, that of the workers included, is what can be compared on a machine that does other things too.
`rice index` reads, checks and digests every file, and writes a table that is searched afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("transformers", "rice fp32", "rice bf16", "rice onnx fp32", "rice int8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--photographs", type=int, default=300)
    add("--pixels", type=int, default=960, help="longer side of a photograph in pixels")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--size", choices=("vit_b_32", "tiny"), default="vit_b_32")
    add("--batch_size", type=int, default=16, help="of both sides (default: %(default)s)")
    add("--num_workers", type=int, default=(os.cpu_count() or 1) // 4, help="decoding processes of `rice index`")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def draw_photographs(folder: Path, count: int, pixels: int) -> None:
    """JPEG files with structure at all scales, which take about as long to decode as photographs."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        size = (pixels, pixels * 3 // 4)
        picture = np.zeros((size[1], size[0], 3), np.float32)
        for side in (8, 40, 200):
            noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) / 3
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """The photographs, a checkpoint, and its export."""
    from plain import measure

    from hub_rice.export.onnx_export import export
    from processing_rice import build_processor, train_tokenizer

    draw_photographs(folder / "photographs", options.photographs, options.pixels)
    model = measure.build_model(options.size).eval()
    vision = model.config.vision_config
    processor = build_processor(train_tokenizer(["benchmark"] * 20), vision.image_size, vision.patch_size)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    if any("onnx" in side or "int8" in side for side in options.sides):
        export(model, processor, folder / "towers", int8=True, quiet=True)


def clock() -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of this process and its finished children."""
    return time.perf_counter(), sum(os.times()[:4])


def since(start: tuple[float, float]) -> list[float]:
    return [now - then for now, then in zip(clock(), start)]


def run_transformers(options: argparse.Namespace, files: list[Path], side: str) -> list[float]:
    """Wall-clock and CPU seconds of a user's code."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    from hub_rice.loading import load_model

    config = load_model(options.folder / "model", "cpu")[0].config.vision_config
    model = CLIPVisionModelWithProjection(config).eval()
    pixels = config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}, do_center_crop=True
    )
    start, parts = clock(), []
    with torch.no_grad():
        for first in range(0, len(files), options.batch_size):
            pictures = [Image.open(file) for file in files[first : first + options.batch_size]]
            parts.append(model(**processor(images=pictures, return_tensors="pt")).image_embeds)
    torch.cat(parts)
    return since(start)


def run_rice(options: argparse.Namespace, files: list[Path], side: str) -> list[float]:
    """Wall-clock and CPU seconds of `rice index`."""
    from retrieval_rice.index import GalleryIndex
    from retrieval_rice.index.table import lancedb
    from retrieval_rice.options import open_model

    lancedb()
    is_exported = side in ("rice onnx fp32", "rice int8")
    chosen = argparse.Namespace(
        model=options.folder / "model",
        device="cpu",
        precision=side.split()[-1],
        towers=options.folder / "towers" if is_exported else None,
    )
    model, processor = open_model(chosen)
    rows = [{"image_id": file.name, "image": str(file)} for file in files]
    start = clock()
    settings = {"batch_size": options.batch_size, "num_workers": options.num_workers, "progress": False}
    GalleryIndex.build(model, processor, rows, output_dir=str(options.folder / side.replace(" ", "-")), **settings)
    return since(start)


def run_side(options: argparse.Namespace) -> dict[str, object]:
    import torch
    from plain import measure

    if options.threads:
        torch.set_num_threads(options.threads)
    files = sorted((options.folder / "photographs").iterdir())
    is_rice = options.side != "transformers"
    run = run_rice if is_rice else run_transformers
    seconds, cpu_seconds = run(options, files, options.side)
    row = {
        "benchmark": "index",
        "side": options.side,
        "photographs": len(files),
        "pixels": options.pixels,
        "seconds": round(seconds, 3),
        "ms_per_photograph": round(1000 * seconds / len(files), 2),
        "cpu_ms_per_photograph": round(1000 * cpu_seconds / len(files), 2),
        "num_workers": options.num_workers if is_rice else 0,
        "batch_size": options.batch_size,
        "size": options.size,
    }
    return row | measure.machine("cpu")


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.side:
        print(json.dumps(run_side(options)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="bench-index-") as folder:
        prepare(options, Path(folder))
        for side in options.sides:
            command = [sys.executable, __file__, "--side", side, "--folder", folder, "--pixels", str(options.pixels)]
            command += ["--size", options.size, "--batch_size", str(options.batch_size)]
            command += ["--num_workers", str(options.num_workers)]
            command += ["--threads", str(options.threads)] if options.threads else []
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(result.stdout.splitlines()[-1])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
