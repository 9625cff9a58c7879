"""Rows that are read on request: equal to the table, each once, and resumed after a stop."""

import json
import logging
import os
import pickle
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from data_rice import StreamingView, load_dataset_view, open_dataset_view, stream_dataset_view
from data_rice.lazy_rows import ArrowRows, LineRows, ParquetRows
from data_rice.line_index import build_line_index
from data_rice.lpr4m.prepare import prepare
from data_rice.parsing import parse_string_list
from data_rice.prepare import PrepareSettings
from data_rice.samplers import BlockSampler

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def _uuid(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


def training_row(live: int, clip: int, product: int, frames: int = 2, **columns: str) -> list[str]:
    clip_id = f"{_uuid(live)}-{1000 * clip}-{1000 * clip + 500}"
    frame_ids = [f"{clip_id}-{index:04d}" for index in range(frames)]
    row = {
        "clip": clip_id,
        "frames": str(frame_ids),
        "boxes": str([[4, 2, 20, 10]] * frames),
        "image": f"{_uuid(1000 + product)}-0",
        "title": f"看 a 'title' {product}",
        "category_id": str(product % 3),
        "category": "" if product % 2 else f"category {product % 3}",
        "asr": f"speech {clip}",
        "scale": "large",
        "duration": "long",
        "number": "2",
    }
    return list((row | columns).values())


def write_lists(root: Path, *lists: list[list[str]], end: str = "\n") -> list[Path]:
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"training_videoinfo_{number}.txt" for number in range(len(lists))]
    for path, rows in zip(paths, lists):
        path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return paths


