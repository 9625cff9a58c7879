"""Export a model to ONNX: encoder, image tower, video tower and pair scorer, checked against torch.

Batch size and number of frames are dynamic. The inputs of the video tower are the frames of all clips without padding,
and the frame indices of each clip; its outputs are an embedding per clip, and keys and values per frame. `rice index`,
`recognise`, `demo` and `serve` use the encoder if its folder is given by --towers. onnx.json describes the files,
their inputs and the preprocessing. --int8 adds files with dynamically quantised matrix products. --evaluate measures
the effect of export and quantisation on recall. Exported models do not support boxes and text.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

MAX_DIFFERENCE = 1e-4
DYNAMIC = ("images", "clips", "frames", "length", "tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model_dir", type=Path, help="folder of a trained model and its processor")
    add(
        "output_dir",
        type=Path,
        help="folder for the .onnx files and onnx.json; `rice publish` reads MODEL_DIR/onnx",
    )
    add("--int8", action="store_true", help="also write int8 files")
    add("--evaluate", metavar="DATASET", help="measure R@k of torch, ONNX and int8 on mini_lpr4m, shop_clips, ...")
    add("--data_dir", help="folder of the data set's files")
    add("--split", default="test", choices=("validation", "test"), help="split to measure (default: %(default)s)")
    add("--num_workers", type=int, default=0, help="processes that decode images (default: %(default)s)")


def run(options: argparse.Namespace) -> tuple:
    """
    Exports a model. Returns the model and its processor.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: for a damaged checkpoint, a missing package, or a graph that differs from the model.
    """
    model, processor = load(options.model_dir)
    about = export(model, processor, options.output_dir, int8=options.int8)
    if model.config.text_config is not None or model.config.text_embed_dim is not None:
        print("This model reads titles and ASR, but the exported files do not.")
    for name, part in about["parts"].items():
        size = (options.output_dir / part["file"]).stat().st_size
        line = f"{part['file']}: {size / 1e6:.1f} MB, at most {part['max_difference']:.1e} from torch"
        if "int8_file" in part:
            size = (options.output_dir / part["int8_file"]).stat().st_size
            line += f"; {part['int8_file']}: {size / 1e6:.1f} MB, {part['int8_max_difference']:.1e}"
        print(line)
    return model, processor


def load(folder: Path):
    """Model in eval mode, and its processor. Raises the errors of `hub_rice.loading.load_model`."""
    from ..loading import load_model

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name one that train_rice.py wrote.")
    model, processor = load_model(folder, "cpu")
    return model.float(), processor


def export(model, processor, output_dir: Path, int8: bool = False, quiet: bool = False) -> dict:
    """
    Writes `encoder.onnx`, `image.onnx`, `video.onnx`, with a decoder `pairs.onnx`, and `onnx.json`.

    Args:
        model: A [`RiceModel`] in eval mode, float32, on the CPU.
        processor: The model's [`RiceProcessor`]; `onnx.json` repeats its settings.
        output_dir: Output folder, created if it does not exist.
        int8: Also write `*_int8.onnx`, quantised dynamically.
        quiet: Whether to hide the progress bar.

    Returns:
        The content of `onnx.json`.

    Raises:
        ValueError: if a package of the extra `onnx` is missing, torch cannot export the model, or the outputs of a
            graph differ from torch by more than 1e-4.
    """
    from PIL import Image
    from tqdm.auto import tqdm

    from data_rice.files import write_atomically

    from .onnx_model import DESCRIPTION
    from .towers import towers

    _check_packages()
    output_dir.mkdir(parents=True, exist_ok=True)
    # Written last, so that a folder that has it is complete.
    (output_dir / DESCRIPTION).unlink(missing_ok=True)
    size = tuple(processor(images=Image.new("RGB", (32, 32)))["pixel_values"].shape[-2:])
    parts = {}
    for name, tower in tqdm(towers(model).items(), desc="export", unit="part", disable=quiet):
        parts[name] = export_part(tower, name, model, size, output_dir, int8)
    about = {
        "model_fingerprint": model.fingerprint(),
        "encoder": model.config.vision_config.model_type,
        # The settings that define the default ranking.
        "config": {name: getattr(model.config, name) for name in ("ranking", "fusion_weight", "alignment_weight")},
        "parts": parts,
        "preprocessing": preprocessing(processor),
    }
    write_atomically(output_dir / DESCRIPTION, json.dumps(about, indent=2, allow_nan=False) + "\n")
    return about


def export_part(tower, name: str, model, size: tuple[int, int], output_dir: Path, int8: bool) -> dict:
    """Writes one part for images of height and width `size`; returns its entry in `onnx.json`."""
    import torch

    example, other = (tuple(example_inputs(model, name, size, *counts)) for counts in ((2, 3, 2), (3, 5, 1)))
    with torch.no_grad():
        results = tower(*example)
    part = {"file": f"{name}.onnx", "inputs": _describe(tower.inputs, example)}
    part["outputs"] = _describe(tower.outputs, results)
    file = output_dir / part["file"]
    _write_graph(tower, example, part, file)
    part["max_difference"] = difference(tower, file, other)
    if not part["max_difference"] <= MAX_DIFFERENCE:
        raise ValueError(
            f"{file} differs from torch by {part['max_difference']:.1e}, more than {MAX_DIFFERENCE:.0e}: do not use "
            f"it, and report the encoder, {model.config.vision_config.model_type}."
        )
    if int8:
        part["int8_file"] = f"{name}_int8.onnx"
        quantize(file, output_dir / part["int8_file"])
        part["int8_max_difference"] = difference(tower, output_dir / part["int8_file"], other)
    return part


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"exporting needs the package {missing[0]}: pip install 'rice-retrieval[onnx]'.")


def _describe(shapes: dict, tensors: tuple) -> list[dict]:
    """Names, types and shapes for `onnx.json`; fixed axes are numbers."""
    described = []
    for (name, shape), tensor in zip(shapes.items(), tensors):
        sizes = [axis if axis in DYNAMIC else size for axis, size in zip(shape, tensor.shape, strict=True)]
        described.append({"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": sizes})
    return described


def example_inputs(model, part: str, size: tuple[int, int], clips: int, frames: int, images: int) -> Iterator:
    """
    Random inputs of a part (`encoder`, `image`, `video`, `pairs`), for `images` images or `clips` clips of `frames`
    frames of height and width `size`.
    """
    import torch

    generator = torch.Generator().manual_seed(clips)

    def draw(*shape: int):
        return torch.randn(*shape, generator=generator)

    if part in ("encoder", "image"):
        yield draw(images, 3, *size)
    elif part == "video":
        yield draw(clips * frames, 3, *size)
        yield torch.arange(clips * frames).reshape(clips, frames)
        yield shorter_last(clips, frames)
    else:
        tokens, width = 4 * frames, model.config.decoder_hidden_size
        yield from (draw(images, width), draw(clips, tokens, width), draw(clips, tokens, width))
        yield shorter_last(clips, tokens)


def shorter_last(clips: int, length: int):
    """A mask `(clips, length)` whose last row is half padding."""
    import torch

    mask = torch.ones(clips, length, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    return mask


def _write_graph(tower, example: tuple, part: dict, file: Path) -> None:
    import logging
    import warnings

    import torch

    symbols = {}

    def dynamic(shape: list) -> dict:
        names = {i: name for i, name in enumerate(shape) if name in DYNAMIC}
        return {i: symbols.setdefault(name, torch.export.Dim(name)) for i, name in names.items()}

    shapes = tuple(dynamic(item["shape"]) for item in part["inputs"])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower,
                example,
                str(file),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[item["name"] for item in part["inputs"]],
                output_names=[item["name"] for item in part["outputs"]],
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{file.name} cannot be written, since torch cannot export this model ({reason}); use another encoder."
        ) from error


def difference(tower, file: Path, inputs: tuple) -> float:
    """Largest difference between a part in torch and its file; relative for outputs with values above 1."""
    import onnxruntime
    import torch

    with torch.no_grad():
        expected = tower(*inputs)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), inputs, strict=True)}
    actual = [torch.from_numpy(output) for output in session.run(None, feed)]
    pairs = zip(actual, expected, strict=True)
    return max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in pairs)


def quantize(file: Path, output: Path) -> None:
    """Dynamic int8 quantisation of matrix products: weights per tensor, activations at run time. Not convolutions."""
    import logging

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # onnxruntime recommends a preprocessing step that the exporter has already done.
    logging.getLogger().addFilter(lambda record: "pre-process" not in record.getMessage())
    # Removed, so that shapes are inferred again: the exporter transposes weights but keeps their old shapes.
    graph = onnx.load(file)
    del graph.graph.value_info[:]
    quantize_dynamic(graph, output, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def preprocessing(processor) -> dict:
    """The preprocessing of images and clips, for programs that do not use the processor."""
    names = ("size", "crop_size", "do_center_crop", "resample", "rescale_factor", "image_mean", "image_std")
    settings = processor.video_processor.to_dict()
    used = {name: settings.get(name) for name in (*names, "num_frames", "sampling")}
    return used | {"channels": "RGB"}
