"""Training on several processes: clips per second, waiting for data, memory; and a simulation of many nodes.

    python benchmarks/bench_scaling.py [--processes 1 2] [--size vit_b_32 --batch_size 32 --frames 10]
    python benchmarks/bench_scaling.py --simulate --compute_seconds 0.31 --nodes 1 2 4 8 16

One JSON line per number of processes: each runs `RiceTrainer` on clips of JPEG frames in memory, which loader workers
decode. The first half of the steps is warm-up. Each process takes one GPU if there are enough. On CPU they share the
cores, so two processes are not faster than one unless there are spare cores.

`--simulate` runs nothing. It prints the step time predicted from a measured one (`--compute_seconds`, one process,
same batch) and given speeds, with the formulas of docs/scale.md.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from plain import measure

from training_rice.gather import exchanged_bytes


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2])
    add("--batch_size", type=int, default=8, help="pairs per process, at least 4")
    add("--frames", type=int, default=10, help="frames per clip")
    add("--side", type=int, default=540, help="longer side of the JPEG frames, in pixels")
    add("--steps", type=int, default=10, help="measured steps, after as many warm-up steps")
    add("--workers", type=int, default=2, help="loader workers per process")
    add("--size", choices=measure.SIZES, default="vit_b_32")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--cpu", action="store_true", help="do not use GPUs")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    add("--simulate", action="store_true", help="print predicted step times and stop")
    add("--compute_seconds", type=float, help="measured step of one process with this batch")
    add("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--gpus_per_node", type=int, default=8)
    add("--network_gbits", type=float, default=100.0, help="speed of one node's network card, per direction")
    add("--local_gbytes", type=float, default=300.0, help="speed between the GPUs of a node, per direction and GPU")
    add("--latency_us", type=float, default=20.0, help="latency of one hop of a ring")
    add("--overlap", type=float, default=0.5, help="share of the gradient exchange hidden behind the backward pass")
    add("--teraflops", type=float, default=100.0, help="speed of one GPU on the decoder's pairs")
    options = parser.parse_args(arguments)
    if options.batch_size < 4:
        parser.error("--batch_size must be at least 4, for three hard negatives")
    if options.simulate and not options.compute_seconds:
        parser.error("--simulate needs --compute_seconds, the step of one process")
    if not 0 <= options.overlap <= 1:
        parser.error("--overlap must lie in 0..1")
    return options


def make_rows(options: argparse.Namespace, count: int):
    """Pairs of noise, with at least as many bytes to decode as photographs of that size."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    from data_rice.features import clip_row, pair_features

    generator = np.random.default_rng(0)

    def picture() -> dict:
        coarse = generator.integers(0, 256, (options.side // 16 + 1, options.side // 28 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((options.side * 9 // 16, options.side), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=90)
        return {"path": None, "bytes": buffer.getvalue()}

    pictures = [picture() for _ in range(16)]
    rows = []
    for i in range(count):
        frames = [pictures[(i + j) % 16] for j in range(options.frames)]
        row = clip_row(
            clip_id=f"clip{i}", live_id="live", product_id=f"product{i}", frames=frames, boxes=[None] * len(frames)
        )
        rows.append(row | {"image_id": f"image{i}", "image": pictures[i % 16], "title": "a product"})
    return Dataset.from_list(rows, features=pair_features())


def train(options: argparse.Namespace, folder: str) -> dict[str, object]:
    """One process of a run; all processes return the figures of the whole run."""
    import torch.distributed as dist

    from data_rice.collator import RiceCollator
    from processing_rice import build_processor, train_tokenizer
    from training_rice.arguments import RiceTrainingArguments
    from training_rice.trainer import RiceTrainer

    arguments = RiceTrainingArguments(
        output_dir=folder,
        use_cpu=options.cpu or not torch.cuda.is_available(),
        bf16=options.bf16,
        per_device_train_batch_size=options.batch_size,
        max_steps=2 * options.steps,
        logging_steps=options.steps,
        dataloader_num_workers=options.workers,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = measure.build_model(options.size)
    vision = model.config.vision_config
    processor = build_processor(
        train_tokenizer(["a product"], vocab_size=400), vision.image_size, vision.patch_size, options.frames
    )
    rows = make_rows(options, count=options.batch_size * arguments.world_size * 4)
    collator = RiceCollator(processor, num_frames=options.frames)
    trainer = RiceTrainer(model, arguments, rows, collator, processing_class=processor)
    trainer.train()
    figures = [entry for entry in trainer.state.log_history if "clips_per_second" in entry][-1]
    memory: list[dict] = [{} for _ in range(arguments.world_size)]
    own = {name: figures[name] for name in ("memory_gb", "gpu_memory_gb") if name in figures}
    if arguments.world_size > 1:
        dist.all_gather_object(memory, own)
    else:
        memory = [own]
    return {
        "processes": arguments.world_size,
        "clips_per_second": figures["clips_per_second"],
        "data_wait_share": round(figures["data_wait_share"], 4),
        "memory_per_process": memory,
        "exchanged_mb_per_step": exchanged_bytes(model.config, options.batch_size, arguments.world_size) / 1e6,
    } | measure.machine("cpu" if arguments.use_cpu else "cuda")


def run(options: argparse.Namespace, arguments: list[str], processes: int) -> dict[str, object]:
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = str(server.getsockname()[1])
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    if options.cpu or torch.cuda.device_count() < processes:
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, __file__, *arguments, "--measure"], capture_output=True, text=True, env=environment
    )
    if result.returncode:
        sys.exit(f"The run of {processes} process(es) failed:\n{result.stderr}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"processes"')))


def simulate(
    config,
    batch_size: int,
    compute_seconds: float,
    nodes: int,
    *,
    frames: int = 10,
    gpus_per_node: int = 8,
    network_gbits: float = 100.0,
    local_gbytes: float = 300.0,
    latency_us: float = 20.0,
    overlap: float = 0.5,
    teraflops: float = 100.0,
    parameters: int,
) -> dict[str, float]:
    """
    Seconds of a step on many nodes, ring by ring; the formulas are those of docs/scale.md.

    Args:
        config: `RiceConfig` of the model.
        batch_size: Pairs per process.
        compute_seconds: Measured step of one process with that batch.
        nodes, gpus_per_node: Processes, one per GPU.
        frames: Frames per clip.
        network_gbits: Speed of one node's network, in 10^9 bits per second and direction.
        local_gbytes: Speed from one GPU to the next in a node, in 10^9 bytes per second.
        latency_us: Latency of one hop.
        overlap: Share of the gradient exchange hidden behind the backward pass, limited to half of the step.
        teraflops: Speed of one GPU on the decoder's pairs, whose number grows with the processes.
        parameters: Number of trained parameters, 4 bytes each.

    Returns:
        `seconds` and its parts, `clips_per_second`, and `efficiency` relative to as many processes without a network.
    """
    world = nodes * gpus_per_node
    speed = network_gbits / 8 * 1e9 if nodes > 1 else local_gbytes * 1e9
    hops = (world - 1) * latency_us * 1e-6
    gradients = 2 * (world - 1) / world * 4 * parameters / speed + 2 * hops if world > 1 else 0.0
    exchange = exchanged_bytes(config, batch_size, world) / speed + 8 * hops if world > 1 else 0.0
    pairs = 0.0
    if config.use_decoder:
        width, keys = config.decoder_hidden_size, frames * (1 + (config.num_patches or 0))
        more = batch_size * batch_size * (world - 1)
        pairs = 3 * more * (4 * keys * width + 18 * width**2) / (teraflops * 1e12)
    visible = gradients - min(overlap * gradients, compute_seconds / 2)
    seconds = compute_seconds + pairs + visible + exchange
    return {
        "nodes": nodes,
        "processes": world,
        "seconds": seconds,
        "compute_seconds": compute_seconds,
        "pairs_seconds": pairs,
        "gradient_seconds": visible,
        "exchange_seconds": exchange,
        "clips_per_second": world * batch_size / seconds,
        "efficiency": compute_seconds / seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            figures = train(options, folder)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(figures))
        return
    settings = {name: getattr(options, name) for name in ("size", "batch_size", "frames")}
    if options.simulate:
        model = measure.build_model(options.size)
        speeds = ("gpus_per_node", "network_gbits", "local_gbytes", "latency_us", "overlap", "teraflops")
        given = {name: getattr(options, name) for name in speeds}
        parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
        for nodes in options.nodes:
            row = simulate(
                model.config,
                options.batch_size,
                options.compute_seconds,
                nodes,
                frames=options.frames,
                parameters=parameters,
                **given,
            )
            row = {name: round(value, 6) for name, value in row.items()}
            print(json.dumps({"benchmark": "scaling_simulation"} | settings | row | given), flush=True)
        return
    alone = None
    for processes in options.processes:
        row = run(options, arguments, processes)
        alone = row["clips_per_second"] if processes == 1 else alone
        if alone:
            row["efficiency"] = round(row["clips_per_second"] / (processes * alone), 3)
        print(json.dumps({"benchmark": "scaling"} | settings | row), flush=True)


if __name__ == "__main__":
    main()