def write_media(root: Path, rows: list[list[str]]) -> None:
    for number, row in enumerate(rows):
        for frame in parse_string_list(row[1]):
            path = root / f"training_video_0{number % 2}" / row[0] / f"{frame}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), (number, 0, 0)).save(path)
        path = root / "training_image" / f"{row[3]}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def lpr4m(tmp_path) -> Path:
    """Two lists of 24 rows each from six livestreams; every tenth row has no frames."""
    rows = [training_row(n // 8, n, n % 11, frames=0 if n % 10 == 9 else 2) for n in range(48)]
    write_lists(tmp_path / "lpr4m", rows[:24], rows[24:])
    write_media(tmp_path / "lpr4m", rows)
    return tmp_path / "lpr4m"


@pytest.fixture
def both(tmp_path):
    """A function that reads a view as a table and opens it for streaming."""

    def both(folder, view, split, **options):
        load = load_dataset_view(folder, view, split, cache_dir=tmp_path / "cache", **options)
        return list(load), open_dataset_view(folder, view, split, cache_dir=tmp_path / "cache", **options)

    return both


def ids(rows) -> list[str]:
    return [row["clip_id"] for row in rows]


class TestRows:
    @pytest.mark.parametrize("split", ["train", "validation"])
    @pytest.mark.parametrize("options", [{"validation_lives": 2}, {"validation_fraction": 0.4, "subset": 9}])
    def test_lpr4m_pairs_are_those_of_the_table(self, lpr4m, both, split, options):
        table, rows = both(lpr4m, "pairs", split, **options)
        assert isinstance(rows, LineRows)
        assert len(rows) == len(table) > 4
        assert rows.__getitems__(range(len(rows))) == table
        assert rows[3] == table[3]
        assert table[0]["boxes"][0] == [pytest.approx(v) for v in (0.1, 0.1, 0.5, 0.5)]

    def test_left_out_rows_are_counted_and_listed(self, lpr4m, both, caplog):
        with caplog.at_level(logging.WARNING):
            rows = open_dataset_view(lpr4m, "pairs", "train", cache_dir=lpr4m / "cache", validation_lives=2)
        counts = rows.index.problems.counts
        assert counts["left out because they have no frames"] > 0
        assert counts["left out of training because a validation livestream sells their product"] > 0
        assert "left out because they have no frames" in caplog.text
        assert rows.index.problems.path in caplog.text

    def test_other_views_and_builders(self, lpr4m, both, shop):
        for folder, view, split in [
            (lpr4m, "query", "validation"),
            (lpr4m, "gallery", "train"),
            (shop, "pairs", "train"),
            (shop, "gallery", "test"),
        ]:
            options = {"validation_lives": 2} if folder is lpr4m else {}
            table, rows = both(folder, view, split, **options)
            assert isinstance(rows, ArrowRows)
            assert rows.__getitems__(range(len(rows))) == table

    def test_moving_fashion(self, tmp_path, both):
        folder = tmp_path / "fashion"
        (folder / "imgs").mkdir(parents=True)
        (folder / "videos").mkdir()
        for name in ("train", "test"):
            entries = {}
            for n in range(3):
                Image.new("RGB", (8, 8)).save(folder / "imgs" / f"{name}{n}.jpg")
                (folder / "videos" / f"{name}{n}.mp4").write_bytes(b"x")
                paths = {"video_paths": [f"videos/{name}{n}.mp4"], "img_path": f"imgs/{name}{n}.jpg", "source": 1}
                entries[f"{name}{n}"] = paths
            (folder / f"{name}.json").write_text(json.dumps(entries))
        table, rows = both(folder, "pairs", "train")
        assert len(rows) == 3
        assert rows.__getitems__([2, 0]) == [table[2], table[0]]

    @pytest.mark.parametrize("file_format", ["parquet", "tar"])
    def test_prepared_shards(self, lpr4m, both, tmp_path, file_format):
        settings = PrepareSettings(rows_per_shard=13, file_format=file_format)
        folder = tmp_path / "prepared"
        prepare(str(lpr4m), str(folder), views=["pairs"], cache_dir=str(tmp_path / "cache"), settings=settings)
        table, rows = both(folder, "pairs", "train")
        assert len(rows) == len(table) == 44
        assert rows.__getitems__(range(44)) == table
        with pytest.raises(ValueError, match="was prepared with no subset, not 3"):
            open_dataset_view(folder, "pairs", "train", subset=3)

    @pytest.mark.parametrize("split", ["test", "nonsense"])
    def test_missing_split(self, lpr4m, tmp_path, split):
        for load in (load_dataset_view, open_dataset_view):
            with pytest.raises(ValueError) as error:
                load(lpr4m, "pairs", split, cache_dir=tmp_path / "cache")
            assert split in str(error.value)

    def test_groups(self, lpr4m, both):
        table, rows = both(lpr4m, "pairs", "train")
        for column in ("live_id", "product_id"):
            codes, carried = rows.column_codes(column)
            assert carried
            pairs = {(row[column], code) for row, code in zip(table, codes.tolist(), strict=True)}
            assert len(pairs) == len({row[column] for row in table}) == len(set(codes.tolist()))
        with pytest.raises(ValueError, match="can be grouped by live_id, product_id, category, not by title"):
            rows.column_codes("title")


@pytest.fixture
def shop(tmp_path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
    (folder / "gallery.jsonl").write_text(
        '{"gallery_id": "a", "image": "a.jpg"}\n{"gallery_id": "b", "image": "b.jpg"}\n'
    )
    clips = [f'{{"query_id": "q{n}", "frames": ["a.jpg"], "gt_gallery_ids": ["{"ab"[n % 2]}"]}}' for n in range(7)]
    (folder / "clips_train.jsonl").write_text("\n".join(clips) + "\n")
    return folder


class TestLineIndex:
    def open(self, root, **options):
        return open_dataset_view("lpr4m", "pairs", "train", data_dir=root, cache_dir=root / "cache", **options)

    def test_blank_lines_line_ends_and_byte_order_mark(self, tmp_path):
        rows = [training_row(0, n, n) for n in range(4)]
        (path,) = write_lists(tmp_path, rows, end="\r\n")
        lines = path.read_bytes().split(b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n  \r\n".join(lines[:2]) + b"\r\n\r\n\n" + b"\n".join(lines[2:4]))
        opened = self.open(tmp_path)
        assert ids(opened.__getitems__(range(4))) == [row[0] for row in rows]
        assert [opened.index.read(row)[1] for row in range(4)] == [1, 3, 6, 7]

    def test_a_bad_row_names_file_and_line_when_it_is_read(self, tmp_path):
        rows = [training_row(0, n, n) for n in range(5)]
        rows[3][1] = "[not, a, list]"
        (path,) = write_lists(tmp_path, rows)
        opened = self.open(tmp_path)
        assert opened[2]["clip_id"] == rows[2][0]
        with pytest.raises(ValueError, match=f"{path}, line 4: clip .*expected a list of quoted strings"):
            opened[3]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda line: line.replace(b"speech", b"sp\xffech"), "line 3: the line is not UTF-8"),
            (lambda line: line.replace(b"speech", b"sp\0ech"), "line 3: the line holds a NUL character"),
        ],
    )
    def test_bad_bytes(self, tmp_path, damage, message):
        (path,) = write_lists(tmp_path, [training_row(0, n, n) for n in range(4)])
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], damage(lines[2]), lines[3]]))
        with pytest.raises(ValueError, match=message):
            self.open(tmp_path)[2]

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            (0, "no-uuid", "line 2: the clip id 'no-uuid' is not of the form"),
            (2, "a\tb", "line 2: expected 11 tab-separated columns, found 12"),
            (3, "../up", "line 2: the image id '../up' is not a plain name"),
            (1, "[", "line 2: expected a list of quoted strings"),
        ],
    )
    def test_fields_that_decide_the_split_are_checked_when_the_list_is_opened(self, tmp_path, column, value, message):
        rows = [training_row(0, n, n) for n in range(3)]
        rows[1][column] = value
        write_lists(tmp_path, rows)
        with pytest.raises(ValueError, match=message):
            self.open(tmp_path)
        assert not list((tmp_path / "cache" / "line_index").iterdir())

    def test_duplicated_clips_across_lists(self, tmp_path):
        rows = [training_row(0, n, n) for n in range(6)]
        _, second = write_lists(tmp_path, rows[:4], [rows[5], rows[1], rows[2]])
        with pytest.raises(ValueError, match=f"{second}, line 2: the row's id appears a second time"):
            self.open(tmp_path)

    def test_no_usable_row(self, tmp_path):
        write_lists(tmp_path, [training_row(0, n, n, frames=0) for n in range(3)])
        with pytest.raises(ValueError, match=r"no usable row \(3 rows left out because they have no frames\)"):
            self.open(tmp_path)

    def test_the_cache_follows_the_files(self, tmp_path):
        (path,) = write_lists(tmp_path, [training_row(0, n, n) for n in range(4)])
        assert len(self.open(tmp_path)) == 4
        path.write_bytes(path.read_bytes() + ("\t".join(training_row(0, 9, 9)) + "\n").encode())
        assert len(self.open(tmp_path)) == 5

    def test_it_is_built_once(self, tmp_path):
        path = tmp_path / "list.txt"
        path.write_text("a\nb\n")
        made = []

        def make():
            made.append(1)
            return lambda file, line, raw, problems: (raw, [raw])

        for _ in range(2):
            index = build_line_index([str(path)], make, tmp_path / "cache", key="x")
            assert index.read(1) == (str(path), 2, "b")
        assert made == [1]
        build_line_index([str(path)], make, tmp_path / "cache", key="y")
        assert made == [1, 1]

    def test_an_interrupted_build_leaves_nothing(self, tmp_path):
        path = tmp_path / "list.txt"
        path.write_text("a\nb\n")

        def stop(file, line, raw, problems):
            if line == 2:
                raise KeyboardInterrupt
            return raw, []

        with pytest.raises(KeyboardInterrupt):
            build_line_index([str(path)], lambda: stop, tmp_path / "cache")
        assert not list((tmp_path / "cache" / "line_index").iterdir())

    def test_pickled_rows_are_opened_again(self, lpr4m, tmp_path):
        rows = open_dataset_view(lpr4m, "pairs", "train", cache_dir=tmp_path / "cache")
        assert pickle.loads(pickle.dumps(rows)).__getitems__([5, 1]) == rows.__getitems__([5, 1])


