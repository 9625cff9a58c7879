"""Searching a shop: exact, FAISS HNSW and IVF-PQ, matching, frames to answer, and a load test of Qdrant, in one run.

    python benchmarks/bench_retrieval.py [--rows 66358 1000000] [--steps exact hnsw ivfpq ...] [--device cuda]

One JSON line per step and size, each measured in a fresh process, so that `peak_rss_mb` is that step's own:

* `exact`, `hnsw`, `ivfpq`: `GalleryIndex.search` for one clip and for `--queries` at once, embeddings alone;
  `recall@10` is against exact search, `index_mb` the FAISS file, `build_seconds` what it takes to make it;
* `match_top`, `match_shop`: the same with matching over the nearest 100, and over the `--shop` images of a livestream;
* `end_to_end`: decoded frames to answer (processor, encoder, search, matching over 100) at batch 1 and 32;
* `qdrant`: upload to Qdrant (`--qdrant`: its embedded engine in memory, in a folder, or a server's URL), then
  `--clients` threads that search for `--seconds`: searches per second, median and 99th percentile.

Embeddings are drawn around centres (`--centres` rows each), queries near rows of the shop, which is harder for
approximate search than the even spread of random vectors. 10 million rows of 512 numbers take 10 GB in half precision,
and building HNSW over them hours: `--rows 10000000 --steps exact ivfpq`.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

STEPS = ("exact", "hnsw", "ivfpq", "match_top", "match_shop", "end_to_end", "qdrant")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[66_358, 1_000_000], help="images of the shop")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    add("--size", choices=("vit_b_32", "tiny"), default="vit_b_32", help="model, which sets the embeddings' width")
    add("--queries", type=int, default=64, help="clips searched at once, and for recall")
    add("--shop", type=int, default=603, help="images of one livestream")
    add("--centres", type=int, default=50, help="images per cluster")
    add("--frames", type=int, default=10, help="frames per clip")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored encodings")
    add("--repeats", type=int, default=5, help="timed runs, of which the fastest counts")
    add("--faiss", type=json.loads, default={}, help="settings of FAISS, such as '{\"ef_search\": 64}'")
    add("--qdrant", default=":memory:", help="folder or URL of the engine")
    add("--clients", type=int, default=4, help="threads of the load test")
    add("--seconds", type=float, default=10, help="length of the load test")
    add("--device", default="cpu")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def memory_mb(field: str) -> float:
    """A field of the process's status, such as the peak of resident memory, in MB; 0 where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def make_shop(model, rows: int, options):
    """An index of `rows` clustered encodings in pieces, livestreams of `--shop` images each, and clips near some."""
    import torch

    from modeling_rice import RiceClips, RiceGallery
    from retrieval_rice.index import GalleryIndex

    dtype = getattr(torch, options.dtype)
    width, states = model.config.projection_dim, model.config.decoder_hidden_size
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(1, rows // options.centres), width, generator=generator)
    index, fingerprint = GalleryIndex(model), model.fingerprint()
    picked = []
    for start in range(0, rows, 131_072):
        count = min(131_072, rows - start)
        # Two thirds of an image's length are its cluster's, so that neighbours are many and near.
        noise = 0.7 * torch.randn(count, width, generator=generator)
        embeds = centres[torch.randint(len(centres), (count,), generator=generator)] + noise
        embeds = torch.nn.functional.normalize(embeds, dim=1)
        picked.append(embeds[torch.randint(count, (options.queries,), generator=generator)])
        gallery = RiceGallery(
            embeds=embeds.to(dtype),
            states=torch.randn(count, states, generator=generator).to(dtype),
            model_fingerprint=fingerprint,
        )
        index.store.put([_record(i, options.shop) for i in range(start, start + count)], gallery, [])
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
    return index.to(options.device), clips.to(options.device)


def _record(number: int, shop: int) -> dict:
    image_id = f"image-{number}"
    return {
        "image_id": image_id,
        "product_id": image_id,
        "live_ids": [f"live-{number // shop}"],
        "title": "",
        "image": "",
    }


def timed(run, options, repeats: int | None = None) -> tuple[float, float]:
    """Milliseconds of wall-clock and of CPU time."""
    from plain import measure

    seconds, cpu_seconds = measure.best_seconds(run, repeats or options.repeats, options.device)
    return round(1000 * seconds, 3), round(1000 * cpu_seconds, 3)


def recall(found: list, expected: list) -> float:
    """Share of the expected hits that were found, over all clips."""
    pairs = [({hit.image_id for hit in a.hits}, {hit.image_id for hit in b.hits}) for a, b in zip(found, expected)]
    return round(sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs), 4)


