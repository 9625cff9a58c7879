"""`rice recognise` on a video: speed relative to real time, by encoder and precision.

    python benchmarks/bench_recognise.py [--sizes lite0 vit_b_32] [--precisions fp32 bf16] [--threads 2]

One JSON line per encoder and precision: seconds of video per second of work, from the file to the last segment, with
`--fps` frames per second and windows of 4 s every second, searched in a shop of `--shop` images. Weights and pictures
are random. Loading the model is not timed. Above 1, recognition is fast enough for a live stream.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plain import measure

from hub_rice.convolutions import speed_up
from hub_rice.precision import PRECISIONS, in_precision
from processing_rice import build_processor, train_tokenizer
from retrieval_rice.index import GalleryIndex
from retrieval_rice.recogniser import Recogniser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", choices=measure.SIZES, default=["lite0", "vit_b_32"])
    add("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    add("--seconds", type=int, default=60, help="length of the video")
    add("--fps", type=float, default=2.5, help="frames per second")
    add("--shop", type=int, default=100, help="images of the shop")
    add("--pixels", type=int, nargs=2, default=(540, 960), help="width and height of the video")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    return parser.parse_args(arguments)


def pictures(count: int, size: tuple[int, int]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (16, 9, 3), dtype=np.uint8)) for _ in range(count)]
    return [one.resize(size, Image.Resampling.BICUBIC) for one in noise]


def write_video(path: Path, seconds: int, size: tuple[int, int]) -> None:
    """25 frames per second of H.264, another picture every five seconds, moving."""
    import av

    shown = pictures(seconds // 5 + 1, size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(25 * seconds):
            pixels = np.roll(np.asarray(shown[number // 125]), number % 125, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))))
        container.mux(stream.encode())


def run(size: str, precision: str, video: Path, options: argparse.Namespace) -> dict[str, object]:
    model = measure.build_model(size).eval()
    side, patch = model.layout.image_size[0], getattr(model.config.vision_config, "patch_size", 32)
    processor = build_processor(train_tokenizer(["benchmark"] * 20), side, patch)
    speed_up(model)
    model = in_precision(model, precision)
    rows = [{"image_id": str(i), "image": one} for i, one in enumerate(pictures(options.shop, (120, 160)))]
    index = GalleryIndex.build(model, processor, rows, progress=False)
    recogniser = Recogniser(model, processor, index)
    start, cpu_start = time.perf_counter(), time.process_time()
    segments = len(list(recogniser.stream(video, fps=options.fps)))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "benchmark": "recognise",
        "size": size,
        "precision": precision,
        "times_real_time": round(options.seconds / seconds, 2),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "video_seconds": options.seconds,
        "fps": options.fps,
        "pixels": list(options.pixels),
        "shop": options.shop,
        "segments": segments,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench-recognise-") as folder:
        video = Path(folder, "video.mp4")
        write_video(video, options.seconds, tuple(options.pixels))
        for size in options.sizes:
            for precision in options.precisions:
                print(json.dumps(run(size, precision, video, options) | measure.machine("cpu")), flush=True)


if __name__ == "__main__":
    main()
