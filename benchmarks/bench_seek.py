"""Reading five frames early and late in a long video: with the reader, which seeks, and by decoding from the start.

    python benchmarks/bench_seek.py [--minutes 20] [--container mp4]

One JSON line per side and position: wall-clock seconds including opening the file, and the number of decoded frames.
The video is rendered first: H.264 with a key frame every ten seconds, without sound. The early range starts ten
seconds after the start, the late range ten seconds before the end.
"""

import argparse
import json
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from plain import measure

from processing_rice import sample_frame_indices
from processing_rice.video_media_rice import VideoReader

FRAMES = 5
RANGE_S = 4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="length of the video")
    add("--fps", type=int, default=25, help="frames per second")
    add("--side", type=int, default=320, help="width of a frame in pixels; the height is 9/16 of it")
    add("--container", choices=("mp4", "mkv", "ts"), default="mp4")
    add("--repeats", type=int, default=5, help="timed runs; the fastest one counts")
    return parser.parse_args(arguments)


def render(path: Path, options: argparse.Namespace) -> None:
    """A moving pattern, so that all frames of a range differ."""
    height = options.side * 9 // 16 // 2 * 2
    pattern = np.random.default_rng(0).integers(0, 256, (height // 8, options.side // 8, 3), dtype=np.uint8)
    pattern = pattern.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=options.fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = pattern.shape[1], pattern.shape[0], "yuv420p"
        stream.codec_context.gop_size = 10 * options.fps
        for i in range(round(60 * options.minutes * options.fps)):
            frame = av.VideoFrame.from_ndarray(np.roll(pattern, i, axis=1), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, options.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def by_seeking(path: Path, start: float) -> tuple[np.ndarray, int]:
    """Frames of the range, and the number of decoded frames."""
    with VideoReader({"path": path, "start": start, "end": start + RANGE_S}) as video:
        frames = video.frames(sample_frame_indices(len(video), FRAMES))
        return np.stack([frame.picture for frame in frames]), video.num_decoded


def from_the_start(path: Path, start: float) -> tuple[np.ndarray, int]:
    """The same, by decoding all earlier frames."""
    shown, decoded = [], 0
    with av.open(str(path)) as container:
        first = container.start_time / 1e6
        for frame in container.decode(video=0):
            decoded += 1
            if frame.time - first >= start + RANGE_S - 1e-3:
                break
            if frame.time - first >= start - 1e-3:
                shown.append(frame)
        chosen = sample_frame_indices(len(shown), FRAMES)
        return np.stack([shown[i].to_ndarray(format="rgb24") for i in chosen]), decoded


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"long.{options.container}"
        render(path, options)
        for start in (10.0, 60 * options.minutes - 10):
            expected, _ = from_the_start(path, start)
            for side, read in (("from the start", from_the_start), ("seeking", by_seeking)):
                frames, decoded = read(path, start)
                wall, cpu = measure.best_seconds(lambda: read(path, start), options.repeats, "cpu")
                row = {
                    "benchmark": "seek",
                    "side": side,
                    "start_s": start,
                    "seconds": round(wall, 4),
                    "cpu_seconds": round(cpu, 4),
                    "decoded_frames": decoded,
                    "max_difference": int(np.abs(frames.astype(int) - expected).max()),
                    "minutes": options.minutes,
                    "container": options.container,
                    "megabytes": round(path.stat().st_size / 1e6, 1),
                }
                print(json.dumps(row | measure.machine("cpu")), flush=True)


if __name__ == "__main__":
    main()
