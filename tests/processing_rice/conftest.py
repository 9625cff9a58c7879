"""Pictures as files, a short video, and a small processor."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from processing_rice import build_processor, train_tokenizer


@pytest.fixture
def make_picture():
    """A function that draws a smooth random RGB picture as a (height, width, 3) uint8 array."""

    def make(height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray:
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return np.array(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))

    return make


@pytest.fixture
def make_video(tmp_path):
    """A function that writes an mp4 whose frame i is a flat grey of level 20 + 10 * i, and returns its path."""
    av = pytest.importorskip("av")

    def make(num_frames: int = 20, fps: int = 5, name: str = "clip.mp4"):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(num_frames):
                picture = np.full((48, 64, 3), 20 + 10 * i, dtype=np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["a red cup", "buy this blue cup", "红色连衣裙", "a green dress 50ml"], vocab_size=400)


@pytest.fixture(scope="session")
def processor(tokenizer):
    return build_processor(tokenizer, image_size=32, patch_size=8, num_frames=4)
