"""POST /v1/recognise: answers equal those of the recogniser, and mistakes get one sentence."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from retrieval_rice.uploads import UploadLimits
from tests.retrieval_rice.service.pictures import draw, frame_files, png

PRIVATE = {"image"}
TEXT = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 16, "max_position_embeddings": 64}


def refusal(answer, status: int) -> str:
    """The one sentence of a refusal."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    words = answer.json()["error"]
    assert words.endswith(".") and "\n" not in words and "/tmp" not in words and "Traceback" not in words
    return words


def assert_same(body: dict, answer) -> None:
    """A body says what the index says."""
    assert [hit["image_id"] for hit in body["hits"]] == [hit.image_id for hit in answer.hits]
    for told, hit in zip(body["hits"], answer.hits):
        assert told.keys() == vars(hit).keys() - PRIVATE
        for name, value in told.items():
            assert value == (pytest.approx(vars(hit)[name], abs=1e-5) if isinstance(value, float) else vars(hit)[name])
    assert body["confidence"] == pytest.approx(answer.confidence, abs=1e-5)
    assert body["no_product"] == answer.no_product


@pytest.fixture
def make_video(tmp_path):
    """A function that writes an MP4 of one second that shows the picture of a number."""
    av = pytest.importorskip("av", reason="needs PyAV")

    def make(number: int, frames: int = 10):
        path = tmp_path / f"clip{number}-{frames}.mp4"
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for i in range(frames):
                frame = av.VideoFrame.from_image(draw(number, 64).rotate(i))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


def test_frames_get_the_answer_of_the_recogniser(make_service):
    served = make_service()
    for number, live_id, top_k in ((3, None, 10), (4, "x", 2)):
        data = {"top_k": top_k} | ({"live_id": live_id} if live_id else {})
        answer = served.client.post("/v1/recognise", files=frame_files(number), data=data)
        direct = served.recogniser.recognise([draw(number), draw(number).rotate(5)], live_id=live_id, top_k=top_k)
        assert answer.status_code == 200 and answer.json()["hits"][0]["image_id"] == f"p{number}"
        assert_same(answer.json(), direct)
        assert set(answer.json()["timings"]) == {"read_ms", "wait_ms", "encode_ms", "search_ms"}


def test_frames_keep_the_order_in_which_they_are_sent_and_too_many_are_sampled(make_service):
    served = make_service()
    # Of seven pictures the model looks at two; their names would sort otherwise.
    pictures = [draw(number) for number in (9, 2, 3, 1, 5, 6, 0)]
    files = [("frames", (f"{name}.png", png(picture))) for name, picture in zip("gfedcba", pictures)]
    assert_same(served.client.post("/v1/recognise", files=files).json(), served.recogniser.recognise(pictures))


def test_a_video_gets_the_answer_of_the_recogniser(make_service, make_video):
    served = make_service()
    for path in (make_video(6), make_video(7, frames=1)):
        answer = served.client.post("/v1/recognise", files={"clip": ("any name", path.read_bytes())})
        assert_same(answer.json(), served.recogniser.recognise(path))


def test_clips_of_one_batch_are_answered_as_single_clips(make_service):
    served = make_service(wait_s=0.3)
    numbers = (1, 2, 3, 4, 5)
    lives = {1: None, 2: "x", 3: "y", 4: None, 5: None}

    def ask(number: int) -> dict:
        data = {"live_id": lives[number]} if lives[number] else {}
        # Of different length, and with another number of hits.
        return served.client.post(
            "/v1/recognise", files=frame_files(number)[: 1 + number % 2], data={**data, "top_k": 1 + number % 2}
        ).json()

    with ThreadPoolExecutor(5) as pool:
        bodies = list(pool.map(ask, numbers))
    for number, body in zip(numbers, bodies):
        pictures = [draw(number), draw(number).rotate(5)][: 1 + number % 2]
        live, top_k = lives[number], 1 + number % 2
        assert_same(body, served.recogniser.recognise(pictures, live_id=live, top_k=top_k))
    text = served.client.get("/metrics").text
    assert "rice_batch_clips_sum 25.0" in text and "rice_batch_clips_count 5.0" in text


def test_asr_counts_for_a_model_that_reads_text(make_service):
    settings = {"fusion_weight": 0.7, "fused_text_weight": 4.0, "text_config": TEXT, "text_score_weight": 0.5}
    served = make_service(model_settings=settings)
    pictures, answers = [draw(3), draw(3).rotate(5)], []
    for asr in ("", "a red mug and title 7"):
        body = served.client.post("/v1/recognise", files=frame_files(3), data={"asr": asr}).json()
        assert_same(body, served.recogniser.recognise(pictures, asr=asr))
        answers.append([hit["score"] for hit in body["hits"]])
    assert answers[0] != answers[1]


