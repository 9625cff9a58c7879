"""Run mteb's MovingFashion tasks, video to shop image and back, for scores that compare with other models of mteb.

The tasks download their data from the Hub. Clips and images are compared by embedding. mteb's hit_rate_at_1 is the R@1
of eval_rice.py. Frames are sampled as in eval_rice.py. Needs mteb, torchcodec and FFmpeg.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

TASKS = ("MovingFashionV2IRetrieval", "MovingFashionI2VRetrieval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="checkpoint folder, or the id of a published model")
    add("--tasks", nargs="+", default=list(TASKS), help="names of mteb tasks (default: %(default)s)")
    add("--output_dir", type=Path, required=True, help="folder for mteb.json and the rankings")
    add("--device", help="such as cpu or cuda; default: cuda if there is one")
    add("--num_frames", type=int, help="frames per clip; default: that of the checkpoint's processor")
    add("--batch_size", type=int, default=16, help="clips or images per batch (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: if mteb is not installed or has no such task, or the checkpoint cannot be loaded.
        ConnectionError, FileNotFoundError: if model or data are missing, see `hub_rice.repository.hub_errors`.
    """
    try:
        import mteb
    except ImportError as error:
        raise ValueError(f"mteb is not installed ({error}): pip install mteb torchcodec") from error
    from .repository import hub_errors

    try:
        tasks = mteb.get_tasks(tasks=options.tasks, exclude_beta=False)
    except KeyError as error:
        raise ValueError(f"--tasks names a task that mteb does not have ({error.args[0]}): name another.") from error
    encoder = RiceEncoder(options.model, device=options.device, num_frames=options.num_frames)
    check_torchcodec()
    with hub_errors("the tasks' data"):
        scores = evaluate(encoder, tasks, options.output_dir, options.batch_size)
    for name, values in scores.items():
        print(
            name, *(f"{key} {values[key]:.4f}" for key in ("hit_rate_at_1", "hit_rate_at_10", "ndcg_at_10")), sep="  "
        )
    print(f"written to {options.output_dir / 'mteb.json'}")


def check_torchcodec() -> None:
    """Raises `ValueError` if torchcodec does not work, since mteb decodes a video of each task when loading it."""
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"mteb needs torchcodec and FFmpeg's libraries, which cannot be loaded ({reason}): install both."
        ) from error


def evaluate(encoder, tasks, output_dir: Path, batch_size: int = 16) -> dict[str, dict[str, float]]:
    """Scores of mteb tasks by task name. Writes them to `output_dir/mteb.json`, and the rankings beside it."""
    import mteb

    from data_rice.files import write_atomically

    output_dir.mkdir(parents=True, exist_ok=True)
    results = mteb.evaluate(
        encoder, tasks, cache=None, encode_kwargs={"batch_size": batch_size}, prediction_folder=output_dir / "rankings"
    )
    scores = {}
    for result in results.task_results:
        numbers = result.scores["test"][0]
        # Some scores are not defined for few queries.
        scores[result.task_name] = {
            name: value for name, value in numbers.items() if isinstance(value, float) and math.isfinite(value)
        }
    about = {"model": encoder.name, "mteb": mteb.__version__, "num_frames": encoder.num_frames, "scores": scores}
    write_atomically(output_dir / "mteb.json", json.dumps(about, indent=2, allow_nan=False) + "\n")
    return scores


class RiceEncoder:
    """
    A checkpoint as mteb's `EncoderProtocol`, for tasks of images and videos.

    Args:
        model_name: Checkpoint folder, or the id of a published model.
        revision: Revision of the published model.
        device: Such as "cpu" or "cuda"; by default cuda if there is one.
        num_frames: Frames per clip; by default that of the checkpoint's processor.
    """

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, num_frames=None):
        from .loading import load_model

        self.name, self.revision = str(model_name), revision
        self.model, self.processor = load_model(model_name, device, revision=revision)
        self.num_frames = num_frames or self.processor.video_processor.num_frames

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """Embeddings `(n, D)` of the rows of a loader, which have `video` or `image`."""
        import torch
        from datasets import Video
        from torch.utils.data import DataLoader
        from tqdm.auto import tqdm

        rows = inputs.dataset
        if "video" in rows.features:
            # Kept as encoded bytes, so that the processor decodes only the sampled frames.
            rows = rows.cast_column("video", Video(decode=False))
        loader = DataLoader(rows, inputs.batch_size, collate_fn=inputs.collate_fn, num_workers=inputs.num_workers)
        parts = []
        with torch.no_grad():
            for batch in tqdm(loader, desc="encode", disable=not kwargs.get("show_progress_bar", True)):
                if "video" in batch:
                    clips = self._process_videos(batch["video"]).to(self.model.device)
                    parts.append(self.model.get_video_features(**clips).pooler_output)
                else:
                    images = self.processor(images=[image.convert("RGB") for image in batch["image"]])
                    parts.append(self.model.get_image_features(**images.to(self.model.device)).pooler_output)
        return torch.cat(parts).float().cpu().numpy()

    def _process_videos(self, videos: list[dict]):
        """Model inputs of encoded videos `{"path", "bytes"}`."""
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for i, video in enumerate(videos):
                paths.append(video["path"])
                if video["bytes"] is not None:
                    paths[-1] = os.path.join(folder, f"{i}{Path(video['path'] or '').suffix}")
                    Path(paths[-1]).write_bytes(video["bytes"])
            return self.processor(videos=paths, num_frames=self.num_frames)

    def similarity(self, embeddings1, embeddings2):
        """Cosines `(n, m)` of normalised embeddings."""
        import torch

        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1, embeddings2):
        """Cosines `(n,)` of the rows of two equally long sets of embeddings, row by row."""
        import torch

        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self):
        """Name and modalities; mteb uses them to choose what to run and where to write results."""
        from mteb.models import ModelMeta

        name = (
            self.name
            if self.name.count("/") == 1 and not Path(self.name).exists()
            else f"local/{Path(self.name).name}"
        )
        return ModelMeta.create_empty(
            {"name": name, "revision": self.revision or "main", "modalities": ["image", "video"]}
        )
