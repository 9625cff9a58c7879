"""`rice serve` on loopback with 1, 8 and 32 clients, and the model called in a loop in one process.

    python benchmarks/bench_service.py [--clients 1 8 32] [--seconds 10] [--precision bf16]

One JSON line per side: answers per second, median and 99th percentile of milliseconds per request, errors (503, which
asks a client to retry, is counted separately), and the peak resident memory of the process with the model. A request
is a clip of `--frames` JPEG pictures, recognised in a livestream of `--shop` images. Weights are random. Clients share
the machine with the service, and send the next request after each answer.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[1, 8, 32])
    add("--seconds", type=float, default=10, help="length of each measurement")
    add("--frames", type=int, default=10, help="pictures of a clip")
    add("--pixels", type=int, default=320, help="side of a picture in pixels")
    add("--shop", type=int, default=603, help="images of the livestream")
    add("--size", choices=("vit_b_32", "tiny"), default="vit_b_32")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--max_requests", type=int, default=64, help="the service's --max_requests")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of the model")
    add("--loop", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """A checkpoint and an index; random encodings do not change the cost of a search."""
    import torch
    from plain import measure

    from modeling_rice import RiceGallery
    from processing_rice import build_processor, train_tokenizer
    from retrieval_rice.index import GalleryIndex

    model = measure.build_model(options.size).eval()
    vision, config = model.config.vision_config, model.config
    processor = build_processor(
        train_tokenizer(["benchmark"] * 20), vision.image_size, vision.patch_size, options.frames
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    embeds = torch.nn.functional.normalize(torch.randn(options.shop, config.projection_dim), dim=1).half()
    states = torch.randn(options.shop, config.decoder_hidden_size).half()
    gallery = RiceGallery(embeds=embeds, states=states, model_fingerprint=model.fingerprint())
    index = GalleryIndex(model)
    index.put([{"image_id": f"image-{i}", "live_ids": ["live"]} for i in range(options.shop)], gallery)
    index.save(folder / "index")


def make_clips(options: argparse.Namespace) -> list[list[bytes]]:
    """Some clips, each a list of JPEG files."""
    import numpy as np
    from PIL import Image

    generator, clips = np.random.default_rng(0), []
    for _ in range(8):
        clip = []
        for _ in range(options.frames):
            noise = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            noise.resize((options.pixels, options.pixels)).save(buffer, format="JPEG")
            clip.append(buffer.getvalue())
        clips.append(clip)
    return clips


def resident_mb(process_id: int) -> float:
    """Peak resident memory of a process, in MB; 0 if unknown."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def summary(milliseconds: list[float], seconds: float) -> dict[str, float]:
    ordered = sorted(milliseconds) or [0.0]
    return {
        "answers_per_second": round(len(milliseconds) / seconds, 2),
        "p50_ms": round(ordered[len(ordered) // 2], 1),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1),
    }


def run_loop(options: argparse.Namespace) -> dict[str, object]:
    """The model called clip after clip."""
    import torch

    from processing_rice import open_image
    from retrieval_rice.options import open_index, open_model
    from retrieval_rice.recogniser import Recogniser

    torch.set_num_threads(options.threads)
    chosen = argparse.Namespace(
        model=options.loop / "model",
        shop=str(options.loop / "index"),
        device="cpu",
        precision=options.precision,
        towers=None,
    )
    model, processor = open_model(chosen)
    recogniser = Recogniser(model, processor, open_index(chosen, model, processor))
    clips, times = make_clips(options), []
    for clip in clips[:2]:
        recogniser.recognise([open_image(data) for data in clip], live_id="live")
    end = time.perf_counter() + options.seconds
    while (start := time.perf_counter()) < end:
        clip = clips[len(times) % len(clips)]
        recogniser.recognise([open_image(data) for data in clip], live_id="live")
        times.append(1000 * (time.perf_counter() - start))
    row = summary(times, options.seconds + time.perf_counter() - end)
    return {
        "side": "loop",
        "clients": 1,
        **row,
        "errors": 0,
        "told_to_come_again": 0,
        "peak_rss_mb": round(resident_mb(os.getpid())),
    }


def ask(address: str, clips: list[list[bytes]], clients: int, seconds: float) -> dict[str, object]:
    """Requests from `clients` clients at once."""
    import httpx

    times: list[float] = []
    statuses: list[int] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        with httpx.Client(base_url=address, timeout=120) as connection:
            while (start := time.perf_counter()) < end:
                clip = clips[(number + len(times)) % len(clips)]
                files = [("frames", (f"{i}.jpg", data)) for i, data in enumerate(clip)]
                answer = connection.post("/v1/recognise", files=files, data={"live_id": "live"})
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    times.append(1000 * (time.perf_counter() - start))
                elif answer.status_code == 503:
                    time.sleep(0.1)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = statuses.count(503)
    errors = len(statuses) - statuses.count(200) - again
    return {**summary(times, time.perf_counter() - begun), "errors": errors, "told_to_come_again": again}


def run_service(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Results of one service for all numbers of clients."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "rice_cli.py"), "serve", "--shop", str(folder / "index")]
    command += ["--model", str(folder / "model"), "--device", "cpu", "--precision", options.precision]
    command += ["--port", str(port), "--max_requests", str(options.max_requests)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    address, rows, clips = f"http://127.0.0.1:{port}", [], make_clips(options)
    try:
        for _ in range(1200):
            try:
                if process.poll() is not None or httpx.get(f"{address}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        ask(address, clips, 1, min(2.0, options.seconds))
        for clients in options.clients:
            row = ask(address, clips, clients, options.seconds)
            rows.append({"side": "service", "clients": clients, **row, "peak_rss_mb": round(resident_mb(process.pid))})
    finally:
        process.terminate()
        process.wait()
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.loop is not None:
        print(json.dumps(run_loop(options)))
        return
    from plain import measure

    about = {name: getattr(options, name) for name in ("frames", "shop", "size", "precision", "seconds")}
    with tempfile.TemporaryDirectory(prefix="bench-service-") as folder:
        prepare(options, Path(folder))
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, __file__, *given, "--loop", folder]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        machine = {**measure.machine("cpu"), "threads": options.threads}
        print(json.dumps({"benchmark": "service", **json.loads(result.stdout), **about, **machine}), flush=True)
        for row in run_service(options, Path(folder)):
            print(json.dumps({"benchmark": "service", **row, **about, **machine}), flush=True)


if __name__ == "__main__":
    main()
