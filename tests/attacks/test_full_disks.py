"""A full disk at any moment, simulated by a limit on file size: one sentence, and existing files stay complete."""

import json
import resource

import pytest

from tests.attacks.kills import contents, start
from tests.retrieval_rice.index import test_attacks as index_attacks


def put(pipe, folder, limit):
    from retrieval_rice.index import GalleryIndex

    index = GalleryIndex.load(folder, index_attacks.model())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _tell(pipe, lambda: index_attacks.put(index, [f"new{i}" for i in range(400)]))


def write(pipe, path, limit):
    from data_rice.files import write_atomically

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _tell(pipe, lambda: write_atomically(path, json.dumps(list(range(10_000)))))


def _tell(pipe, function) -> None:
    try:
        function()
        pipe.send(None)
    except (ValueError, OSError) as error:
        pipe.send(str(error))


def said_by(function, *arguments) -> str | None:
    child, pipe = start(__file__, function, *arguments)
    said = pipe.recv()
    child.join()
    assert child.exitcode == 0
    return said


@pytest.mark.slow
def test_a_full_disk_leaves_the_index_unchanged(tmp_path, count):
    folder = tmp_path / "index"
    index_attacks.new_index(folder)
    told = 0
    for limit in (0, 100, 1000, 3000, 6000, 10_000, 20_000, 10_000_000):
        said = said_by(put, folder, limit)
        index = index_attacks.GalleryIndex.load(folder, index_attacks.model())
        names = index.image_ids()
        if said is None:
            assert set(names) == {f"p{i}" for i in range(40)} | {f"new{i}" for i in range(400)}
            continue
        told += 1
        assert "\n" not in said and str(folder) in said
        assert names == [f"p{i}" for i in range(40)] and index_attacks.found(index, "p7") == "p7"
    assert said is None and told >= 4
    count("full disks told", "index", told)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 1, 4096, 40_000])
def test_a_full_disk_leaves_the_old_or_the_new_file(tmp_path, count, limit):
    path = tmp_path / "results.json"
    path.write_text("{}")
    said = said_by(write, path, limit)
    assert said is not None and str(path) in said
    assert contents(tmp_path).keys() == {"results.json"} and path.read_text() == "{}"
    count("full disks told", "files that are replaced")


if __name__ == "child":
    name, pipe, *arguments = globals()["call"]
    globals()[name](pipe, *arguments)
