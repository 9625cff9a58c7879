"""A tiny model, and shops of coloured pictures to index."""

import io
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer


@pytest.fixture(scope="session")
def save_detector():
    """A function that saves an untrained detector in a folder and returns its path."""
    from retrieval_rice.detector.product_detector import build_detector

    def save(folder, seed: int = 0) -> str:
        torch.manual_seed(seed)
        model, processor = build_detector(32)
        model.config.score_threshold = 0.0
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def detector_dir(tmp_path_factory, save_detector):
    """An untrained detector, one for the tests of a file."""
    return save_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="session")
def index_processor():
    return build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20, vocab_size=400), 32, 8, 2)


@pytest.fixture
def text_config():
    """A small text encoder for `make_index_model`, which reads the tokens of `index_processor`."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"vocab_size": 400, "max_position_embeddings": 64} | sizes


@pytest.fixture
def make_index_model():
    """A function that builds a small model in eval mode, large enough in its weights to tell pictures apart."""

    def make(seed: int = 1, **overrides) -> RiceModel:
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        model = RiceModel(RiceConfig(vision_config=vision, projection_dim=16, decoder_num_heads=4, **overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def index_model(make_index_model):
    return make_index_model()


def draw(number: int, side: int = 32) -> Image.Image:
    """A smooth random picture, another one for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def make_shop_rows(tmp_path):
    """A function that writes pictures and returns gallery rows: livestreams "x" and "y" take turns."""

    def make(count: int = 10, folder: str = "pictures") -> list[dict]:
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = []
        for i in range(count):
            path = tmp_path / folder / f"p{i}.png"
            draw(i).save(path)
            row = {"image_id": f"p{i}", "live_id": "xy"[i % 2], "title": f"title {i}"}
            rows.append(row | {"image": {"path": str(path), "bytes": None}})
        return rows

    return make


@pytest.fixture
def shop(index_model, index_processor, make_shop_rows):
    """A model, its processor, ten rows, and clips that show the pictures of some numbers."""

    def clips(*numbers: int):
        videos = [[draw(number), draw(number).rotate(5)] for number in numbers]
        return index_model.encode_clips(**index_processor(videos=videos))

    return SimpleNamespace(
        model=index_model, processor=index_processor, rows=make_shop_rows(), clips=clips, make_rows=make_shop_rows
    )


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def demo_queries():
    """Ten clips, each of the product with its number; the first frame has a box, its left half."""
    return [
        {
            "clip_id": f"clip {i}",
            "live_id": "xy"[i % 2],
            "frames": [{"path": None, "bytes": png(draw(i).rotate(angle))} for angle in (0, 5)],
            "boxes": [[0.0, 0.0, 0.5, 1.0], None],
            "asr": f"this is title {i}",
            "relevant": [f"p{i}"],
        }
        for i in range(10)
    ]


@pytest.fixture
def demo(make_index_model, index_processor, make_shop_rows, demo_queries, tmp_path):
    """A demo whose model tells the pictures apart, of two shops with five products and clips each."""
    from retrieval_rice.demo.page import Demo
    from retrieval_rice.index import GalleryIndex

    # An untrained decoder knows nothing, so the embedding decides.
    model = make_index_model(fusion_weight=0.01)
    with torch.no_grad():
        for parameter in model.reconstruction_head.parameters():
            parameter.abs_()
    rows = make_shop_rows()
    (tmp_path / "uploads").mkdir()
    index = GalleryIndex.build(model, index_processor, rows, progress=False)
    return Demo(model, index_processor, index, rows, demo_queries, str(tmp_path / "uploads"))


@pytest.fixture
def save_frames(tmp_path):
    """A function that puts frames of a product where uploads arrive."""

    def save(number: int) -> list[str]:
        paths = [tmp_path / "uploads" / f"frame{i}.png" for i in range(2)]
        for path, angle in zip(paths, (0, 5)):
            draw(number).rotate(angle).save(path)
        return [str(path) for path in paths]

    return save


@pytest.fixture
def write_show(tmp_path):
    """
    A function that writes a video of single colours, one per second, with sound and a subtitle track where given, and
    returns its path. Sound is `(n,)` float at 16 kHz, from `sound_at` seconds on; cues are `(start, end, text)`.
    """
    av = pytest.importorskip("av")

    def write(name, colours, sound=None, sound_at=0.0, cues=(), codec="pcm_s16le", rate=10):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            video = container.add_stream("mpeg4", rate=rate)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
            heard = container.add_stream(codec, rate=16000, layout="mono") if sound is not None else None
            written = av.open(io.BytesIO(subrip(cues).encode())) if cues else None
            track = container.add_stream_from_template(written.streams.subtitles[0]) if cues else None
            for i in range(len(colours) * rate):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), colours[i // rate]))
                container.mux(video.encode(frame))
            container.mux(video.encode())
            for start in range(0, 0 if sound is None else len(sound), 1024):
                block = (np.clip(sound[start : start + 1024], -1, 1) * 32767).astype(np.int16)[None]
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
                frame.pts = round(sound_at * 16000) + start
                container.mux(heard.encode(frame))
            if heard is not None:
                container.mux(heard.encode(None))
            for packet in written.demux() if cues else ():
                if packet.dts is not None:
                    packet.stream = track
                    container.mux(packet)
        return path

    return write


def subrip(cues) -> str:
    from retrieval_rice.stream.timeline import clock

    spans = [f"{clock(start)} --> {clock(end)}".replace(".", ",") for start, end, _ in cues]
    return "".join(f"{i}\n{span}\n{text}\n\n" for i, (span, (_, _, text)) in enumerate(zip(spans, cues), 1))


def tones(*parts) -> np.ndarray:
    """Sound of `(loudness, seconds)` after each other."""
    times = [np.arange(round(16000 * seconds)) / 16000 for _, seconds in parts]
    return np.concatenate([level * np.sin(2 * np.pi * 440 * time) for (level, _), time in zip(parts, times)])


@pytest.fixture(name="tones")
def tones_fixture():
    return tones
