"""Search of a shop in its table: exact, one livestream, HNSW and IVF-PQ, and tensors in memory, in one run.

    python benchmarks/bench_retrieval.py [--rows 66358 1000000] [--steps torch exact room hnsw ivfpq ...]

One JSON line per step and size, each measured in a new process, so that `peak_rss_mb` is for that step only:

* `torch`: the reference: `model.similarity` and `topk` on tensors in memory, without table, records or ties;
* `exact`: `GalleryIndex` over all images in memory; `streamed`: the same without memory, read for each search;
* `room`: one livestream of `--shop` images: `cold_ms` for the first read from files, `ms` from memory;
* `hnsw`, `ivfpq`: approximate search; `recall@10` is relative to exact search, `index_mb` is the added disk space;
* `match_top`, `match_shop`: search and matching over the nearest 100, and over all images of a livestream;
* `end_to_end`: from decoded frames to the answer (processor, encoder, search, matching over 100) at batch 1 and 32;
* `write`: `write_seconds` for all rows, then the time for one more image (`put_ms`), and until a second reader sees
it; * `load`: `--clients` threads that search for `--seconds`: searches per second, median and 99th percentile.

Embeddings are drawn around centres (`--centres` rows each), and queries near rows of the shop. This is harder for
approximate search than uniform random vectors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS = (
    *("torch", "exact", "streamed", "room", "hnsw", "ivfpq"),
    *("match_top", "match_shop", "end_to_end", "write", "load"),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[66_358, 1_000_000], help="images of the shop")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    add("--size", choices=("vit_b_32", "tiny"), default="vit_b_32", help="model, which sets the embedding width")
    add("--queries", type=int, default=64, help="clips searched at once, and for recall")
    add("--shop", type=int, default=603, help="images of one livestream")
    add("--centres", type=int, default=50, help="images per cluster")
    add("--frames", type=int, default=10, help="frames per clip")
    add("--dtype", choices=("float16", "float32"), default="float16", help="type of the stored encodings")
    add("--repeats", type=int, default=5, help="timed runs; the fastest one counts")
    add("--settings", type=json.loads, default={}, help="of approximate search, such as '{\"ef_search\": 64}'")
    add("--folder", help="folder for the tables; default: a temporary folder")
    add("--clients", type=int, default=4, help="threads of the load test")
    add("--seconds", type=float, default=10, help="length of the load test")
    add("--device", default="cpu")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def memory_mb(field: str) -> float:
    """A field of the process's status, such as peak resident memory, in MB; 0 if the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def make_shop(model, rows: int, options, folder: str):
    """An index of `rows` clustered encodings in livestreams of `--shop` images, clips near some, and seconds."""
    import torch

    from modeling_rice import RiceClips, RiceGallery
    from retrieval_rice.index import GalleryIndex
    from retrieval_rice.index.table import ShopTable, State, columns_of

    dtype = getattr(torch, options.dtype)
    width, states = model.config.projection_dim, model.config.decoder_hidden_size
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(1, rows // options.centres), width, generator=generator)
    table, fingerprint = ShopTable(folder), model.fingerprint()
    blank = RiceGallery(embeds=torch.zeros(1, width, dtype=dtype), states=torch.zeros(1, states, dtype=dtype))
    table.create(columns_of(blank), State(fingerprint, dtype=options.dtype))
    index = GalleryIndex(model, table, cache_bytes=0 if options.step == "streamed" else 4 * 2**30)
    picked, seconds = [], 0.0
    for start in range(0, rows, 65_536):
        count = min(65_536, rows - start)
        # The cluster contributes two thirds of an image's vector, so that there are many near neighbours.
        noise = 0.7 * torch.randn(count, width, generator=generator)
        embeds = centres[torch.randint(len(centres), (count,), generator=generator)] + noise
        embeds = torch.nn.functional.normalize(embeds, dim=1)
        picked.append(embeds[torch.randint(count, (options.queries,), generator=generator)])
        gallery = RiceGallery(
            embeds=embeds.to(dtype),
            states=torch.randn(count, states, generator=generator).to(dtype),
            model_fingerprint=fingerprint,
        )
        begun = time.perf_counter()
        names = range(start, start + count)
        index.put([{"image_id": f"image-{i}", "live_ids": [f"live-{i // options.shop}"]} for i in names], gallery)
        seconds += time.perf_counter() - begun
    begun = time.perf_counter()
    index.compact()
    seconds += time.perf_counter() - begun
    near = torch.cat(picked)[torch.randperm(len(picked) * options.queries, generator=generator)[: options.queries]]
    near = near + 0.5 * torch.randn(near.shape, generator=generator) / width**0.5
    tokens = options.frames * (model.config.num_patches + 1)
    clips = RiceClips(
        embeds=torch.nn.functional.normalize(near, dim=1),
        keys=torch.randn(options.queries, tokens, states, generator=generator),
        values=torch.randn(options.queries, tokens, states, generator=generator),
        mask=torch.ones(options.queries, tokens, dtype=torch.bool),
        model_fingerprint=fingerprint,
    )
    return index, clips.to(options.device), seconds


def folder_mb(folder: str) -> float:
    return round(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20, 1)


def timed(run, options, repeats: int | None = None) -> tuple[float, float]:
    """Milliseconds of wall-clock and of CPU time."""
    from plain import measure

    seconds, cpu_seconds = measure.best_seconds(run, repeats or options.repeats, options.device)
    return round(1000 * seconds, 3), round(1000 * cpu_seconds, 3)


def recall(found: list, expected: list) -> float:
    """Share of the expected hits that were found, over all clips."""
    pairs = [({hit.image_id for hit in a.hits}, {hit.image_id for hit in b.hits}) for a, b in zip(found, expected)]
    return round(sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs), 4)