def measure_search(index, clips, options) -> dict:
    """`exact`, `hnsw` or `ivfpq`; what is timed is the search and the reading of ten records."""
    row: dict[str, object] = {}
    # Exact answers of the same run are what recall is against.
    expected = index.search(clips, rerank=10)
    if options.step != "exact":
        start, cpu = time.perf_counter(), time.process_time()
        index.approximate(options.step, progress=False, **options.faiss)
        row["build_seconds"] = round(time.perf_counter() - start, 2)
        row["build_cpu_seconds"] = round(time.process_time() - cpu, 2)
        row["index_mb"] = round(faiss_bytes(index) / 2**20, 1)

    def search(some):
        return index.store.search(index.model, some, [None] * len(some), 10)

    ms, cpu_ms = timed(lambda: search(clips[:1]), options)
    batch_ms, batch_cpu_ms = timed(lambda: search(clips), options)
    return row | {
        "recall@10": recall(index.search(clips, rerank=10), expected),
        "ms": ms,
        "cpu_ms": cpu_ms,
        "batch_ms_per_clip": round(batch_ms / len(clips), 3),
        "batch_cpu_ms_per_clip": round(batch_cpu_ms / len(clips), 3),
    }


def faiss_bytes(index) -> int:
    import faiss

    return faiss.serialize_index(index.store.approximate.index).nbytes


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

        # The frames of 32 clips are a minute's work for two cores.
        ms, cpu_ms = timed(answer, options, options.repeats if batch == 1 else 1)
        row |= {f"ms_batch_{batch}": ms, f"cpu_ms_batch_{batch}": cpu_ms, f"ms_per_clip_batch_{batch}": ms / batch}
    return row


def measure_qdrant(index, clips, options) -> dict:
    """Upload, answers against the exact ones, and a load test."""
    from retrieval_rice.index import GalleryIndex
    from retrieval_rice.index_qdrant import QdrantStore

    store = QdrantStore(options.qdrant, f"bench-{os.getpid()}", index.model)
    try:
        start = time.perf_counter()
        store.upload(index.store, progress=False)
        seconds = time.perf_counter() - start
        remote = GalleryIndex(index.model, store)
        row = {
            "engine": "embedded" if store.is_embedded else "server",
            "upload_rows_per_second": round(len(store) / seconds),
            "recall@10": recall(remote.search(clips, rerank=10), index.search(clips, rerank=10)),
        }
        return row | load_test(remote, clips, options)
    finally:
        store.client.delete_collection(store.collection)
        store.close()


def load_test(index, clips, options) -> dict:
    """Searches per second of several clients that each wait for their answer."""
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
    index, clips = make_shop(model, options.rows[0], options)
    shop_mb = memory_mb("VmRSS")
    if options.step in ("exact", "hnsw", "ivfpq"):
        row = measure_search(index, clips, options)
    elif options.step == "end_to_end":
        row = measure_end_to_end(index, options)
    else:
        row = (measure_qdrant if options.step == "qdrant" else measure_matching)(index, clips, options)
    encoding = index.store.shards[0].features
    about = {"dtype": options.dtype, "bytes_per_image": (encoding.embeds[0].nbytes + encoding.states[0].nbytes)}
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
            # The last mention of an option counts.
            print(f"{step} of {rows:,} images", file=sys.stderr)
            command = [sys.executable, __file__, *given, "--steps", step, "--rows", str(rows), "--step", step]
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = {"benchmark": "retrieval", "step": step, "rows": rows}
            print(json.dumps(row | json.loads(result.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
