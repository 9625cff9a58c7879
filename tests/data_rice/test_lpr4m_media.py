"""LPR4M's pictures out of img2dataset's folders and tar shards.

The shards here are laid out like those that img2dataset 1.47.0 wrote, in both formats, from a list of urls on a local
server: names, key padding, order of members (by arrival, not by key), json and parquet columns, what a failed download
leaves behind (a parquet row without a picture).
"""

import io
import json
import os
import tarfile
import uuid
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_rice import load_dataset_view
from data_rice.lpr4m.index import DamagedShard, MediaIndex, id_of_url, read_shard
from processing_rice.media_rice import read_media, tar_member_path

PREFIX = "https://cdn.example/media/"


def jpeg(size=(20, 10), colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


class Shards:
    """Writes an output folder of img2dataset; ``None`` as a picture is a download that failed."""

    def __init__(self, folder: Path, output_format: str, parquet: bool = True, original=(40, 20)):
        self.folder, self.output_format, self.parquet, self.original = folder, output_format, parquet, original
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, shard: int, pictures: dict[str, bytes | None], stats: bool = True) -> None:
        metas = []
        for number, (name, data) in enumerate(pictures.items()):
            done = data is not None
            metas.append(
                {
                    "url": f"{PREFIX}{name}.jpg",
                    "key": f"{shard}{number:05d}",
                    "status": "success" if done else "failed_to_download",
                    "error_message": None if done else "HTTP Error 404: File not found",
                    "width": 20 if done else None,
                    "height": 10 if done else None,
                    "original_width": self.original[0] if done else None,
                    "original_height": self.original[1] if done else None,
                    "exif": "{}" if done else None,
                    "sha256": "0" * 64 if done else None,
                }
            )
        whole = [(meta, data) for meta, data in zip(metas, pictures.values()) if data is not None]
        if self.output_format == "files":
            (self.folder / f"{shard:05d}").mkdir(exist_ok=True)
            for meta, data in whole:
                (self.folder / f"{shard:05d}" / f"{meta['key']}.jpg").write_bytes(data)
                (self.folder / f"{shard:05d}" / f"{meta['key']}.json").write_text(json.dumps(meta, indent=4))
        else:
            with tarfile.open(self.folder / f"{shard:05d}.tar", "w") as archive:
                for meta, data in reversed(whole):
                    self.add(archive, f"{meta['key']}.jpg", data)
                    self.add(archive, f"{meta['key']}.json", json.dumps(meta, indent=4).encode())
        if self.parquet:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(metas), self.folder / f"{shard:05d}.parquet")
        if stats:
            counts = {"count": len(metas), "successes": len(whole), "failed_to_download": len(metas) - len(whole)}
            (self.folder / f"{shard:05d}_stats.json").write_text(json.dumps(counts, indent=4))

    @staticmethod
    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def _uuid(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


CLIPS = [f"{_uuid(live)}-0-5000" for live in range(3)]
FRAMES = [[f"{clip}-{index:04d}" for index in range(2)] for clip in CLIPS]
IMAGES = [f"{_uuid(100 + number)}-0" for number in range(3)]


@pytest.fixture
def root(tmp_path) -> Path:
    """Annotations of two training clips and one test clip; boxes are pixels of 40x20 frames."""
    root = tmp_path / "lpr4m"
    annotations = root / "annotations"
    annotations.mkdir(parents=True)
    rest = ["title", "3", "Skirt", "speech", "large", "long", "2"]
    rows = [
        [clip, str(frames), str([[4, 2, 20, 10]] * 2), image, *rest]
        for clip, frames, image in zip(CLIPS[:2], FRAMES, IMAGES)
    ]
    (annotations / "training_videoinfo_tiny.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    (annotations / "test_videoid_to_gtimage.json").write_text(json.dumps({CLIPS[2]: [IMAGES[2]]}))
    (annotations / "test_liveid_to_gallery.json").write_text(json.dumps({_uuid(2): [IMAGES[2]]}))
    boxes = {FRAMES[2][1]: [[0.5, 0.5, 1.5, 1], [0, 0, 0.25, 0.5]], FRAMES[2][0]: []}
    (annotations / "test_frameid2gtbox.json").write_text(json.dumps(boxes))
    (annotations / "test_videoid_asr.txt").write_text(f"{CLIPS[2]}\tspeech\n")
    (annotations / "test_image_title.txt").write_text(f"{IMAGES[2]}\ttitle\n")
    return root


@pytest.fixture
def load(root, tmp_path):
    def load(view: str, split: str, **options):
        return load_dataset_view("lpr4m", view, split, data_dir=root, cache_dir=tmp_path / "cache", **options)

    return load


def _size(entry) -> tuple[int, int]:
    return Image.open(io.BytesIO(read_media(entry))).size


@pytest.mark.parametrize("output_format", ["files", "webdataset"])
@pytest.mark.parametrize("parquet", [True, False])
def test_rows_read_from_shards(root, load, output_format, parquet):
    frames = Shards(root / "img2dataset" / "frames", output_format, parquet)
    frames.write(0, {FRAMES[0][0]: jpeg(colour="red"), "other": None, FRAMES[0][1]: jpeg(colour="lime")})
    frames.write(1, dict.fromkeys([*FRAMES[1], *reversed(FRAMES[2])], jpeg()))
    Shards(root / "img2dataset" / "images", output_format, parquet).write(0, dict.fromkeys(IMAGES, jpeg((10, 10))))

    pairs = load("pairs", "train")
    colours = [Image.open(io.BytesIO(read_media(entry))).getpixel((5, 5)) for entry in pairs[0]["frames"]]
    assert [colour.index(max(colour)) for colour in colours] == [0, 1]
    # Boxes are pixels of the frames before img2dataset reduced them.
    assert pairs[0]["boxes"] == [pytest.approx([0.1, 0.1, 0.5, 0.5])] * 2
    assert _size(pairs[1]["image"]) == (10, 10)
    query = load("query", "test")[0]
    assert len(query["frames"]) == 2 and query["boxes"] == [None, pytest.approx([0, 0, 1, 1])]
    assert _size(load("gallery", "test")[0]["image"]) == (10, 10)
    assert all((entry["path"].count(".tar#") == 1) == (output_format == "webdataset") for entry in query["frames"])


def test_tree_folders_and_tar_shards_mix(root, load):
    Shards(root / "img2dataset" / "a", "files").write(0, {FRAMES[0][0]: jpeg((20, 10))})
    Shards(root / "img2dataset" / "b", "webdataset").write(0, {FRAMES[1][0]: jpeg((22, 11)), FRAMES[1][1]: None})
    tree = root / "training_video_00" / CLIPS[0]
    tree.mkdir(parents=True)
    (tree / f"{FRAMES[0][1]}.jpg").write_bytes(jpeg((40, 20)))
    first, second = load("pairs", "train")
    assert [_size(entry) for entry in first["frames"]] == [(20, 10), (40, 20)]
    assert _size(second["frames"][0]) == (22, 11) and not os.path.exists(second["frames"][1]["path"])


def test_detection_rows(root, load):
    Shards(root / "img2dataset" / "a", "webdataset").write(0, dict.fromkeys(sum(FRAMES, []), jpeg()))
    train = load("detection", "train")
    assert train["frame_id"][:] == FRAMES[0] + FRAMES[1] and set(train["split"]) == {"train"}
    assert train[0]["boxes"] == [pytest.approx([0.1, 0.1, 0.5, 0.5])] and train[0]["category"] == "Skirt"
    test = load("detection", "test")
    assert test["frame_id"][:] == [FRAMES[2][1]]
    assert test[0]["boxes"] == [pytest.approx([0.5, 0.5, 1, 1]), pytest.approx([0, 0, 0.25, 0.5])]
    assert test[0]["live_id"] == _uuid(2) and _size(test[0]["image"]) == (20, 10)
    every = load("detection", "test", empty_frames=True)
    assert every["boxes"][1] == [] and every["frame_id"][1] == FRAMES[2][0]


def test_new_shards_are_indexed(root, load):
    shards = Shards(root / "img2dataset" / "a", "webdataset")
    shards.write(0, {FRAMES[0][0]: jpeg()})
    assert not any("tar#" in entry["path"] for entry in load("pairs", "train")[1]["frames"])
    shards.write(1, dict.fromkeys(FRAMES[1], jpeg()))
    assert all("tar#" in entry["path"] for entry in load("pairs", "train")[1]["frames"])


def test_unfinished_and_damaged_shards_are_left_out_and_reported(root, load, caplog):
    shards = Shards(root / "img2dataset" / "a", "webdataset")
    shards.write(0, dict.fromkeys(FRAMES[0], jpeg()))
    shards.write(1, dict.fromkeys(FRAMES[1], jpeg()), stats=False)
    shards.write(2, dict.fromkeys(FRAMES[2], jpeg()))
    whole = shards.folder / "00002.tar"
    whole.write_bytes(whole.read_bytes()[:700])
    with caplog.at_level("WARNING"):
        rows = load("pairs", "train")
    assert "tar#" in rows[0]["frames"][0]["path"] and "tar#" not in rows[1]["frames"][0]["path"]
    assert "00001.tar" in caplog.text and "unfinished" in caplog.text
    assert "00002.tar" in caplog.text and "damaged" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, "../a.jpg", "/etc/a.jpg"])
