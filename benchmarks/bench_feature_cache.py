"""Steps per second of training on a frozen encoder: from pictures and from cached features, in one run.

    python benchmarks/bench_feature_cache.py
    python benchmarks/bench_feature_cache.py --architecture tf_efficientnet_lite2 --losses icl icl_pmd_pfr
    python benchmarks/bench_feature_cache.py --unfreeze_last_stage --batch_size 48 --cached_steps 4

One JSON line per training mode, and one for the pass that fills the cache, on `--clips` clips of random JPEG pictures.
A step includes reading, decoding, encoder, losses, backward pass and optimiser. Weights are random, which does not
change the times. `loss_difference` is the largest difference of the losses at the same step, with the cache in fp32.
Compare CPU time, which other programs on the machine affect little.
"""

import argparse
import io
import json
import logging
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from plain import measure
from transformers import TrainerCallback

from data_rice.features import clip_row, pair_features
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer
from training_rice.arguments import DataArguments, RiceTrainingArguments
from training_rice.feature_cache_encoding import cache_features
from training_rice.setup import build_collators
from training_rice.trainer import RiceTrainer

LOSSES = {
    "icl": {"use_decoder": False},
    "icl_pmd_pfr": {"matching_negatives": "hardest", "decoder_position_embeddings": False, "decoder_dropout": 0.0},
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--architecture", default="tf_efficientnet_lite0", help="of timm")
    add("--losses", nargs="+", choices=LOSSES, default=["icl"])
    add("--clips", type=int, default=192, help="pairs of a clip and an image")
    add("--batch_size", type=int, default=96)
    add("--frames", type=int, default=3, help="frames of a clip")
    add("--side", type=int, default=224, help="side of the pictures in pixels")
    add("--plain_steps", type=int, default=2, help="measured steps from pictures, after one warm-up step")
    add("--cached_steps", type=int, default=100)
    add("--unfreeze_last_stage", action="store_true", help="train the encoder's last stage in both modes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.clips < options.batch_size:
        parser.error(f"--clips must be at least --batch_size {options.batch_size}")
    return options


def make_pairs(options: argparse.Namespace) -> Dataset:
    """Clips of noise, each with its own image."""
    generator = torch.Generator().manual_seed(0)

    def picture() -> dict:
        coarse = torch.rand(3, 8, 8, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse[None], size=(options.side,) * 2, mode="bicubic")[0]
        buffer = io.BytesIO()
        Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
        return {"path": None, "bytes": buffer.getvalue()}

    rows = []
    for i in range(options.clips):
        frames = [picture() for _ in range(options.frames)]
        clip = clip_row(clip_id=str(i), product_id=str(i), frames=frames, boxes=[None] * options.frames)
        rows.append({**clip, "image_id": str(i), "image": picture(), "title": ""})
    return Dataset.from_list(rows, features=pair_features())


class StepTimes(TrainerCallback):
    """Wall-clock and CPU seconds at the end of each step."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def on_step_end(self, args, state, control, **kwargs):
        measure.synchronize(self.device)
        self.times.append((time.perf_counter(), time.process_time()))


def train(options: argparse.Namespace, pairs: Dataset, losses: str, folder: str, cached: bool) -> tuple[dict, list]:
    """Figures of one training mode, and the loss of each step."""
    torch.manual_seed(0)
    vision = {"model_type": "timm_wrapper", "architecture": options.architecture, "num_classes": 0}
    settings = {"vision_config": vision, "projection_dim": 256, "logit_scale_init_value": 15.0, **LOSSES[losses]}
    model = RiceModel(RiceConfig(**settings))
    processor = build_processor(
        train_tokenizer(["a red mug"] * 20, vocab_size=400), options.side, model.config.mask_patch_size, options.frames
    )
    steps = options.cached_steps if cached else options.plain_steps + 1
    data = DataArguments(num_frames=options.frames, frame_sampling="random", cache_dir=folder)
    arguments = {"cache_vision_features": True, "cached_precision": "fp32"} if cached else {}
    training = RiceTrainingArguments(
        output_dir=f"{folder}/run",
        use_cpu=options.device == "cpu",
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=options.batch_size,
        max_steps=steps,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        freeze_vision=True,
        unfreeze_last_stage=options.unfreeze_last_stage,
        **arguments,
    )
    collators = build_collators(data, processor, f"{folder}/failures.jsonl")
    figures = {}
    if cached:
        start, cpu_start = time.perf_counter(), time.process_time()
        pairs, _, *collators = cache_features(model, pairs, None, tuple(collators), data, training)
        figures["encoding_seconds"] = time.perf_counter() - start
        figures["encoding_cpu_seconds"] = time.process_time() - cpu_start
        figures["cache_bytes"] = sum(path.stat().st_size for path in Path(folder).glob("rice_features/*/*.pt"))
    trainer = RiceTrainer(model, training, pairs, collators[0], processing_class=processor)
    times = StepTimes(options.device)
    trainer.add_callback(times)
    trainer.train()
    wall, cpu = zip(*times.times, strict=True)
    figures["step_seconds"] = (wall[-1] - wall[0]) / (steps - 1)
    figures["step_cpu_seconds"] = (cpu[-1] - cpu[0]) / (steps - 1)
    return figures, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.getLogger("training_rice").setLevel(logging.ERROR)
    pairs = make_pairs(options)
    about = {"batch_size": options.batch_size, "frames": options.frames, **measure.machine(options.device)}
    about |= {"architecture": options.architecture, "last_stage_trained": options.unfreeze_last_stage}
    for losses in options.losses:
        with tempfile.TemporaryDirectory() as folder:
            plain, plain_losses = train(options, pairs, losses, folder, cached=False)
            cached, cached_losses = train(options, pairs, losses, folder, cached=True)
        difference = max(abs(a - b) for a, b in zip(plain_losses, cached_losses, strict=False))
        encoding = {name: cached.pop(name) for name in list(cached) if not name.startswith("step")}
        cached |= {
            "times_the_steps_per_second": plain["step_seconds"] / cached["step_seconds"],
            "times_the_steps_per_cpu_second": plain["step_cpu_seconds"] / cached["step_cpu_seconds"],
            "loss_difference": difference,
        }
        for way, figures in (("pictures", plain), ("filling the cache", encoding), ("cached features", cached)):
            rounded = {name: round(value, 6) for name, value in figures.items()}
            print(json.dumps({"losses": losses, "way": way, **rounded, **about}), flush=True)


if __name__ == "__main__":
    main()
