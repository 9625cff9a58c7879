"""Small files that claim, or unpack to, a very large size: refused quickly, in one sentence, without the memory."""

import json
import resource
import struct
import time
import zlib

import pytest

from processing_rice import open_image, read_video


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IDAT", zlib.compress(bytes(1000)))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + bytes(100)


def gif(width: int, height: int) -> bytes:
    image = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + image + b";"


def mjpeg_avi(side: int) -> bytes:
    """A video whose frames say that they are of `side` pixels a side."""
    av = pytest.importorskip("av")
    import io

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuvj420p"
        out.mux(stream.encode(av.VideoFrame(48, 48, "yuvj420p")))
        out.mux(stream.encode())
    data = buffer.getvalue().replace(struct.pack("<II", 48, 48), struct.pack("<II", side, side))
    sizes = [b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", one, one) for one in (48, side)]
    assert sizes[0] in data
    return data.replace(*sizes)


def read_gallery(path):
    from data_rice.shop_clips.shop_clips import read_gallery as read

    return read(str(path.parent))


def read_recipe(path):
    from training_rice.recipe import read_recipe as read

    return read(path, ["model", "dataset"])


def read_study(path):
    from evaluation_rice.study.definition import read_study as read

    return read(path)


def read_features(path):
    from modeling_rice import RiceGallery

    return RiceGallery.load(path)


def read_weights(path):
    from hub_rice.checkpoint import check_checkpoint

    (path.parent / "config.json").write_text("{}")
    check_checkpoint(path.parent)


def read_boxes(path):
    from data_rice.box_files import BoxFile

    return BoxFile(path)


def safetensors(shape: list[int], length: int | None = None) -> bytes:
    header = json.dumps({"embeds": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(4)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
DEEP, LONG = b"[" * 2_000_000, b'{"gallery_id": ' + b"9" * 2_000_000 + b"}\n"
BOMBS = {
    "png of 3.6 gigapixels": ("x.png", png(60_000, 60_000), open_image),
    "png of 2 ** 31 pixels a side": ("x.png", png(2**31 - 1, 2**31 - 1), open_image),
    "png with 300 MB of text": ("x.png", png(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))),
                                open_image),
    "bmp of 2.5 gigapixels": ("x.bmp", bmp(50_000, 50_000), open_image),
    "gif of 4.3 gigapixels": ("x.gif", gif(65_535, 65_535), open_image),
    "avi of 900 megapixels": ("x.avi", lambda: mjpeg_avi(30_000), read_video),
    "brackets in a gallery": ("gallery.jsonl", DEEP, read_gallery),
    "digits in a gallery": ("gallery.jsonl", LONG, read_gallery),
    "brackets in a box file": ("boxes.jsonl", DEEP, read_boxes),
    "a recipe of a billion laughs": ("recipe.yaml", LAUGHS.encode(), read_recipe),
    "a recipe of brackets": ("recipe.yaml", b"model: " + b"[" * 100_000, read_recipe),
    "a study of brackets": ("study.yaml", b"arms: " + b"[" * 100_000, read_study),
    "encodings of a terabyte": ("x.safetensors", safetensors([2**38]), read_features),
    "a header of 2 ** 62 bytes": ("x.safetensors", safetensors([1], 2**62), read_features),
    "weights of a terabyte": ("model.safetensors", safetensors([2**38]), read_weights),
    "weights with a header of 2 ** 62 bytes": ("model.safetensors", safetensors([1], 2**62), read_weights),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bomb", list(BOMBS))
def test_a_decompression_bomb_is_refused_quickly(bomb, tmp_path, count):
    name, data, read = BOMBS[bomb]
    (tmp_path / name).write_bytes(data() if callable(data) else data)
    before_kb, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((ValueError, OSError)) as refused:
        read(tmp_path / name)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    sentence = str(refused.value)
    assert "\n" not in sentence and len(sentence) < 1000 and (name in sentence or str(tmp_path) in sentence)
    assert grown_mb < 500 and time.process_time() - start_s < 10
    count("bombs refused", bomb)
