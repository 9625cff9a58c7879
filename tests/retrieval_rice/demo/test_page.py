import io

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval_rice.demo.page import Demo, caption, column, draw_box, enlarge, shared_words, table_rows
from retrieval_rice.index import GalleryIndex
from retrieval_rice.index.calibration import Calibration, presence_features
from retrieval_rice.uploads import UploadError


@pytest.fixture
def callbacks(demo):
    pytest.importorskip("gradio", reason="needs gradio")
    from retrieval_rice.demo.app import Callbacks

    return Callbacks(demo)


def test_an_example_is_ranked_in_its_own_shop(demo):
    assert demo.shops == ["x", "y", ""]
    for live_id, numbers in {"x": "02468", "y": "13579"}.items():
        assert len(demo.example_pictures(live_id)) == len(demo.example_numbers(live_id)) == 5
        for place, number in enumerate(numbers):
            recognition = demo.recognise(demo.example(live_id, place), live_id)
            hits = recognition.answer.hits
            assert hits[0].image_id == f"p{number}" and {hit.live_id for hit in hits} == {live_id}
            assert caption(hits[0], 1, [f"p{number}"]).startswith("1. ✓ ")
            assert "✓" not in caption(hits[1], 2, [f"p{number}"])


def test_the_whole_index_can_be_searched(demo):
    recognition = demo.recognise(demo.example("x", 1), "")
    assert len(recognition.answer.hits) == 10 and recognition.answer.hits[0].image_id == "p2"


def test_an_upload_is_ranked_and_deleted(demo, save_frames):
    from pathlib import Path

    clip = demo.upload(save_frames(3))
    assert list(Path(demo.folder).iterdir()) == []
    assert demo.recognise(clip, "y", "look at title 3").answer.hits[0].image_id == "p3"
    with pytest.raises(UploadError, match="not uploaded here"):
        demo.upload([demo.gallery[0]["image"]["path"]])
    assert Path(demo.gallery[0]["image"]["path"]).is_file()


def test_frames_carry_the_box_where_it_is_known(demo):
    with_box, without = demo.frames(demo.recognise(demo.example("x", 0), "x", boxes="true"))
    plain = [np.asarray(enlarge(frame)) for frame in demo_frames(demo, 0)]
    assert with_box.size == without.size == (240, 240)
    assert (np.asarray(without) == plain[1]).all()
    changed = (np.asarray(with_box) != plain[0]).any(axis=2)
    # The box is the left half: its middle and the right half stay as they were.
    assert changed[:, :8].mean() > 0.5 and not changed[20:220, 20:100].any() and not changed[:, 130:].any()


def demo_frames(demo, number):
    row = demo.queries[number]
    return [Image.open(io.BytesIO(frame["bytes"])) for frame in row["frames"]]


def test_a_tiny_box_is_not_an_error():
    draw_box(Image.new("RGB", (40, 40)), [0.5, 0.5, 0.51, 0.51])


def test_heat_follows_the_chosen_patch(demo):
    recognition = demo.recognise(demo.example("x", 0), "x")
    pair = demo.pair(recognition, 0)
    size = pair.picture.size
    assert pair.maps.weights.shape == (4, 4, 2, 4, 4)
    assert demo.patch_at(pair, (size[0] * 0.9, size[1] * 0.1)) == (0, 3)
    whole, one = demo.heat(pair, None)[1], demo.heat(pair, (0, 3))[1]
    assert len(whole) == len(one) == 2
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(whole, one))


def test_a_missing_clip_or_image_gets_a_sentence(demo):
    recognition = demo.recognise(demo.example("x", 0), "x")
    for place in (-1, 99):
        with pytest.raises(ValueError, match="no such product"):
            demo.pair(recognition, place)
        with pytest.raises(ValueError, match="no such example"):
            demo.example("x", place)
    with pytest.raises(ValueError, match="no such shop"):
        demo.recognise(demo.example("x", 0), "z")
    broken = demo.example("x", 0)
    broken.row["frames"] = [{"path": "gone.png", "bytes": None}]
    with pytest.raises(ValueError, match="The clip cannot be read: gone.png"):
        demo.recognise(broken, "x")


def test_an_index_alone_shows_its_pictures(demo):
    alone = Demo(demo.model, demo.processor, demo.index, queries=demo.queries, folder=demo.folder)
    np.testing.assert_array_equal(np.asarray(alone.picture("p4")), np.asarray(demo.picture("p4")))
    recognition = alone.recognise(alone.example("x", 2), "x")
    assert alone.pair(recognition, 0).title == "title 4"
    alone.index.records = lambda ids: {ids[0]: {"image": "gone.png"}}
    assert alone.picture("p4").getpixel((9, 9)) == (220, 220, 220)


def test_a_model_without_decoder_has_no_heat(make_index_model, index_processor, demo):
    model = make_index_model(use_decoder=False)
    index = GalleryIndex.build(model, index_processor, demo.gallery, progress=False)
    plain = Demo(model, index_processor, index, demo.gallery, demo.queries)
    recognition = plain.recognise(plain.example("x", 0), "x")
    assert not plain.explains and demo.explains
    assert table_rows(recognition)[0][-1] == "" and recognition.answer.hits[0].image_id == "p0"


