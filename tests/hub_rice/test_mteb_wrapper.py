"""mteb's MovingFashion tasks on a miniature of their data: the scores are those of evaluation_rice."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_rice.recall import recall_at_k
from hub_rice import mteb_wrapper
from hub_rice.mteb_wrapper import RiceEncoder, evaluate
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer
from rice_cli import main

mteb = pytest.importorskip("mteb")
av = pytest.importorskip("av")

CONFIGS = """---
configs:
- config_name: corpus
  data_files: [{split: test, path: corpus.parquet}]
- config_name: queries
  data_files: [{split: test, path: queries.parquet}]
- config_name: default
  data_files: [{split: test, path: qrels.parquet}]
---
"""


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files of eight shop images and six clips of uneven length, flat colours in noise, and what shows what."""
    folder, generator = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    colours = generator.integers(0, 256, (8, 3))
    images, videos = {}, {}
    for i, colour in enumerate(colours):
        pixels = np.clip(colour + generator.normal(0, 60, (48, 32, 3)), 0, 255).astype(np.uint8)
        images[f"image{i}"] = str(folder / f"{i}.png")
        Image.fromarray(pixels).save(images[f"image{i}"])
    for i in range(6):
        videos[f"video{i}"] = str(folder / f"{i}.mp4")
        with av.open(videos[f"video{i}"], "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 32, 48, "yuv420p"
            for _ in range(1 + 2 * i):
                pixels = np.clip(colours[i] + generator.normal(0, 90, (48, 32, 3)), 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    # As in the real test split, a clip may have several images, and some images have no clip.
    relevant = {f"video{i}": [f"image{i}"] for i in range(6)}
    relevant["video0"].append("image6")
    return images, videos, relevant


@pytest.fixture(scope="module")
def tasks(media, tmp_path_factory):
    """Both of mteb's tasks, reading local folders of the format of their repositories on the Hub."""
    import datasets
    from mteb.tasks.retrieval.zxx.moving_fashion_retrieval import MovingFashionI2VRetrieval, MovingFashionV2IRetrieval

    images, videos, relevant = media
    reverse = {image: [v for v in relevant if image in relevant[v]] for image in images}

    def rows(kind, files):
        encoded = [{"path": Path(path).name, "bytes": Path(path).read_bytes()} for path in files.values()]
        features = datasets.Features({"id": datasets.Value("string"), kind.__name__.lower(): kind()})
        return datasets.Dataset.from_dict({"id": list(files), kind.__name__.lower(): encoded}, features)

    image_rows, video_rows = rows(datasets.Image, images), rows(datasets.Video, videos)
    found = {}
    for task, queries, corpus, pairs in (
        (MovingFashionV2IRetrieval, video_rows, image_rows, relevant),
        (MovingFashionI2VRetrieval, image_rows, video_rows, reverse),
    ):
        folder = tmp_path_factory.mktemp("task")
        (folder / "README.md").write_text(CONFIGS)
        triples = [(query, document, 1) for query, documents in pairs.items() for document in documents]
        qrels = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*triples, strict=True)), strict=True))
        for name, table in (("queries", queries), ("corpus", corpus), ("qrels", datasets.Dataset.from_dict(qrels))):
            table.to_parquet(str(folder / f"{name}.parquet"))
        local = {"path": str(folder), "revision": "local"}
        kind = type(task.__name__, (task,), {"metadata": task.metadata.model_copy(update={"dataset": local})})
        found[task.metadata.name] = kind()
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    RiceModel(RiceConfig(vision_config=vision, projection_dim=16, use_decoder=False)).save_pretrained(folder)
    build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20), 32, 16, 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return RiceEncoder(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def similarity(encoder, media):
    """Cosines `(clips, images)` by the model itself, each clip read from its file and alone."""
    images, videos, _ = media
    model, processor = encoder.model, encoder.processor
    gallery = model.encode_gallery(**processor(images=list(images.values())))
    clips = [model.encode_clips(**processor(videos=[path])) for path in videos.values()]
    return model.similarity(type(clips[0]).cat(clips), gallery)


def own_recall(scores, queries, corpus, relevant):
    order = scores.argsort(dim=1, descending=True).tolist()
    rankings = {
        query: [corpus[i] for i in row] for query, row in zip(queries, order, strict=True) if query in relevant
    }
    return recall_at_k(rankings, relevant, ks=(1, 3, 5))


def test_scores_are_those_of_this_project(tasks, encoder, similarity, media, tmp_path, monkeypatch):
    import datasets

    # mteb looks at a first example, which would need FFmpeg's libraries; the wrapper takes videos encoded.
    monkeypatch.setattr(datasets.Video, "decode_example", lambda self, value, token_per_repo_id=None: value)
    images, videos, relevant = media
    scores = evaluate(encoder, list(tasks.values()), tmp_path / "out", batch_size=4)
    reverse = {image: [v for v in relevant if image in relevant[v]] for image in images}
    reverse = {image: clips for image, clips in reverse.items() if clips}
    expected = {
        "MovingFashionV2IRetrieval": own_recall(similarity, list(videos), list(images), relevant),
        "MovingFashionI2VRetrieval": own_recall(similarity.T, list(images), list(videos), reverse),
    }
    assert expected["MovingFashionV2IRetrieval"]["R@1"] not in (0, 1)
    for name, recall in expected.items():
        assert {f"R@{k}": scores[name][f"hit_rate_at_{k}"] for k in (1, 3, 5)} == pytest.approx(recall, abs=1e-5)
    written = json.loads((tmp_path / "out" / "mteb.json").read_text())
    assert written["scores"] == scores and written["num_frames"] == 3
    assert any((tmp_path / "out" / "rankings").rglob("*MovingFashionV2IRetrieval*"))


def test_embeddings_follow_the_number_of_frames(checkpoint, encoder, media):
    import datasets
    from torch.utils.data import DataLoader

    paths = list(media[1].values())
    rows = datasets.Dataset.from_dict({"video": paths}).cast_column("video", datasets.Video())
    loader = DataLoader(rows, batch_size=4, collate_fn=lambda rows: {"video": [row["video"] for row in rows]})

    def encode(encoder):
        return encoder.encode(loader, task_metadata=None, hf_split="", hf_subset="", show_progress_bar=False)

    one = RiceEncoder(checkpoint, device="cpu", num_frames=1)
    clips = one.processor(videos=paths, num_frames=1)
    assert clips["pixel_values_videos"].shape[1] == 1
    with torch.no_grad():
        expected = one.model.get_video_features(**clips).pooler_output
    np.testing.assert_allclose(encode(one), expected, atol=1e-5)
    assert np.abs(encode(one) - encode(encoder)).max() > 1e-3


def test_similarities(encoder):
    first, second = np.eye(2, dtype=np.float32), np.array([[0.6, 0.8], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(encoder.similarity(first, second), [[0.6, 1], [0.8, 0]])
    np.testing.assert_allclose(encoder.similarity_pairwise(first, second), [0.6, 0])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["mteb", *map(str, arguments)])
    assert end.value.code == 2
    return capsys.readouterr().err.strip()


def test_mistakes_get_one_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    output = ["--output_dir", tmp_path / "out"]
    message = fails(capsys, checkpoint, *output, "--tasks", "MovingFashion")
    assert "--tasks names a task that mteb does not have" in message and len(message.splitlines()) == 1
    assert "there is no checkpoint folder" in fails(capsys, tmp_path / "none", *output)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert "mteb needs torchcodec and FFmpeg's libraries" in fails(capsys, checkpoint, *output)
    monkeypatch.setattr(mteb_wrapper, "check_torchcodec", lambda: None)
    assert "needs the Hub, but HF_HUB_OFFLINE is set" in fails(capsys, checkpoint, *output)
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert "mteb is not installed" in fails(capsys, checkpoint, *output)
