"""Boxes in the demo: which are offered, where they are drawn, and their effect on the model."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import ResNetConfig

from evaluation_rice.frames import clip_frames
from modeling_rice import RiceConfig, RiceModel
from retrieval_rice.demo.page import Demo, numbered_frames
from retrieval_rice.index import GalleryIndex
from retrieval_rice.recogniser import Recogniser

RIGHT_HALF = [0.5, 0.0, 1.0, 1.0]


class SecondFrameDetector:
    """Finds the product in the right half of the second frame only, and notes what it is shown."""

    def __init__(self):
        self.shown = []

    def detect(self, frames):
        self.shown += frames
        return [RIGHT_HALF if number == 1 else None for number in range(len(frames))]


@pytest.fixture
def detecting(demo):
    parts = (demo.model, demo.processor, demo.index, demo.gallery, demo.queries, demo.folder)
    return Demo(*parts, detector=SecondFrameDetector())


def scores(answer):
    return [(hit.image_id, hit.score) for hit in answer.hits]


def pictures(row):
    return [frame for frame, _ in clip_frames(row, 99)]


def test_only_boxes_that_exist_are_offered(demo, detecting):
    assert demo.boxes == ["none", "true"] and detecting.boxes == ["none", "true", "detector"]
    # True boxes would tell a model that takes them the answer.
    assert demo.first_boxes == "none" and detecting.first_boxes == "detector"
    without = [{**row, "boxes": [None, None]} for row in demo.queries]
    for queries in (None, without, [{**row, "boxes": None} for row in demo.queries]):
        assert Demo(demo.model, demo.processor, demo.index, demo.gallery, queries).boxes == ["none"]
    with pytest.raises(ValueError, match="no such boxes"):
        demo.recognise(demo.example("x", 0), "x", boxes="detector")


def test_boxes_of_a_data_set_are_found(demo):
    datasets = pytest.importorskip("datasets")
    queries = datasets.Dataset.from_list([{"live_id": "x", "boxes": boxes} for boxes in (None, [None, RIGHT_HALF])])
    assert Demo(demo.model, demo.processor, demo.index, demo.gallery, queries).boxes == ["none", "true"]
    queries = queries.select([0])
    assert Demo(demo.model, demo.processor, demo.index, demo.gallery, queries).boxes == ["none"]


@pytest.mark.parametrize("boxes, name", [("none", "none"), ("true", "ground_truth"), ("detector", "detector")])
def test_answers_are_those_of_a_recogniser(detecting, boxes, name):
    clip = detecting.example("x", 1)
    detector = SecondFrameDetector() if boxes == "detector" else None
    recogniser = Recogniser(detecting.model, detecting.processor, detecting.index, name, detector)
    known = clip.row["boxes"] if boxes == "true" else None
    expected = recogniser.recognise(pictures(clip.row), known, live_id="x")
    found = detecting.recognise(clip, "x", boxes=boxes)
    assert [image for image, _ in scores(found.answer)] == [image for image, _ in scores(expected)]
    np.testing.assert_allclose([s for _, s in scores(found.answer)], [s for _, s in scores(expected)], atol=1e-5)


def test_boxes_change_scores_and_maps(detecting):
    clip = detecting.example("x", 1)
    answers = [scores(detecting.recognise(clip, "x", boxes=boxes).answer) for boxes in detecting.boxes]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    recognition = detecting.recognise(clip, "x", boxes="detector")
    weights = detecting.pair(recognition, 0).maps.weights
    # Nothing is reconstructed from the left half of the second frame.
    assert weights[:, :, 1, :, :2].max() == 0 < weights[:, :, 1, :, 2:].max() and weights[:, :, 0].min() > 0


def test_detected_boxes_are_drawn_on_their_frames(detecting):
    clip = detecting.example("x", 0)
    plain = detecting.frames(detecting.recognise(clip, "x"))
    drawn = detecting.frames(detecting.recognise(clip, "x", boxes="detector"))
    changed = [(np.asarray(a) != np.asarray(b)).any(axis=2) for a, b in zip(plain, drawn)]
    assert not changed[0].any() and changed[1][:, 120:128].mean() > 0.5 and not changed[1][:, :110].any()
    assert clip.row["boxes"] == [[0.0, 0.0, 0.5, 1.0], None]


def test_a_detector_sees_the_frames_in_use_only(detecting):
    clip = detecting.example("x", 0)
    clip.row = {**clip.row, "frames": clip.row["frames"] * 3, "boxes": None}
    recognition = detecting.recognise(clip, "x", boxes="detector")
    assert len(detecting.detector.shown) == 2
    # Of six frames the first and the fourth are looked at.
    assert recognition.row["boxes"] == [None, None, None, RIGHT_HALF, None, None]


def test_boxes_find_their_frames_in_a_video(detecting, tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (25 * number, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = {"video": str(tmp_path / "clip.mp4"), "start": 0.4, "end": 1.0, "frames": None, "boxes": None, "asr": ""}
    frames = numbered_frames(row, 2)
    # Of the six frames from 0.4 s on.
    assert list(frames) == [0, 3] and [round(frames[i].getpixel((9, 9))[0] / 25) for i in (0, 3)] == [4, 7]
    boxed = detecting.with_boxes(row, "detector")
    assert [box for _, box in clip_frames(boxed, 2)] == [None, RIGHT_HALF]
    clip = SimpleNamespace(row={"clip_id": "video", **row}, note="")
    assert detecting.recognise(clip, "x", boxes="detector").row["box_frames"] == [0, 3]


def test_a_clip_without_frames_is_reported(detecting):
    clip = detecting.example("x", 0)
    clip.row = {**clip.row, "frames": [], "boxes": None}
    with pytest.raises(ValueError, match="The clip cannot be read"):
        detecting.recognise(clip, "x", boxes="detector")


def test_boxes_are_only_drawn_if_the_model_takes_none(demo, index_processor):
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    sizes = {"projection_dim": 16, "decoder_num_heads": 4, "decoder_position_embeddings": False}
    config = RiceConfig(vision_config=vision, vision_pooling="mean", **sizes)
    model = RiceModel(config).eval()
    index = GalleryIndex.build(model, index_processor, demo.gallery, progress=False)
    plain = Demo(model, index_processor, index, demo.gallery, demo.queries)
    assert not plain.takes_boxes and demo.takes_boxes and plain.first_boxes == "true"
    clip = plain.example("x", 0)
    none, true = (plain.recognise(clip, "x", boxes=boxes) for boxes in ("none", "true"))
    assert scores(none.answer) == scores(true.answer)
    first = [np.asarray(plain.frames(recognition)[0]) for recognition in (none, true)]
    assert (first[0] != first[1]).any()


@pytest.fixture
def callbacks(detecting):
    pytest.importorskip("gradio", reason="needs gradio")
    from retrieval_rice.demo.app import Callbacks

    return Callbacks(detecting)


def test_choosing_other_boxes_ranks_the_clip_again(callbacks, save_frames):
    state = callbacks.upload(save_frames(6), "", "none", "look at title 6")[0]
    again, answer, *_ = callbacks.boxes(state, "detector")
    assert again.boxes == "detector" and again.row["boxes"] == [None, RIGHT_HALF]
    assert again.row["asr"] == "look at title 6" and "boxes detected: 1, in" in answer
    # A clip without true boxes is looked at as a whole.
    assert scores(callbacks.boxes(again, "true")[0].answer) == scores(state.answer)
    assert "detected" not in callbacks.boxes(again, "none")[1]


def test_without_a_clip_the_choice_of_boxes_changes_nothing(callbacks):
    gradio = pytest.importorskip("gradio")
    assert callbacks.boxes(None, "true") == gradio.skip()


def test_the_page_explains_the_boxes(demo):
    pytest.importorskip("gradio", reason="needs gradio")
    from retrieval_rice.demo.app import build_demo

    def label():
        page = build_demo(demo)
        return next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "boxes").label

    assert label() == "boxes (the model uses only these parts)"
    demo.model = SimpleNamespace(config=SimpleNamespace(accepts_patch_mask=False))
    assert label() == "boxes (only drawn: this model does not use boxes)"
