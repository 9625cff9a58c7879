"""POST /v1/recognise answers as the recogniser does, and tells mistakes in one sentence."""

import io

import pytest
from PIL import Image


def draw(number, side=32):
    import numpy as np

    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def frames(number):
    return [("frames", (f"{i}.png", png(draw(number).rotate(angle)))) for i, angle in enumerate((0, 5))]


def test_answer(make_service):
    served = make_service()
    r = served.client.post("/v1/recognise", files=frames(3))
    print(r.status_code, r.text)
    direct = served.recogniser.recognise([draw(3), draw(3).rotate(5)])
    body = r.json()
    assert [h["image_id"] for h in body["hits"]] == [h.image_id for h in direct.hits]
    assert [h["score"] for h in body["hits"]] == pytest.approx([h.score for h in direct.hits], abs=1e-5)
    print(served.client.get("/metrics").text[:3000])
    print(served.client.get("/openapi.json").text[:1500])
    print(served.client.get("/readyz").text)
    r = served.client.put(
        "/v1/shops/x/images", files=[("images", ("a.png", png(draw(77))))], data={"image_ids": ["new"]}
    )
    print(r.status_code, r.text)
    r = served.client.request("DELETE", "/v1/shops/x/images", params={"image_id": ["new", "nope"]})
    print(r.status_code, r.text)