class TestParquet:
    @pytest.fixture
    def files(self, tmp_path):
        paths = []
        for number, count in enumerate((25, 7)):
            payload = [os.urandom(1000) for _ in range(count)]
            rows = Dataset.from_dict({"clip_id": [f"{number}-{n}" for n in range(count)], "payload": payload})
            paths.append(tmp_path / f"{number}.parquet")
            pyarrow.parquet.write_table(rows.data.table, paths[-1], row_group_size=5)
        return paths

    def test_rows_of_row_groups(self, files):
        rows = ParquetRows(files)
        assert rows.shard_starts.tolist() == [0, 5, 10, 15, 20, 25, 30, 32]
        assert ids(rows.__getitems__([31, 0, 24, 25])) == ["1-6", "0-0", "0-24", "1-0"]

    def test_an_epoch_reads_each_row_group_once_and_caches_few(self, files, monkeypatch):
        rows = ParquetRows(files, memory=3 * 8000)
        assert 1 < rows.shards_per_block < 7
        reads = []
        plain = ParquetRows._group

        def group(self, shard):
            known = shard in self._tables
            table = plain(self, shard)
            if not known:
                reads.append(shard)
            assert len(self._tables) <= self.shards_per_block
            return table

        monkeypatch.setattr(ParquetRows, "_group", group)
        seen = ids(StreamingView(rows, batch_size=4))
        assert len(set(seen)) == 32
        assert sorted(reads) == list(range(7))

    def test_refusals(self, files, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.parquet does not exist"):
            ParquetRows([tmp_path / "missing.parquet"])
        (tmp_path / "bad.parquet").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"bad\.parquet is not a Parquet file"):
            ParquetRows([tmp_path / "bad.parquet"])
        with pytest.raises(ValueError, match="prepare tar shards"):
            ParquetRows(files).column_codes("live_id")


