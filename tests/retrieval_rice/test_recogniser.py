"""From pictures, files and streams to answers and segments, with a model that knows colours and with a random RICE."""

import gc
import json
import os
import signal
import threading
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

from modeling_rice import RiceClips, RiceConfig, RiceFrames, RiceModel
from processing_rice import build_processor, train_tokenizer
from retrieval_rice.index import Answer, GalleryIndex, Hit
from retrieval_rice.recogniser import Recogniser
from retrieval_rice.stream.source import Frame
from retrieval_rice.stream.timeline import Hysteresis
from rice_cli import main

av = pytest.importorskip("av")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
GREY = (128, 128, 128)


class ColourProcessor:
    """Pictures to their mean colour; a box restricts it."""

    video_processor = SimpleNamespace(num_frames=10)

    def __call__(self, videos, boxes=None, asr=None):
        clips = [
            [self.mean(f, boxes and boxes[i] and boxes[i][j]) for j, f in enumerate(c)] for i, c in enumerate(videos)
        ]
        return {"pixel_values_videos": torch.tensor(np.array(clips), dtype=torch.float32)}

    @staticmethod
    def mean(frame, box):
        pixels = np.asarray(frame, dtype=np.float64)
        if box is not None:
            left, top, right, bottom = (int(v * s) for v, s in zip(box, (pixels.shape[1], pixels.shape[0]) * 2))
            pixels = pixels[top:bottom, left:right]
        return pixels.mean(axis=(0, 1))


class ColourModel:
    """Each frame is one of the colours, or nothing; a clip is the direction of their counts."""

    training = False
    config = SimpleNamespace()

    def __init__(self):
        self.calls = []

    def encode_frames(self, pixel_values, patch_mask=None):
        self.calls.append(len(pixel_values))
        palette = torch.tensor([*COLOURS.values(), GREY], dtype=torch.float32)
        nearest = torch.cdist(pixel_values, palette).argmin(dim=-1)
        return RiceFrames(nearest, torch.nn.functional.one_hot(nearest, len(palette)).float())

    def pool_frames(self, frames):
        return RiceClips(embeds=torch.nn.functional.normalize(frames.features.sum(dim=0), dim=-1)[None])

    def encode_clips(self, pixel_values_videos):
        return RiceClips.cat([self.pool_frames(self.encode_frames(clip)) for clip in pixel_values_videos])


class ColourIndex:
    """Answers with the share of frames that show each colour, as its confidence."""

    calibration = SimpleNamespace(threshold=0.5, rerank=7)

    def __init__(self):
        self.searches = []

    def live_ids(self):
        return ["room"]

    def search(self, clips, live_id=None, top_k=10, rerank=100):
        self.searches.append((live_id, top_k, rerank))
        answers = []
        for embed in clips.embeds:
            if live_id not in (None, "room"):
                answers.append(Answer([], True, 0.0))
                continue
            shares = (embed / embed.sum())[: len(COLOURS)].tolist()
            hits = [Hit(f"{n}-0", n, "room", n.title(), "", s, s, None, s) for n, s in zip(COLOURS, shares)]
            hits.sort(key=lambda hit: -hit.confidence)
            answers.append(Answer(hits[:top_k], False, hits[0].confidence))
        return answers


def recogniser(**kwargs):
    return Recogniser(ColourModel(), ColourProcessor(), ColourIndex(), **kwargs)


def picture(colour, size=32):
    return Image.new("RGB", (size, size), COLOURS.get(colour, GREY))


def frames_of(*parts, fps=2.5):
    """Frames of `(colour, seconds)` after each other."""
    pictures = [picture(colour) for colour, seconds in parts for _ in range(round(seconds * fps))]
    return [Frame(i / fps, p) for i, p in enumerate(pictures)]


def write_video(path, *parts, rate=10, options=None):
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for colour, seconds in parts:
            for _ in range(round(seconds * rate)):
                for packet in stream.encode(av.VideoFrame.from_image(picture(colour))):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def spans(segments):
    return [(round(s.start_s, 3), round(s.end_s, 3), s.hit and s.hit.product_id) for s in segments]


EXACT = Hysteresis(enter=0.5, leave=0.5)


def test_the_time_line_of_a_video_is_exactly_right(tmp_path):
    parts = [("red", 8), ("green", 7), (None, 9), ("blue", 6), ("red", 5)]
    path = write_video(tmp_path / "show.mp4", *parts)
    tool = recogniser()
    segments = list(tool.stream(path, hysteresis=EXACT, live_id="room"))
    assert spans(segments) == [
        (0, 8, "red"),
        (8, 15, "green"),
        (15, 24, None),
        (24, 30, "blue"),
        (30, 35, "red"),
    ]
    assert set(tool.index.searches) == {("room", 5, 7)}


