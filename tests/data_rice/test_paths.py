"""Paths in lists from other systems, and paths that are not valid UTF-8."""

import os
import random
import unicodedata

import pytest

from data_rice.paths import MediaRoot, path_to_text, text_to_path


@pytest.fixture
def make(tmp_path):
    """A function that makes a file below tmp_path and returns its path."""

    def make(name: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        return str(path)

    return make


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    "on_disk, in_list",
    [
        ("gallery/p0.jpg", "gallery\\p0.jpg"),
        ("a/b/p0.jpg", "a\\b/p0.jpg"),
        ("a/p0.jpg", ".\\a\\p0.jpg"),
        (nfd("café/ガラス.jpg"), "café/ガラス.jpg"),
        ("café/ガラス.jpg", nfd("café/ガラス.jpg")),
        (nfd("é") + "/è.jpg", "é/" + nfd("è.jpg")),
        (nfd("é/é.jpg"), "é\\é.jpg"),
        ("한/각.jpg", nfd("한\\각.jpg")),
        ("Å.jpg", "\u212b.jpg"),
    ],
)
def test_paths_of_other_systems_are_found(make, tmp_path, on_disk, in_list):
    path = make(on_disk)
    make("other/" + on_disk)
    found = MediaRoot(str(tmp_path)).path(in_list, "image path")
    assert os.path.samefile(found, path)


def test_the_name_as_written_is_tried_first(make, tmp_path):
    literal, composed, decomposed = make("a\\b.jpg"), make("é.jpg"), make(nfd("é.jpg"))
    make("a/b.jpg")
    media = MediaRoot(str(tmp_path))
    assert media.path("a\\b.jpg", "path") == literal
    assert [media.path(name, "path") for name in ("é.jpg", nfd("é.jpg"))] == [composed, decomposed]


def test_a_missing_file_keeps_its_name_and_similar_names_are_suggested(make, tmp_path):
    make("Gallery/P0.JPG")
    media = MediaRoot(str(tmp_path))
    path = media.path("gallery\\p0.jpg", "path")
    assert path == str(tmp_path / "gallery/p0.jpg") and media.near(path) == "Gallery/P0.JPG"
    assert media.near(str(tmp_path / "gallery/p1.jpg")) is None


def test_a_corrected_path_may_not_leave_the_folder_through_a_link(make, tmp_path):
    make("elsewhere/a.jpg")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / nfd("é")).symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="leads out of the data folder through a link"):
        MediaRoot(str(tmp_path / "shop")).path("é\\a.jpg", "image path")


def test_a_folder_is_listed_once_for_all_missing_files(make, tmp_path, monkeypatch):
    make("gallery/a.jpg")
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    media = MediaRoot(str(tmp_path))
    for i in range(50):
        media.path(f"gallery/{i}.jpg", "path")
    media.path("gallery/a.jpg", "path")
    assert listed == [str(tmp_path / "gallery")]


@pytest.mark.parametrize(
    "name, text",
    [
        (b"\xc8\xcb\xb2\xce.jpg", r"\xc8\xcb\xb2\xce.jpg"),
        (b"caf\xe9/\xc3\xa9.png", r"caf\xe9/é.png"),
        (b"\xc3\xa9/\xc3\xa9\xff.png", r"é/\xc3\xa9\xff.png"),
        ("人参.jpg".encode(), "人参.jpg"),
        (rb"C:\x.jpg", r"C:\x.jpg"),
        (rb"\xc8.jpg", r"\x5cxc8.jpg"),
        (rb"\x5c.jpg", r"\x5cx5c.jpg"),
    ],
)
def test_a_path_that_is_not_utf8_has_a_text_form(name, text):
    path = os.fsdecode(name)
    assert path_to_text(path) == text and text_to_path(text) == path
    text.encode("utf-8")


def test_different_paths_have_different_text_forms():
    parts = [b"\\", b"x", b"c8", b"5c", b"\xc8", b"\xcb", b"/", "é".encode()]
    paths = {os.fsdecode(b"".join(random.choices(parts, k=random.randint(1, 6)))) for _ in range(3000)}
    assert len({path_to_text(path) for path in paths}) == len(paths)
    assert all(text_to_path(path_to_text(path)) == path for path in paths)