def measure_search(index, clips, options, folder: str) -> dict:
    """`exact`, `streamed`, `hnsw` or `ivfpq`: search and reading of ten images, without matching."""
    row: dict[str, object] = {}
    # Recall is relative to the exact answers of the same run.
    expected = index.search(clips, rerank=10)
    if options.step in ("hnsw", "ivfpq"):
        before, start, cpu = folder_mb(folder), time.perf_counter(), time.process_time()
        row["recall@10_of_images"] = index.approximate(options.step, **options.settings)
        row["build_seconds"] = round(time.perf_counter() - start, 2)
        row["build_cpu_seconds"] = round(time.process_time() - cpu, 2)
        row["index_mb"] = round(folder_mb(folder) - before, 1)

    def search(some):
        return index.search(some, rerank=0)

    ms, cpu_ms = timed(lambda: search(clips[:1]), options)
    batch_ms, batch_cpu_ms = timed(lambda: search(clips), options)
    return row | {
        "recall@10": recall(index.search(clips, rerank=10), expected),
        "ms": ms,
        "cpu_ms": cpu_ms,
        "batch_ms_per_clip": round(batch_ms / len(clips), 3),
        "batch_cpu_ms_per_clip": round(batch_cpu_ms / len(clips), 3),
    }


def measure_torch(index, clips, options) -> dict:
    """A user's code without an index: the similarity to all images in memory, and the ten best."""
    snapshot = index._newest.rooms().snapshot
    gallery = snapshot.features(snapshot.read(["embeds"]), type_of_gallery(), ["embeds"]).to(options.device)

    def search(some):
        return index.model.similarity(some, gallery).topk(10)

    ms, cpu_ms = timed(lambda: search(clips[:1]), options)
    batch_ms, batch_cpu_ms = timed(lambda: search(clips), options)
    row = {"batch_ms_per_clip": batch_ms / len(clips), "batch_cpu_ms_per_clip": batch_cpu_ms / len(clips)}
    return {"ms": ms, "cpu_ms": cpu_ms} | {name: round(value, 3) for name, value in row.items()}


def type_of_gallery() -> type:
    from modeling_rice import RiceGallery

    return RiceGallery


