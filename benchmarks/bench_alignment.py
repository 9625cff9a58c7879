"""Aligning one clip with a shop: `align_patches` against the definition one image at a time, in one run.

    python benchmarks/bench_alignment.py [--images 600] [--frames 4 10] [--threads 1] [--device cuda]

One JSON line per number of frames and precision of the cosines. Patches of the shop are in float16, as in an index.
The plain side computes all cosines of an image and a clip (on a GPU, of the whole shop) at once, in float32.
"""

import argparse
import json

import torch
from plain import measure

from modeling_rice.alignment_rice import align_patches


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, default=600, help="pictures of the shop")
    add("--frames", type=int, nargs="+", default=[4, 10], help="frames of the clip")
    add("--patches", type=int, default=196, help="patches of a picture or frame")
    add("--rank", type=int, default=64, help="width of a patch")
    add("--repeats", type=int, default=10, help="timed runs; the fastest one counts")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: as torch chooses")
    return parser.parse_args(arguments)


def plain_scores(images: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """The definition: images `(n, P, R)`, a clip `(T, P, R)` -> `(n,)`."""
    cosines = torch.einsum("npr,tqr->ntpq", images.float(), clip)
    image_side = cosines.amax(dim=(1, 3)).mean(dim=1)
    return image_side + cosines.amax(dim=2).mean(dim=2).amax(dim=1)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, shape = options.device, (options.patches, options.rank)
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(options.images, *shape), dim=-1).to(device, torch.float16)
    parts = images.split(options.images if device != "cpu" else 1)
    for frames in options.frames:
        clip = torch.nn.functional.normalize(torch.randn(frames, *shape), dim=-1).to(device)

        def plain(clip=clip):
            return torch.cat([plain_scores(part, clip) for part in parts])

        expected = plain()
        plain_seconds, plain_cpu_seconds = measure.best_seconds(plain, options.repeats, device)
        for dtype in (torch.float32, torch.bfloat16):

            def fast(video=clip[None].to(dtype)):
                return align_patches(images, video)[0]

            seconds, cpu_seconds = measure.best_seconds(fast, options.repeats, device)
            row = {
                "benchmark": "alignment",
                "images": options.images,
                "frames": frames,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": 1000 * seconds,
                "cpu_ms": 1000 * cpu_seconds,
                "plain_ms": 1000 * plain_seconds,
                "plain_cpu_ms": 1000 * plain_cpu_seconds,
                "bytes_per_image": images[0].nbytes,
                "max_difference": (fast() - expected).abs().max().item(),
                **measure.machine(device),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
