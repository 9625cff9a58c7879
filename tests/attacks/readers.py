"""Every way in which files come into the project, with undamaged files to damage."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .mutations import Reader, mutate_bytes, mutate_header, mutate_json, mutate_lines, mutate_rows

RECALL = {"R@1": 0.25, "R@5": 0.5, "R@1_ci95": [0.1, 0.4]}
RESULTS = {
    "protocol": {"split": "test", "gallery_scope": "live", "num_galleries": 2, "num_gallery_images": 90}
    | {"boxes": "none", "fusion": {"source_words": "fitted", "edge_words": ["at the edge"]}, "interval": "bootstrap"},
    "num_queries": 77,
    "gallery_size": {"min": 40, "median": 45.0, "max": 50},
    "scores": {"embedding": RECALL, "fused": RECALL},
    "fusion_weight": 0.4,
    "fused_text_weight": 2.5,
    "baselines": {"chance": {"R@1": 0.02, "R@5": 0.1}},
    "by": {"category": {"mugs": {"num_queries": 7, "embedding": RECALL}}},
    "model": "runs/x",
    "dataset": "mini_lpr4m",
    "failures": [{"kind": "query", "id": "q", "file": "/home/me/q.jpg", "reason": "no image"}],
    "ties": {"embedding": {"share": 0.0, "R@1_ties_at_random": 0.25}},
    "versions": {"torch": "2"},
    "command": "python eval_rice.py --model runs/x",
}


def model_json(folder: Path, checkpoint: Path) -> Reader:
    """The JSON of a model folder."""
    from hub_rice.loading import load_model

    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    names = ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
    return Reader(folder, names, lambda folder: load_model(folder, "cpu"), mutate_json)


def _same_weights(whole, read, name, data) -> str:
    one, other = whole[0].state_dict(), read[0].state_dict()
    changed = [key for key, value in one.items() if not torch.equal(value.reshape(-1), other[key].reshape(-1))]
    return f"{len(changed)} other weights, such as {changed[0]}" if changed else ""


def model_weights(folder: Path, checkpoint: Path) -> Reader:
    """The weights of a model folder."""
    from hub_rice.loading import load_model

    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    return Reader(folder, ["model.safetensors"], lambda at: load_model(at, "cpu"), mutate_bytes, _same_weights)


def model_header(folder: Path, checkpoint: Path) -> Reader:
    """The header of the weights of a model folder that has no hashes."""
    reader = model_weights(folder, checkpoint)
    (folder / "model.sha256").unlink()
    reader.mutate = mutate_header
    return reader


def records(folder: Path, checkpoint: Path) -> Reader:
    """results.json and train_arguments.json, through what `rice publish` makes of them."""
    from huggingface_hub import ModelCard

    from hub_rice.model_card import breakdown_page, model_card
    from hub_rice.results import portable_results, read_results
    from hub_rice.training_record import license_of

    arguments = {"dataset": "mini_lpr4m", "data_dir": None, "max_steps": 8, "learning_rate": 0.1, "num_processes": 2}
    arguments |= {"model_name_or_path": None, "init_vision_from": "openai/clip", "freeze": ["a"], "model": {"a": 1}}
    files = {
        "results.json": RESULTS,
        "train_results.json": {"train_runtime": 120.0},
        "train_arguments.json": arguments,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))

    def publish(folder):
        results = portable_results(read_results(folder / "results.json"), "someone/rice")
        license_of(folder)
        json.dumps(results, allow_nan=False)
        text = model_card(results, model_id="someone/rice", run_dir=folder)
        assert ModelCard(text).data.model_name == "someone/rice"
        breakdown_page(results)

    return Reader(folder, list(files), publish, mutate_json)


class _Cosine:
    """A model that compares embeddings and nothing else."""

    config = type("Config", (), {"use_decoder": False})()

    @staticmethod
    def similarity(clips, gallery):
        return clips.embeds @ gallery.embeds.float().T


def index(folder: Path, checkpoint: Path) -> Reader:
    """Every file of an index, searched afterwards."""
    from modeling_rice import RiceClips, RiceGallery
    from retrieval_rice.index import GalleryIndex

    embeds = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    shop = GalleryIndex(_Cosine())
    names = [{"image_id": f"p{i}", "live_ids": ["x"], "title": f"title {i}"} for i in range(20)]
    shop.put(names[:10], RiceGallery(embeds=embeds[:10]))
    shop.save(folder / "index")
    shop = GalleryIndex.load(folder / "index", _Cosine())
    shop.put(names[10:], RiceGallery(embeds=embeds[10:]))
    shop.remove(["p3"])

    def read(folder):
        opened = GalleryIndex.load(folder / "index", _Cosine())
        answers = opened.search(RiceClips(embeds=embeds[[0, 7, 15]]), rerank=0)
        return sorted(opened.image_ids()), [[(hit.image_id, hit.title, hit.score) for hit in a.hits] for a in answers]

    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return Reader(folder, files, read, mutate_bytes, lambda whole, got, *_: "" if got == whole else "other answers")


def _jpeg(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def _rows_of_whole_lines(whole, read, name, data) -> str:
    """Rows whose lines were not touched must be as before, and none may come from nowhere."""
    before, now = whole[name], read[name]
    known = {line: row for line, row in before}
    for line, row in now:
        if line in known and row != known[line]:
            return f"another row from the same line: {row}"
    left = {line for line, _ in now}
    lines = data.splitlines()
    lost = [line for line in known if line in lines and line not in left]
    return f"{len(lost)} rows of whole lines are lost" if lost else ""


def shop_clips(folder: Path, checkpoint: Path) -> Reader:
    """gallery.jsonl and clips_test.jsonl of one's own shop."""
    from data_rice.builder import ProblemLog
    from data_rice.shop_clips import ShopClips
    from data_rice.shop_clips.shop_clips import read_gallery

    for name in ("g0", "g1", "g2", "a", "b"):
        _jpeg(folder / f"{name}.jpg")
    gallery = [{"gallery_id": f"g{i}", "image": f"g{i}.jpg", "title": f"cup {i}", "live_id": "x"} for i in range(3)]
    clips = [
        {"query_id": "c0", "frames": ["a.jpg", "b.jpg"], "gt_gallery_ids": ["g0", "g1"], "asr": "苹果"},
        {"query_id": "c1", "frames": ["b.jpg"], "boxes": [[0.1, 0.2, 0.5, 1.0]], "gt_gallery_ids": ["g2"]},
        {"query_id": "c2", "frames": ["a.jpg"], "gt_gallery_ids": ["g1"]},
    ]
    clips = [{**clip, "live_id": "x"} for clip in clips]
    for name, rows in (("gallery.jsonl", gallery), ("clips_test.jsonl", clips)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder = ShopClips("query", data_dir=folder, cache_dir=folder / "cache")

    def read(folder):
        images = read_gallery(str(folder))
        rows = list(builder.generate_rows("test", ProblemLog(None), images))
        found = {"gallery.jsonl": images.values(), "clips_test.jsonl": rows}
        key = {"gallery.jsonl": "image_id", "clips_test.jsonl": "clip_id"}
        ids = {"gallery.jsonl": "gallery_id", "clips_test.jsonl": "query_id"}
        by_line = {}
        for name in found:
            by_id = {row[key[name]]: row for row in found[name]}
            lines = [line for line in (folder / name).read_bytes().splitlines() if line.strip()]
            by_line[name] = [
                (line, by_id[entry[ids[name]]])
                for line in lines
                if (entry := json.loads(line)) and entry.get(ids[name]) in by_id
            ]
        return by_line

    return Reader(folder, ["gallery.jsonl", "clips_test.jsonl"], read, mutate_lines, _rows_of_whole_lines)


def lpr4m(folder: Path, checkpoint: Path) -> Reader:
    """A training list and the test files of LPR4M's raw layout."""
    from data_rice.lpr4m import layout

    live = "0b7e1c5a-6d7c-4d5b-9a3f-1a2b3c4d5e6f"
    rows = []
    for i in range(4):
        clip = f"{live}-{1000 * i}-{1000 * i + 900}"
        frames = [f"{clip}-{j}" for j in range(2)]
        box = [[1, 2, 30, 40]] * 2
        rows.append([clip, str(frames), str(box), f"{live}-{i}", f"title {i}", "3", "mugs", "said", "0.5", "9", "1"])
    (folder / "training_videoinfo").write_text("".join("\t".join(row) + "\n" for row in rows))
    clips = [row[0] for row in rows]
    (folder / "gt.json").write_text(json.dumps({clip: [f"{live}-{i}"] for i, clip in enumerate(clips)}, indent=1))
    boxes = {f"{clip}-{j}": [[0.1, 0.2, 0.5, 0.6]] for clip in clips for j in range(2)}
    (folder / "boxes.json").write_text(json.dumps(boxes, indent=1))

    def read(folder):
        training = list(layout.read_training_rows([str(folder / "training_videoinfo")]))
        lines = (folder / "training_videoinfo").read_bytes().split(b"\n")
        relevant = layout.read_id_lists(str(folder / "gt.json"), "clip id")
        where = layout.read_test_boxes(str(folder / "boxes.json"))
        return {
            "training_videoinfo": [(lines[number - 1], row) for _, number, row in training],
            "gt.json": [(json.dumps(item).encode(), item) for item in relevant.items()],
            "boxes.json": [(json.dumps(item).encode(), item) for item in where.items()],
        }

    def mutate(data, draw):
        return (mutate_rows if data.count(b"\t") else draw.choice((mutate_json, mutate_bytes)))(data, draw)

    names = ["training_videoinfo", "gt.json", "boxes.json"]
    return Reader(folder, names, read, mutate, _rows_of_whole_lines)


def moving_fashion(folder: Path, checkpoint: Path) -> Reader:
    """train.json of MovingFashion."""
    from data_rice import MovingFashion
    from data_rice.builder import ProblemLog

    for name in ("videos/a.mp4", "videos/b.mp4", "imgs/0.jpg", "imgs/1.jpg"):
        _jpeg((folder / name).with_suffix(".jpg"))
        (folder / name).touch()
    products = {
        "p0": {"video_paths": ["videos/a.mp4", "videos/b.mp4"], "img_path": "imgs/0.jpg", "source": 1},
        "p1": {"video_paths": ["videos/a.mp4"], "img_path": "imgs/1.jpg", "source": 0}
        | {"tracklets": {"1": [0, 0, 0.5, 1]}},
    }
    (folder / "train.json").write_text(json.dumps(products))
    builder = MovingFashion("pairs", data_dir=folder, cache_dir=folder / "cache")

    def read(folder):
        problems = ProblemLog(None)
        return list(builder.generate_rows("train", problems)), sum(problems.counts.values())

    def wrong(whole, got, name, data):
        listed = sum(len(entry["video_paths"]) or 1 for entry in json.loads(data).values())
        inside = all(row[part].startswith(str(folder)) for row in got[0] for part in ("video", "image"))
        return "" if inside and len(got[0]) + got[1] >= listed else f"{len(got[0])} rows of {listed}"

    return Reader(folder, ["train.json"], read, mutate_json, wrong)


def box_file(folder: Path, checkpoint: Path) -> Reader:
    """Boxes that a detector found."""
    from data_rice.box_files import FORMAT, BoxFile, box_line

    lines = [box_line("test", f"c{i}", 3, [0, 1, 2], [[0.1, 0.2, 0.5, 0.6], None, None], [0.5, None, None], "ab" * 8)
             for i in range(4)]  # fmt: skip
    (folder / "boxes.jsonl").write_text(json.dumps(FORMAT) + "\n" + "".join(lines))

    def read(folder):
        file = BoxFile(folder / "boxes.jsonl")
        found = {name: file.columns("test", name, 3) for split, name in sorted(file.keys()) if split == "test"}
        lines = [line for line in (folder / "boxes.jsonl").read_bytes().splitlines()[1:] if line.strip()]
        entries = [(line, json.loads(line)["clip_id"]) for line in lines]
        return {"boxes.jsonl": [(line, found[name]) for line, name in entries if name in found]}

    return Reader(folder, ["boxes.jsonl"], read, mutate_lines, _rows_of_whole_lines)


def recipe(folder: Path, checkpoint: Path) -> Reader:
    """A recipe of training, through the arguments that are made of it."""
    import dataclasses

    from training_rice import arguments as module
    from training_rice.arguments import parse_arguments
    from training_rice.recipe import read_recipe

    names = {field.name for cls in module._CLASSES for field in dataclasses.fields(cls) if field.init}
    text = (Path(module.__file__).parents[1] / "configs/mini_lpr4m.yaml").read_bytes()
    (folder / "recipe.yaml").write_bytes(text)

    def read(folder):
        read_recipe(folder / "recipe.yaml", names)
        try:
            parse_arguments([str(folder / "recipe.yaml"), "--output_dir", str(folder / "run"), "--use_cpu", "true"])
        except SystemExit as end:
            raise ValueError(f"{folder}: status {end.code}") from end

    return Reader(folder, ["recipe.yaml"], read, mutate_bytes)


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def pictures(folder: Path, checkpoint: Path) -> Reader:
    """A picture of each format."""
    from processing_rice import open_image

    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((40, 32))
    for form in FORMATS:
        picture.save(folder / f"picture.{form.lower()}", format=form)

    last = {}

    def read(folder):
        for name, data in last.items():
            if (folder / name).read_bytes() != data:
                return {name: np.asarray(open_image(folder / name))}
        return {name: np.asarray(open_image(folder / name)) for name in last}

    last.update({path.name: path.read_bytes() for path in folder.iterdir()})

    def wrong(whole, got, name, data):
        picture = got.get(name)
        if picture is None or picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            return "no RGB picture"
        return ""

    return Reader(folder, sorted(last), read, mutate_bytes, wrong)


def videos(folder: Path, checkpoint: Path) -> Reader:
    """A video of each container, as a clip and as a stream."""
    import av

    from processing_rice.video_media_rice import VideoReader
    from retrieval_rice.stream.source import open_stream

    kinds = {"clip.mp4": "mpeg4", "clip.mkv": "mpeg4", "clip.avi": "mpeg4", "clip.ts": "mpeg4", "clip.webm": "libvpx"}
    kinds |= {"clip.gif": "gif", "clip.flv": "flv"}
    for name, codec in kinds.items():
        with av.open(str(folder / name), "w") as out:
            stream = out.add_stream(codec, rate=10)
            stream.width = stream.height = 32
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for i in range(6):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (40 * i, 100, 0)))
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def read(folder):
        name = next((name for name, data in whole.items() if (folder / name).read_bytes() != data), None)
        if name is None:
            return None
        stream = open_stream(folder / name, 100.0, notify=lambda text: None)
        times = [frame.time_s for frame in stream]
        with VideoReader(folder / name) as video:
            return times, list(video.times), [frame.picture.mode for frame in video.frames()]

    def wrong(_, got, name, data):
        streamed, times, modes = got
        ascending = all(a <= b for steps in (streamed, times) for a, b in zip(steps, steps[1:]))
        finite = all(math.isfinite(time_s) and time_s >= 0 for time_s in (*streamed, *times))
        return "" if ascending and finite and set(modes) <= {"RGB"} else f"times {streamed} {times}"

    return Reader(folder, sorted(whole), read, mutate_bytes, wrong)