@pytest.mark.parametrize(("given", "used"), [(None, 7), (3, 3), (0, 0)])
def test_the_number_of_scored_images_can_be_set(given, used):
    tool = recogniser(rerank=given)
    tool.recognise([picture("red")])
    assert tool.index.searches == [(None, 10, used)]


def test_a_folder_can_be_streamed(tmp_path):
    for i, colour in enumerate(["red"] * 6 + ["blue"] * 6):
        picture(colour).save(tmp_path / f"{i}.png")
    assert spans(recogniser().stream(tmp_path, hysteresis=EXACT)) == [(0, 6, "red"), (6, 12, "blue")]


def test_every_frame_is_encoded_once():
    tool = recogniser()
    list(tool.stream(frames_of(("red", 20))))
    assert sum(tool.model.calls) == 50


def test_segments_are_given_during_the_stream():
    taken, started = [], []

    def source():
        for frame in frames_of(("red", 10), ("blue", 10)):
            taken.append(frame.time_s)
            yield frame

    segments = recogniser().stream(
        source(), hysteresis=EXACT, on_start=lambda hit, start_s: started.append((hit.product_id, start_s, taken[-1]))
    )
    first = next(segments)
    assert spans([first]) == [(0, 10, "red")] and taken[-1] < 15
    assert len(list(segments)) == 1
    # What is on screen is known within a window and the patience, not when it is gone.
    assert [(name, start_s) for name, start_s, _ in started] == [("red", 0.0), ("blue", 10.0)]
    assert started[0][2] < 6 and started[1][2] < 15


def test_one_frame_and_no_frame(tmp_path):
    path = write_video(tmp_path / "one.mp4", ("green", 0.1))
    assert spans(recogniser().stream(path)) == [(0, 0.1, "green")]
    assert list(recogniser().stream([])) == []


def test_a_long_pause_belongs_to_no_segment():
    frames = frames_of(("red", 6)) + [Frame(f.time_s + 100, f.picture) for f in frames_of(("red", 6))]
    assert spans(recogniser().stream(frames, hysteresis=EXACT)) == [(0, 6, "red"), (100, 106, "red")]


