"""PUT and DELETE /v1/shops/{live_id}/images."""

import io

import pytest
from PIL import Image

from retrieval_rice.index import GalleryIndex
from retrieval_rice.uploads import UploadLimits
from tests.retrieval_rice.service.pictures import draw, frame_files, png
from tests.retrieval_rice.service.test_recognise import refusal


def images(*numbers: int) -> list[tuple]:
    return [("images", (f"{number}.png", png(draw(number)))) for number in numbers]


def put(client, live_id: str, numbers, **data):
    return client.put(f"/v1/shops/{live_id}/images", files=images(*numbers), data=data)


def best(client, number: int, **data) -> dict:
    return client.post("/v1/recognise", files=frame_files(number), data=data).json()["hits"][0]


def test_images_are_found_after_writing(make_service):
    served = make_service()
    answer = put(served.client, "z", (30, 31), image_ids=["a", "b"], titles=["cup", "jug"], product_ids=["A", "B"])
    assert answer.status_code == 200
    body = answer.json()
    assert (body["images"], body["changed"], body["unreadable"], body["unknown"]) == (12, 2, [], [])
    hit = best(served.client, 31, live_id="z")
    assert [hit[name] for name in ("image_id", "product_id", "title", "live_id")] == ["b", "B", "jug", "z"]
    # Again with another picture, it is another one.
    assert put(served.client, "z", (40,), image_ids=["b"]).json()["images"] == 12
    assert best(served.client, 40)["image_id"] == "b"
    # As `rice index` would have encoded it.
    fresh = GalleryIndex.build(
        served.recogniser.model,
        served.recogniser.processor,
        [{"image_id": "b", "image": draw(40)}],
        progress=False,
    )
    clip = served.recogniser.model.encode_clips(**served.recogniser.processor(videos=[[draw(40)]]))
    ours = served.index.search(clip, "z", top_k=1)[0].hits[0]
    assert ours.embedding_score == pytest.approx(fresh.search(clip, top_k=1)[0].hits[0].embedding_score, abs=1e-6)


def test_an_image_leaves_one_livestream_and_stays_in_the_others(make_service):
    served = make_service()
    # p3 is sold in "y" already, and keeps its place and its encodings there.
    assert put(served.client, "x", (3,), image_ids=["p3"]).json()["images"] == 10
    before = best(served.client, 3, live_id="y")
    answer = served.client.request("DELETE", "/v1/shops/x/images", params={"image_id": ["p3", "p0", "p1", "none"]})
    body = answer.json()
    assert (body["images"], body["changed"], sorted(body["unknown"])) == (9, 2, ["none", "p1"])
    assert best(served.client, 3, live_id="y") == before
    assert best(served.client, 3, live_id="x")["image_id"] != "p3"
    assert served.index.records(["p3", "p0"])["p3"]["live_ids"] == ["y"] and "p0" not in served.index.records(["p0"])
    # A checksum that did not fit would be told here.
    assert len(GalleryIndex.load(served.index._table.uri, served.recogniser.model).search(_clips(served))) == 1


def _clips(served):
    return served.recogniser.model.encode_clips(**served.recogniser.processor(videos=[[draw(3)]]))


def test_damaged_pictures_are_named_and_the_others_written(make_service):
    served = make_service()
    cut = io.BytesIO()
    draw(31, 256).save(cut, format="JPEG")
    files = [*images(30), ("images", ("b.jpg", cut.getvalue()[:2000]))]
    answer = served.client.put("/v1/shops/z/images", files=files, data={"image_ids": ["a", "b"]})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["changed"] == 1 and [failure["image_id"] for failure in body["unreadable"]] == ["b"]
    assert "cannot be decoded" in body["unreadable"][0]["reason"] and best(served.client, 30)["image_id"] == "a"


def test_mistakes_get_a_sentence_and_change_nothing(make_service):
    served = make_service(limits=UploadLimits(max_pixels=10_000, max_files=2))
    client, version = served.client, served.index.version
    large = io.BytesIO()
    Image.new("RGB", (200, 100)).save(large, format="PNG")
    for status, words, answer in (
        (422, "images: Field required.", client.put("/v1/shops/z/images", data={"image_ids": "a"})),
        (422, "image_ids: Field required.", client.put("/v1/shops/z/images", files=images(1))),
        (422, "image_ids: there are 1 of them for 2 images", put(client, "z", (1, 2), image_ids=["a"])),
        (422, "titles: there are 1 of them for 2", put(client, "z", (1, 2), image_ids=["a", "b"], titles=["t"])),
        (422, "image_ids: every image needs its own id.", put(client, "z", (1, 2), image_ids=["a", "a"])),
        (422, "image_ids: every image needs its own id.", put(client, "z", (1, 2), image_ids=["a", ""])),
        (422, "product_ids: one is empty", put(client, "z", (1, 2), image_ids=["a", "b"], product_ids=["q", ""])),
        (422, "'title' is not a field of the form", put(client, "z", (1,), image_ids=["a"], title="mug")),
        (422, "'id' is not a field of the query here, which takes image_id",
              client.delete("/v1/shops/x/images", params={"image_id": "p0", "id": "p2"})),
        (422, "image_ids: one is longer than 2000", put(client, "z", (1,), image_ids=["a" * 3000])),
        (422, "live_id: String should have at most 200", put(client, "z" * 300, (1,), image_ids=["a"])),
        (413, "3 pictures are more than the maximum of 2", put(client, "z", (1, 2, 3), image_ids=["a", "b", "c"])),
        (422, "a is neither a picture", client.put("/v1/shops/z/images", files={"images": ("a", b"x")},
                                                   data={"image_ids": "a"})),
        (413, "a has 200 x 100 pixels", client.put("/v1/shops/z/images", files={"images": ("a", large.getvalue())},
                                                   data={"image_ids": "a"})),
        (422, "image_id: Field required.", client.delete("/v1/shops/x/images")),
    ):  # fmt: skip
        assert refusal(answer, status).startswith(words)
    body = client.delete("/v1/shops/x/images", params={"image_id": "none"}).json()
    assert body["changed"] == 0 and body["unknown"] == ["none"]
    assert served.index.version == version


def test_changes_of_other_replicas_appear_in_the_metrics(make_service):
    served = make_service()
    put(served.client, "z", (30,), image_ids=["a"])
    text = served.client.get("/metrics").text
    assert "rice_index_images 11.0" in text and f"rice_index_version {served.index.version}.0" in text
    ready = served.client.get("/readyz").json()
    assert ready == {"ready": True, "images": 11, "version": served.index.version, "precision": "fp32"}


def test_an_unreadable_index_is_not_ready(make_service, monkeypatch):
    served = make_service()

    def fail(self):
        raise ValueError("the index /secret is damaged")

    monkeypatch.setattr(type(served.index), "__len__", fail)
    assert refusal(served.client.get("/readyz"), 503).startswith("The index cannot be read")
