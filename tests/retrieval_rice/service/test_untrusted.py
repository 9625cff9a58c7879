"""Any request gets an answer or an error of one sentence, and never an internal error."""

import io
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.retrieval_rice.service.pictures import draw, frame_files, png
from tests.retrieval_rice.service.test_recognise import refusal


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


PICTURES = {
    "1 pixel": png(Image.new("RGB", (1, 1))),
    "16 bits": png(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200)),
    "transparent": png(Image.new("RGBA", (8, 8))),
    "a palette": png(Image.new("P", (8, 8))),
    "cmyk": encoded(Image.new("CMYK", (8, 8)), "JPEG"),
    "gif": encoded(Image.new("P", (8, 8)), "GIF"),
    "webp": encoded(Image.new("RGB", (8, 8)), "WEBP"),
}
FILES = {
    "a line": png(Image.new("1", (1, 300_000))),
    "floats beyond white": encoded(Image.fromarray(np.full((8, 8), 7.5, np.float32)), "TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "avi": b"RIFF\x10\0\0\0AVI LIST" + bytes(100),
    "mkv": b"\x1a\x45\xdf\xa3" + bytes(200),
}


def test_pictures_of_any_kind(make_service):
    pytest.importorskip("av", reason="needs PyAV")
    client = make_service().client
    for data in PICTURES.values():
        answer = client.post("/v1/recognise", files=[("frames", ("x", data))])
        assert answer.status_code == 200 and len(answer.json()["hits"]) == 10, answer.text
    for data in FILES.values():
        assert refusal(client.post("/v1/recognise", files=[("frames", ("x", data))]), 422).startswith("file 1 ")


def test_ids_and_titles_of_any_kind(make_service):
    client = make_service().client
    names = ("\x00", "a\x00b", "'", "' OR 1=1 --", '"', "\\", "é" * 100, "\u202e", "😀", " ", "../x", "a/b", "\x7f")
    for name in names:
        at = f"/v1/shops/{quote(name, safe='')}/images"
        assert "no images of livestream" in refusal(
            client.post("/v1/recognise", files=frame_files(1), data={"live_id": name}), 404
        )
        data = {"image_ids": [name], "titles": [name], "product_ids": [name]}
        assert client.put(at, files=[("images", ("x", png(draw(1))))], data=data).json()["changed"] == 1
        hit = client.post("/v1/recognise", files=frame_files(1), data={"live_id": name}).json()["hits"][0]
        assert [hit[kind] for kind in ("image_id", "title", "product_id", "live_id")] == [name] * 4
        assert client.request("DELETE", at, params={"image_id": name}).json()["changed"] == 1


@pytest.mark.parametrize("number", ["1e3", "٣", "9" * 5000, "-1", "NaN", "true", "0x10", "1.5"])
def test_invalid_numbers(make_service, number):
    answer = make_service().client.post("/v1/recognise", files=frame_files(1), data={"top_k": number})
    assert refusal(answer, 422).startswith("top_k: ")


def test_bodies_that_are_not_forms(make_service):
    client = make_service().client
    part = b"--x\r\nContent-Disposition: form-data; name="
    bodies = (
        b"", b"--x\r\n", b"\xff" * 100, b"%ff%fe=%00&url=%00", part + b'"clip"\r\n\r\nabc\r\n--x--\r\n',
        part + b'"live_id"\r\n\r\n\xff\xfe\r\n--x--\r\n',
        part + b'"frames"; filename="\xff\x00/../../etc"\r\n\r\nabc\r\n--x--\r\n',
    )  # fmt: skip
    for kind in ("multipart/form-data; boundary=", "multipart/form-data; boundary=x", "text/plain", "application/json",
                 'multipart/form-data; boundary="x', "application/x-www-form-urlencoded"):  # fmt: skip
        for body in bodies:
            answer = client.post("/v1/recognise", content=body, headers={"content-type": kind})
            assert answer.status_code in (400, 403, 422)
            refusal(answer, answer.status_code)
    many = client.post("/v1/recognise", files=[("frames", (str(i), b"x")) for i in range(1500)])
    assert refusal(many, 400) == "Too many files. Maximum number of files is 1000."
    assert client.post("/v1/recognise", files=frame_files(1)).status_code == 200


@pytest.mark.parametrize("number", ["-1", "x", "1e9", "9" * 400])
def test_events_after_none(make_service, number):
    answer = make_service().client.get("/v1/streams/x/events", headers={"last-event-id": number})
    assert answer.status_code in (404, 422)
    refusal(answer, answer.status_code)
