"""A new folder is complete or absent."""

import errno

import pytest

from hub_rice.files import new_folder


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_folder_appears_as_a_whole(tmp_path, exists):
    path = tmp_path / "some" / "where" if not exists else tmp_path / "empty"
    if exists:
        path.mkdir()
    with new_folder(path) as folder:
        (folder / "a.txt").write_text("a")
        assert not path.exists() or not any(path.iterdir())
    assert (path / "a.txt").read_text() == "a" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "raised, expected",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "was not written .*No space left.*make room"),
        (FileNotFoundError("there is no checkpoint x."), "^there is no checkpoint x.$"),
        (ValueError("bad value"), "^bad value$"),
    ],
)
def test_a_failure_leaves_no_files(tmp_path, raised, expected):
    with pytest.raises((OSError, ValueError), match=expected):
        with new_folder(tmp_path / "new") as folder:
            (folder / "half.txt").write_text("half")
            raise raised
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file already exists; name a new or empty folder"):
        with new_folder(tmp_path / "file"):
            raise RuntimeError("not reached")
    with pytest.raises(OSError, match="was not written"):
        with new_folder(tmp_path / "file" / "below"):
            raise RuntimeError("not reached")
