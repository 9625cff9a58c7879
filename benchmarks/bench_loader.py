"""From JPEG to tensor: the collator's fast and exact modes and plain code, in one run.

    python benchmarks/bench_loader.py [--frames_dir FOLDER]

One JSON line per content and side. The plain side opens each frame with PIL, decodes the whole picture, resizes it
bicubically, and normalises it in float32, one frame at a time. The other sides are `RiceCollator.collate_queries`:
`exact`; `fast`, which decodes at reduced scale to uint8, as loader workers do in training; and `fast_with_normalize`,
which adds the normalisation of the device, on the CPU. Rates are per second of CPU time of one core, because loader
workers share only the disk. Encoded frames are read from memory.

Contents: `photo` are photographs from `--frames_dir` (cut to the size and encoded again); `leaves` is the dead leaves
model of natural pictures (opaque shaded discs whose radii follow a power law, with sensor noise); `noise` is
independent pixels, the worst case for the fast mode. `mean_difference` and `max_difference` compare the uint8 pictures
with PIL's bicubic resizing of the whole picture, in grey levels of 255.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from plain import measure

from data_rice.collator import RiceCollator
from data_rice.decoding import normalize_pixels
from data_rice.folders import list_pictures
from processing_rice import build_processor, train_tokenizer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--frames_dir", type=Path, help="folder of photographs, for the content `photo`")
    add("--width", type=int, default=540, help="width of a frame")
    add("--height", type=int, default=960, help="height of a frame")
    add("--image_size", type=int, default=224, help="side of the resized frames")
    add("--frames", type=int, default=10, help="frames of a clip")
    add("--clips", type=int, default=4, help="different clips; each timed run takes all of them")
    add("--quality", type=int, default=75, help="JPEG quality; PIL's default is 75")
    add("--repeats", type=int, default=5, help="timed runs; the fastest one counts")
    return parser.parse_args(arguments)


def draw_leaves(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Discs over discs, radii with density r^-3 between 1/240 and 1/2 of the width, back to front."""
    smallest, largest = max(width / 240, 1.0), width / 2
    share = rng.random(width * height // 200)
    radii = (share / largest**2 + (1 - share) / smallest**2) ** -0.5
    picture = np.full((height, width, 3), 128, dtype=np.float32)
    for radius in radii:
        x, y = rng.random() * width, rng.random() * height
        colour, slope = rng.uniform(20, 235, size=3), rng.normal(size=2) * 40
        left, right = int(max(0, x - radius)), int(min(width, x + radius + 2))
        top, bottom = int(max(0, y - radius)), int(min(height, y + radius + 2))
        rows, columns = np.mgrid[top:bottom, left:right]
        cover = np.clip(radius - np.hypot(columns - x, rows - y) + 0.5, 0, 1)[..., None]
        shade = colour + (((columns - x) * slope[0] + (rows - y) * slope[1]) / radius)[..., None]
        region = picture[top:bottom, left:right]
        region += cover * (shade - region)
    picture += rng.normal(size=picture.shape) * 3
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def make_frames(content: str, options: argparse.Namespace) -> list[bytes]:
    """JPEGs for all distinct clips; few pictures are drawn, then shifted and mirrored."""
    rng = np.random.default_rng(0)
    size = (options.width, options.height)
    if content == "photo":
        paths = list_pictures(options.frames_dir, below=True).pictures
        if not paths:
            raise SystemExit(f"bench_loader.py: error: {options.frames_dir} holds no picture")
        pictures = [ImageOps.fit(Image.open(path).convert("RGB"), size) for path in paths[:16]]
    elif content == "leaves":
        pictures = [draw_leaves(rng, *size) for _ in range(4)]
    else:
        pictures = [Image.fromarray(rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))]
    frames = []
    for i in range(options.frames * options.clips):
        picture = np.roll(pictures[i % len(pictures)], 17 * (i // len(pictures)), axis=0)
        buffer = io.BytesIO()
        Image.fromarray(picture[:, :: 1 - 2 * (i % 2)]).save(buffer, format="JPEG", quality=options.quality)
        frames.append(buffer.getvalue())
    return frames


def plain_resize(data: bytes, side: int) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def plain_clip(frames: list[bytes], side: int, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    """`(T, 3, side, side)` float32."""
    pictures = []
    for data in frames:
        pixels = np.asarray(plain_resize(data, side), dtype=np.float32) / 255
        pictures.append(torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy()))
    return torch.stack(pictures)


def best_cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of this process; unlike wall-clock they do not depend on what else the machine does."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times[1:])


def compare(content: str, options: argparse.Namespace) -> list[dict]:
    """One row per side."""
    frames, side = make_frames(content, options), options.image_size
    processor = build_processor(
        train_tokenizer(["a red mug", "blue shoe"] * 20, vocab_size=400), side, side // 7, options.frames
    )
    part = processor.video_processor
    mean, std = (np.array(values, dtype=np.float32) for values in (part.image_mean, part.image_std))
    starts = range(0, len(frames), options.frames)
    clips = [
        {
            "clip_id": str(start),
            "frames": [{"path": None, "bytes": data} for data in frames[start : start + options.frames]],
        }
        for start in starts
    ]
    exact = RiceCollator(processor, pixels="uint8")
    fast = RiceCollator(processor, decode="fast", pixels="uint8")

    def each_clip(collator: RiceCollator, finish: Callable = lambda inputs: inputs) -> None:
        for clip in clips:
            finish(collator.collate_queries([clip])[0])

    sides = {
        "plain": lambda: [plain_clip(frames[i : i + options.frames], side, mean, std) for i in starts],
        "exact": lambda: each_clip(RiceCollator(processor)),
        "fast": lambda: each_clip(fast),
        "fast_with_normalize": lambda: each_clip(fast, lambda inputs: normalize_pixels(inputs, processor)),
    }
    bicubic = np.stack([np.asarray(plain_resize(data, side)) for data in frames]).astype(np.int16)
    rows, plain_rate = [], 0.0
    for name, run in sides.items():
        rate = len(clips) / best_cpu_seconds(run, options.repeats)
        plain_rate = plain_rate or rate
        row = {
            "benchmark": "loader",
            "content": content,
            "side": name,
            "clips_per_core_second": round(rate, 3),
            "frames_per_core_second": round(rate * options.frames, 1),
            "speedup": round(rate / plain_rate, 2),
        }
        if name != "plain":
            inputs = (exact if name == "exact" else fast).collate_queries(clips)[0]
            pixels = inputs["pixel_values_videos"].flatten(0, 1).movedim(1, -1).numpy()
            difference = np.abs(pixels.astype(np.int16) - bicubic)
            row |= {"mean_difference": round(float(difference.mean()), 3), "max_difference": int(difference.max())}
        rows.append(row)
    kilobytes = round(sum(map(len, frames)) / len(frames) / 1024, 1)
    frame_size = [options.width, options.height]
    settings = {"frames": options.frames, "frame_size": frame_size, "image_size": side, "quality": options.quality}
    return [row | settings | {"kilobytes_per_frame": kilobytes} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    # A loader worker has one thread.
    torch.set_num_threads(1)
    for content in (["photo"] if options.frames_dir else []) + ["leaves", "noise"]:
        for row in compare(content, options):
            print(json.dumps(row | measure.machine("cpu")), flush=True)


if __name__ == "__main__":
    main()
