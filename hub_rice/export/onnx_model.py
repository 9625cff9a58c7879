"""An exported RICE model in onnxruntime: it encodes and scores like the original model."""

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from modeling_rice import RiceClips, RiceGallery
from modeling_rice.alignment_rice import align_patches
from modeling_rice.loss_rice import cosines

from .towers import pack, unpack

DESCRIPTION = "onnx.json"
_IMAGES_AT_ONCE = 1024


def read_description(folder: Path) -> dict:
    """
    The content of the onnx.json of an export.

    Raises:
        FileNotFoundError: if there is no such export.
        ValueError: if the description is damaged, or names a file outside the folder.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {DESCRIPTION}: write it with `rice export MODEL_DIR {folder}`.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        files = [part[name] for part in about["parts"].values() for name in ("file", "int8_file") if name in part]
        fits = "model_fingerprint" in about and all(Path(file).name == file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged: export the model again.")
    return about


class Session:
    """
    A graph on the CPU. It is run by as many threads as torch has in the calling thread.

    Args:
        file: The graph.

    Raises:
        ValueError: if onnxruntime is not installed, or the file is damaged.
    """

    def __init__(self, file: str | os.PathLike):
        self.file = file
        self._lock = threading.Lock()
        self._by_threads = {}
        session = self._session()
        self.inputs = [item.name for item in session.get_inputs()]
        self.outputs = [item.name for item in session.get_outputs()]

    def run(self, feed: dict) -> list:
        """Outputs of the graph as arrays, for the arrays of its inputs by name."""
        return self._session().run(None, feed)

    def _session(self):
        threads = torch.get_num_threads()
        with self._lock:
            if threads not in self._by_threads:
                self._by_threads[threads] = self._open(threads)
            return self._by_threads[threads]

    def _open(self, threads: int):
        try:
            import onnxruntime
        except ImportError:
            raise ValueError("exported models need onnxruntime: pip install 'rice-retrieval[onnx]'.") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take the cores from those that read the next batch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return onnxruntime.InferenceSession(str(self.file), options, ["CPUExecutionProvider"])
        except Exception as error:
            # The errors of onnxruntime have no common base class.
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.file} cannot be read ({reason}); export again.") from error


class OnnxRice:
    """
    A model from the files of `rice export`, with the methods `encode_gallery`, `encode_clips`, `similarity`, `match`
    and `align` of [`RiceModel`]. Encodings of the exported and of the original model can be compared with each other,
    but not with those of the int8 model.

    Args:
        folder: Output folder of `rice export`, with `onnx.json`.
        int8: Use the quantised files.

    Raises:
        FileNotFoundError: if there is no such export.
        ValueError: if onnxruntime is not installed, or a file is damaged.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | os.PathLike, int8: bool = False):
        folder = Path(folder)
        self.about = read_description(folder)
        self.sessions = {}
        for name, part in self.about["parts"].items():
            # The encoder is for `with_towers`, which runs everything else in torch.
            if name == "encoder":
                continue
            file = folder / part["int8_file" if int8 else "file"] if not int8 or "int8_file" in part else None
            if file is None or not file.is_file():
                wanted = "int8 files" if int8 else f"{part['file']}"
                raise FileNotFoundError(
                    f"{folder} has no {wanted}: export again{' with --int8' if int8 else ''} to have them."
                )
            self.sessions[name] = Session(file)
        # Exports of older versions have no such entry.
        settings = self.about.get("config", {})
        self.config = SimpleNamespace(use_decoder="pairs" in self.sessions, **settings)
        self.int8 = int8

    def fingerprint(self) -> str | None:
        """The `RiceModel.fingerprint` of the exported model, with the suffix "-int8" for quantised weights."""
        name = self.about["model_fingerprint"]
        return f"{name}-int8" if self.int8 and name is not None else name

    def run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        """Runs one part (`image`, `video`, `pairs`) with its inputs in order."""
        session = self.sessions[name]
        feed = {key: value.contiguous().numpy() for key, value in zip(session.inputs, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(feed)]

    def _fields(self, name: str, *inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.sessions[name].outputs, self.run(name, *inputs), strict=True))

    def encode_gallery(self, pixel_values: Tensor, batch_size: int = 64, **kwargs) -> RiceGallery:
        """As `RiceModel.encode_gallery`, but titles are ignored."""
        parts = []
        for pixels in pixel_values.float().split(batch_size):
            fields = self._fields("image", pixels)
            if "patches" in fields:
                fields["patches"] = fields["patches"].half()
            parts.append(RiceGallery(model_fingerprint=self.fingerprint(), **fields))
        return RiceGallery.cat(parts)

    def encode_clips(
        self,
        pixel_values_videos: Tensor,
        frame_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        batch_size: int = 16,
        **kwargs,
    ) -> RiceClips:
        """As `RiceModel.encode_clips`, but ASR is ignored, and boxes (`patch_mask`) raise a `ValueError`."""
        if patch_mask is not None:
            raise ValueError(
                "An exported model takes no boxes (`patch_mask`); leave them out, or use the torch model."
            )
        if frame_mask is None:
            frame_mask = torch.ones(pixel_values_videos.shape[:2], dtype=torch.bool)
        parts = []
        for videos, mask in zip(pixel_values_videos.float().split(batch_size), frame_mask.split(batch_size)):
            fields = self._fields("video", *pack(videos, mask))
            if "keys" in fields:
                fields["mask"] = mask[:, :, None].expand(-1, -1, fields["keys"].shape[1]).flatten(1)
                fields |= {name: unpack(fields[name], mask) for name in ("keys", "values")}
            if "patches" in fields:
                fields["patches"] = unpack(fields["patches"], mask).unflatten(1, (mask.shape[1], -1)).half()
                fields["patch_mask"] = mask[:, :, None].expand(fields["patches"].shape[:3])
            parts.append(RiceClips(model_fingerprint=self.fingerprint(), **fields))
        return RiceClips.cat(parts)

    def similarity(self, clips: RiceClips, gallery: RiceGallery) -> Tensor:
        """Cosine of every clip with every image, `(num_clips, num_images)`."""
        return cosines(clips.embeds, gallery.embeds)

    def match(self, clips: RiceClips, gallery: RiceGallery) -> Tensor:
        """Decoder score of every clip with every image, `(num_clips, num_images)`."""
        if "pairs" not in self.sessions:
            raise ValueError("This model has no matching decoder; rank by `similarity` instead.")
        rows = []
        for i in range(len(clips)):
            clip = clips[i]
            parts = [
                self.run("pairs", states, clip.keys, clip.values, clip.mask)[0]
                for states in gallery.states.split(_IMAGES_AT_ONCE)
            ]
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    def align(self, clips: RiceClips, gallery: RiceGallery) -> Tensor:
        """Alignment of every clip with every image, `(num_clips, num_images)`."""
        if gallery.patches is None or clips.patches is None:
            raise ValueError("This model has no alignment; rank by `similarity` instead.")
        return align_patches(gallery.patches, clips.patches.float(), clips.patch_mask)