def test_links_and_paths_in_a_tar_are_refused(root, load, kind):
    shards = Shards(root / "img2dataset" / "a", "webdataset", parquet=False)
    shards.write(0, {FRAMES[0][0]: jpeg()})
    with tarfile.open(shards.folder / "00000.tar", "a") as archive:
        if isinstance(kind, str):
            shards.add(archive, kind, b"x")
        else:
            member = tarfile.TarInfo("000009.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"00000\.tar: the member '.*' is a link, a folder or a path"):
        load("pairs", "train")


def test_links_out_of_the_data_folder_are_refused(root, load, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{FRAMES[2][0]}.jpg").write_bytes(jpeg())
    query = root / "query" / CLIPS[2]
    query.mkdir(parents=True)
    (query / f"{FRAMES[2][0]}.jpg").symlink_to(outside / f"{FRAMES[2][0]}.jpg")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        load("query", "test")
    (root / "training_video_00").mkdir()
    (root / "training_video_00" / CLIPS[0]).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leads out of"):
        load("pairs", "train")


def test_a_training_folder_may_be_a_link_to_another_disk(root, load, tmp_path):
    disk = tmp_path / "disk"
    (disk / CLIPS[0]).mkdir(parents=True)
    for frame in FRAMES[0]:
        (disk / CLIPS[0] / f"{frame}.jpg").write_bytes(jpeg((40, 20)))
    (root / "training_video_03").symlink_to(disk)
    assert _size(load("pairs", "train")[0]["frames"][0]) == (40, 20)


@pytest.mark.parametrize(
    "url, expected",
    [
        (f"{PREFIX}{FRAMES[0][0]}.jpg", FRAMES[0][0]),
        (f"{PREFIX}{IMAGES[0]}.jpg?x=1/2", IMAGES[0]),
        (f"  {PREFIX}a.b.png\n", "a.b"),
        (f"{PREFIX}noending", "noending"),
    ],
)
def test_id_of_url(url, expected):
    assert id_of_url(url) == expected


@pytest.mark.parametrize("url", [None, "", "https://cdn.example/", f"{PREFIX}..", f"{PREFIX}a%5Cb.jpg", "a/.."])
def test_url_without_an_id(url):
    with pytest.raises(ValueError, match="url"):
        id_of_url(url)


changes = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes, st.data())
def test_damaged_shards_are_reported_and_not_used(tmp_path, changes, data):
    """Whatever bytes a shard holds, it is refused, or left out and reported, or its ids lead to bytes inside it."""
    output_format = data.draw(st.sampled_from(["webdataset", "files"]))
    shards = Shards(tmp_path / uuid.uuid4().hex, output_format, parquet=data.draw(st.booleans()))
    shards.write(0, {"a-0": b"first", "a-1": b"second"})
    files = sorted(path for path in shards.folder.rglob("*") if path.is_file() and "stats" not in path.name)
    target = files[data.draw(st.integers(0, len(files) - 1))]
    content = bytearray(target.read_bytes())
    for place, junk in changes:
        place %= len(content) + 1
        content[place : place + len(junk)] = junk
    target.write_bytes(content)
    path = str(shards.folder / "00000") + (".tar" if output_format == "webdataset" else "")
    try:
        rows = list(read_shard(path))
    except DamagedShard:
        return
    except ValueError as error:
        assert path in str(error)
        return
    for _, name, start, size, width, height in rows:
        assert all(side is None or 0 <= side < 10**7 for side in (width, height))
        if name is None:
            assert 0 <= start <= start + size <= os.path.getsize(path)
        else:
            assert os.path.isfile(os.path.join(path, name))


def test_removed_shards_leave_the_index(tmp_path):
    shards = Shards(tmp_path / "a", "files")
    shards.write(0, {"x": jpeg(), "y": jpeg()})
    index = MediaIndex(str(tmp_path / "index" / "media.sqlite"))
    index.update([str(shards.folder)])
    assert set(index.find(["x", "y", "z"])) == {"x", "y"}
    (shards.folder / "00000_stats.json").unlink()
    index.update([str(shards.folder)])
    assert index.find(["x", "y"]) == {} and "unfinished" in index.problems[0][1]


def test_read_media(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    tar = str(tmp_path / "a.tar")
    Path(tar).write_bytes(b"0123456789")
    assert read_media({"path": str(tmp_path / "a.bin"), "bytes": None}) == b"0123456789"
    assert read_media({"path": "nowhere", "bytes": b"inside"}) == b"inside"
    assert read_media({"path": tar_member_path(tar, 2, 3), "bytes": None}) == b"234"
    with pytest.raises(OSError, match="ends before this member"):
        read_media({"path": tar_member_path(tar, 8, 3), "bytes": None})
    with pytest.raises(FileNotFoundError):
        read_media({"path": tar_member_path(f"{tmp_path}/b.tar", 0, 3), "bytes": None})
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        read_media({"path": None, "bytes": None})
