"""Fixtures of the data tests: small video files."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def write_video():
    """A function that writes an mp4 whose frame number i is flat grey of level 20 + 10 i (mod 240)."""
    av = pytest.importorskip("av")

    def write(
        path, num_frames: int = 20, fps: int = 5, size: tuple[int, int] = (64, 48), first_level: int = 20, **options
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("mpeg2video" if path.suffix == ".mpg" else "mpeg4", rate=fps)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for i in range(num_frames):
                picture = np.full((size[1], size[0], 3), (first_level + 10 * i) % 240, dtype=np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    return write


@pytest.fixture(scope="session")
def cut_after():
    """A function that cuts an mp4 whose directory stands at its start off after so many frames."""
    av = pytest.importorskip("av")

    def cut(path, num_frames: int):
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        path.write_bytes(path.read_bytes()[: packets[num_frames].pos])
        return path

    return cut