def test_ten_hours_take_no_more_memory_than_one():
    """A frame every 30 seconds, 1,200 for ten hours."""
    sizes = []

    def source():
        for i in range(1200):
            if i in (120, 1199):
                # Garbage that waits to be collected is no growth.
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
            yield Frame(i * 30.0, picture(list(COLOURS)[i // 30 % 3], size=8))

    tracemalloc.start()
    try:
        tool = recogniser()
        tool.index.searches = SimpleNamespace(append=lambda item: None)
        tool.model.calls = SimpleNamespace(append=lambda item: None)
        count = sum(1 for _ in tool.stream(source(), window_s=300.0, hop_s=30.0, fps=1 / 30, hysteresis=EXACT))
    finally:
        tracemalloc.stop()
    assert count == 40
    assert sizes[1] < sizes[0] + 75_000


def test_recognise_pictures_files_and_folders(tmp_path):
    tool = recogniser()
    clip = [picture("blue")] * 3 + [picture("red")]
    answer = tool.recognise(clip, live_id="room", top_k=2)
    assert [h.product_id for h in answer.hits] == ["blue", "red"]
    assert answer.confidence == pytest.approx(0.75)
    assert tool.recognise(np.stack([np.asarray(p) for p in clip])).confidence == pytest.approx(0.75)
    path = write_video(tmp_path / "clip.mp4", ("green", 3), ("red", 1))
    assert tool.recognise(path).hits[0].product_id == "green"
    assert tool.model.calls[-1] == 10


def test_a_truncated_clip_is_used_up_to_the_cut(tmp_path, caplog):
    path = write_video(tmp_path / "clip.mp4", ("green", 5), options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: -len(data) // 4])
    assert recogniser().recognise(path).hits[0].product_id == "green"
    assert "cut short" in caplog.text and "of 50 frames" in caplog.text
    with pytest.raises(FileNotFoundError, match="There is no video file"):
        recogniser().recognise(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="is not a file"):
        recogniser().recognise("rtsp://shop/1")


def test_boxes_from_truth_or_detector():
    two = Image.new("RGB", (32, 32), COLOURS["red"])
    two.paste(picture("blue", 12), (20, 20))
    box = [20 / 32, 20 / 32, 1.0, 1.0]
    assert recogniser().recognise([two]).hits[0].product_id == "red"
    assert recogniser(boxes="ground_truth").recognise([two], boxes=[box]).hits[0].product_id == "blue"

    class Detector:
        def detect(self, frames):
            assert all(isinstance(frame, Image.Image) for frame in frames)
            return [box if frame.width == 32 else None for frame in frames]

    tool = recogniser(boxes="detector", detector=Detector())
    assert tool.recognise([two] * 20).hits[0].product_id == "blue"
    assert tool.recognise([np.array(two)]).hits[0].product_id == "blue"
    stream = [Frame(i / 2.5, two) for i in range(20)]
    assert spans(tool.stream(stream, hysteresis=EXACT)) == [(0, 8, "blue")]


def test_frames_without_a_detection_can_be_left_out_of_windows():
    """Three of four frames are a blue room without a product; all of them stay where nothing was ever found."""

    class Detector:
        def detect(self, frames):
            return [[0.0, 0.0, 1.0, 1.0] if frame.getpixel((0, 0)) == COLOURS["red"] else None for frame in frames]

    parts = [frame for _ in range(8) for frame in [("red", 0.4), ("blue", 1.2)]]
    for rule, product in (("keep", "blue"), ("drop", "red")):
        tool = recogniser(boxes="detector", detector=Detector())
        tool.processor.video_processor = SimpleNamespace(num_frames=10, frames_without_box=rule)
        assert {span[2] for span in spans(tool.stream(frames_of(*parts), hysteresis=EXACT))} == {product}
        assert spans(tool.stream(frames_of(("blue", 8)), hysteresis=EXACT)) == [(0, 8, "blue")]


def test_refusals():
    with pytest.raises(ValueError, match="`boxes` must be one of"):
        recogniser(boxes="guess")
    with pytest.raises(ValueError, match="belong together"):
        recogniser(boxes="detector")
    with pytest.raises(ValueError, match="does not use them"):
        recogniser().recognise([picture("red")], boxes=[None])
    with pytest.raises(ValueError, match="needs them"):
        recogniser(boxes="ground_truth").recognise([picture("red")])
    with pytest.raises(ValueError, match="no ground-truth boxes"):
        recogniser(boxes="ground_truth").stream([])
    with pytest.raises(ValueError, match=r"no images of livestream 'other' \(it has: room\)"):
        recogniser().recognise([picture("red")], live_id="other")
    with pytest.raises(ValueError, match=r"no images of livestream 'other' \(it has: room\)"):
        recogniser().stream([], live_id="other")
    with pytest.raises(ValueError, match="hop <= window"):
        recogniser().stream([], hop_s=5.0)
    model = ColourModel()
    model.training = True
    with pytest.raises(ValueError, match="training mode"):
        Recogniser(model, ColourProcessor(), ColourIndex())


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A random RICE, and an index of three coloured pictures, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shop")
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RiceConfig(
        vision_config=CLIPVisionConfig(**tiny, image_size=32, patch_size=8), projection_dim=16, use_decoder=False
    )
    model = RiceModel(config).eval()
    processor = build_processor(train_tokenizer(["red green blue"]), image_size=32, patch_size=8, num_frames=10)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = [
        {"image_id": f"{n}-0", "product_id": n, "live_id": "room", "image": picture(n), "title": f"Cup, {n}"}
        for n in COLOURS
    ]
    GalleryIndex.build(model, processor, rows, progress=False, dtype="float32").save(folder / "index")
    with torch.no_grad():
        model.visual_projection.weight += 1
    model.save_pretrained(folder / "other")
    processor.save_pretrained(folder / "other")
    return folder


def rice(*arguments):
    return main(["recognise", *map(str, arguments)])


def options(shop):
    return ("--shop", shop / "index", "--model", shop / "model", "--device", "cpu")


def test_the_command_writes_table_lines_and_subtitles(shop, tmp_path, capsys):
    path = write_video(tmp_path / "show.mp4", ("red", 8), ("green", 8), ("blue", 6))
    files = ("--jsonl", tmp_path / "show.jsonl", "--vtt", tmp_path / "show.vtt")
    assert rice(path, *options(shop), "--live_id", "room", *files) == 0
    captured = capsys.readouterr()
    table = captured.out.strip().splitlines()
    assert [row.split()[3] for row in table] == ["product", "red", "green", "blue"]
    assert "55 frames recognised of 220 that can be decoded" in captured.err
    lines = [json.loads(line) for line in (tmp_path / "show.jsonl").read_text().splitlines()]
    assert [line["product_id"] for line in lines] == ["red", "green", "blue"]
    assert [line["start_s"] for line in lines] == pytest.approx([0, 8, 16], abs=0.6)
    assert lines[-1]["end_s"] == 22.0
    for pair in (files[:2], files[2:]):
        with pytest.raises(SystemExit):
            rice(path, *options(shop), *pair)
        assert f"{pair[0]} {pair[1]} is not empty" in capsys.readouterr().err
    cues = (tmp_path / "show.vtt").read_text()
    assert cues.startswith("WEBVTT\n\n00:00:00.000 --> ") and cues.count("-->") == 3 and "Cup, green (" in cues

    assert rice(path, *options(shop), "--jsonl", "-") == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["product_id"] for line in captured.out.splitlines()] == ["red", "green", "blue"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"source": "missing.mp4"}, "no video file or folder missing.mp4"),
        ({"--shop": "nowhere"}, "nowhere"),
        ({"--model": "other"}, "was encoded by another model"),
        ({"--live_id": "elsewhere"}, "no images of livestream 'elsewhere'"),
        ({"--hop": "9"}, "hop <= window"),
        ({"--patience": "0"}, "at least 1"),
        ({"--vtt": "nowhere/show.vtt"}, "nowhere/show.vtt"),
    ],
)
def test_the_command_refuses_in_one_sentence(shop, tmp_path, capsys, changes, words):
    changes = dict(changes)
    (tmp_path / "frames").mkdir()
    picture("red").save(tmp_path / "frames" / "1.png")
    source = changes.pop("source", tmp_path / "frames")
    if "--model" in changes:
        changes["--model"] = shop / changes["--model"]
    given = dict(zip(options(shop)[::2], options(shop)[1::2])) | changes
    with pytest.raises(SystemExit) as end:
        rice(source, *(item for pair in given.items() for item in pair))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and message.startswith("rice recognise: error: ") and words in message


