"""Serve recognition over HTTP: clips, streams and changes of the shop, with metrics for Prometheus.

The service listens on 127.0.0.1 by default. If the environment has RICE_TOKEN, every request must carry that secret
(`Authorization: Bearer ...`); access from other machines requires it. Any number of services may share an index: they
see each other's changes within --refresh seconds. SIGTERM and Ctrl-C stop the service after the requests in progress.
docs/serving.md describes the routes, a client and a Dockerfile.
"""

import argparse
import signal
from typing import Any

from ..options import add_precision_and_towers, open_index, open_model, port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shop", required=True, metavar="INDEX", help="folder or URI of the shop's index, from `rice index`")
    add("--model", required=True, help="folder or id of the model that the index was built with")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 allows other machines and requires "
        "RICE_TOKEN (default: %(default)s)")  # fmt: skip
    add("--port", type=port, default=8080, help="default: %(default)s")
    add("--allow_urls", action="store_true", help="fetch clips from public http(s) addresses in requests")
    add("--source", action="append", default=[], metavar="NAME=ADDRESS", help="a stream that requests may name, "
        "such as studio=rtsp://...; may be repeated")  # fmt: skip
    add("--max_requests", type=int, default=32, help="requests in progress; more get 503 (default: %(default)s)")
    add("--max_streams", type=int, default=2, help="maximum number of running streams (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="maximum number of clips in a batch (default: %(default)s)")
    add("--batch_ms", type=float, default=5.0, help="milliseconds that a clip waits for others (default: "
        "%(default)g)")  # fmt: skip
    add("--refresh", type=float, default=1.0, metavar="SECONDS", help="interval of checks for a newer index version "
        "(default: %(default)g)")  # fmt: skip
    add("--rerank", type=int, help="images per clip that get pair scores; default: as "
        "calibrated")  # fmt: skip
    add_precision_and_towers(parser)
    add("--device", help="such as cpu or cuda; default: cuda if available")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: the index or model does not exist.
        ValueError: one of them, an argument or the token cannot be used, or a package is missing.
        OSError: the port is in use.
    """
    _check(options)
    build_app, uvicorn = _packages()
    from .gate import read_token

    token = read_token(options.host)
    sources = parse_sources(options.source)
    service = load_service(options, sources)
    app = build_app(service, token, options.max_requests)
    # Requests are frequent; one line for each would fill the log.
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=60,
    )
    print(
        f"{len(service.index)} pictures of {options.shop}, {service.precision}, at http://{options.host}:"
        f"{options.port}; {'with' if token else 'without'} a token",
        flush=True,
    )
    serve(uvicorn.Server(config), service)


def _check(options: argparse.Namespace) -> None:
    for name in ("max_requests", "max_streams", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    for name in ("batch_ms", "refresh"):
        if not 0 <= getattr(options, name) <= 3600:
            raise ValueError(f"--{name} must be from 0 to 3600, got {getattr(options, name):g}.")


def _packages():
    try:
        import uvicorn

        from .app import build_app
    except ImportError as error:
        names = ("fastapi", "uvicorn", "multipart", "prometheus_client", "httpx", "starlette")
        if error.name is None or error.name.partition(".")[0] not in names:
            raise
        raise ValueError(f"the service needs the package {error.name}: pip install 'rice-retrieval[serve]'.") from None
    return build_app, uvicorn


def parse_sources(entries: list[str]) -> dict[str, str]:
    """
    Parses `NAME=ADDRESS` entries as name -> address.

    Raises:
        ValueError: an entry has another form, or a name occurs twice.
    """
    sources: dict[str, str] = {}
    for entry in entries:
        name, equals, address = entry.partition("=")
        if not (name and equals and address) or name in sources:
            raise ValueError(f"--source {entry}: write NAME=ADDRESS, each name once.")
        sources[name] = address
    return sources


def load_service(options: argparse.Namespace, sources: dict[str, str]):
    """The `Service` for the options."""
    from ..recogniser import Recogniser
    from ..uploads import UploadLimits
    from .fetching import Fetcher
    from .work import Service

    model, processor = open_model(options)
    index = open_index(options, model, processor, refresh_s=options.refresh)
    limits = UploadLimits()
    return Service(
        Recogniser(model, processor, index, rerank=options.rerank),
        limits,
        Fetcher(limits) if options.allow_urls else None,
        sources,
        options.max_streams,
        options.batch_size,
        options.batch_ms / 1000,
    )


def serve(server: Any, service: Any) -> None:
    """Serves until a signal; then ends streams and waits for the requests in progress."""
    handle_exit = server.handle_exit

    def stop(number: int, frame: Any) -> None:
        service.stop()
        handle_exit(number, frame)

    server.handle_exit = stop
    # The server raises the signal again at the end; the exit status stays 0.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.started:
        raise OSError("the service did not start: the address cannot be used, or the port is in use.")
    print("the service has stopped", flush=True)
