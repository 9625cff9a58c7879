"""Scoring one clip against a shop: `RiceModel.match` against the published procedure, in one run.

    python benchmarks/bench_decoder.py [--images 64 1000 10000] [--device cuda]

One JSON line per shop size. Both sides start from encoded pictures and give the same scores. The plain side processes
the pairs of two images at a time, recomputes the clip's keys and values for each pair and runs all 50 query rows. It
is measured on `--plain_pairs` pairs, because its cost per pair does not depend on their number. Larger shops repeat
the encoded images, which does not change the cost.
"""

import argparse
import json

import torch
from plain import measure, procedure

from modeling_rice import RiceGallery


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[64, 1000, 10_000], help="shop sizes")
    add("--plain_pairs", type=int, default=64, help="pairs for the plain side, and distinct images")
    add("--frames", type=int, default=10, help="frames of the clip")
    add("--repeats", type=int, default=5, help="timed runs; the fastest one counts")
    add("--max_memory_mb", type=int, default=512, help="memory setting of `match`")
    add("--size", choices=measure.SIZES, default="vit_b_32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    # TensorFloat-32 would round the matrix products of the two sides differently.
    torch.set_float32_matmul_precision("highest")
    model = measure.build_model(options.size).to(device).eval()
    side = model.config.vision_config.image_size
    images = torch.randn(options.plain_pairs, 3, side, side)
    video = torch.randn(1, options.frames, 3, side, side)
    with torch.no_grad():
        image_tokens = torch.cat([procedure.encode_tokens(model, part.to(device)) for part in images.split(32)])
        clip_tokens = procedure.encode_tokens(model, video[0].to(device)).flatten(0, 1)[None]
    mask = torch.ones(clip_tokens.shape[:2], dtype=torch.bool, device=device)
    encoded = model.encode_gallery(images, batch_size=32).to(device)
    clips = model.encode_clips(video).to(device)

    def plain():
        return procedure.match(model, image_tokens, clip_tokens, mask)

    plain_scores = plain()
    plain_seconds, plain_cpu_seconds = measure.best_seconds(plain, options.repeats, device)
    plain_ms = 1000 * plain_seconds / options.plain_pairs
    for count in options.images:
        copies = -(-count // options.plain_pairs)
        gallery = RiceGallery.cat([encoded] * copies)[:count]

        def fast(gallery=gallery):
            return model.match(clips, gallery, max_memory=options.max_memory_mb * 2**20)

        seconds, cpu_seconds = measure.best_seconds(fast, options.repeats, device)
        with measure.PeakMemory(device) as peak:
            scores = fast()
        expected = plain_scores.repeat(1, copies)[:, :count]
        row = {
            "benchmark": "decoder",
            "images": count,
            "frames": options.frames,
            "pairs": count,
            "seconds": round(seconds, 6),
            "ms_per_pair": round(1000 * seconds / count, 6),
            "plain_pairs": options.plain_pairs,
            "plain_seconds": round(plain_seconds, 6),
            "plain_ms_per_pair": round(plain_ms, 6),
            "speedup": round(plain_ms / (1000 * seconds / count), 1),
            "cpu_speedup": round(plain_cpu_seconds / options.plain_pairs / (cpu_seconds / count), 1),
            "max_score_difference": (scores - expected).abs().max().item(),
            "score_range": [round(scores.min().item(), 4), round(scores.max().item(), 4)],
            "gallery_mb": round((gallery.embeds.nbytes + gallery.states.nbytes) / 2**20, 1),
            "peak_memory_mb": round(peak.bytes / 2**20, 1),
            "max_memory_mb": options.max_memory_mb,
            "size": options.size,
            "dtype": "float32",
        }
        print(json.dumps(row | measure.machine(device)), flush=True)


if __name__ == "__main__":
    main()