def measure_room(index, clips, options, folder: str) -> dict:
    """One livestream, from the files and from memory; other livestreams in memory do not help."""
    from retrieval_rice.index import GalleryIndex

    lives = [f"live-{number}" for number in range(min(20, options.rows[0] // options.shop))]
    fresh = GalleryIndex.load(folder, index.model)
    cold = []
    for live in lives:
        start = time.perf_counter()
        fresh.search(clips[:1], live_id=live, rerank=0)
        cold.append(1000 * (time.perf_counter() - start))
    ms, cpu_ms = timed(lambda: fresh.search(clips[:1], live_id=lives[0], rerank=0), options)
    return {"cold_ms": round(sorted(cold)[len(cold) // 2], 3), "ms": ms, "cpu_ms": cpu_ms}


def measure_write(index, clips, options, folder: str, seconds: float) -> dict:
    """One more image, and the time until another reader, which checks for new versions in each search, finds it."""
    from retrieval_rice.index import GalleryIndex

    reader = GalleryIndex.load(folder, index.model, refresh_s=0)
    stored = index._newest.rooms().search(clips[:1], [("live-0",)], 1)[0].features
    start = time.perf_counter()
    index.put([{"image_id": "new", "live_ids": ["new"]}], stored)
    put_ms = 1000 * (time.perf_counter() - start)
    while not reader.search(clips[:1], live_id="new", rerank=0)[0].hits:
        pass
    found_ms = 1000 * (time.perf_counter() - start)
    start = time.perf_counter()
    index.compact()
    return {
        "write_seconds": round(seconds, 2),
        "put_ms": round(put_ms, 1),
        "found_by_another_reader_ms": round(found_ms, 1),
        "compact_seconds": round(time.perf_counter() - start, 2),
        "folder_mb": folder_mb(folder),
    }


def measure_matching(index, clips, options) -> dict:
    """`match_top`: the nearest 100 of all; `match_shop`: all images of one livestream."""
    arguments = {"live_id": "live-0", "rerank": None} if options.step == "match_shop" else {"rerank": 100}
    ms, cpu_ms = timed(lambda: index.search(clips[:1], **arguments), options)
    answer = index.search(clips[:1], **arguments)[0]
    return {"ms": ms, "cpu_ms": cpu_ms, **{name: round(value, 3) for name, value in answer.timings.items()}}


def measure_end_to_end(index, options) -> dict:
    """Decoded frames (PIL, 360 x 640) to answers."""
    import numpy as np
    import torch
    from PIL import Image

    from processing_rice import build_processor, train_tokenizer

    vision = index.model.config.vision_config
    tokenizer = train_tokenizer(["a red mug", "blue shoe"] * 20, vocab_size=400)
    processor = build_processor(tokenizer, vision.image_size, vision.patch_size, options.frames)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (options.frames, 9, 16, 3), dtype=np.uint8)
    frames = [Image.fromarray(picture).resize((640, 360)) for picture in noise]
    row: dict[str, object] = {}
    for batch in (1, 32):

        @torch.no_grad()
        def answer(batch=batch):
            inputs = processor(videos=[frames] * batch).to(options.device)
            return index.search(index.model.encode_clips(**inputs), "live-0")

        # The frames of 32 clips take two cores about a minute.
        ms, cpu_ms = timed(answer, options, options.repeats if batch == 1 else 1)
        row |= {f"ms_batch_{batch}": ms, f"cpu_ms_batch_{batch}": cpu_ms, f"ms_per_clip_batch_{batch}": ms / batch}
    return row


def load_test(index, clips, options) -> dict:
    """Searches per second of several clients, each waiting for its answer."""
    import numpy as np

    times: list[float] = []
    failures: list[str] = []
    end = time.perf_counter() + options.seconds

    def client(number: int) -> None:
        turn = number
        while time.perf_counter() < end:
            start = time.perf_counter()
            try:
                index.search(clips[turn % len(clips)], rerank=10)
            except Exception as error:
                failures.append(repr(error))
                return
            times.append(time.perf_counter() - start)
            turn += options.clients

    threads = [threading.Thread(target=client, args=(i,)) for i in range(options.clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    row = {"clients": options.clients, "searches_per_second": round(len(times) / seconds, 1), "failures": failures}
    if times:
        row |= {f"p{p}_ms": round(1000 * float(np.percentile(times, p)), 2) for p in (50, 99)}
    return row


def run_step(options: argparse.Namespace) -> dict:
    """Measure one step at one size in this process."""
    import torch
    from plain import measure

    if options.threads:
        torch.set_num_threads(options.threads)
    model = measure.build_model(options.size).to(options.device).eval()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        index, clips, seconds = make_shop(model, options.rows[0], options, folder)
        shop_mb = memory_mb("VmRSS")
        if options.step == "torch":
            row = measure_torch(index, clips, options)
        elif options.step == "room":
            row = measure_room(index, clips, options, folder)
        elif options.step in ("match_top", "match_shop"):
            row = measure_matching(index, clips, options)
        elif options.step == "end_to_end":
            row = measure_end_to_end(index, options)
        elif options.step == "write":
            row = measure_write(index, clips, options, folder, seconds)
        elif options.step == "load":
            row = load_test(index, clips, options)
        else:
            row = measure_search(index, clips, options, folder)
        about = {"dtype": options.dtype, "bytes_per_image": index._newest.rooms().snapshot.row_bytes}
    memory = {"shop_rss_mb": round(shop_mb), "peak_rss_mb": round(memory_mb("VmHWM"))}
    return row | about | memory | measure.machine(options.device)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.step:
        print(json.dumps(run_step(options)))
        return
    given = sys.argv[1:] if arguments is None else arguments
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for rows in options.rows:
        for step in options.steps:
            # The last occurrence of an option counts.
            print(f"{step} of {rows:,} images", file=sys.stderr)
            command = [sys.executable, __file__, *given, "--steps", step, "--rows", str(rows), "--step", step]
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = {"benchmark": "retrieval", "step": step, "rows": rows}
            print(json.dumps(row | json.loads(result.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
