"""`rice index`: a folder of pictures, a shop with clips, and the sentences for mistakes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from PIL import Image

from data_rice.paths import text_to_path
from retrieval_rice.demo.page import Demo
from retrieval_rice.index import GalleryIndex
from rice_cli import main


@pytest.fixture
def checkpoint(shop, tmp_path):
    folder = tmp_path / "model"
    # An untrained decoder is never sure, while embeddings tell the pictures apart.
    shop.model.config.ranking = "embedding"
    shop.model.save_pretrained(folder)
    shop.processor.save_pretrained(folder)
    return folder


def run(*arguments):
    return main(["index", *map(str, arguments), "--num_workers", "0", "--device", "cpu"])


def write_shop(shop, folder):
    """A shop_clips folder of 24 pictures and as many validation clips."""
    rows = shop.make_rows(24, folder.name)
    gallery = [{"gallery_id": row["image_id"], "image": f"{row['image_id']}.png", "title": "mug"} for row in rows]
    clips = [
        {"query_id": f"c{i}", "frames": [row["image"]], "gt_gallery_ids": [row["gallery_id"]]}
        for i, row in enumerate(gallery)
    ]
    for name, lines in (("gallery.jsonl", gallery), ("clips_val.jsonl", clips)):
        folder.joinpath(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_shop_with_clips_is_indexed_and_calibrated(shop, checkpoint, tmp_path, capsys):
    write_shop(shop, tmp_path / "shop")
    output = tmp_path / "index"
    assert run(tmp_path / "shop", "--model", checkpoint, "--output", output, "--cache_dir", tmp_path / "cache") == 0
    text = capsys.readouterr().out
    assert "calibrated on" in text and "24 pictures; 0 could not be read" in text
    index = GalleryIndex.load(output, shop.model)
    assert len(index) == 24 and index.calibration.report["num_present"] == 24
    assert (index.calibration.presence_prior, index.calibration.threshold) == (0.9, 0.5)
    assert index.search(shop.clips(3))[0].hits[0].title == "mug"


def test_a_changed_decision_rule_is_fitted_again_and_the_same_one_kept(shop, checkpoint, tmp_path, capsys):
    write_shop(shop, tmp_path / "shop")
    output = tmp_path / "index"
    arguments = (tmp_path / "shop", "--model", checkpoint, "--output", output, "--cache_dir", tmp_path / "cache")
    assert run(*arguments) == 0
    capsys.readouterr()
    strict = ("--presence_prior", "0.5", "--false_accept_rate", "0.1")
    for options, fits in ((strict, True), (strict, False), ((), False), (("--presence_prior", "0.7"), True)):
        assert run(*arguments, *options) == 0
        assert ("calibrated on" in capsys.readouterr().out) == fits
        if options is strict:
            calibration = GalleryIndex.load(output, shop.model).calibration
            assert (calibration.presence_prior, calibration.false_accept_rate) == (0.5, 0.1)
            assert calibration.report["false_accepts"] <= 0.1
    assert GalleryIndex.load(output, shop.model).calibration.presence_prior == 0.7


def test_confidences_can_be_calibrated_with_a_detectors_boxes(shop, checkpoint, tmp_path, capsys):
    write_shop(shop, tmp_path / "shop")
    lines = [{"format": "rice-boxes", "version": 1, "dataset": "shop_clips"}]
    lines += [
        {"split": "validation", "clip_id": f"c{i}", "num_frames": 1, "frames": [0], "boxes": [[0, 0, 0.5, 0.5]],
         "scores": [0.9]}
        for i in range(24)
    ]  # fmt: skip
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (tmp_path / "shop", "--model", checkpoint, "--cache_dir", tmp_path / "cache")
    # Of a quarter of each frame an untrained model is never sure.
    arguments += ("--false_accept_rate", "0.3")
    fitted = []
    for name, options in (("plain", ()), ("boxes", ("--boxes_file", boxes))):
        assert run(*arguments, "--output", tmp_path / name, *options) == 0
        fitted.append(GalleryIndex.load(tmp_path / name, shop.model).calibration)
    assert fitted[0].weights != fitted[1].weights
    boxes.write_text("".join(json.dumps(line) + "\n" for line in lines[:9]))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments, "--output", tmp_path / "boxes", "--boxes_file", boxes)
    assert end.value.code == 2 and "has no boxes for 16 clips of the validation split" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (("--boxes_file", "boxes.jsonl", "--calibrate", "none"), "--boxes_file belongs to a calibration"),
        (("--presence_prior", "1"), "presence_prior must be above 0 and below 1, got 1.0"),
        (("--false_accept_rate", "5"), "false_accept_rate must be at least 0 and below 1, got 5.0"),
        (("--presence_prior", "0.5", "--calibrate", "none"), "leave out --calibrate none"),
    ],
)
def test_a_bad_decision_rule_is_refused_before_encoding(checkpoint, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--model", checkpoint, "--output", tmp_path / "index", *options)
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in message and len(message.splitlines()) == 1
    assert not (tmp_path / "index").exists()


def test_a_folder_of_pictures_is_a_shop(shop, checkpoint, tmp_path, capsys):
    folder = tmp_path / "plain"
    shop.make_rows(3, "plain")
    (folder / "broken_one.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("no picture")
    output = tmp_path / "index"
    assert run(folder, "--model", checkpoint, "--output", output) == 0
    text = capsys.readouterr().out
    assert "plain: 1 entry was left out: notes.txt (no suffix of a picture)" in text.splitlines()[-1]
    assert "3 pictures; 1 could not be read" in text and "not read: broken_one.jpg" in text
    assert "not calibrated" in text
    assert sorted(GalleryIndex.load(output, shop.model).image_ids()) == ["p0.png", "p1.png", "p2.png"]


def test_every_decoded_picture_format_is_indexed(shop, checkpoint, tmp_path, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    kinds = {"10.avif": "AVIF", "9.gif": "GIF", "2.TIF": "TIFF", "1.jfif": "JPEG"}
    for i, (name, kind) in enumerate(kinds.items()):
        Image.open(shop.rows[i]["image"]["path"]).save(folder / name, format=kind)
    assert run(folder, "--model", checkpoint, "--output", tmp_path / "index") == 0
    assert "4 pictures; 0 could not be read" in capsys.readouterr().out
    ids = GalleryIndex.load(tmp_path / "index", shop.model).image_ids()
    assert ids == ["1.jfif", "2.TIF", "9.gif", "10.avif"]


def test_system_folders_are_left_out_and_reported(shop, checkpoint, tmp_path, capsys):
    shop.make_rows(2, "plain")
    for folder in ("@eaDir/p0.png", ".ipynb_checkpoints", "deep/__MACOSX"):
        (tmp_path / "plain" / folder).mkdir(parents=True)
        shop.make_rows(1, f"plain/{folder}")
    assert run(tmp_path / "plain", "--model", checkpoint, "--output", tmp_path / "index") == 0
    text = capsys.readouterr().out
    assert "2 pictures; 0 could not be read" in text
    assert "3 entries were left out: .ipynb_checkpoints, @eaDir, deep/__MACOSX (hidden or made by the system)" in text


def test_a_name_that_is_not_utf8_is_indexed_and_found(shop, checkpoint, tmp_path, capsys):
    rows = shop.make_rows(2, "plain")
    name = os.fsencode(tmp_path / "plain") + "/人参_1.png".encode("gbk")
    os.rename(rows[0]["image"]["path"], name)
    (tmp_path / "plain" / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    assert run(tmp_path / "plain", "--model", checkpoint, "--output", tmp_path / "index") == 0
    text = capsys.readouterr().out
    assert "2 pictures; 1 could not be read" in text and r"not read: \xff.png" in text
    index = GalleryIndex.load(tmp_path / "index", shop.model, shop.processor)
    hit = next(hit for hit in index.search(shop.clips(0))[0].hits if hit.image_id == r"\xc8\xcb\xb2\xce_1.png")
    assert os.fsencode(text_to_path(hit.image)) == name
    json.dumps([asdict(hit), index.skipped], ensure_ascii=False).encode()
    # The demo of an index opens the picture by what the index says.
    demo = Demo(shop.model, shop.processor, index, None, None)
    assert demo.picture(hit.image_id).size == demo.picture("p1.png").size


@pytest.mark.parametrize("is_folder", [True, False])
def test_links_out_of_the_shop_are_refused_by_name(shop, checkpoint, tmp_path, capsys, is_folder):
    shop.make_rows(2, "plain")
    rows = shop.make_rows(1, "elsewhere")
    target = tmp_path / "elsewhere" if is_folder else rows[0]["image"]["path"]
    (tmp_path / "plain" / "more.png").symlink_to(target)
    with pytest.raises(SystemExit):
        run(tmp_path / "plain", "--model", checkpoint, "--output", tmp_path / "index")
    assert "plain/more.png is a link that leads out of" in capsys.readouterr().err


def test_the_command_works_on_an_ascii_terminal(shop, checkpoint, tmp_path):
    shop.make_rows(1, "plain")
    (tmp_path / "plain" / "笔记.txt").write_text("x")
    command = [sys.executable, "rice_cli.py", "index", tmp_path / "plain", "--model", checkpoint]
    command += ["--output", tmp_path / "index", "--num_workers", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and rb"left out: \u7b14\u8bb0.txt" in done.stdout


@pytest.mark.slow
def test_two_processes_of_one_launch_fill_one_table(shop, checkpoint, tmp_path):
    rows = shop.make_rows(24, "plain")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "rice_cli.py", "index", tmp_path / "plain", "--model", checkpoint]
    launch += ["--output", tmp_path / "index", "--batch_size", "2", "--commit_every", "2", "--num_workers", "0"]
    ours = {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for expected in (24, 23):
        done = subprocess.run(launch, capture_output=True, text=True, env=os.environ | ours, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{expected} pictures; 0 could not be read" in done.stdout and "(1 of 2)" in done.stderr
        index = GalleryIndex.load(tmp_path / "index", shop.model)
        names = sorted((f"p{i}.png" for i in range(24)), key=lambda name: int(name[1:-4]))[-expected:]
        assert index.image_ids() == names
        hits = index.search(shop.clips(5))[0].hits
        whole = GalleryIndex.build(shop.model, shop.processor, rows[-expected:], progress=False)
        # Without the suffix of a file.
        assert [hit.image_id[:-4] for hit in hits] == [hit.image_id for hit in whole.search(shop.clips(5))[0].hits]
        # A shop that has lost one is the second try.
        (tmp_path / "plain" / "p0.png").unlink(missing_ok=True)


def test_an_approximate_index_is_built_kept_and_dropped(shop, checkpoint, tmp_path, capsys):
    shop.make_rows(5, "plain")
    arguments = (tmp_path / "plain", "--model", checkpoint, "--output", tmp_path / "index")
    for options, kind, built in (
        (("--approximate", "hnsw"), "hnsw", True),
        (("--approximate", "hnsw"), "hnsw", False),
        ((), "hnsw", False),
        (("--approximate", "none"), None, False),
    ):
        assert run(*arguments, *options) == 0
        assert ("of the 10 nearest, measured" in capsys.readouterr().out) == built
        assert GalleryIndex.load(tmp_path / "index", shop.model).approximate_kind == kind


def test_a_dry_run_reports_and_writes_nothing(shop, checkpoint, tmp_path, capsys):
    shop.make_rows(5, "plain")
    arguments = (tmp_path / "plain", "--model", checkpoint, "--output", tmp_path / "index")
    assert run(*arguments, "--dry_run") == 0
    text = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (tmp_path / "plain").iterdir())
    assert f"5 images; about {size / 1000:.0f} kB of pictures" in text and "s to encode 5 at" in text
    assert not (tmp_path / "index").exists()
    assert run(*arguments) == 0
    capsys.readouterr()
    shop.make_rows(7, "plain")
    assert run(*arguments, "--dry_run") == 0
    assert "7 images, 5 of them in the index already" in capsys.readouterr().out
    assert len(GalleryIndex.load(tmp_path / "index", shop.model)) == 5


def test_versions_are_listed_and_restored(shop, checkpoint, tmp_path, capsys):
    output = tmp_path / "index"
    for count in (3, 5):
        shop.make_rows(count, "plain")
        assert run(tmp_path / "plain", "--model", checkpoint, "--output", output) == 0
    capsys.readouterr()
    assert run("--versions", "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    number = next(line.split()[1] for line in lines if line.endswith("3 pictures"))
    assert lines[-1].endswith("5 pictures")
    assert run("--restore", number, "--output", output) == 0
    assert f"version {number} is restored" in capsys.readouterr().out
    assert len(GalleryIndex.load(output, shop.model)) == 3
    for wrong, words in ((("--restore", "999"), "has no version 999"), ((), "name the shop to index")):
        with pytest.raises(SystemExit) as end:
            run(*wrong, "--output", output)
        message = capsys.readouterr().err.strip()
        assert end.value.code == 2 and words in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "holds neither pictures nor the files of a data set"),
    ],
)
def test_mistakes_end_with_one_sentence(checkpoint, tmp_path, capsys, prepare, words):
    prepare(tmp_path / "shop")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "shop", "--model", checkpoint, "--output", tmp_path / "index")
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in message and len(message.splitlines()) == 1


def test_another_shop_needs_overwrite(shop, checkpoint, tmp_path, capsys):
    output = tmp_path / "index"
    shop.make_rows(5, "one")
    shop.make_rows(4, "two")
    for path in (tmp_path / "two").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    assert run(tmp_path / "one", "--model", checkpoint, "--output", output) == 0
    with pytest.raises(SystemExit):
        run(tmp_path / "two", "--model", checkpoint, "--output", output)
    assert "--overwrite" in capsys.readouterr().err
    assert run(tmp_path / "two", "--model", checkpoint, "--output", output, "--overwrite") == 0
    assert GalleryIndex.load(output, shop.model).image_ids() == [f"other_p{i}.png" for i in range(4)]


def precision_of_index(folder) -> str:
    from retrieval_rice.index.table import ShopTable

    return ShopTable(str(folder)).snapshot().state.precision


def test_an_index_keeps_its_precision_and_can_be_searched_in_any(shop, checkpoint, tmp_path, capsys, monkeypatch):
    import hub_rice.precision

    shop.make_rows(10)
    pictures, output = tmp_path / "pictures", tmp_path / "index"
    arguments = (pictures, "--model", checkpoint, "--output", output)
    monkeypatch.setattr(hub_rice.precision, "computes_bf16", lambda device: True)
    assert run(*arguments) == 0 and precision_of_index(output) == "bfloat16"
    assert "the model computes in bf16 (--precision auto)" in capsys.readouterr().err
    # On a machine that computes otherwise, what is added is as what is there.
    monkeypatch.setattr(hub_rice.precision, "computes_bf16", lambda device: False)
    shop.make_rows(12)
    assert run(*arguments) == 0 and precision_of_index(output) == "bfloat16"
    assert "the model computes in bf16 (--precision auto)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*arguments, "--precision", "fp32")
    assert "with other settings (precision)" in capsys.readouterr().err
    lines = {}
    for precision in ("fp32", "bf16", "fp16"):
        words = ["recognise", str(pictures), "--shop", str(output), "--model", str(checkpoint), "--device", "cpu"]
        assert main([*words, "--jsonl", "-", "--precision", precision]) == 0
        told = capsys.readouterr()
        lines[precision] = [json.loads(line)["image_id"] for line in told.out.splitlines()]
        assert ("were encoded in bfloat16: scores differ by its rounding" in told.err) == (precision != "bf16")
    assert lines["fp32"] == lines["bf16"] == lines["fp16"]
    assert run(*arguments, "--precision", "fp32", "--overwrite") == 0 and precision_of_index(output) == "float32"
