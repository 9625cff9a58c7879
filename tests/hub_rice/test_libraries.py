"""One published folder in other libraries: sentence-transformers, transformers' pipelines, mteb."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

import modeling_rice  # noqa: F401
import processing_rice  # noqa: F401
from hub_rice.repository import publication

sentence_transformers = pytest.importorskip("sentence_transformers")

# A process that cannot import this project, with the repository on the local server.
FROM_THE_SERVER = """
import json
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import pipeline

torch.set_num_threads(1)
pictures = [Image.open(path) for path in PICTURES]
embedder = SentenceTransformer("someone/libraries", trust_remote_code=True, device="cpu")
clips = [{"video": pictures[:2]}, {"video": pictures[:1]}]
save_file({
    "images": torch.from_numpy(embedder.encode(pictures)), "clips": torch.from_numpy(embedder.encode(clips)),
}, OUTPUT)
retrieve = pipeline("product-retrieval", model="someone/libraries", trust_remote_code=True, device="cpu")
assert type(retrieve).__module__.startswith("transformers_modules"), type(retrieve)
print(json.dumps(retrieve(pictures[:2], candidates=PICTURES, top_k=2)))
assert retrieve.model.rank(pictures[:2], PICTURES, 1, processor=retrieve.processor)[0].keys() == {"corpus_id", "score"}
retrieve.save_pretrained(SAVED)
again = pipeline("product-retrieval", model=SAVED, trust_remote_code=True, device="cpu")
print(json.dumps(again(pictures[:2], candidates=PICTURES, top_k=2)))
"""

MTEB = """
import mteb
from PIL import Image
from safetensors.numpy import save_file

model = mteb.get_model("someone/for_mteb", trust_remote_code=True, num_frames=2, device="cpu")
assert set(model.mteb_model_meta.modalities) == {"image", "video"}, model.mteb_model_meta
save_file({"images": model.model.encode([Image.open(path) for path in PICTURES])}, OUTPUT)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of five photographs."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(generator.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(5)]


