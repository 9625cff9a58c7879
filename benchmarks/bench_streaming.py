"""Training lists of any size: opened and read by index, as an Arrow table, and as a whole file.

    python benchmarks/bench_streaming.py [--rows 4000000] [--plain_rows 400000] [--folder DIR]

Writes a list of `--rows` rows in LPR4M's format, without media, to a temporary folder, and removes it at the end. One
JSON line per step, each measured in a new process:

* `index`: open the list for the first time, which indexes its usable rows;
* `reopen`: open it again and read the first row;
* `stream`: one shuffled epoch of `StreamingView`, every row parsed;
* `seek`: resume in the middle of an epoch and read the first row;
* `order_same_live`: the order of an epoch in batches of one livestream;
* `table`, `table_read`: build the Arrow table of `--plain_rows` rows, and read it in random order;
* `pandas`: read a whole list of `--plain_rows` rows, without parsing its columns.

`peak_rss_mb` is the peak resident memory of the process, including libraries (`import_rss_mb`) and mapped files.
Compare CPU time, which other programs on the machine affect little. Rows without boxes do not need the frame size;
with boxes, one JPEG header is read per row, streamed or not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

BATCH = 64
STEPS = ("index", "reopen", "stream", "seek", "order_same_live", "table", "table_read", "pandas")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=4_000_000, help="rows of the list for streaming")
    add("--plain_rows", type=int, default=400_000, help="rows of the list for the table and pandas")
    add("--folder", type=Path, help="folder for the lists; default: the system's temporary folder")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what to measure")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def write_list(root: Path, num_rows: int) -> Path:
    """About 380 bytes a row: livestreams of 400 clips, 34 categories of very different size."""
    rng = random.Random(0)
    lives = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(num_rows // 400 + 1)]
    products = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(num_rows // 12 + 1)]
    path = root / "annotations" / "training_videoinfo.txt"
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(num_rows):
            clip = f"{lives[row // 400]}-{row % 400 * 9000}-{row % 400 * 9000 + 5000}"
            frames = f"['{clip}-0000', '{clip}-0001']"
            category = int(34 * rng.random() ** 3)
            image = products[(row // 400 * 33 + rng.randrange(40)) % len(products)]
            columns = (
                clip,
                frames,
                "[[0, 0, 0, 0], [0, 0, 0, 0]]",
                f"{image}-0",
                "a title of eight words for this one",
            )
            text = (str(category), f"category {category}", "what the host says about it", "large", "long", "1-5")
            file.write("\t".join((*columns, *text)) + "\n")
    return path


def memory_mb(field: str) -> float:
    """A field of the process's status, such as peak resident memory, in MB; 0 if the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def run_step(step: str, root: Path) -> dict[str, object]:
    """Measure one step in this process."""
    import numpy as np
    import pandas

    from data_rice import StreamingView, load_dataset_view, open_dataset_view
    from data_rice.samplers import build_sampler

    where = {"data_dir": root, "cache_dir": root / "cache"}
    imported = memory_mb("VmRSS")
    table = load_dataset_view("lpr4m", "pairs", "train", **where) if step == "table_read" else None
    start, cpu_start = time.perf_counter(), time.process_time()
    if step == "pandas":
        count = len(pandas.read_csv(root / "annotations" / "training_videoinfo.txt", sep="\t", header=None, quoting=3))
    elif step == "table":
        count = len(load_dataset_view("lpr4m", "pairs", "train", **where))
    elif step == "table_read":
        order = np.random.default_rng(0).permutation(len(table))
        count = sum(len(table.__getitems__(order[i : i + BATCH].tolist())) for i in range(0, len(order), BATCH))
    else:
        rows = open_dataset_view("lpr4m", "pairs", "train", **where)
        count = len(rows)
        if step == "order_same_live":
            count = len(build_sampler("same_live", rows, 8 * BATCH).order(0))
        elif step != "index":
            view = StreamingView(rows, BATCH)
            if step == "seek":
                view.load_state_dict(view.state_dict(batches=view.num_batches // 2))
            count = sum(1 for _ in view) if step == "stream" else len([next(iter(view))])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "rows": count,
        "rows_per_second": round(count / seconds),
        "rows_per_cpu_second": round(count / cpu_seconds),
        "import_rss_mb": round(imported),
        "peak_rss_mb": round(memory_mb("VmHWM")),
        "anonymous_rss_mb": round(memory_mb("RssAnon")),
        "cache_mb": round(sum(file.stat().st_size for file in (root / "cache").rglob("*") if file.is_file()) / 1e6),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.step:
        print(json.dumps(run_step(options.step, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-streaming-") as folder:
        roots: dict[int, Path] = {}
        for step in options.steps:
            size = options.plain_rows if step in ("table", "table_read", "pandas") else options.rows
            if size not in roots:
                roots[size] = Path(folder, str(size))
                write_list(roots[size], size)
            measure = [sys.executable, __file__, "--step", step, "--folder", str(roots[size])]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            result = subprocess.run(measure, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            size_mb = round((roots[size] / "annotations" / "training_videoinfo.txt").stat().st_size / 1e6)
            row = {"benchmark": "streaming", "step": step, "list_rows": size, "list_mb": size_mb}
            print(json.dumps(row | json.loads(result.stdout) | {"cores": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