@pytest.fixture
def numbers() -> ArrowRows:
    """1,003 rows whose id is their number."""
    return ArrowRows(Dataset.from_dict({"clip_id": list(range(1003))}))


def batches(view: StreamingView, workers: int = 0, **options) -> list[list[int]]:
    return list(loader(view, workers, **options))


def loader(view: StreamingView, workers: int = 0, **options) -> DataLoader:
    return DataLoader(view, batch_size=view.batch_size, num_workers=workers, collate_fn=ids, **options)


class TestSharing:
    @pytest.mark.parametrize("processes", [1, 2, 3])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_row_once_and_equal_steps(self, numbers, processes, workers):
        views = [StreamingView(numbers, 24 // processes, 0, processes, index) for index in range(processes)]
        shares = [batches(view, workers) for view in views]
        assert [len(share) for share in shares] == [1003 // 24] * processes
        rows = [row for share in shares for batch in share for row in batch]
        assert len(set(rows)) == len(rows) == 1003 // 24 * 24
        assert all(len(view) == len(share) * view.batch_size for view, share in zip(views, shares))
        # The same global batches, however they are divided.
        whole = batches(StreamingView(numbers, 24))
        assert [sum(parts, []) for parts in zip(*shares)] == whole
        assert "19 rows left out" in views[0].describe()

    @pytest.mark.parametrize("workers", [0, 3])
    def test_without_drop_last_every_row_comes(self, numbers, workers):
        views = [StreamingView(numbers, 10, 0, 2, index, drop_last=False) for index in range(2)]
        shares = [batches(view, workers) for view in views]
        assert sorted(row for share in shares for batch in share for row in batch) == list(range(1003))
        assert [sum(map(len, share)) for share in shares] == [len(view) for view in views] == [503, 500]

    def test_order_of_the_rows(self, numbers):
        view = StreamingView(numbers, 10, shuffle=False, drop_last=False)
        assert sum(batches(view, 2), []) == list(range(1003))

    def test_epochs_and_seeds(self, numbers):
        view = StreamingView(numbers, 16)
        first = batches(view)
        assert batches(view) == first
        view.set_epoch(1)
        second = batches(view)
        assert second != first
        assert batches(StreamingView(numbers, 16, seed=1)) != first
        left_out = [set(range(1003)) - {row for batch in epoch for row in batch} for epoch in (first, second)]
        assert len(left_out[0]) == len(left_out[1]) == 1003 % 16
        assert left_out[0] != left_out[1]
        view.set_epoch(0)
        assert batches(view, 1) == first

    def test_persistent_workers_get_the_next_epoch(self, numbers):
        view = StreamingView(numbers, 16)
        lasting = loader(view, 2, persistent_workers=True)
        assert list(lasting) == batches(view)
        view.set_epoch(1)
        assert list(lasting) == batches(view)

    def test_rows_are_well_mixed(self, numbers):
        """Rows of a batch come from places all over the data."""
        for batch in batches(StreamingView(numbers, 50)):
            assert np.ptp(batch) > 500
            assert len({row // 100 for row in batch}) > 5

    def test_the_sampler_is_the_same_order(self, numbers):
        sampler = BlockSampler(numbers, batch_size=16, seed=3)
        view = StreamingView(numbers, 16, seed=3)
        for epoch in (0, 4):
            sampler.set_epoch(epoch)
            view.set_epoch(epoch)
            assert ids(numbers.__getitems__(list(sampler))) == ids(view)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0,), "batch_size .0. and num_processes"),
            ((4, 0, 2, 2), "process_index .2. must lie in 0..1"),
            ((600, 0, 2, 0), "1003 rows are fewer than one global batch of 1200"),
        ],
    )
    def test_refusals(self, numbers, arguments, message):
        with pytest.raises(ValueError, match=message):
            StreamingView(numbers, *arguments)


class TestResuming:
    @pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (3, 0), (0, 2), (1, 3)])
    @pytest.mark.parametrize("stop", [0, 1, 7, 40, 62])
    def test_no_row_twice_and_none_skipped(self, numbers, before, after, stop):
        """Whatever the number of workers before and after."""
        view = StreamingView(numbers, 8, num_processes=2, process_index=1)
        view.set_epoch(3)
        expected = batches(view)
        assert len(expected) == 62
        taken = []
        for batch in loader(view, before):
            if len(taken) == stop:
                break
            taken.append(batch)
        state = view.state_dict(batches=stop)
        again = StreamingView(numbers, 8, num_processes=2, process_index=1)
        again.load_state_dict(state)
        again.set_epoch(3)
        assert taken + batches(again, after) == expected

    def test_with_another_number_of_processes(self, numbers):
        whole = batches(StreamingView(numbers, 24))
        state = StreamingView(numbers, 12, num_processes=2, process_index=0).state_dict(batches=5)
        shares = []
        for index in range(4):
            view = StreamingView(numbers, 6, num_processes=4, process_index=index)
            view.load_state_dict(state)
            shares.append(batches(view, 2))
        assert [sum(parts, []) for parts in zip(*shares)] == whole[5:]

    def test_twice(self, numbers):
        view = StreamingView(numbers, 10)
        expected = batches(view)
        view.load_state_dict(view.state_dict(batches=3))
        view.load_state_dict(view.state_dict(batches=4))
        assert batches(view) == expected[7:]

    def test_within_a_batch(self, numbers):
        view = StreamingView(numbers, 10)
        expected = ids(view)
        rows = iter(view)
        taken = [next(rows)["clip_id"] for _ in range(37)]
        again = StreamingView(numbers, 10)
        again.load_state_dict(view.state_dict())
        assert again.state_dict() == view.state_dict()
        assert taken + ids(again) == expected
        again.load_state_dict(view.state_dict())
        with pytest.raises(ValueError, match="within a batch, which several loader workers cannot share"):
            batches(again, 2)

    def test_the_next_epoch_starts_at_its_first_row(self, numbers):
        view = StreamingView(numbers, 10)
        view.load_state_dict(view.state_dict(batches=90))
        assert len(batches(view)) == 10
        view.set_epoch(1)
        assert len(batches(view)) == 100
        assert view.state_dict(batches=0)["batches"] == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 5}, "seed=5, not 0"),
            ({"num_rows": 1}, "num_rows=1, not 1003"),
            ({"global_batch_size": 20}, "global_batch_size=20, not 10"),
        ],
    )
    def test_another_run(self, numbers, change, message):
        view = StreamingView(numbers, 10)
        with pytest.raises(ValueError, match=f"The saved position has {message}"):
            view.load_state_dict(view.state_dict() | change)

    def test_seeking_reads_no_row_before_the_position(self, numbers, monkeypatch):
        asked = []
        plain = ArrowRows.__getitems__
        monkeypatch.setattr(ArrowRows, "__getitems__", lambda self, rows: asked.extend(rows) or plain(self, rows))
        view = StreamingView(numbers, 10)
        view.load_state_dict(view.state_dict(batches=98))
        assert ids(view) == asked
        assert len(asked) == 20


def test_streamed_lpr4m_in_workers(lpr4m, tmp_path):
    """Forked workers read through files of their own, at the same time."""
    table = load_dataset_view(lpr4m, "pairs", "train", cache_dir=tmp_path / "cache")
    view = stream_dataset_view(lpr4m, "pairs", "train", cache_dir=tmp_path / "cache", batch_size=4)
    view.rows[0]
    rows = [row for batch in DataLoader(view, 4, num_workers=3, collate_fn=list) for row in batch]
    by_id = {row["clip_id"]: row for row in table}
    assert len(rows) == 44
    assert {row["clip_id"] for row in rows} == set(by_id)
    assert all(row == by_id[row["clip_id"]] for row in rows)


def test_streamed_rows_refuse_a_boxes_file(lpr4m, tmp_path):
    with pytest.raises(ValueError, match="Streamed rows do not support boxes_file"):
        open_dataset_view(lpr4m, "pairs", "train", cache_dir=tmp_path / "cache", boxes_file=tmp_path / "boxes.jsonl")
