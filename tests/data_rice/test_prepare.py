"""Shards of prepared rows: the same rows again, the same bytes after an interruption, losses reported."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from data_rice import gallery_scope, load_dataset_view
from data_rice import prepare as prepare_module
from data_rice.features import clip_row, view_features
from data_rice.prepare import PrepareSettings, load_prepared, prepare_views, shard_files
from data_rice.prepare_rows import reduce_picture
from processing_rice.media_rice import read_media

REPOSITORY = Path(__file__).parents[2]


def _picture(path: Path, size=(40, 20), seed=0, suffix=".jpg") -> str:
    path = path.with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


@pytest.fixture
def views(tmp_path):
    """Seven pairs of five frames, two queries, three gallery images."""
    folder = tmp_path / "media"
    pairs, queries = [], []
    for number in range(7):
        frames = [_picture(folder / f"{number}-{frame}", seed=10 * number + frame) for frame in range(5)]
        boxes = [[0.1 * frame, 0, 1, 1] if frame else None for frame in range(5)]
        clip = clip_row(clip_id=f"clip/{number}", frames=frames, boxes=boxes, asr="看 'a'", category="Skirt")
        image = _picture(folder / f"image{number}", (16, 16), suffix=".png")
        pairs.append({**clip, "image_id": f"image{number}", "image": image, "title": "title"})
        if number < 2:
            queries.append({**clip, "relevant": [f"image{number}"]})
    gallery = [
        {"image_id": f"i{n}", "live_id": "", "image": _picture(folder / f"i{n}"), "title": ""} for n in range(3)
    ]

    def build() -> dict:
        return {
            (view, split): datasets.Dataset.from_list(rows, features=view_features(view))
            for view, split, rows in (
                ("pairs", "train", pairs),
                ("query", "test", queries),
                ("gallery", "test", gallery),
            )
        }

    return build


@pytest.fixture
def prepare(views, tmp_path):
    def prepare(name="out", source="x", options=None, num_workers=1, **settings):
        settings = PrepareSettings(**{"num_frames": 3, "short_side": 16, "rows_per_shard": 3, **settings})
        manifest = prepare_views(
            views(),
            tmp_path / name,
            dataset="toy",
            gallery_scope="all",
            source=source,
            options=options,
            settings=settings,
            num_workers=num_workers,
        )
        return tmp_path / name, manifest

    return prepare


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("file_format", ["parquet", "tar"])
def test_prepared_rows_are_the_rows(prepare, views, tmp_path, file_format):
    folder, manifest = prepare(file_format=file_format)
    assert manifest["views"]["pairs"]["train"] == {"rows": 7, "kept": 7, "shards": 3, "lost": {}}
    for (view, split), source in views().items():
        rows = load_dataset_view(folder, view, split, cache_dir=tmp_path / "cache")
        assert rows.features == source.features and len(rows) == len(source)
        for row, original in zip(rows, source):
            for name in set(row) - {"frames", "boxes", "image"}:
                assert row[name] == original[name]
            if "frames" in row:
                assert len(row["frames"]) == 3
                # Evenly spread, as in evaluation: int(linspace(0, 5, 3, endpoint=False)).
                assert row["boxes"] == [original["boxes"][frame] for frame in (0, 1, 3)]
                assert all(min(Image.open(io.BytesIO(read_media(entry))).size) == 16 for entry in row["frames"])
            if view == "pairs":
                # Already small, so not encoded anew.
                assert read_media(row["image"]) == Path(original["image"]["path"]).read_bytes()
    assert gallery_scope(folder) == gallery_scope("toy", folder) == "all"


def test_prepared_parquet_can_be_published_and_saved(prepare, tmp_path):
    folder, _ = prepare()
    rows = datasets.load_dataset(str(folder), "pairs", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 7 and rows[0]["frames"][0]["bytes"][:2] == b"\xff\xd8"
    load_prepared(folder, "pairs", "train", tmp_path / "cache").save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")[6]["clip_id"] == "clip/6"


def test_tar_shards_are_webdataset_samples(prepare):
    folder, _ = prepare(file_format="tar")
    with tarfile.open(shard_files(folder, "pairs", "train")[1]) as archive:
        members = archive.getmembers()
        names = [member.name for member in members]
        row = json.load(archive.extractfile("000000003.json"))
    frames = [f"000000003.frame000{frame}.jpg" for frame in range(3)]
    assert names[:5] == [*frames, "000000003.image.png", "000000003.json"]
    assert {name.partition(".")[0] for name in names} == {"000000003", "000000004", "000000005"}
    assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in members)
    assert row["clip_id"] == "clip/3" and row["frames"] == frames and row["asr"] == "看 'a'"


@pytest.mark.parametrize("file_format", ["parquet", "tar"])
def test_interrupted_run_ends_with_the_same_bytes(prepare, monkeypatch, file_format):
    once, _ = prepare("once", file_format=file_format)
    write_shard, written = prepare_module.write_shard, []

    def interrupted(path, rows, features):
        if len(written) == 2:
            Path(path).write_bytes(b"half of a shard")
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, rows, features)

    monkeypatch.setattr(prepare_module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("twice", file_format=file_format)
    monkeypatch.setattr(prepare_module, "write_shard", write_shard)
    with pytest.raises(FileNotFoundError):
        shard_files(once.with_name("twice"), "pairs", "train")
    first = {path: os.stat(path).st_mtime_ns for path in (once.with_name("twice") / "pairs").glob("train-0000[01]-*")}
    assert len(first) == 2
    twice, _ = prepare("twice", file_format=file_format)
    assert _hashes(twice) == _hashes(once)
    assert all(os.stat(path).st_mtime_ns == time for path, time in first.items())
    before = _hashes(once)
    prepare("once", file_format=file_format)
    assert _hashes(once) == before


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(prepare):
    one, _ = prepare("one")
    two, _ = prepare("two", num_workers=2)
    assert _hashes(one) == _hashes(two)


def test_unreadable_pictures_are_replaced_counted_and_listed(prepare, tmp_path):
    media = tmp_path / "media"
    (media / "0-1.jpg").write_bytes(b"no picture")  # chosen; 0-2 takes its place
    (media / "1-0.jpg").write_bytes((media / "1-0.jpg").read_bytes()[:200])  # a query and a pair
    for frame in range(5):
        (media / f"2-{frame}.jpg").unlink()
    (media / "image3.png").unlink()
    (media / "i1.jpg").unlink()
    folder, manifest = prepare()
    assert manifest["views"]["pairs"]["train"] == {
        "rows": 7,
        "kept": 5,
        "shards": 3,
        "lost": {"frames": 7, "clips in all their frames": 1, "images": 1},
    }
    pairs = load_prepared(folder, "pairs", "train", tmp_path / "cache")
    assert pairs["clip_id"][:] == [f"clip/{number}" for number in (0, 1, 4, 5, 6)]
    assert [entry["path"] for entry in pairs[0]["frames"]] == [f"clip/0-000{frame}.jpg" for frame in (0, 2, 3)]
    assert pairs[0]["boxes"] == [None, pytest.approx([0.2, 0, 1, 1]), pytest.approx([0.3, 0, 1, 1])]
    assert len(pairs[1]["frames"]) == 3
    gallery = load_prepared(folder, "gallery", "test", tmp_path / "cache")
    assert len(gallery) == 3 and gallery[1]["image"] == {"bytes": None, "path": "i1"}
    lost = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert {"view": "gallery", "split": "test", "id": "i1", "file": str(media / "i1.jpg")}.items() <= lost[-1].items()
    assert lost[-1]["reason"] == "there is no such file" and "cannot be decoded" in lost[0]["reason"]


def test_a_query_without_frames_is_kept(prepare, tmp_path):
    for frame in range(5):
        (tmp_path / "media" / f"1-{frame}.jpg").unlink()
    folder, _ = prepare()
    queries = load_prepared(folder, "query", "test", tmp_path / "cache")
    assert queries["clip_id"][:] == ["clip/0", "clip/1"] and queries[1]["frames"] == []


def test_other_settings_data_or_options_are_refused(prepare, tmp_path):
    folder, _ = prepare(options={"validation_fraction": 0.1})
    with pytest.raises(ValueError, match="was begun with another settings"):
        prepare(options={"validation_fraction": 0.1}, num_frames=4)
    with pytest.raises(ValueError, match="was begun with another source"):
        prepare(options={"validation_fraction": 0.1}, source="y")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        prepare("full")
    assert len(load_dataset_view(folder, "pairs", "train", cache_dir=tmp_path / "cache", validation_fraction=0.1)) == 7
    with pytest.raises(ValueError, match="was prepared with validation_fraction=0.1, not 0.2"):
        load_dataset_view(folder, "pairs", "train", cache_dir=tmp_path / "cache", validation_fraction=0.2)
    with pytest.raises(ValueError, match="has no test pairs, only gallery test, pairs train"):
        load_dataset_view(folder, "pairs", "test", cache_dir=tmp_path / "cache")
    Path(shard_files(folder, "pairs", "train")[1]).unlink()
    with pytest.raises(FileNotFoundError, match="train-00001-of-00003.parquet does not exist"):
        load_prepared(folder, "pairs", "train", tmp_path / "cache")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_frames": -1}, "num_frames must be"),
        ({"short_side": 1.5}, "short_side must be"),
        ({"quality": 101}, "quality must be at most 100"),
        ({"rows_per_shard": 0}, "rows_per_shard must be"),
        ({"file_format": "zip"}, "file_format must be"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**settings)


def test_videos_are_refused(tmp_path):
    row = {**clip_row(clip_id="c", frames=[], boxes=[], video="/v.mp4"), "relevant": []}
    rows = datasets.Dataset.from_list([row], features=view_features("query"))
    with pytest.raises(ValueError, match="The clip c is part of a video; extract its frames"):
        prepare_views({("query", "test"): rows}, tmp_path / "out", dataset="toy", gallery_scope="all")


def test_reduce_picture(tmp_path):
    large = Path(_picture(tmp_path / "a", (540, 960))).read_bytes()
    data, suffix = reduce_picture(large, 256, 95)
    small = Image.open(io.BytesIO(data))
    assert small.size == (256, 455) and small.format == "JPEG" and suffix == ".jpg"
    assert reduce_picture(data, 256, 95) == (data, ".jpg")
    assert reduce_picture(large, 0, 95) == (large, ".jpg")
    bitmap = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(bitmap, "BMP")
    assert reduce_picture(bitmap.getvalue(), 256, 95)[1] == ".jpg"
    gradient = Image.fromarray(np.linspace(0, 255, 800 * 600).astype(np.uint8).reshape(600, 800)).convert("RGB")
    buffer = io.BytesIO()
    gradient.save(buffer, "JPEG", quality=95)
    exact = np.asarray(gradient.resize((133, 100), Image.Resampling.BICUBIC), dtype=float)
    reduced = np.asarray(Image.open(io.BytesIO(reduce_picture(buffer.getvalue(), 100, 95)[0])), dtype=float)
    assert np.abs(exact - reduced).mean() < 1
    for broken in (b"", b"no picture", large[:5000]):
        with pytest.raises(ValueError, match="cannot be decoded"):
            reduce_picture(broken, 256, 95)


@pytest.mark.parametrize("file_format", ["parquet", "tar"])
def test_damaged_shard_is_named_and_written_again(prepare, tmp_path, file_format):
    folder, _ = prepare(file_format=file_format)
    path = Path(shard_files(folder, "pairs", "train")[1])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"{path.name}.*damaged .*delete it and"):
        load_prepared(folder, "pairs", "train", tmp_path / "cache")
    path.unlink()
    prepare(file_format=file_format)
    assert len(load_prepared(folder, "pairs", "train", tmp_path / "cache")) == 7


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bytes(tmp_path):
    """The command line, killed in the middle without a chance to tidy up."""
    if not (REPOSITORY / "data" / "mini_lpr4m" / "mini_lpr4m.json").is_file():
        pytest.skip("needs data/mini_lpr4m: python -m data_rice.mini_lpr4m")

    def command(name):
        arguments = ["prepare", "data/mini_lpr4m", str(tmp_path / name), "--rows_per_shard", "100", "--views", "pairs"]
        arguments += ["--cache_dir", str(tmp_path / "cache"), "--short_side", "48", "--num_frames", "2"]
        return [sys.executable, "-m", "data_rice.lpr4m", *arguments]

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command("once"), cwd=REPOSITORY, env=environment, check=True)
    process = subprocess.Popen(command("twice"), cwd=REPOSITORY, env=environment)
    while process.poll() is None and len(list((tmp_path / "twice").glob("pairs/*.parquet"))) < 5:
        pass
    assert process.poll() is None
    process.kill()
    process.wait()
    subprocess.run(command("twice"), cwd=REPOSITORY, env=environment, check=True)
    assert _hashes(tmp_path / "once") == _hashes(tmp_path / "twice")
