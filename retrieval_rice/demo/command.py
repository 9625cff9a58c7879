"""Show the recognition of clips in a browser: ranked products, speech, and heat maps.

Example clips and the shop come from --dataset, by default the rendered mini_lpr4m. --shop names another shop: an index
of `rice index` (with calibrated confidences), a data set's folder, or a folder of pictures. --space starts no server
but writes a folder that can be pushed as a Space.
"""

import argparse
import signal
from pathlib import Path

from ..options import add_hints, add_precision_and_towers, check_asr, open_index, open_model, port

DEFAULT_MODEL = "runs/demo/model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="checkpoint folder, or the id of a published model "
        "(default: %(default)s, which `make demo` trains)")  # fmt: skip
    add("--dataset", help="data set with example clips and their shop (default: mini_lpr4m, unless --shop is given)")
    add("--data_dir", help="folder of the data set's files")
    add("--split", default="test", choices=("validation", "test"))
    add("--shop", metavar="DIR", help="shop to search: an index, a data set's folder, or pictures")
    add("--detector", metavar="FOLDER|ID", help="product detector, whose boxes are shown, and used by a model that "
        "takes boxes (default: none)")  # fmt: skip
    add("--asr", metavar="MODEL", help="transcribe uploads: folder, id or size of a faster-whisper model, or a speech "
        "model of transformers (default: none)")  # fmt: skip
    add("--language", help="language of the speech, such as zh or en; auto, the default, detects it")
    add_hints(parser)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 allows other machines")
    add("--port", type=port, help="default: the first free port from 7860")
    add_precision_and_towers(parser)
    add("--device", help="such as cpu or cuda; default: cuda if available")
    add("--batch_size", type=int, default=64, help="pictures per batch for encoding the shop")
    add("--space", type=Path, metavar="DIR", help="write a Space to this new folder instead of starting a server")
    add("--space_examples", type=int, default=48, help="number of example clips in a Space (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: the checkpoint, data set or shop does not exist.
        FileExistsError: the folder of the Space is not empty.
        ValueError: Gradio is not installed, or an argument cannot be used.
        OSError: the port is in use.
    """
    check_asr(options)
    if options.space is not None and options.asr is not None:
        raise ValueError("--asr works with a server only, not with --space; leave it out.")
    if options.space is not None:
        from .space import write_space

        queries, gallery = load_rows(options)
        write_space(options.space, options.model, queries, gallery, options.space_examples, options.detector)
        return
    serve, upload_folder = _page()
    demo = load_demo(options)
    # The signals that stop a container must also delete the uploads.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with upload_folder() as folder:
        demo.folder = folder
        try:
            serve(demo, options.host, options.port)
        except KeyboardInterrupt:
            print("the demo has stopped")


def _page():
    try:
        from .app import serve, upload_folder
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "gradio":
            raise
        raise ValueError("the demo's page needs Gradio; install it: pip install gradio.") from None
    return serve, upload_folder


def load_rows(options: argparse.Namespace):
    """
    Rows of example clips and of the shop.

    Returns:
        The query view (`None` without example clips) and the gallery rows (`None` for an index).
    """
    from data_rice import load_dataset_view

    from ..index.table import ShopTable
    from ..index_command import gallery_rows, shop_rows

    source = {"data_dir": options.data_dir, "cache_dir": None, "gallery_images": None}
    dataset, queries, gallery = options.dataset, None, None
    if dataset is None and options.shop is None:
        dataset = "mini_lpr4m"
    if dataset is not None:
        queries = load_dataset_view(dataset, "query", options.split, data_dir=options.data_dir)
    if options.shop is None:
        gallery = gallery_rows(dataset, options.split, source)
    elif not ShopTable(options.shop).exists():
        shop = {**source, "data_dir": None, "shop": options.shop, "split": options.split}
        gallery, left_out = shop_rows(argparse.Namespace(**shop))
        if left_out:
            print(left_out)
    return queries, gallery


def load_demo(options: argparse.Namespace):
    """The `Demo` for the options; encodes the shop unless it is an index."""
    from ..index import GalleryIndex
    from .page import Demo

    queries, gallery = load_rows(options)
    model, processor = open_model(options)
    detector = None
    if options.detector is not None:
        from ..detector.product_detector import ProductDetector

        detector = ProductDetector.from_pretrained(options.detector, options.device)
    if gallery is None:
        index = open_index(options, model, processor)
    else:
        index = GalleryIndex.build(model, processor, gallery, batch_size=options.batch_size)
    transcriber = None
    if options.asr is not None:
        if getattr(model.config, "text_config", None) is None:
            raise ValueError(f"--asr needs a model that reads text, which {options.model} does not; leave it out.")
        from ..stream.speech_hints import expect_titles
        from ..stream.speech_models import load_transcriber

        transcriber = load_transcriber(options.asr, options.language or "auto", options.device)
        # Refused where it would change nothing.
        expect_titles(transcriber, () if options.asr_hints is None else index.titles(), options.asr_hints)
    hearing = {"transcriber": transcriber, "expects_titles": options.asr_hints != "none"}
    return Demo(model, processor, index, gallery, queries, detector=detector, **hearing)