@pytest.fixture(scope="module")
def frames():
    """Clips of three frames, one and two, as uint8 arrays `(T, H, W, 3)`; the processor takes three at most."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, (count, 36, 48, 3), dtype=np.uint8) for count in (3, 1, 2)]


@pytest.fixture(scope="module")
def video_files(frames, tmp_path_factory):
    av = pytest.importorskip("av")
    folder, paths = tmp_path_factory.mktemp("videos"), []
    for i, clip in enumerate(frames[::2]):
        paths.append(str(folder / f"{i}.mp4"))
        with av.open(paths[-1], "w") as container:
            stream = container.add_stream("mpeg4", rate=1)
            stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return paths


@pytest.fixture(scope="module")
def own(tiny_checkpoint):
    """Model and processor, loaded by this project."""
    return AutoModel.from_pretrained(tiny_checkpoint).eval(), AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def embedder(tiny_checkpoint):
    return sentence_transformers.SentenceTransformer(str(tiny_checkpoint), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def retrieve(tiny_checkpoint):
    return pipeline("product-retrieval", model=str(tiny_checkpoint), trust_remote_code=True, device="cpu")


def embed_images(own, images):
    with torch.no_grad():
        return own[0].get_image_features(**own[1](images=images)).pooler_output


def embed_clips(own, clips):
    """Each clip by itself, so that nothing is padded."""
    with torch.no_grad():
        return torch.cat([own[0].get_video_features(**own[1](videos=[clip])).pooler_output for clip in clips])


def assert_equal(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), expected, atol=1e-6, rtol=0)


def test_sentence_transformers_embeds_shop_images(own, embedder, pictures):
    expected = embed_images(own, pictures)
    for images in (pictures, [Image.open(path) for path in pictures], [{"image": path} for path in pictures]):
        assert_equal(embedder.encode(images, batch_size=2), expected)
    assert embedder.get_embedding_dimension() == expected.shape[1]
    assert set(embedder.modalities) == {"image", "video"} and embedder.similarity_fn_name == "cosine"


@pytest.mark.parametrize("kind", ["frames", "paths", "THWC array", "THWC tensor", "TCHW tensor"])
def test_sentence_transformers_embeds_clips_of_uneven_length(own, embedder, frames, kind, tmp_path):
    def convert(clip):
        if kind in ("frames", "paths"):
            pictures = [Image.fromarray(frame) for frame in clip]
            for i, picture in enumerate(pictures * (kind == "paths")):
                picture.save(tmp_path / f"{len(clip)}_{i}.png")
            return {
                "video": [str(tmp_path / f"{len(clip)}_{i}.png") for i in range(len(clip))]
                if kind == "paths"
                else pictures
            }
        if kind == "THWC array":
            return clip
        tensor = torch.from_numpy(clip)
        return tensor if kind == "THWC tensor" else tensor.movedim(-1, 1)

    for batch_size in (1, 3):
        assert_equal(
            embedder.encode([convert(clip) for clip in frames], batch_size=batch_size), embed_clips(own, frames)
        )


def test_sentence_transformers_embeds_video_files(own, embedder, video_files):
    assert_equal(embedder.encode(video_files), embed_clips(own, video_files))


def test_padding_would_change_the_embedding(own, frames):
    """The mean over padded frames too is another embedding, so the tests above can fail."""
    inputs = own[1](videos=frames)
    counted = own[0].get_video_features(inputs["pixel_values_videos"]).pooler_output
    assert (counted - embed_clips(own, frames))[1].abs().max() > 1e-3


def test_information_retrieval_evaluator_ranks_images_for_clips(own, embedder, pictures, frames):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    corpus = {str(i): path for i, path in enumerate(pictures)}
    queries = {str(i): {"video": [Image.fromarray(frame) for frame in clip]} for i, clip in enumerate(frames)}
    best = (embed_clips(own, frames) @ embed_images(own, pictures).T).argsort(dim=1, descending=True)
    # The second clip's image is found second, the others' first.
    relevant = {str(i): {str(best[i, i % 2].item())} for i in range(3)}
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, accuracy_at_k=[1, 2], name="shop")
    scores = evaluator(embedder)
    assert scores["shop_cosine_accuracy@1"] == pytest.approx(2 / 3) and scores["shop_cosine_accuracy@2"] == 1


def test_a_resaved_sentence_transformer_gives_the_same(own, embedder, frames, tmp_path):
    embedder.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert_equal(again.encode(frames), embed_clips(own, frames))


def expected_ranking(own, clip, images):
    gallery, clips = own[0].encode_gallery(**own[1](images=images)), own[0].encode_clips(**own[1](videos=[clip]))
    scores = own[0].match(clips, gallery)[0]
    order = scores.argsort(descending=True).tolist()
    return order, scores[order].tolist(), own[0].similarity(clips, gallery)[0, order].tolist()


def test_the_pipeline_ranks_by_matching(own, retrieve, pictures, frames):
    order, scores, cosines = expected_ranking(own, frames[0], pictures)
    answers = retrieve([Image.fromarray(frame) for frame in frames[0]], candidates=pictures, top_k=3)
    assert [answer["index"] for answer in answers] == order[:3]
    assert [answer["score"] for answer in answers] == pytest.approx(scores[:3], abs=1e-6)
    assert [answer["similarity"] for answer in answers] == pytest.approx(cosines[:3], abs=1e-6)
    assert [answer["label"] for answer in answers] == [pictures[i] for i in order[:3]]


def test_the_pipeline_takes_clips_and_candidates_of_any_kind(own, retrieve, pictures, frames, video_files, tmp_path):
    opened = [Image.open(path) for path in pictures]
    gallery = own[0].encode_gallery(**own[1](images=pictures))
    gallery.save(tmp_path / "shop.safetensors")
    order = expected_ranking(own, frames[0], pictures)[0]
    clip = [Image.fromarray(frame) for frame in frames[0]]
    for kind in (clip, tuple(clip), frames[0], torch.from_numpy(frames[0]), list(frames[0])):
        for candidates in (opened, gallery, tmp_path / "shop.safetensors"):
            assert [answer["index"] for answer in retrieve(kind, candidates=candidates)] == order
    assert [a["index"] for a in retrieve(video_files[0], candidates=gallery)] == expected_ranking(
        own, video_files[0], pictures
    )[0]
    titled = retrieve(clip, candidates=gallery, titles=["a", "b", "c", "d", "e"], top_k=1)
    assert titled[0]["label"] == "abcde"[order[0]]
    column = pd.Series(["a", None, "c", float("nan"), "e"], index=range(3, 8))
    labels = ["a", pictures[1], "c", pictures[3], "e"]
    by_column = retrieve(clip, candidates=pictures, titles=column, asr=float("nan"))
    assert [answer["label"] for answer in by_column] == [labels[i] for i in order]
    assert retrieve(clip, candidates=opened, labels=[10, 11, 12, 13, 14], top_k=1)[0]["label"] == 10 + order[0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_takes_many_clips(own, retrieve, pictures, frames, batch_size):
    expected = [expected_ranking(own, clip, pictures) for clip in frames]
    answers = retrieve(frames, candidates=pictures, batch_size=batch_size)
    assert [[answer["index"] for answer in each] for each in answers] == [order for order, _, _ in expected]
    one = retrieve([[Image.fromarray(frame) for frame in frames[1]]], candidates=pictures, rank_by="embedding")
    assert len(one) == 1 and [a["score"] for a in one[0]] == pytest.approx(sorted(expected[1][2])[::-1], abs=1e-6)


def test_the_decoder_of_the_pipeline_scores_the_nearest_only(own, retrieve, pictures, frames):
    by_cosine = [a["index"] for a in retrieve(frames[0], candidates=pictures, rank_by="embedding")]
    answers = retrieve(frames[0], candidates=pictures, top_k=2, rerank=2)
    assert {answer["index"] for answer in answers} == set(by_cosine[:2])
    assert len(retrieve(frames[0], candidates=pictures, top_k=4, rerank=2)) == 4


def test_the_pipeline_keeps_a_shop_given_at_the_start(tiny_checkpoint, retrieve, pictures, frames):
    shop = pipeline(
        "product-retrieval",
        model=str(tiny_checkpoint),
        trust_remote_code=True,
        device="cpu",
        candidates=pictures,
        top_k=2,
    )
    assert shop(frames[0]) == retrieve(frames[0], candidates=pictures, top_k=2)
    assert len(shop(frames[0], candidates=pictures[:1])) == 1


@pytest.mark.parametrize(
    "clip, settings, sentence",
    [
        ([], {}, "There is no clip"),
        ("clip", {"candidates": None}, "`candidates` are missing"),
        ("clip", {"candidates": []}, "`candidates` is empty"),
        ("clip", {"candidates": ["none.png"]}, "There is no image file none.png"),
        ("clip", {"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ("clip", {"rank_by": "colour"}, "`rank_by` must be one of 'embedding', .* got 'colour'"),
        ("clip", {"titles": ["one"]}, "`titles` has 1 entries for 5 candidates"),
        ("clip", {"titles": ["a", "b", 3, "d", "e"]}, "Entry 2 of `titles` is a int"),
        ("clip", {"asr": 3}, "Entry 0 of `asr` is a int"),
        ("clip", {"labels": ["one"]}, "`labels` has 1 entries for 5 candidates"),
        ("clip", {"candidates": None, "labels": ["one"]}, "belong to `candidates`"),
        ("none.mp4", {}, "There is no video file none.mp4"),
    ],
)
def test_the_pipeline_refuses_in_one_sentence(retrieve, pictures, frames, clip, settings, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        retrieve(frames[0] if clip == "clip" else clip, **{"candidates": pictures, **settings})
    assert "\n" not in str(error.value)


def test_a_gallery_of_another_model_is_refused(retrieve, pictures, frames, own):
    gallery = own[0].encode_gallery(**own[1](images=pictures))
    gallery.model_fingerprint = "0" * 32
    with pytest.raises(ValueError, match="encoded by another model"):
        retrieve(frames[0], candidates=gallery)


def test_both_load_from_the_hub_without_the_project(hub, fresh_process, tiny_checkpoint, own, pictures, tmp_path):
    from safetensors.torch import load_file

    files = publication(tiny_checkpoint, "someone/libraries", license="apache-2.0")
    assert {"modules.json", "sentence_bert_config.json", "pipeline_rice.py"} < files.keys()
    hub.add(
        "someone/libraries", {n: item if isinstance(item, bytes) else item.read_bytes() for n, item in files.items()}
    )
    start = f"PICTURES, OUTPUT, SAVED = {pictures!r}, {str(tmp_path / 'out')!r}, {str(tmp_path / 'saved')!r}\n"
    example = re.findall(r"```py\n(.*?)```", files["README.md"].decode(), re.DOTALL)[0]
    for name, path in zip(("red_mug", "blue_mug", "frame_0", "frame_1"), pictures, strict=False):
        example = example.replace(f"{name}.jpg", path)
    printed = fresh_process(start + FROM_THE_SERVER + example).splitlines()
    opened = [Image.open(path) for path in pictures]
    found = load_file(tmp_path / "out")
    assert_equal(found["images"], embed_images(own, pictures))
    assert_equal(found["clips"], embed_clips(own, [opened[:2], opened[:1]]))
    order = expected_ranking(own, opened[:2], pictures)[0]
    for line in (line for line in printed if line.startswith("[")):
        assert [answer["index"] for answer in json.loads(line)] == order[:2]
    assert sum(line.startswith("[") for line in printed) == 2
    cosines = [float(number) for number in re.findall(r"-?[0-9.]+", printed[-1])]
    expected = embed_clips(own, [opened[2:4]]) @ embed_images(own, pictures[:2]).T
    assert cosines == pytest.approx(expected[0].tolist(), abs=1e-3)


def test_mteb_loads_the_repository_without_code(hub, fresh_process, tiny_checkpoint, own, pictures, tmp_path):
    from safetensors.torch import load_file

    pytest.importorskip("mteb")
    files = publication(tiny_checkpoint, "someone/for_mteb", license="apache-2.0")
    hub.add(
        "someone/for_mteb", {n: item if isinstance(item, bytes) else item.read_bytes() for n, item in files.items()}
    )
    fresh_process(f"PICTURES, OUTPUT = {pictures!r}, {str(tmp_path / 'out')!r}\n" + MTEB)
    assert_equal(load_file(tmp_path / "out")["images"], embed_images(own, pictures))


def test_pipelines_of_transformers_take_pictures(own, tiny_checkpoint, pictures):
    extract = pipeline("image-feature-extraction", model=str(tiny_checkpoint), trust_remote_code=True, device="cpu")
    expected = embed_images(own, pictures)
    for settings in ({}, {"pool": True}):
        assert_equal(np.concatenate(extract(pictures, **settings)).astype(np.float32), expected)
    assert_equal(extract(Image.open(pictures[0]), return_tensors=True), expected[:1])


def test_the_text_pipeline_without_a_text_encoder_says_so(tiny_checkpoint):
    extract = pipeline("feature-extraction", model=str(tiny_checkpoint), trust_remote_code=True, device="cpu")
    with pytest.raises(ValueError, match="The model has no text encoder"):
        extract("a red cup")


def test_the_pipeline_takes_rows(retrieve, pictures, video_files):
    clip = [Image.open(path) for path in pictures[:2]]
    expected = retrieve(clip, candidates=pictures)
    for row in ({"video": clip}, {"frames": clip, "video": None, "asr": "a cup"}):
        assert retrieve(row, candidates=pictures) == expected
        assert retrieve([row, row], candidates=pictures) == [expected] * 2
    row = {"video": video_files[0], "start": None, "end": None}
    assert retrieve(row, candidates=pictures) == retrieve(video_files[0], candidates=pictures)
    with pytest.raises(ValueError, match='A video is a path or {"path", "start", "end"}'):
        retrieve({"vid": clip}, candidates=pictures)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 1.5}, "`top_k` must be an integer, got 1.5"),
        ({"rerank": 0}, "`rerank` must be at least 1"),
        ({"labels": 3}, "`labels` is a int; give a list"),
        ({"labels": "abcde"}, "`labels` is a str; give a list"),
        ({"candidates": "."}, "`candidates` is the folder .; give a list of its images"),
        ({"candidates": []}, "`candidates` is empty"),
    ],
    ids=str,
)
def test_the_pipeline_names_what_is_wrong(retrieve, pictures, settings, message):
    with pytest.raises(ValueError, match=message):
        retrieve([Image.open(pictures[0])], **({"candidates": pictures} | settings))
