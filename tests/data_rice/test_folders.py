"""The pictures of a folder: their order, what counts as one, what is left out, and where links may lead."""

import io
import os
import random
import sys

import pytest
from PIL import Image

from data_rice import folders
from data_rice.commands import print_anywhere
from data_rice.folders import list_names, list_pictures, natural_key


@pytest.fixture
def fill(tmp_path):
    """A function that makes files and folders (names that end with a slash) below tmp_path / "shop"."""

    def make(*names: str):
        root = tmp_path / "shop"
        root.mkdir(exist_ok=True)
        for name in names:
            path = root / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(b"x")
        return root

    return make


def found(root, **options) -> list[str]:
    return [os.path.relpath(path, root) for path in list_pictures(root, **options).pictures]


@pytest.mark.parametrize(
    "in_order",
    [
        ["f1", "f2", "f10", "f11"],
        ["①2", "②2", "③2", "⑩2"],
        ["x¹", "x²", "x³", "x⁴"],
        ["f２", "f３", "f１０"],
        ["٢", "٣", "١٠"],
        ["f" + "9" * 5000, "f1" + "0" * 5000],
        ["a", "a1", "a1b", "ab"],
        ["f01", "f1", "f02", "f2"],
        ["x", "½"],
    ],
)
def test_numbers_of_any_script_and_length_are_in_order(in_order):
    shuffled = list(in_order)
    random.shuffle(shuffled)
    assert sorted(shuffled, key=natural_key) == in_order


def test_any_two_names_can_be_compared():
    alphabet = "a1٣２²①⑩½一億ⅷ௧_.\udcc8"
    names = ["".join(random.choices(alphabet, k=random.randint(0, 6))) for _ in range(300)]
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)


@pytest.mark.parametrize(
    "suffix, file_format",
    [(suffix, "JPEG") for suffix in (".jpg", ".JPEG", ".jpe", ".jfif", ".pjpeg")]
    + [(suffix, suffix[1:].upper()) for suffix in (".png", ".webp", ".gif", ".bmp", ".avif")]
    + [(suffix, "TIFF") for suffix in (".tif", ".TIFF")]
    + [(suffix, "PPM") for suffix in (".ppm", ".pgm", ".pbm", ".pnm")],
)
def test_listed_formats_can_be_decoded(tmp_path, suffix, file_format):
    from processing_rice import open_image

    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (8, 8)).save(tmp_path / f"p{suffix}", format=file_format)
    (path,) = list_pictures(tmp_path).pictures
    assert open_image({"path": path}).size == (8, 8)


SYSTEM_ENTRIES = [
    *(".hidden.jpg", "._mug.jpg", ".ipynb_checkpoints/mug-checkpoint.jpg", ".git/annex/mug.jpg"),
    *("@eaDir/mug.jpg/SYNOPHOTO_THUMB_S.jpg", "__MACOSX/._mug.jpg", "__MACOSX/lamp.jpg", "$RECYCLE.BIN/$R1.jpg"),
    *("System Volume Information/x.jpg", "#recycle/mug.jpg", "@Recycle/mug.jpg", "lost+found/#12.jpg"),
    *("@eadir/x.jpg", "$Recycle.Bin/x.jpg", "Thumbs.db", "desktop.ini", "mug.jpg~", "#mug.jpg#"),
]


@pytest.mark.parametrize("name", SYSTEM_ENTRIES)
def test_system_entries_are_left_out_in_any_folder(fill, name):
    root = fill("mug.jpg", "sub/lamp.jpg", name, f"sub/{name}")
    listing = list_pictures(root, below=True)
    assert found(root, below=True) == ["mug.jpg", "sub/lamp.jpg"]
    first = name.split("/")[0]
    assert listing.left_out == {folders.SYSTEM: [first, f"sub/{first}"]} and first in listing.note()


def test_names_similar_to_system_entries_are_pictures(fill):
    names = ["#1.jpg", "$5 mug.jpg", "@home/mug.jpg", "_mug.jpg", "a.b/~mug.jpg", "thumbs.db.jpg"]
    assert sorted(found(fill(*names), below=True)) == sorted(names)


def test_the_root_itself_may_be_hidden(fill):
    root = fill(".cache/shop/mug.jpg") / ".cache"
    assert found(root, below=True) == ["shop/mug.jpg"]


def test_left_out_entries_are_counted_and_named(fill):
    root = fill("p2.jpg", "p10.jpg", ".DS_Store", *(f"n{i}.txt" for i in (1, 2, 10, 3)), "deep/p.jpg", "noSuffix")
    assert found(root) == ["p2.jpg", "p10.jpg"]
    assert list_pictures(root).note() == (
        f"{root}: 7 entries were left out: .DS_Store (hidden or made by the system); deep (folders are not looked "
        "into); n1.txt, n2.txt, n3.txt and 2 more (no suffix of a picture)"
    )
    assert list_pictures(root / "deep").note() == ""


def test_folders_and_pipes_with_a_picture_suffix_are_left_out(fill):
    root = fill("folder.jpg/mug.png", "p.jpg")
    os.mkfifo(root / "pipe.jpg")
    assert found(root, below=True) == ["folder.jpg/mug.png", "p.jpg"]
    assert list_names(root) == ["p.jpg", "pipe.jpg"]


@pytest.mark.parametrize("target, is_folder", [("elsewhere/lamp.jpg", False), ("elsewhere", True), ("", True)])
def test_links_out_of_the_folder_are_refused_by_name(fill, tmp_path, target, is_folder):
    root = fill("mug.jpg", "../elsewhere/lamp.jpg", "sub/")
    link = root / "sub" / ("more" if is_folder else "more.jpg")
    link.symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"{link.name} is a link that leads out of {root}"):
        list_pictures(root, below=True)


def test_links_within_the_folder_are_read_once_and_cycles_end(fill):
    root = fill("all/mug.jpg", ".data/lamp.jpg", "a/", "b/")
    (root / "again").symlink_to("all")
    (root / "kept").symlink_to(".data")
    (root / "a" / "up").symlink_to("../")
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    (root / "self").symlink_to("self")
    (root / "gone.jpg").symlink_to("nothing.jpg")
    assert found(root, below=True) == ["all/mug.jpg", "gone.jpg", "kept/lamp.jpg"]
    left_out = list_pictures(root, below=True).left_out
    assert sorted(left_out[folders.LISTED]) == ["a/b", "a/up", "again", "b/a"]


def test_the_folder_may_be_a_link(fill, tmp_path):
    fill("sub/mug.jpg")
    (tmp_path / "link").symlink_to("shop")
    (tmp_path / "shop" / "more").symlink_to(tmp_path / "shop" / "sub")
    assert found(tmp_path / "link", below=True) == ["sub/mug.jpg"]


def test_a_data_sets_names_must_be_text(fill):
    root = fill("a.jpg", "._a.jpg", os.fsdecode(b"\xc8\xcb.jpg"))
    with pytest.raises(ValueError, match=r"\\xc8\\xcb.jpg: the name is not UTF-8; rename"):
        list_names(root)


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
def test_any_text_can_be_printed_and_json_stays_valid(monkeypatch, encoding):
    import json

    value = {"title": "é 人 😀 \udcc8 \x85"}
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
    print_anywhere()
    print(json.dumps(value, ensure_ascii=False), flush=True)
    assert json.loads(screen.getvalue().decode(encoding)) == value