class Camera:
    """A live source that never ends by itself: it breaks off, or Ctrl-C is pressed, after so many frames."""

    def __init__(self, count=10**9, interrupt_after=None):
        self.count, self.interrupt_after, self.opened = count, interrupt_after, False

    def __call__(self, source):
        if self.opened:
            raise ValueError("no answer")
        self.opened = True
        video = SimpleNamespace(
            average_rate=10,
            thread_type=None,
            disposition=av.stream.Disposition(0),
            metadata={},
            codec_context=SimpleNamespace(width=8, height=8, is_open=True, name="rawvideo", decode=self.decode),
            sample_aspect_ratio=None,
        )
        return SimpleNamespace(
            streams=SimpleNamespace(video=[video]),
            format=SimpleNamespace(flags=0, name="v4l2"),
            start_time=None,
            duration=None,
            demux=self.packets,
            close=lambda: None,
        )

    def packets(self, stream):
        for i in range(self.count):
            if i == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            frame = av.VideoFrame.from_image(picture("green"))
            frame.pts, frame.time_base = i, Fraction(1, 10)
            yield SimpleNamespace(frame=frame)
            # Not faster than the model, and slow enough to be stopped.
            threading.Event().wait(0.002)
        raise ConnectionResetError("gone")

    @staticmethod
    def decode(packet):
        return [] if packet is None else [packet.frame]


def test_a_lost_camera_is_an_error_after_everything_is_written(shop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retrieval_rice.stream.source.open_source", Camera(count=100))
    with pytest.raises(SystemExit) as end:
        rice("camera:0", *options(shop), "--jsonl", tmp_path / "out.jsonl", "--max_reconnects", "0")
    captured = capsys.readouterr()
    assert end.value.code == 2 and "camera:0 did not come back" in captured.err.splitlines()[-1]
    assert "now: Cup, green" in captured.err
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["product_id"] == "green"


def test_ctrl_c_writes_the_known_segments(shop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retrieval_rice.stream.source.open_source", Camera(interrupt_after=200))
    before = signal.getsignal(signal.SIGINT)
    assert rice("camera:0", *options(shop), "--vtt", tmp_path / "out.vtt") == 0
    assert signal.getsignal(signal.SIGINT) is before
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].split()[3] == "green" and "frames recognised" in captured.err
    assert (tmp_path / "out.vtt").read_text().count("Cup, green") == 1


def test_eval_takes_the_options_of_the_script(capsys):
    with pytest.raises(SystemExit) as end:
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith("usage: rice eval ") and "--rank_by" in text
    with pytest.raises(SystemExit) as end:
        main(["eval", "--model", "nowhere/at/all", "--dataset", "mini_lpr4m", "--output_dir", "x"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("rice eval: error: ") and "nowhere/at/all" in message


def test_outputs_of_a_failed_run_can_be_used_again(tmp_path):
    from retrieval_rice.recognise_command import outputs

    cues = tmp_path / "show.vtt"
    with pytest.raises(FileNotFoundError), outputs(str(tmp_path / "show.jsonl"), cues):
        raise FileNotFoundError("no such video")
    with outputs(str(tmp_path / "show.jsonl"), cues):
        pass
    assert cues.read_text() == "WEBVTT\n\n"
    for jsonl, vtt, words in (
        (str(tmp_path / "a"), tmp_path / "a", "--jsonl and --vtt are both .*; name two files"),
        (str(tmp_path), None, "--jsonl .* cannot be written \\(Is a directory\\); name another file"),
        (None, tmp_path / "nowhere" / "a.vtt", "--vtt .* cannot be written \\(No such file or directory\\)"),
    ):
        with pytest.raises(ValueError, match=words), outputs(jsonl, vtt):
            pass