def features(folder: Path, checkpoint: Path) -> Reader:
    """Stored encodings, whose bits are compared with a checksum."""
    from modeling_rice import RiceGallery

    embeds = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    RiceGallery(embeds=embeds, model_fingerprint="f" * 16).save(folder / "gallery.safetensors")

    def mutate(data, draw):
        return draw.choice((mutate_header, mutate_bytes))(data, draw)

    def wrong(whole, got, name, data):
        same = torch.equal(whole.embeds, got.embeds) and whole.model_fingerprint == got.model_fingerprint
        return "" if same else "other encodings"

    return Reader(
        folder, ["gallery.safetensors"], lambda at: RiceGallery.load(at / "gallery.safetensors"), mutate, wrong
    )


def parquet(folder: Path, checkpoint: Path) -> Reader:
    """Rows of prepared shards, whose pages carry checksums."""
    import pyarrow as pa
    import pyarrow.parquet

    from data_rice.lazy_rows import ParquetRows

    rows = [{"clip_id": f"c{i}", "title": f"title {i}", "boxes": [[0.1, 0.2, 0.3, 0.4]]} for i in range(40)]
    pyarrow.parquet.write_table(
        pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=10, write_page_checksum=True
    )

    def read(folder):
        lazy = ParquetRows([folder / "pairs.parquet"])
        return lazy.__getitems__(list(range(len(lazy))))

    def wrong(whole, got, name, data):
        # The list of columns at the end of a file has no checksum: a change of it is believed.
        return "" if got == whole or data[: len(content) - footer] == content[:-footer] else "other rows"

    content = (folder / "pairs.parquet").read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    return Reader(folder, ["pairs.parquet"], read, mutate_bytes, wrong)


