"""Building an index: interrupted and continued, shared among processes, with pictures that cannot be read."""

import copy
import io
import os
import struct
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from PIL import Image

from data_rice.collator import RiceCollator
from hub_rice.precision import in_precision
from processing_rice.tokenization_rice import fold_texts
from retrieval_rice.index import GalleryIndex
from retrieval_rice.index.table import ShopTable


@pytest.fixture
def build(shop):
    def make(rows=None, output_dir=None, **options):
        options = {"progress": False, "batch_size": 3, "commit_every": 3} | options
        rows = shop.rows if rows is None else rows
        return GalleryIndex.build(shop.model, shop.processor, rows, output_dir=output_dir, **options)

    return make


@pytest.fixture
def encoded(shop, monkeypatch):
    """Counts the images that the model encodes; `stop_after` images it is interrupted."""
    from types import SimpleNamespace

    log = SimpleNamespace(count=0, stop_after=None)
    encode = shop.model.encode_gallery

    def counting(pixel_values, **inputs):
        if log.stop_after is not None and log.count >= log.stop_after:
            raise KeyboardInterrupt
        log.count += len(pixel_values)
        return encode(pixel_values, **inputs)

    monkeypatch.setattr(shop.model, "encode_gallery", counting)
    return log


def rows_of(folder):
    """What is in the table, in the gallery's order."""
    rows = ShopTable(folder).snapshot().read().sort_by("position").drop_columns(["_rowid", "checksum"])
    encodings = {name: np.array(rows[name].to_pylist(), dtype=np.float64) for name in ("embeds", "states")}
    return rows.drop_columns(["embeds", "states"]).to_pylist(), encodings


def assert_same(folder, other):
    """The same rows; in batches of other sizes encodings differ in their last bits."""
    (records, encodings), (expected, numbers) = rows_of(folder), rows_of(other)
    assert records == expected
    for name in encodings:
        np.testing.assert_allclose(encodings[name], numbers[name], atol=2e-3)


def test_an_interrupted_build_continues(build, shop, encoded, tmp_path):
    build(output_dir=tmp_path / "whole")
    encoded.count, encoded.stop_after = 0, 7
    with pytest.raises(KeyboardInterrupt):
        build(output_dir=tmp_path / "index")
    with pytest.raises(ValueError, match="is not complete: .* run the same `rice index` again"):
        GalleryIndex.load(tmp_path / "index", shop.model)
    encoded.stop_after = None
    assert len(build(output_dir=tmp_path / "index")) == 10
    # Ten pictures, and a blank one that tells how wide the columns are.
    assert encoded.count == 11
    assert_same(tmp_path / "index", tmp_path / "whole")
    version = ShopTable(tmp_path / "index").version
    build(output_dir=tmp_path / "index")
    assert encoded.count == 11 and ShopTable(tmp_path / "index").version == version


def test_only_pictures_that_changed_are_encoded(build, shop, encoded, tmp_path):
    build(output_dir=tmp_path / "index")
    path = shop.rows[4]["image"]["path"]
    before = os.stat(path)
    Image.new("RGB", (32, 32), "red").save(path)
    # The content tells, whatever the clock says.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(shop.rows[5]["image"]["path"])
    encoded.count = 0
    index = build(output_dir=tmp_path / "index")
    assert encoded.count == 1 and len(index) == 10
    build(output_dir=tmp_path / "fresh")
    assert_same(tmp_path / "index", tmp_path / "fresh")


def test_a_shop_with_removed_added_and_renamed_images(build, shop, encoded, tmp_path):
    rows = shop.make_rows(14)
    build(rows[:10], tmp_path / "index")
    new = [rows[12], *rows[3:8], {**rows[8], "title": "another", "live_id": "z"}, rows[13], rows[9], rows[0]]
    encoded.count = 0
    index = build(new, tmp_path / "index")
    assert encoded.count == 2
    assert index.image_ids() == [row["image_id"] for row in new]
    assert index.records(["p8"])["p8"] | {"image": ""} == {
        "image_id": "p8", "product_id": "p8", "title": "another", "live_ids": ["z"], "image": ""
    }  # fmt: skip
    fresh = build(new, tmp_path / "fresh")
    # Ties are decided alike, although the places have gaps here.
    for one, other in zip(index.search(shop.clips(4, 12), rerank=None), fresh.search(shop.clips(4, 12), rerank=None)):
        assert [hit.image_id for hit in one.hits] == [hit.image_id for hit in other.hits]