def test_asr_is_refused_for_a_model_without_text(make_service):
    words = refusal(make_service().client.post("/v1/recognise", files=frame_files(3), data={"asr": "mug"}), 422)
    assert words == "asr: this model reads no text; leave it out."


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({}, 422, "Send one of clip, frames and url."),
        ({"files": [*frame_files(1), ("clip", ("a.mp4", b"x"))]}, 422, "Send one of clip, frames and url."),
        (
            {"data": {"url": "http://example.com/a.mp4"}},
            403,
            "url: this service does not fetch addresses; upload the clip.",
        ),
        ({"files": frame_files(1), "data": {"live_id": "z"}}, 404, "The index has no images of livestream 'z'."),
        ({"files": frame_files(1), "data": {"top_k": "0"}}, 422, "top_k: Input should be greater than or equal to 1."),
        ({"files": frame_files(1), "data": {"top_k": "all"}}, 422, "top_k: Input should be a valid integer"),
        ({"files": frame_files(1), "data": {"live_id": "z" * 300}}, 422, "live_id: String should have at most 200"),
        ({"data": {"frames": "no file"}}, 422, "frames.0: "),
        ({"files": [("frames", ("a.png", b"no picture"))]}, 422, "file 1 is neither a picture"),
        ({"files": [("frames", ("a.png", b""))]}, 422, "file 1 is neither a picture"),
        ({"files": [("frames", ("a.png", png(draw(1))[:300]))]}, 422, "file 1 cannot be decoded ("),
        ({"files": {"clip": ("a.mp4", b"\0\0\0\x20ftypisom" + bytes(500))}}, 422, "file 1 cannot be "),
        ({"files": {"clip": ("a.m3u8", b"#EXTM3U\n#EXTINF:2,\nfile:///etc/passwd\n")}}, 422, "file 1 is neither"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, 422, "The body must be a form"),
        ({"content": b"{}"}, 422, "The body must be a form (multipart/form-data), and its content-type must say so"),
        ({"data": {"clip": "no file"}}, 422, "clip: send it as a file, with a file's name."),
        (
            {"files": frame_files(1), "data": {"topk": 1}},
            422,
            "'topk' is not a field of the form here, which takes clip",
        ),
        ({"files": [*frame_files(1), ("video", ("a", b"x"))]}, 422, "'video' is not a field of the form here"),
        (
            {"files": frame_files(1), "params": {"top_k": 1}},
            422,
            "'top_k' is not a field of the query here, which takes",
        ),
        ({"files": frame_files(1), "data": {"top_k": [1, 2]}}, 422, "top_k: it occurs 2 times; send it once."),
        ({"files": [("clip", ("a", b"x"))] * 2}, 422, "clip: it occurs 2 times; send it once."),
        ({"files": frame_files(1), "data": {"live_id": ""}}, 422, "live_id: it is empty; fill it in, or leave"),
        ({"files": frame_files(1), "data": {"top_k": ""}}, 422, "top_k: it is empty; fill it in, or leave it out."),
    ],
)
def test_mistakes_get_a_sentence(make_service, request_, status, words):
    if b"ftypisom" in str(request_.get("files")).encode():
        pytest.importorskip("av", reason="needs PyAV")
    served = make_service()
    assert refusal(served.client.post("/v1/recognise", **request_), status).startswith(words)
    # It goes on.
    assert served.client.post("/v1/recognise", files=frame_files(1)).status_code == 200


def test_bounds_are_those_of_the_limits(make_service, make_video):
    limits = UploadLimits(max_bytes=40_000, max_files=2, max_pixels=10_000, max_seconds=0.5)
    served = make_service(limits=limits)

    def send(**files):
        return served.client.post("/v1/recognise", **files)

    assert "at most 2 pictures" in refusal(send(files=[*frame_files(1), *frame_files(2)]), 413)
    large = io.BytesIO()
    Image.new("RGB", (200, 100)).save(large, format="PNG")
    assert "200 x 100 pixels" in refusal(send(files=[("frames", ("a.png", large.getvalue()))]), 413)
    assert "lasts 1 s" in refusal(send(files={"clip": ("a.mp4", make_video(1).read_bytes())}), 413)
    assert "more than the maximum of 0.04 MB" in refusal(send(files={"clip": ("a", bytes(50_000))}), 413)
    # More than may arrive at all is not even read.
    assert refusal(send(files={"clip": ("a", bytes(1_100_000))}), 413).startswith("This is 1 MB")


def test_an_internal_error_reveals_no_details(make_service, monkeypatch):
    served = make_service()

    def fail(*_, **__):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(served.recogniser.model, "encode_frames", fail)
    answer = served.client.post("/v1/recognise", files=frame_files(1))
    assert refusal(answer, 500) == "The service failed; see its log."
    monkeypatch.undo()
    assert served.client.post("/v1/recognise", files=frame_files(1)).status_code == 200


def test_no_file_is_left_on_the_disk(make_service, make_video):
    from pathlib import Path

    served = make_service()
    before = list(Path(served.service.folder).rglob("*"))
    served.client.post("/v1/recognise", files=frame_files(1))
    served.client.post("/v1/recognise", files={"clip": ("a", make_video(1).read_bytes())})
    served.client.post("/v1/recognise", files={"clip": ("a", b"nothing")})
    assert list(Path(served.service.folder).rglob("*")) == before


def test_the_description_is_complete_and_reveals_no_server_details(make_service):
    description = make_service().client.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/v1/recognise", "/v1/streams", "/v1/streams/{stream_id}", "/v1/streams/{stream_id}/events",
        "/v1/shops/{live_id}/images", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    hit = description["components"]["schemas"]["Hit"]
    assert hit["example"]["image_id"] in json.dumps(description) and not PRIVATE & hit["properties"].keys()