def training_checkpoint(folder: Path, checkpoint: Path) -> Reader:
    """A checkpoint that training goes on from: one that was altered is told from one that was not."""
    from training_rice.checkpoints import CHECKSUMS_FILE, why_broken

    shutil.copytree(checkpoint, folder / "checkpoint-2")
    state = {"global_step": 2, "max_steps": 4, "log_history": []}
    (folder / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.arange(50)}, folder / "checkpoint-2" / name)
    import zlib

    names = [path.name for path in (folder / "checkpoint-2").iterdir()]
    sums = {}
    for name in names:
        data = (folder / "checkpoint-2" / name).read_bytes()
        sums[name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "checkpoint-2" / CHECKSUMS_FILE).write_text(json.dumps(sums))

    def read(folder):
        reason = why_broken(folder / "checkpoint-2")
        if reason is not None:
            raise ValueError(f"{folder}: {reason}")

    def wrong(whole, got, name, data):
        return "" if name.endswith(CHECKSUMS_FILE) else "taken for whole"

    return Reader(folder, [f"checkpoint-2/{name}" for name in sums], read, mutate_bytes, wrong)


READERS = {
    "JSON of models and processors": (model_json, 2000),
    "weights of models": (model_weights, 300),
    "safetensors headers of models": (model_header, 500),
    "results and training records": (records, 1500),
    "index files": (index, 1000),
    "shop clips": (shop_clips, 1200),
    "LPR4M": (lpr4m, 900),
    "MovingFashion": (moving_fashion, 600),
    "box files": (box_file, 600),
    "recipes": (recipe, 300),
    "pictures": (pictures, 1500),
    "videos": (videos, 700),
    "stored encodings": (features, 600),
    "Parquet": (parquet, 400),
    "training checkpoints": (training_checkpoint, 400),
}
