"""Files that are complete or absent."""

import errno
import os
import stat

import pytest

from data_rice.files import replacing, write_atomically


def test_a_text_replaces_the_previous_one(tmp_path):
    for text in ("one", "商品 two"):
        write_atomically(tmp_path / "a.json", text)
        assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_after_a_failure_only_the_previous_file_exists(tmp_path, error):
    write_atomically(tmp_path / "a.json", "one")
    with pytest.raises(type(error)) as raised:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise error
    assert (tmp_path / "a.json").read_text() == "one" and os.listdir(tmp_path) == ["a.json"]
    if isinstance(error, OSError):
        assert str(raised.value) == f"[Errno {errno.ENOSPC}] No space left on device: '{tmp_path / 'a.json'}'"


def test_an_interruption_of_the_last_step_leaves_the_previous_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", "two")
    assert (tmp_path / "a.json").read_text() == "one" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    former = os.umask(mask)
    try:
        with replacing(tmp_path / "a.bin") as temporary:
            temporary.unlink()
            # As safetensors does it.
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o666 & ~mask


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(tmp_path / "gone" / "a.json", "text")
    assert error.value.filename == str(tmp_path / "gone" / "a.json")


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    with replacing(tmp_path / "a.parquet") as temporary:
        assert temporary.suffix == ".parquet" and temporary.parent == tmp_path