def test_images_added_at_the_end_do_not_change_the_others(build, shop, tmp_path):
    rows = shop.make_rows(14)
    build(rows[:10], tmp_path / "index")
    before = {row["image_id"]: row["position"] for row in rows_of(tmp_path / "index")[0]}
    build([*rows[2:10], *rows[10:]], tmp_path / "index")
    after = {row["image_id"]: row["position"] for row in rows_of(tmp_path / "index")[0]}
    assert {name: after[name] for name in before if name in after} == {f"p{i}": i for i in range(2, 10)}
    assert [after[f"p{i}"] for i in range(10, 14)] == [10, 11, 12, 13]


def test_removing_most_images_needs_overwrite(build, shop, tmp_path):
    build(output_dir=tmp_path / "index")
    with pytest.raises(FileExistsError, match="holds another shop: 6 of its 10 images .*--overwrite"):
        build(shop.rows[:4], tmp_path / "index")
    assert len(GalleryIndex.load(tmp_path / "index", shop.model)) == 10
    index = build(shop.rows[:4], tmp_path / "index", overwrite=True)
    assert len(index) == 4
    index.restore(next(version.number for version in index.versions() if version.rows == 10))
    assert len(index) == 10


@pytest.mark.parametrize("change", ["model", "dtype"])
def test_another_models_encodings_are_not_mixed(build, shop, make_index_model, tmp_path, change):
    build(output_dir=tmp_path / "index")
    old = GalleryIndex.load(tmp_path / "index", shop.model, refresh_s=0)
    before, options = old.version, {}
    if change == "model":
        shop.model = make_index_model(seed=2)
        words = "by another model, fingerprint"
    else:
        options, words = {"dtype": "float32"}, r"with other settings \(dtype\)"
    with pytest.raises(FileExistsError, match=words):
        build(output_dir=tmp_path / "index", **options)
    index = build(output_dir=tmp_path / "index", overwrite=True, **options)
    assert len(index) == 10 and index._newest.rooms().snapshot.state.dtype == options.get("dtype", "float16")
    # Who has the old model goes on in the version that was its own.
    assert (len(old), old.version) == (10, index.version if change == "dtype" else before)


def test_titles_read_by_another_tokenizer_are_not_mixed(build, shop, make_index_model, text_config, tmp_path):
    shop.model = make_index_model(text_config=text_config)
    build(output_dir=tmp_path / "index")
    assert len(build(output_dir=tmp_path / "index")) == 10
    shop.processor = copy.copy(shop.processor)
    shop.processor.tokenizer = fold_texts(shop.processor.tokenizer)
    with pytest.raises(FileExistsError, match=r"with other settings \(tokenizer\)"):
        build(output_dir=tmp_path / "index")


def test_the_index_answers_while_it_is_replaced(build, shop, encoded, tmp_path):
    build(output_dir=tmp_path / "index")
    encoded.count, encoded.stop_after = 0, 5
    with pytest.raises(KeyboardInterrupt):
        build(output_dir=tmp_path / "index", overwrite=True, dtype="float32")
    encoded.stop_after = None
    index = GalleryIndex.load(tmp_path / "index", shop.model, shop.processor)
    assert len(index) == 10 and index._newest.rooms().snapshot.state.dtype == "float16"
    with pytest.raises(ValueError, match="is being built again"):
        index.add(shop.rows[:1])
    assert len(build(output_dir=tmp_path / "index", dtype="float32")) == 10
    index.refresh()
    assert index._newest.rooms().snapshot.state.dtype == "float32"


def test_independent_processes_share_a_build(build, shop, encoded, tmp_path):
    whole = build(output_dir=tmp_path / "whole")
    encoded.count = 0
    assert build(output_dir=tmp_path / "index", process_index=1, num_processes=2) is None
    assert encoded.count == 6
    index = build(output_dir=tmp_path / "index", process_index=0, num_processes=2)
    assert encoded.count == 11
    assert_same(tmp_path / "index", tmp_path / "whole")
    assert index.image_ids() == whole.image_ids()


