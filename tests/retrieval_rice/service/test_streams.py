"""POST /v1/streams, and segments as server-sent events."""

import json
import time

import pytest

from retrieval_rice.recogniser import Recogniser
from retrieval_rice.stream.timeline import json_line
from retrieval_rice.uploads import UploadLimits
from tests.retrieval_rice.service.pictures import draw
from tests.retrieval_rice.service.test_recognise import refusal

av = pytest.importorskip("av", reason="needs PyAV")


@pytest.fixture
def show(tmp_path):
    """A video of twelve seconds: product 2, then product 7."""
    path = tmp_path / "show.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(60):
            container.mux(stream.encode(av.VideoFrame.from_image(draw(2 if i < 30 else 7, 64))))
        container.mux(stream.encode())
    return path


def events(client, stream_id: str, **headers) -> list[tuple[str, str, dict]]:
    """Kind, id and data of each event, to the end."""
    found = []
    with client.stream("GET", f"/v1/streams/{stream_id}/events", headers=headers) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        for block in response.read().decode().strip().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


def start(client, show, **data):
    answer = client.post("/v1/streams", files={"clip": ("show", show.read_bytes())}, data=data)
    assert answer.status_code == 201, answer.text
    return answer.json()["stream_id"]


def test_segments_are_those_of_rice_recognise(make_service, show):
    served = make_service()
    stream_id = start(served.client, show, window_s=2, hop_s=0.5)
    *segments, end = events(served.client, stream_id)
    expected = served.recogniser.stream(show, window_s=2, hop_s=0.5)
    assert [data for _, _, data in segments] == [json.loads(json_line(segment)) for segment in expected]
    assert {"p2", "p7"} <= {data["product_id"] for _, _, data in segments}
    assert end == ("end", None, {"segments": len(segments), "error": None})
    state = served.client.get(f"/v1/streams/{stream_id}").json()
    assert state == {"stream_id": stream_id, "segments": len(segments), "running": False, "error": None}
    # A client that was cut off gets the rest.
    again = events(served.client, stream_id, **{"last-event-id": segments[0][1]})
    assert again == [*segments[1:], end]


def test_one_livestream_is_searched(make_service, show):
    served = make_service()
    found = events(served.client, start(served.client, show, live_id="y", window_s=2))
    assert {data["live_id"] for kind, _, data in found if kind == "segment"} == {"y"}


def test_a_source_is_named_in_the_configuration_only(make_service, show):
    served = make_service(sources={"studio": str(show), "gone": str(show) + "-gone"})
    stream_id = served.client.post("/v1/streams", data={"source": "studio"}).json()["stream_id"]
    assert events(served.client, stream_id)[-1][2]["error"] is None and show.exists()
    words = refusal(served.client.post("/v1/streams", data={"source": str(show)}), 404)
    assert words == "source: this service has no source of this name."
    words = refusal(served.client.post("/v1/streams", data={"source": "gone"}), 502)
    assert words == "The source does not answer; see the log of the service."


def test_mistakes_get_a_sentence(make_service, show):
    served = make_service(limits=UploadLimits(max_pixels=5000))
    post = served.client.post
    clip = {"clip": ("show", show.read_bytes())}
    assert refusal(post("/v1/streams", files=clip, data={"live_id": "z"}), 404).endswith("livestream 'z'.")
    assert refusal(post("/v1/streams", files=clip, data={"hop_s": 5}), 422).startswith("hop_s: ")
    assert refusal(post("/v1/streams", files=clip, data={"window_s": "nan"}), 422).startswith("window_s: ")
    assert refusal(post("/v1/streams", files=clip, data={"window": 2}), 422).startswith("'window' is not a field of ")
    assert refusal(post("/v1/streams"), 422) == "Send one of clip, url and source."
    assert refusal(post("/v1/streams", files={"clip": ("a", b"#EXTM3U\n")}), 422).startswith(
        "The stream is not a video"
    )
    cut = show.read_bytes()[:300]
    assert refusal(post("/v1/streams", files={"clip": ("a", cut)}), 422).startswith("The video ")
    served.service.limits = UploadLimits(max_pixels=4000)
    assert "64 x 64 pixels" in refusal(post("/v1/streams", files=clip), 422)
    for method, path in (("GET", "/v1/streams/x"), ("DELETE", "/v1/streams/x"), ("GET", "/v1/streams/x/events")):
        assert refusal(served.client.request(method, path), 404).startswith("There is no stream 'x'")


