"""``python -m data_rice.lpr4m fetch|prepare|verify`` on a small tree, with a stand-in for img2dataset."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from PIL import Image

from data_rice import load_dataset_view
from data_rice.lpr4m.commands import main
from data_rice.lpr4m.fetch import fetch_command
from data_rice.lpr4m.verify import PUBLISHED_COUNTS

PREFIX = "https://cdn.example/media/"

# Does what img2dataset 1.47.0 does with its list: shards that have a _stats.json are left alone, a failed url leaves a
# parquet row and is not tried again. "Addresses" are answered out of the folder WWW.
STAND_IN = """#!{python}
import io, json, os, sys, tarfile
import pyarrow, pyarrow.parquet
options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
print("stand-in", json.dumps(options))
folder, size = options["output_folder"], int(options["number_sample_per_shard"])
assert options["incremental_mode"] == "incremental" and options["input_format"] == "txt"
urls = open(options["url_list"]).read().split()
[int(name.split("_")[0]) for name in os.listdir(folder) if name.endswith(".json")]
for shard in range(-(-len(urls) // size)):
    stem = os.path.join(folder, f"{{shard:05d}}")
    if os.path.exists(stem + "_stats.json"):
        continue
    metas = []
    with tarfile.open(stem + ".tar", "w") as archive:
        for number, url in enumerate(urls[shard * size : (shard + 1) * size]):
            source = os.path.join(os.environ["WWW"], os.path.basename(url))
            done = os.path.exists(source)
            status = "success" if done else "failed_to_download"
            metas.append(dict(url=url, key=f"{{shard}}{{number:05d}}", status=status,
                original_width=40 if done else None, original_height=20 if done else None))
            if done:
                for suffix, data in ((".jpg", open(source, "rb").read()), (".json", json.dumps(metas[-1]).encode())):
                    member = tarfile.TarInfo(metas[-1]["key"] + suffix)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    if os.environ.get("STOP_AT") == str(shard):
        sys.exit(3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(metas), stem + ".parquet")
    done = sum(meta["status"] == "success" for meta in metas)
    with open(stem + "_stats.json", "w") as file:
        json.dump(dict(count=len(metas), successes=done, failed_to_download=len(metas) - done), file)
"""


def _uuid(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (seed * 7 % 256, seed * 13 % 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


class Shop:
    """Annotations and url lists of four training clips, two test clips and their pictures in the folder `www`."""

    def __init__(self, tmp_path: Path):
        self.root, self.www, self.cache = tmp_path / "lpr4m", tmp_path / "www", tmp_path / "cache"
        for folder in (self.root / "annotations", self.root / "urls", self.www):
            folder.mkdir(parents=True)
        self.clips = [f"{_uuid(number)}-0-3000" for number in range(6)]
        self.frames = {clip: [f"{clip}-{index:04d}" for index in range(3)] for clip in self.clips}
        self.images = [f"{_uuid(100 + number)}-0" for number in range(6)]
        names = [*sum(self.frames.values(), []), *self.images]
        for number, name in enumerate(names):
            (self.www / f"{name}.jpg").write_bytes(_jpeg(number))
        rest = ["title", "3", "Skirt", "speech", "large", "long", "2"]
        rows = [
            [clip, str(self.frames[clip]), str([[4, 2, 20, 10]] * 3), image, *rest]
            for clip, image in zip(self.clips[:4], self.images)
        ]
        self.write("training_videoinfo_tiny.txt", "".join("\t".join(row) + "\n" for row in rows))
        test = list(zip(self.clips[4:], self.images[4:]))
        self.write("test_videoid_to_gtimage.json", json.dumps({clip: [image] for clip, image in test}))
        self.write(
            "test_liveid_to_gallery.json",
            json.dumps({_uuid(4 + number): [image] for number, (_, image) in enumerate(test)}),
        )
        boxes = {self.frames[clip][1]: [[0, 0, 0.5, 0.5]] for clip, _ in test}
        self.write("test_frameid2gtbox.json", json.dumps(boxes))
        self.write("test_videoid_asr.txt", "".join(f"{clip}\tspeech\n" for clip, _ in test))
        self.write("test_image_title.txt", "".join(f"{image}\ttitle\n" for _, image in test))
        urls = [f"{PREFIX}{name}.jpg\n" for name in names]
        (self.root / "urls" / "training_frame_url.txt").write_text("".join(urls[:12]))
        (self.root / "urls" / "others.txt").write_text("".join(urls[12:]))

    def write(self, name: str, text: str) -> None:
        (self.root / "annotations" / name).write_text(text)

    def verify(self, *arguments: str, expect: str | None = "none") -> int:
        expected = [] if expect is None else ["--expect", expect]
        return main(["verify", str(self.root), *expected, "--cache_dir", str(self.cache), *arguments])

    def listed(self) -> list[dict]:
        return [json.loads(line) for line in (self.root / "verify" / "missing.jsonl").read_text().splitlines()]


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture
def fetch(shop, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("WWW", str(shop.www))

    def fetch(*arguments: str) -> int:
        return main(["fetch", str(shop.root), "--img2dataset", str(program), "--shard_size", "5", *arguments])

    return fetch


def test_fetch_then_verify(shop, fetch, capfd):
    assert fetch() == 0
    output = capfd.readouterr().out
    assert "+ " in output and "--resize_mode=keep_ratio --image_size=256" in output
    assert "others.txt: 12 of 12 pictures fetched, 0 failed" in output
    assert shop.verify() == 0
    output = capfd.readouterr().out
    assert "training clips: 4" in output and "gallery images: 2" in output and output.endswith("\ncomplete\n")
    assert shop.listed() == []
    row = load_dataset_view("lpr4m", "pairs", "train", data_dir=shop.root, cache_dir=shop.cache)[0]
    assert all(".tar#" in entry["path"] for entry in row["frames"])


def test_manifest_is_what_sha256sum_reads(shop, fetch):
    fetch()
    shop.verify()
    manifest = (shop.root / "verify" / "manifest.sha256").read_text().splitlines()
    entries = dict(reversed(line.split("  ", 1)) for line in manifest)
    assert len(entries) == 6 + 3 + 3 and "img2dataset/others/00002.tar" in entries
    for name, digest in entries.items():
        assert hashlib.sha256((shop.root / name).read_bytes()).hexdigest() == digest


def test_interrupted_fetch_continues(shop, fetch, capfd, monkeypatch):
    monkeypatch.setenv("STOP_AT", "1")
    assert fetch() == 2
    assert "img2dataset ended with status 3" in capfd.readouterr().err
    monkeypatch.delenv("STOP_AT")
    first = shop.root / "img2dataset" / "others" / "00000.tar"
    before = first.stat().st_mtime_ns
    assert shop.verify() == 1
    assert any("unfinished" in entry["reason"] for entry in shop.listed())
    assert fetch() == 0 and shop.verify() == 0
    assert first.stat().st_mtime_ns == before


def test_missing_urls_are_listed_and_fetched_again(shop, fetch, capfd):
    gone = [shop.frames[shop.clips[0]][1], shop.frames[shop.clips[5]][2], shop.images[5]]
    for name in gone:
        (shop.www / f"{name}.jpg").rename(shop.www / name)
    assert fetch() == 1
    assert "11 of 12 pictures fetched, 1 failed" in capfd.readouterr().out
    assert shop.verify() == 1
    assert "3 missing" in capfd.readouterr().out
    assert {entry["id"] for entry in shop.listed()} == set(gone)
    (again,) = (shop.root / "verify").glob("missing_urls-*.txt")
    assert sorted(again.read_text().split()) == sorted(f"{PREFIX}{name}.jpg" for name in gone)
    for name in gone:
        (shop.www / name).rename(shop.www / f"{name}.jpg")
    assert fetch("--url_lists", str(again)) == 0 and shop.verify() == 0
    assert not again.exists()


def test_corrupt_pictures_are_listed(shop, fetch, capfd):
    bad, cut = shop.frames[shop.clips[1]][0], shop.images[4]
    (shop.www / f"{bad}.jpg").write_bytes(b"<html>not found</html>")
    (shop.www / f"{cut}.jpg").write_bytes(_jpeg(1)[:300])
    fetch()
    assert shop.verify() == 1
    assert {entry["id"] for entry in shop.listed()} == {bad, cut}
    assert all(entry["reason"].startswith("cannot be decoded") and ".tar#" in entry["file"] for entry in shop.listed())
    assert "2 cannot be decoded" in capfd.readouterr().out
    assert shop.verify("--no_decode") == 0


def test_verify_reads_the_tree_and_its_links(shop, tmp_path, capfd):
    for clip in shop.clips:
        folder = shop.root / ("training_video_01" if clip in shop.clips[:4] else "query") / clip
        folder.mkdir(parents=True)
        for frame in shop.frames[clip]:
            (folder / f"{frame}.jpg").write_bytes((shop.www / f"{frame}.jpg").read_bytes())
    for number, image in enumerate(shop.images):
        folder = shop.root / ("training_image" if number < 4 else f"gallery/{_uuid(number)}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{image}.jpg").write_bytes((shop.www / f"{image}.jpg").read_bytes())
    assert shop.verify() == 0
    assert len((shop.root / "verify" / "manifest.sha256").read_text().splitlines()) == 6 + 24
    first = shop.root / "training_video_01" / shop.clips[0] / f"{shop.frames[shop.clips[0]][0]}.jpg"
    first.unlink()
    first.symlink_to(shop.www / first.name)
    assert shop.verify() == 1
    assert "leads out of" in shop.listed()[0]["reason"] and len(shop.listed()) == 1


def test_wrong_counts_fail_the_verification(shop, fetch, tmp_path, capfd):
    fetch()
    expected = {"training clips": 4, "training frames": 12, "training boxes": 12, "test boxes": 2, "livestreams": 2}
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(expected))
    assert shop.verify(expect=str(path)) == 0
    path.write_text(json.dumps({**expected, "training clips": 5}))
    capfd.readouterr()
    assert shop.verify(expect=str(path)) == 1
    output = capfd.readouterr().out
    assert "training clips: 4 (expected 5)" in output and output.endswith("not complete\n")
    assert shop.verify(expect="full") == 1
    assert PUBLISHED_COUNTS["full"]["training clips"] == 4_013_617
    summary = json.loads((shop.root / "verify" / "verify.json").read_text())
    assert summary["whole"] is False and summary["counts"]["training clips"] == 4


def test_verify_expects_the_counts_of_the_named_list(shop, fetch, capfd):
    fetch()
    capfd.readouterr()
    assert shop.verify(expect=None) == 0
    assert "by the file names of the training list: none" in capfd.readouterr().out
    tiny = shop.root / "annotations" / "training_videoinfo_tiny.txt"
    rows = tiny.read_text().splitlines(keepends=True)
    tiny.rename(tiny.with_name("training_videoinfo_750k.txt"))
    assert shop.verify(expect=None) == 1
    output = capfd.readouterr().out
    assert "training list: 750k" in output and "test clips: 2 (expected 20079)" in output
    tiny.with_name("training_videoinfo_750k.txt").unlink()
    for part in range(10):
        shop.write(f"training_videoinfo_full_part_{part}.txt", "".join(rows[part : part + 1]))
    assert shop.verify(expect=None) == 1
    output = capfd.readouterr().out
    assert "training list: full" in output and "training clips: 4 (expected 4013617)" in output


def test_prepare_skips_views_without_a_source(shop, fetch, tmp_path, caplog, capsys):
    fetch()
    for path in (shop.root / "annotations").glob("test_*"):
        path.unlink()
    arguments = ["prepare", str(shop.root), str(tmp_path / "out"), "--cache_dir", str(shop.cache)]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "pairs train: 4 of 4 rows" in capsys.readouterr().out
    skipped = [message for message in caplog.messages if "is skipped" in message]
    assert len(skipped) == 1 and skipped[0].startswith("The view query is skipped: ")
    assert main([*arguments, "--views", "query"]) == 2
    error = capsys.readouterr().err
    assert "LPR4M publishes no validation split; put the test files there, or set validation_fraction" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["verify", "ROOT", "--expect", "all"], "--expect must be"),
        (["verify", "ROOT", "--expect", "nowhere.json"], "nowhere.json does not exist"),
        (["verify", "ROOT/urls", "--expect", "none"], "holds no training list and no test files"),
        (["verify", "ROOT/nothing", "--expect", "none"], "is not a folder"),
        (["fetch", "ROOT/annotations"], "holds no url list"),
        (["fetch", "ROOT", "--url_lists", "ROOT/none.txt"], "none.txt does not exist"),
        (["fetch", "ROOT", "--img2dataset", "ROOT/none"], "none is not a program"),
        (["fetch", "ROOT", "--url_lists", "ROOT/annotations/test_image_title.txt"], "line 1: expected a url"),
        (["prepare", "ROOT", "OUT", "--splits", "dev"], "There is no split 'dev'"),
        (["prepare", "ROOT", "OUT", "--quality", "0"], "quality must be"),
        (["prepare", "ROOT/urls", "OUT"], "annotations does not exist"),
    ],
)
def test_mistakes_get_one_sentence(shop, tmp_path, capsys, arguments, message):
    places = {"ROOT": str(shop.root), "OUT": str(tmp_path / "out")}
    arguments = [places.get(argument, argument.replace("ROOT/", f"{shop.root}/")) for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error


def test_fetch_refuses_to_continue_with_other_shards(shop, fetch, capsys):
    assert fetch() == 0
    assert fetch("--shard_size", "4") == 2
    assert "was begun with another shard_size" in capsys.readouterr().err
    with open(shop.root / "urls" / "others.txt", "a") as file:
        file.write(f"{PREFIX}more.jpg\n")
    assert fetch() == 2
    assert "was begun with another list" in capsys.readouterr().err


def test_fetch_says_how_to_get_img2dataset(shop, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["fetch", str(shop.root)]) == 2
    error = capsys.readouterr().err
    assert "-m venv .venv-img2dataset && .venv-img2dataset/bin/pip install img2dataset" in error
    own = tmp_path / ".venv-img2dataset" / "bin" / "img2dataset"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert main(["fetch", str(shop.root), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("+ .venv-img2dataset/bin/img2dataset ") for line in lines)
    assert not (shop.root / "img2dataset").exists()


def test_fetch_command_can_keep_sizes():
    command = fetch_command("img2dataset", "list.txt", "out", short_side=0)
    assert "--resize_mode=no" in command and not any("image_size" in argument for argument in command)


@pytest.mark.parametrize("file_format", ["parquet", "tar"])
def test_prepare(shop, fetch, tmp_path, capsys, file_format):
    fetch()
    out = tmp_path / "out"
    arguments = ["prepare", str(shop.root), str(out), "--num_frames", "2", "--rows_per_shard", "2"]
    arguments += ["--short_side", "10"]
    arguments += ["--cache_dir", str(shop.cache), "--file_format", file_format, "--views", "pairs", "query"]
    arguments += ["gallery", "detection", "--validation_lives", "1", "--subset", "2"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "pairs train: 2 of 2 rows in 1 shards" in capsys.readouterr().out
    sizes = {}
    for view, split in (("pairs", "train"), ("pairs", "validation"), ("query", "test"), ("gallery", "validation")):
        sizes[view, split] = len(load_dataset_view(out, view, split, cache_dir=shop.cache))
    assert list(sizes.values()) == [2, 1, 2, 1]
    boxes = load_dataset_view(out, "detection", "test", cache_dir=shop.cache)
    assert boxes[0]["boxes"] == [[0, 0, 0.5, 0.5]]
    assert main(arguments) == 0

    missing = shop.root / "img2dataset" / "others" / "00000.tar"
    missing.unlink()
    arguments[2] = str(tmp_path / "less")
    assert main(arguments) == 1
    assert "dropped.jsonl lists the unreadable media" in capsys.readouterr().out


def test_as_a_program(shop):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "data_rice.lpr4m", "verify", str(shop.root), "--expect", "none"]
    result = subprocess.run(
        [*command, "--cache_dir", str(shop.cache)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 1 and "Warning" not in result.stderr
    assert "24 missing" in result.stdout and "not complete; see" in result.stdout