def png_header(width, height):
    """A PNG that says it is huge, in 60 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_listed_and_left_out(build, shop, tmp_path, caplog):
    good = Image.open(shop.rows[0]["image"]["path"])
    buffer = io.BytesIO()
    good.resize((300, 300)).save(buffer, format="JPEG")
    files = {
        "bomb.png": png_header(60_000, 60_000),
        "large.png": png_header(12_000, 12_000),
        "cut.jpg": buffer.getvalue()[:800],
        "text.jpg": b"not a picture",
        "empty.png": b"",
    }
    rows = list(shop.rows)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        rows.insert(3, {"image_id": name, "live_id": "x", "image": str(tmp_path / name), "title": ""})
    rows.append({"image_id": "missing", "live_id": "x", "image": str(tmp_path / "missing.jpg"), "title": ""})
    index = build(rows, output_dir=tmp_path / "index")
    assert index.image_ids() == [row["image_id"] for row in shop.rows]
    reasons = {failure["id"]: failure["reason"] for failure in index.skipped}
    assert set(reasons) == {*files, "missing"} and all(len(reason.splitlines()) == 1 for reason in reasons.values())
    assert "DecompressionBomb" in reasons["bomb.png"] and "12000 x 12000" in reasons["large.png"]
    assert "6 of 16 images were left out" in caplog.text
    # They are remembered.
    assert GalleryIndex.load(tmp_path / "index", shop.model).skipped == index.skipped


def test_the_format_is_recognised_by_content(build, shop, tmp_path):
    with open(shop.rows[0]["image"]["path"], "rb") as file:
        (tmp_path / "p.jpg").write_bytes(file.read())
    index = build([{"image_id": "p.jpg", "image": str(tmp_path / "p.jpg")}, shop.rows[0]])
    one, other = index.search(shop.clips(0))[0].hits
    assert index.skipped == [] and one.score == other.score


@pytest.mark.slow
def test_large_photographs_are_read(build, tmp_path):
    Image.new("RGB", (8660, 5780), (200, 30, 30)).save(tmp_path / "photo.jpg", quality=30)
    index = build([{"image_id": "photo", "image": str(tmp_path / "photo.jpg")}])
    assert len(index) == 1 and index.skipped == []


def test_a_damaged_image_is_read_from_another_livestream(build, shop, tmp_path):
    damaged = {**shop.rows[0], "live_id": "z", "image": str(tmp_path / "gone.png")}
    index = build([damaged, *shop.rows])
    assert index.skipped == [] and len(index) == 10
    record = index.records(["p0"])["p0"]
    assert record["live_ids"] == ["z", "x"] and record["image"] == shop.rows[0]["image"]["path"]


def test_a_shop_of_unreadable_pictures_only(build, tmp_path):
    rows = [{"image_id": str(i), "image": str(tmp_path / f"{i}.png")} for i in range(4)]
    with pytest.raises(ValueError, match="not one of the 4 images could be read; the first: .*no such file"):
        build(rows)


def test_numbers_that_do_not_fit_half_precision_are_listed(build, shop, monkeypatch):
    encode = shop.model.encode_gallery

    def too_large(**inputs):
        gallery = encode(**inputs)
        gallery.states[0, 0] = 1e6
        return gallery

    monkeypatch.setattr(shop.model, "encode_gallery", too_large)
    index = build(batch_size=10)
    assert len(index) == 9 and "not finite" in index.skipped[0]["reason"]
    assert len(build(batch_size=10, dtype="float32")) == 10


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rows": []}, "has no images"),
        ({"rows": [{"image": "a.png"}]}, "row 0 of the shop has no image_id"),
        ({"rows": {"image_id": ["a"]}}, "rows are a dict; give a list of dicts"),
        ({"rows": ["a.png"]}, "row 0 is a str; give dicts"),
        ({"dtype": "int8"}, "dtype must be one of float16, float32"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"commit_every": 0}, "commit_every must be at least 1"),
        ({"num_processes": 2}, "pass output_dir"),
        ({"process_index": 3, "num_processes": 2}, "process_index must be .* got 3 with num_processes 2"),
    ],
)
def test_mistakes_get_one_sentence(build, change, words):
    with pytest.raises(ValueError, match=words):
        build(**change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_id": float("nan")}, "row 7 of the shop has no image_id"),
        ({"image_id": pd.NA}, "row 7 of the shop has no image_id"),
        ({"image_id": ""}, "row 7 of the shop has no image_id"),
        ({"image_id": True}, "row 7 of the shop: image_id is True, neither text nor a whole number"),
        ({"image_id": 1.5}, "row 7 of the shop: image_id is 1.5"),
        ({"image_id": b"a"}, "row 7 of the shop: image_id is b'a'"),
        ({"image_id": "a\udcc8"}, "row 7 of the shop: image_id is .* half of a surrogate pair"),
        ({"product_id": 2.0**60}, "row 7 of the shop: product_id is .* too large"),
        ({"live_id": ["x"]}, "row 7 of the shop: live_id is"),
        ({"title": 3}, "row 7 of the shop: title is a int"),
        ({"image": 3}, "row 7 of the shop: image must be .*, got a int"),
        ({"image": None}, "row 7 of the shop: image must be .*, got a NoneType"),
    ],
)
@pytest.mark.parametrize("add", [False, True])
def test_a_bad_row_is_named_before_anything_is_encoded(build, shop, encoded, change, words, add):
    index = build(shop.rows[:1]) if add else None
    encoded.count = 0
    shop.rows[7] = {**shop.rows[7], **change}
    with pytest.raises(ValueError, match=words):
        index.add(shop.rows) if add else build()
    assert encoded.count == 0


def as_table(rows):
    """The rows as a table of numbers and gaps gives them: ids of one column become floats."""
    paths = [row["image"]["path"] for row in rows]
    return pd.DataFrame({"image_id": range(10), "product_id": [3, None] * 5, "live_id": [None, 7] * 5, "image": paths,
                         "title": pd.Series(["mug", None] * 5)})  # fmt: skip


@pytest.mark.parametrize(
    "of_table",
    [
        lambda table: table,
        lambda table: table.to_dict("records"),
        lambda table: table.convert_dtypes().to_dict("records"),
        lambda table: [dict(row) for _, row in table.iterrows()],
        lambda table: pa.Table.from_pandas(table),
        lambda table: iter(table.astype({"image_id": "Int64"}).to_dict("records")),
        lambda table: Dataset.from_pandas(table),
        lambda table: Dataset.from_dict({**table.to_dict("list"), "title": ["mug", None] * 5}),
        lambda table: [{**row, "image_id": np.int32(row["image_id"])} for row in table.to_dict("records")],
    ],
)
def test_rows_of_any_table_give_one_index(build, shop, of_table):
    index = build(of_table(as_table(shop.rows)))
    records = index.records([str(i) for i in range(10)])
    for i, record in enumerate(records.values()):
        assert record["product_id"] == ("1" if i == 1 else str(i) if i % 2 else "3")
        assert record["live_ids"] == (["7"] if i % 2 else []) and record["title"] == ("" if i % 2 else "mug")
    clips = shop.clips(3)
    found = index.search(clips, live_id=7)[0].hits
    assert [hit.image_id for hit in found] == [hit.image_id for hit in index.search(clips, "7")[0].hits]
    assert len(found) == 5 and index.search(clips, [7.0])[0].hits == found
    assert index.remove([3, "5", 99]) == ["99"] and len(index) == 8


def test_titles_of_a_table_are_cleaned(build, shop):
    shop.rows[0]["title"], shop.rows[1]["title"] = "a\ud83d", float("nan")
    records = build().records(["p0", "p1"])
    assert (records["p0"]["title"], records["p1"]["title"]) == ("a\ufffd", "")


def test_a_path_that_is_not_utf8_is_stored_as_text(build, shop, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xc8\xcb.png")
    os.rename(shop.rows[0]["image"]["path"], path)
    shop.rows[0]["image"] = path
    index = build(output_dir=tmp_path / "index")
    assert index.skipped == [] and index.records(["p0"])["p0"]["image"] == f"{tmp_path}/\\xc8\\xcb.png"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"relevant": "p3"}, "query row 3: relevant is 'p3'; give a list"),
        ({"relevant": float("nan")}, "query row 3: relevant is None; give a list"),
        ({"relevant": [True]}, "query row 3: relevant is True, neither"),
        ({"live_id": 1.5}, "query row 3: live_id is 1.5, neither"),
    ],
)
def test_a_bad_query_row_is_named_before_anything_is_encoded(build, shop, demo_queries, monkeypatch, change, words):
    index = build()
    monkeypatch.setattr(shop.model, "encode_clips", None)
    demo_queries[3] |= change
    with pytest.raises(ValueError, match=words):
        index.calibrate(demo_queries, progress=False)


def test_queries_of_a_table_calibrate_equally(build, shop, demo_queries):
    rows = [{**row, "image_id": i, "product_id": None, "live_id": i % 2} for i, row in enumerate(shop.rows)]
    index = build(rows)
    plain = [{**query, "relevant": [str(i)], "live_id": str(i % 2)} for i, query in enumerate(demo_queries)]
    table = pd.DataFrame(plain)
    table["relevant"] = [[np.int64(i)] for i in range(10)]
    table["live_id"] = [float(i % 2) for i in range(10)]
    table["video"] = float("nan")
    # An untrained decoder is never sure.
    rate = {"false_accept_rate": 0.5}
    reports = [
        index.calibrate(queries, progress=False, **rate) for queries in (plain, table, table.to_dict("records"))
    ]
    assert reports[0] == reports[1] == reports[2] and reports[0]["unreadable"] == []
    clips, lives = shop.clips(*range(10)), [i % 2 for i in range(10)]
    by_clips = [
        index.calibrate(clips, [[kind(i)] for i in range(10)], lives, **rate) for kind in (str, int, np.float64)
    ]
    assert by_clips[0] == by_clips[1] == by_clips[2]


def test_a_model_in_training_mode_is_refused(build, shop):
    shop.model.train()
    with pytest.raises(ValueError, match="model.eval"):
        build()


def test_datasets_are_read_without_their_pictures(build, shop):
    from data_rice.features import gallery_features

    rows = Dataset.from_list(shop.rows, features=gallery_features())
    one, other = build(rows), build()
    clips = shop.clips(1)
    assert [hit.score for hit in one.search(clips)[0].hits] == [hit.score for hit in other.search(clips)[0].hits]


def test_opened_pictures_of_every_mode_and_one_that_cannot_be_read(build, shop):
    cmyk = Image.open(shop.rows[0]["image"]["path"]).convert("CMYK")
    unknown = Image.new("F", (8, 8), 300.0)
    rows = [{"image_id": name, "image": image} for name, image in (("cmyk", cmyk), ("unknown", unknown))]
    index = build(rows)
    assert index.image_ids() == ["cmyk"]
    assert [(failure["id"], "not all in 0..1" in failure["reason"]) for failure in index.skipped] == [
        ("unknown", True)
    ]


@pytest.mark.parametrize("kind, decode", [("fp32", "exact"), ("bf16", "fast"), ("fp16", "fast")])
def test_large_pictures_are_decoded_by_precision(make_index_model, index_processor, kind, decode):
    """Detail of single pixels: decoding at reduced scale averages it, which shows in the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    rows = [{"image_id": "a", "image": {"path": None, "bytes": buffer.getvalue()}, "title": ""}]
    model = in_precision(make_index_model(), kind)
    pixels = {
        name: RiceCollator(index_processor, decode=name).collate_gallery(rows)[0]["pixel_values"]
        for name in ("exact", "fast")
    }
    assert (pixels["fast"] - pixels["exact"]).abs().max() > 0.05
    seen = []
    encode = model.encode_gallery
    model.encode_gallery = lambda pixel_values, **inputs: (seen.append(pixel_values), encode(pixel_values, **inputs))[
        1
    ]
    GalleryIndex.build(model, index_processor, rows, progress=False)
    assert any(torch.equal(each, pixels[decode]) for each in seen)
    other = pixels["exact" if decode == "fast" else "fast"]
    assert not any(torch.equal(each, other) for each in seen)