class Slow:
    """A stream that goes on until it is stopped."""

    fps, error = 5.0, None

    def __init__(self):
        self.stopped = False

    def __iter__(self):
        from retrieval_rice.stream.source import Frame

        number = 0
        while not self.stopped:
            yield Frame(number / 5, draw(2))
            number += 1
            time.sleep(0.005)

    def stop(self):
        self.stopped = True


def test_streams_can_be_stopped_and_are_limited(make_service, monkeypatch):
    import retrieval_rice.service.work as work

    opened = []
    monkeypatch.setattr(work, "open_stream", lambda *_: opened.append(Slow()) or opened[-1])
    served = make_service(sources={"studio": "rtsp://studio"}, max_streams=1)
    first = served.client.post("/v1/streams", data={"source": "studio"}).json()["stream_id"]
    answer = served.client.post("/v1/streams", data={"source": "studio"})
    assert refusal(answer, 503).startswith("1 streams are running") and int(answer.headers["retry-after"]) > 0
    assert "rice_streams 1.0" in served.client.get("/metrics").text
    time.sleep(0.3)
    assert served.client.delete(f"/v1/streams/{first}").status_code == 200
    kinds = [kind for kind, _, _ in events(served.client, first)]
    assert kinds == ["segment", "end"]
    second = served.client.post("/v1/streams", data={"source": "studio"}).json()["stream_id"]
    # A service that stops ends its streams, and says so.
    served.service.stop()
    assert events(served.client, second)[-1][0] == "end"
    assert refusal(served.client.get("/readyz"), 503) == "The service is stopping."


def test_errors_of_a_stream_are_reported(make_service, monkeypatch):
    import retrieval_rice.service.work as work

    monkeypatch.setattr(work, "open_stream", lambda *_: Slow())
    for failure, words in (
        (ValueError("/a/path"), "the rest of the video cannot be read."),
        (RuntimeError("/a/path"), "an error of the service; see its log."),
    ):

        def fail(self, *_, failure=failure, **__):
            raise failure
            yield

        monkeypatch.setattr(Recogniser, "stream", fail)
        served = make_service(sources={"studio": "rtsp://studio"})
        stream_id = served.client.post("/v1/streams", data={"source": "studio"}).json()["stream_id"]
        assert events(served.client, stream_id) == [("end", None, {"segments": 0, "error": words})]


def test_memory_of_a_long_stream_is_bounded(make_service, monkeypatch):
    import retrieval_rice.service.streams as streams

    monkeypatch.setattr(streams, "_SEGMENTS", 3)
    served = make_service()
    one = streams.FollowedStream("x", served.recogniser, Slow(), None, {}, lambda _: None)
    segments = [f"segment {number}" for number in range(5)]
    monkeypatch.setattr(Recogniser, "stream", lambda *_, **__: iter(segments))
    monkeypatch.setattr(streams, "json_line", lambda segment: segment)
    one._run()
    assert one.lines == segments[2:] and one.count == 5


def test_ended_streams_are_removed(make_service, monkeypatch):
    import retrieval_rice.service.streams as streams

    monkeypatch.setattr(streams, "KEPT", 2)
    served = make_service()
    known = served.service.streams
    monkeypatch.setattr(Recogniser, "stream", lambda *_, **__: iter(()))
    followed = []
    for _ in range(4):
        followed.append(known.follow(Slow(), None, {}).stream_id)
        known.known[followed[-1]]._thread.join()
    assert list(known.known) == followed[-2:]
