"""A training step, forward and backward: `RiceModel.forward` and the published procedure, in one run.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --device cuda --batch_size 128 --compile --peak_tflops 989

One JSON line per side and precision, each measured in its own process, so that the peak memory is separate. The plain
side encodes padded frames, decodes two images at a time and recomputes keys and values for every pair; the encoder
module is the same. Both sides use the same weights and the same clips. Every second clip is shorter, so that the share
`--padding` of all frames is padding (about 22 % with the published random frame drop). The optimiser's update, which
is equal on both sides, is not part of the step.

Both sides use the fastest attention: torch's scaled dot product attention, except for bf16 on a CPU, where its
backward pass takes five times as long as plain matrix products; there it is transformers' "eager" attention. Users
choose it with `attn_implementation` in `from_pretrained`, or with `model.set_attn_implementation("eager")`.
"""

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext

import torch
from plain import measure, procedure
from torch import Tensor

SIDES = ("plain", "rice")
SETTINGS = ("batch_size", "frames", "negatives", "size", "compile")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch_size", type=int, default=8, help="pairs, at least 4")
    add("--frames", type=int, default=10, help="frames per clip")
    add("--padding", type=float, default=0.22, help="share of frames that are padding, below 0.5")
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="bf16 is autocast")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--negatives", choices=("hardest", "all"), default="hardest", help="pairs that RiceModel scores in training")
    add("--repeats", type=int, default=3, help="timed steps; the fastest one counts")
    add("--size", choices=measure.SIZES, default="vit_b_32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--attention", choices=("sdpa", "eager"), help="default: the faster one, eager for bf16 on a CPU")
    add("--compile", action="store_true", help="compile the encoder, on both sides")
    add("--peak_tflops", type=float, help="peak speed of the device at the measured precision, for the achieved share")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.batch_size < 4 or not 0 <= options.padding < 0.5:
        parser.error("--batch_size must be at least 4, for three hard negatives, and --padding in 0..0.5")
    return options


def make_batch(options: argparse.Namespace, side: int) -> dict[str, Tensor]:
    """Random pictures, with zeros in padded frames."""
    batch, frames = options.batch_size, options.frames
    lengths = [frames] * batch
    for drop in range(round(options.padding * batch * frames)):
        lengths[2 * (drop % (batch // 2)) + 1] -= 1
    generator = torch.Generator().manual_seed(1)
    frame_mask = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    videos = torch.randn(batch, frames, 3, side, side, generator=generator)
    return {
        "pixel_values": torch.randn(batch, 3, side, side, generator=generator),
        "pixel_values_videos": videos * frame_mask[:, :, None, None, None],
        "frame_mask": frame_mask,
    }


def count_operations(config, frame_mask: Tensor, negatives: str) -> dict[str, float]:
    """Floating-point operations of a step on each side; a backward pass counts as two forward passes."""
    vision = config.vision_config
    tokens, width, hidden = config.num_patches + 1, vision.hidden_size, vision.intermediate_size
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden + 2 * tokens * width)
    embedding = 2 * config.num_patches * 3 * vision.patch_size**2 * width
    picture = vision.num_hidden_layers * block + embedding + 2 * tokens * width * config.projection_dim

    batch, frames = frame_mask.shape
    d, keys = config.decoder_hidden_size, frames * tokens
    self_block = config.decoder_num_self_layers * 2 * tokens * (12 * d**2 + 2 * tokens * d)
    key_value = 2 * keys * 2 * d**2

    def cross(rows: int) -> int:
        return 2 * rows * (d**2 + 2 * keys * d + 8 * d**2) + 2 * d**2

    pairs = batch * (1 + config.num_hard_negatives)
    finished = batch**2 if negatives == "all" else pairs
    attention_rows = 2 * tokens * (d**2 + keys * d) * batch
    reconstruction = 2 * config.num_patches * frames * config.num_patches * d * batch
    plain = batch * (1 + frames) * picture + pairs * (self_block + key_value + cross(tokens)) + reconstruction
    contexts = batch**2 * 2 * 2 * keys * d + finished * 2 * 9 * d**2
    rice = (batch + int(frame_mask.sum())) * picture + batch * (self_block + key_value) + contexts
    return {"plain": 3.0 * plain, "rice": 3.0 * (rice + attention_rows + reconstruction)}


def measure_side(options: argparse.Namespace) -> dict[str, object]:
    """Seconds, peak memory and loss of one side at one precision, in this process."""
    side, precision, device = options.sides[0], options.precisions[0], options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    model = measure.build_model(options.size).to(device).train()
    model.config.matching_negatives = options.negatives
    attention = options.attention or ("eager" if (precision, device) == ("bf16", "cpu") else "sdpa")
    model.set_attn_implementation(attention)
    batch = make_batch(options, model.config.vision_config.image_size)
    operations = count_operations(model.config, batch["frame_mask"], options.negatives)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if options.compile:
        model.compile_encoder()
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16) if precision == "bf16" else nullcontext()
    loss = torch.zeros(())

    def step():
        nonlocal loss
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = procedure.training_loss(model, **batch) if side == "plain" else model(**batch).loss
        loss.backward()

    # The first step selects and compiles kernels.
    step()
    model.zero_grad(set_to_none=True)
    with measure.PeakMemory(device) as peak:
        step()
    seconds, cpu_seconds = measure.best_seconds(step, options.repeats, device)
    tflops = operations[side] / seconds / 1e12
    return {
        "side": side,
        "precision": precision,
        "attention": attention,
        "seconds": round(seconds, 5),
        "cpu_seconds": round(cpu_seconds, 5),
        "clips_per_second": round(options.batch_size / seconds, 3),
        "teraflop": round(operations[side] / 1e12, 3),
        "tflops": round(tflops, 3),
        "peak_share": round(tflops / options.peak_tflops, 4) if options.peak_tflops else None,
        "peak_memory_mb": round(peak.bytes / 2**20, 1),
        "loss": loss.item(),
        "arithmetic_ceiling": round(operations["plain"] / operations["rice"], 3),
        "padded_share": round(1 - batch["frame_mask"].float().mean().item(), 4),
    } | measure.machine(device)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.measure:
        print(json.dumps(measure_side(options)))
        return
    rows: dict[tuple[str, str], dict] = {}
    for precision in options.precisions:
        for side in options.sides:
            command = [sys.executable, __file__, *arguments, "--precisions", precision, "--sides", side, "--measure"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"The {side} side in {precision} failed:\n{result.stderr}")
            row = rows[side, precision] = json.loads(result.stdout.splitlines()[-1])
            for name, other in (("speedup", ("plain", precision)), ("speedup_over_plain_fp32", ("plain", "fp32"))):
                if side == "rice" and other in rows:
                    row[name] = round(rows[other]["seconds"] / row["seconds"], 3)
                    row[f"cpu_{name}"] = round(rows[other]["cpu_seconds"] / row["cpu_seconds"], 3)
            if side == "rice" and ("plain", precision) in rows:
                row["loss_difference"] = abs(row["loss"] - rows["plain", precision]["loss"])
            settings = {
                name: getattr(options, name) for name in ("batch_size", "frames", "negatives", "size", "compile")
            }
            print(json.dumps({"benchmark": "train_step"} | settings | row), flush=True)


if __name__ == "__main__":
    main()