def test_table_shows_the_scores_of_each_hit(demo):
    recognition = demo.recognise(demo.example("x", 0), "x")
    rows, hits = table_rows(recognition), recognition.answer.hits
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[1] == [
        *("2", hits[1].product_id, hits[1].title, f"{100 * hits[1].confidence:.1f} %"),
        *(f"{value:.3f}" for value in (hits[1].score, hits[1].embedding_score, hits[1].matching_score)),
        # The model has no alignment.
        "",
    ]


@pytest.mark.parametrize(
    "text, title, shared",
    [
        ("look a Red mug!", "red mug with dots", ["Red", "mug"]),
        ("the ad", "advert the", ["the"]),
        ("主播身上红色横条纹同款", "【包邮】红色横条纹帽", ["红色横条纹"]),
        ("红", "红色", []),
        ("", "title", []),
    ],
)
def test_shared_words(text, title, shared):
    pieces = shared_words(text, title)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, is_shared in pieces if is_shared] == shared


def test_columns_of_lists_and_data_sets(demo):
    assert column([{"live_id": "a"}, {}], "live_id") == ["a", ""]
    assert column(demo.queries, "live_id")[:2] == ["x", "y"]


def test_the_page_shows_the_right_product_first(callbacks):
    state, answer, frames, ranking, table, said, pair, picture, heat, words = callbacks.example("y", "none", 0)
    assert "<b>title 1</b>" in answer and "the right product: rank 1" in answer and "not calibrated" in answer
    assert len(frames) == 2 and ranking.value and len(table) == 5 and table[0][1] == "p1"
    assert ("title", "in the title") in said
    assert len(heat) == 2 and pair.title == "title 1" and "All patches" in words
    other, _, _, _ = callbacks.pair(state, 1)
    assert other.title == state.answer.hits[1].title
    _, _, words = callbacks.patch(pair, [5, 5])
    assert "row 1, column 1" in words
    assert "All patches" in callbacks.patch(pair, None)[2]
    assert len(callbacks.shop("x")) == 5


def test_a_ranking_works_without_heat_maps(callbacks, demo):
    demo.gallery[1]["image"] = {"path": "gone.png", "bytes": None}
    _, answer, _, _, table, _, pair, _, heat, words = callbacks.example("y", "none", 0)
    assert table[0][1] == "p1" and "title 1" in answer
    assert pair is None and heat == [] and words.startswith("There is no heat map: gone.png")


def test_the_page_takes_uploads(callbacks, save_frames):
    _, answer, _, _, table, said, *_ = callbacks.upload(save_frames(6), "", "none", "<b>title</b>")
    assert table[0][1] == "p6" and "right product" not in answer
    assert "".join(piece for piece, _ in said) == "<b>title</b>"


def test_the_page_before_a_clip_is_chosen(callbacks):
    for function, arguments in ((callbacks.pair, (None, 0)), (callbacks.patch, (None, None))):
        with pytest.raises(ValueError, match="first"):
            function(*arguments)


def test_refusals_are_shown_as_one_escaped_sentence(callbacks):
    gradio = pytest.importorskip("gradio")
    from retrieval_rice.demo.app import _told

    with pytest.raises(gradio.Error) as error:
        _told(callbacks.upload)(["<img>.png"], "x", "none", "")
    assert error.value.message == "A file was not uploaded here or was deleted meanwhile; upload it again."

    def refuse():
        raise ValueError("a <script>\nof two lines")

    with pytest.raises(gradio.Error) as error:
        _told(refuse)()
    assert error.value.message == "a &lt;script&gt; of two lines"


def test_titles_are_escaped(callbacks, demo):
    from retrieval_rice.demo.app import answer_words

    recognition = demo.recognise(demo.example("x", 0), "x")
    recognition.answer.hits[0].title = "<script>alert(1)</script>"
    recognition.clip.note = "<i>note</i>"
    words = answer_words(recognition, True)
    assert "<script>" not in words and "&lt;script&gt;" in words and "<i>" not in words
    assert "<b><i>" not in callbacks._heat(_titled(demo.pair(recognition, 0), "<i>"), None)[2]


def _titled(pair, title):
    pair.title = title
    return pair


def test_no_product_is_an_answer(callbacks, demo):
    from retrieval_rice.demo.app import answer_words

    weights = [0.0] * len(presence_features(np.ones(2), np.ones(2)))
    demo.index.calibration = Calibration(1.0, -50.0, weights, threshold=0.5)
    recognition = demo.recognise(demo.example("x", 0), "x")
    assert recognition.answer.no_product
    words = answer_words(recognition, True)
    assert words.startswith('<div id="answer">Not sure, or no product of this shop') and "not calibrated" not in words


def test_no_gradients_are_kept(demo):
    recognition = demo.recognise(demo.example("x", 0), "x")
    assert torch.is_grad_enabled() and demo.pair(recognition, 0).maps.weights.dtype == np.float32
