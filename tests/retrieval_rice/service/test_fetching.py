"""Clips by URL: public web servers only."""

import asyncio
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from retrieval_rice.service.fetching import Fetcher, is_public
from retrieval_rice.uploads import UploadError, UploadLimits
from tests.retrieval_rice.service.pictures import draw, png
from tests.retrieval_rice.service.test_recognise import assert_same, refusal

LIMITS = UploadLimits(max_bytes=20_000, arriving_seconds=5)
PICTURE = png(draw(3))


class Handler(BaseHTTPRequestHandler):
    hosts: list[str] = []

    def do_GET(self):
        self.hosts.append(self.headers["host"])
        status, headers, body = {
            "/picture": (200, {}, PICTURE),
            "/large": (200, {}, bytes(30_000)),
            "/packed": (200, {"Content-Encoding": "gzip"}, b"x"),
            "/missing": (404, {}, b""),
            "/there": (302, {"Location": "/picture"}, b""),
            "/inside": (302, {"Location": "http://10.0.0.1/secret"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/round": (302, {"Location": "/round"}, b""),
        }[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.hosts = []
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def fetch(url: str, path, is_allowed=lambda address: address == "127.0.0.1") -> bytes | str:
    """What was fetched, or the refusal."""
    try:
        asyncio.run(Fetcher(LIMITS, is_allowed).fetch(url, path))
    except UploadError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
        return str(error)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2001:4860:4860::8888", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("0.0.0.0", False),
        ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False), ("64:ff9b::808:808", True), ("2002:7f00:1::", False), ("ff02::1", False),
        ("::7f00:1", False), ("fec0::1", False), ("64:ff9b:1::a00:1", False), ("192.0.0.8", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public


def test_a_redirected_file_is_fetched(server, tmp_path):
    assert fetch(f"{server}/picture", tmp_path / "a") == PICTURE
    assert fetch(f"{server}/there", tmp_path / "b") == PICTURE


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/large", "url holds more than the maximum of 0.02 MB."),
        ("/packed", "url holds compressed data, which are not supported; upload the clip."),
        ("/missing", "url cannot be fetched: its server answers with status 404."),
        ("/inside", "url names a server that is not public; upload the clip."),
        ("/file", "url must be http://... or https://..., without a user name."),
        ("/round", "url is redirected more than 3 times."),
    ],
)
def test_files_that_are_not_fetched(server, tmp_path, path, words):
    assert fetch(server + path, tmp_path / "a") == words


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.com/a", "gopher://example.com", "//example.com", "a.mp4", "", "http://",
     "http://user:secret@example.com/a", "http:///a", "http://[::1", "http://a\nb/", "rtsp://camera"],
)  # fmt: skip
def test_invalid_addresses(tmp_path, url):
    assert fetch(url, tmp_path / "a").startswith("url ")


def test_private_servers_are_not_contacted_under_any_name(server, tmp_path, monkeypatch):
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0"):
        assert not isinstance(fetch(f"http://{host}:{port}/picture", tmp_path / "a", is_public), bytes)
    # A name with a public address among private ones, and one that changes after it was looked at.
    addresses = iter([["8.8.8.8", "127.0.0.1"]])

    async def resolve(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(addresses)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    assert fetch(f"http://shop.example:{port}/picture", tmp_path / "a", is_public).startswith("url names a server")
    assert Handler.hosts == []


def test_the_checked_address_is_the_one_contacted(server, tmp_path, monkeypatch):
    port, looked_up = server.rpartition(":")[2], []
    getaddrinfo = asyncio.BaseEventLoop.getaddrinfo

    async def resolve(self, host, port, **settings):
        looked_up.append(host)
        host = "127.0.0.1" if host == "shop.example" else host
        return await getaddrinfo(self, host, port, **settings)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    assert fetch(f"http://shop.example:{port}/picture", tmp_path / "a") == PICTURE
    assert looked_up.count("shop.example") == 1 and Handler.hosts == [f"shop.example:{port}"]


def test_a_clip_is_recognised_by_its_address(server, make_service):
    served = make_service(fetcher=Fetcher(LIMITS, lambda address: address == "127.0.0.1"))
    body = served.client.post("/v1/recognise", data={"url": f"{server}/picture"}).json()
    assert_same(body, served.recogniser.recognise([draw(3)]))
    public = make_service(fetcher=Fetcher(LIMITS))
    words = refusal(public.client.post("/v1/recognise", data={"url": f"{server}/picture"}), 422)
    assert words == "url names a server that is not public; upload the clip."
