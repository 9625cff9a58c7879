"""The limit on the disk space of all visitors of the demo together."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from retrieval_rice.quota import OVERHEAD, FolderQuota, UploadGate, temporary_folder
from retrieval_rice.uploads import UploadLimits

LIMITS = UploadLimits(max_bytes=1000, max_total_bytes=OVERHEAD + 3000, arriving_seconds=5)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "uploads"
    path.mkdir()
    return path


def put(path, size: int, age: float = 0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_oldest_files_are_deleted_first(folder):
    quota = FolderQuota(folder, 1000, 3600)
    files = [put(folder / name, 300, age) for name, age in (("a/1", 20), ("2", 30), ("b/c/3", 10))]
    assert quota.make_room(100) and all(file.exists() for file in files)
    assert quota.make_room(101) and [file.exists() for file in files] == [True, False, True]
    assert quota.make_room(700) and [file.exists() for file in files] == [False, False, True]
    assert quota.make_room(1000) and not any(file.exists() for file in files)
    assert not quota.make_room(1001)


def test_expired_files_are_deleted_even_with_free_space(folder):
    quota = FolderQuota(folder, 1000, 60)
    old, young = put(folder / "a/old", 10, 61), put(folder / "a/young", 10, 50)
    empty = folder / "empty"
    empty.mkdir()
    os.utime(empty, (time.time() - 61,) * 2)
    (folder / "new").mkdir()
    assert quota.make_room()
    assert not old.exists() and young.exists() and not empty.exists() and (folder / "new").exists()


def test_existing_files_stay_and_count(folder):
    example = put(folder / "x/example", 600, 9999)
    quota = FolderQuota(folder, 1000, 60)
    upload = put(folder / "x/upload", 300)
    assert not quota.make_room(401) and example.exists() and not upload.exists()
    assert quota.make_room(400)


def test_nothing_outside_of_the_folder_is_touched(folder, tmp_path):
    secret = put(tmp_path / "elsewhere" / "secret", 500, 9999)
    quota = FolderQuota(folder, 100, 60)
    (folder / "file").symlink_to(secret)
    (folder / "folder").symlink_to(secret.parent)
    quota.make_room(100)
    assert secret.exists() and not list(folder.iterdir())


def test_a_missing_folder_is_not_an_error(tmp_path):
    assert FolderQuota(tmp_path / "gone", 100, 60).make_room(100)


class Server:
    """Writes what is sent to it into its folder, and answers when it is told to."""

    def __init__(self, folder=None):
        self.requests, self.folder, self.go_on = [], folder, asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.requests.append(scope["path"])
        path = self.folder and self.folder / f"arriving{len(self.requests)}"
        while receive is not None:
            message = await receive()
            if path is not None:
                path.write_bytes((path.read_bytes() if path.exists() else b"") + message["body"])
            if not message["more_body"]:
                break
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def make_gate(server, folder, limits) -> UploadGate:
    return UploadGate(server, limits, FolderQuota(folder, limits.max_total_bytes, limits.keep_seconds))


async def post(
    gate, size: int | None, path: str = "/gradio_api/upload", method: str = "POST", parts: tuple[int, ...] | None = ()
) -> tuple[int, str]:
    """Status and words of the answer to a request that claims a size and sends parts, or (`None`) nothing for ever."""
    sent, left = [], list(parts or ())

    async def receive():
        await asyncio.sleep(0)
        if parts is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bytes(left.pop(0) if left else 0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    headers = [] if size is None else [(b"content-length", str(size).encode())]
    await gate({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
    return sent[0]["status"], sent[1]["body"].decode()


def test_requests_without_length_or_too_long_are_refused_unread(folder):
    async def scenario():
        server = Server()
        server.go_on.set()
        gate = make_gate(server, folder, LIMITS)
        assert await post(gate, None) == (411, "The request must give its length (Content-Length).")
        status, words = await post(gate, OVERHEAD + 1001)
        assert status == 413 and words.startswith("This is 1 MB, more than")
        assert (await post(gate, OVERHEAD + 1, "/gradio_api/queue/join"))[0] == 413
        assert server.requests == []
        assert (await post(gate, OVERHEAD + 1000))[0] == 200
        assert (await post(gate, OVERHEAD, "/gradio_api/queue/join"))[0] == 200
        assert (await post(gate, None, "/", "GET"))[0] == 200
        assert len(server.requests) == 3

    asyncio.run(scenario())


def test_the_announced_size_reserves_no_space(folder):
    async def scenario():
        gate = make_gate(Server(folder), folder, LIMITS)
        other = put(folder / "other", OVERHEAD, 20)
        idle = [asyncio.create_task(post(gate, OVERHEAD + 1000, parts=None)) for _ in range(20)]
        await asyncio.sleep(0.01)
        assert other.exists() and gate.arrived == 0
        gate.app.go_on.set()
        assert (await post(gate, 1000, parts=(1000,)))[0] == 200 and other.exists()
        for task in idle:
            task.cancel()
        await asyncio.gather(*idle, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("has_quota", [True, False])
def test_simultaneous_uploads_share_the_space(folder, has_quota):
    limits = UploadLimits(max_bytes=4 * OVERHEAD, max_total_bytes=6 * OVERHEAD, arriving_seconds=5)

    async def scenario():
        server = Server(folder)
        gate = make_gate(server, folder, limits) if has_quota else UploadGate(server, limits)
        gate.quota and gate.quota.kept.update(str(folder / f"arriving{number}") for number in (1, 2, 3))
        claims = 4 * OVERHEAD
        first = asyncio.create_task(post(gate, claims, parts=(OVERHEAD,) * 4))
        while gate.arrived < claims:
            await asyncio.sleep(0.001)
        status, words = await post(gate, claims, parts=(OVERHEAD,) * 4)
        assert status == 503 and words.endswith("try again in some minutes.") and len(server.requests) == 2
        server.go_on.set()
        assert (await first)[0] == 200 and gate.arrived == 0

    asyncio.run(scenario())


def test_an_upload_or_a_click_deletes_old_files(folder):
    async def scenario():
        server = Server()
        server.go_on.set()
        gate = make_gate(server, folder, LIMITS)
        old, young = put(folder / "old", OVERHEAD, 20), put(folder / "young", 2500, 10)
        assert (await post(gate, 600, parts=(600,)))[0] == 200
        assert not old.exists() and young.exists()
        shown = put(folder / "shown", LIMITS.max_total_bytes)
        assert (await post(gate, 100, "/gradio_api/queue/join"))[0] == 200
        assert not young.exists() and shown.exists()

    asyncio.run(scenario())


def test_a_slow_upload_ends_and_frees_its_space(folder):
    async def scenario():
        gate = make_gate(Server(), folder, replace(LIMITS, arriving_seconds=0.05))
        status, words = await post(gate, OVERHEAD, parts=None)
        assert status == 408 and words == "The upload took longer than 0.05 s; send something smaller."
        assert gate.arrived == 0

    asyncio.run(scenario())


def test_errors_of_the_server_are_not_hidden(folder):
    async def fail(scope, receive, send):
        raise TimeoutError("of the server")

    gate = make_gate(fail, folder, LIMITS)
    with pytest.raises(TimeoutError, match="of the server"):
        asyncio.run(post(gate, 10))
    assert gate.arrived == 0


def test_the_folder_of_a_killed_process_is_deleted_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, tempfile; from retrieval_rice.quota import temporary_folder; tempfile.tempdir = os.environ['AT']\n"
        "with temporary_folder('own-') as folder: open(folder + '/upload', 'w').close(); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "AT": str(tmp_path)}, timeout=120)
    assert result.returncode == -9
    (left,) = tmp_path.iterdir()
    assert (left / "upload").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "own-file").touch()
    (tmp_path / "own-link").symlink_to(tmp_path / "other")
    (tmp_path / "own-making").mkdir()
    with temporary_folder("own-") as first, temporary_folder("own-") as second:
        assert not left.exists() and os.path.isdir(first) and os.path.isdir(second)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "own-file", "own-link", "own-making"}
    os.utime(tmp_path / "own-making", (0, 0))
    with temporary_folder("own-"):
        assert not (tmp_path / "own-making").exists() and (tmp_path / "other").exists()


def test_a_served_page_limits_uploads(demo):
    pytest.importorskip("gradio", reason="needs gradio")
    httpx = pytest.importorskip("httpx", reason="needs httpx, as gradio does")
    from retrieval_rice.demo.app import serve, upload_folder

    demo.limits = UploadLimits(max_bytes=1_000_000, max_total_bytes=3_000_000)
    with upload_folder() as folder:
        demo.folder = folder
        server = serve(demo, block=False)
        try:
            address = f"{server.local_url}gradio_api/upload"

            def send(number: int, size: int = 900_000) -> httpx.Response:
                return httpx.post(address, files={"files": (f"{number}.png", bytes([number]) * size)}, timeout=60)

            pictures = _files(folder)
            arrived = [send(number).json()[0] for number in range(6)]
            assert not os.path.exists(arrived[0]) and os.path.exists(arrived[-1])
            assert sum(path.stat().st_size for path in _files(folder)) < 3_000_000
            assert pictures and all(path.exists() for path in pictures)
            assert send(7, 2_500_000).status_code == 413
            # Who claims much and sends nothing takes no room from others.
            kept = [name for name in arrived if os.path.exists(name)]
            claim = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {1_900_000}\r\n\r\n".encode()
            place = ("127.0.0.1", int(server.local_url.rstrip("/").rpartition(":")[2]))
            sockets = [socket.create_connection(place) for _ in range(20)]
            for idle in sockets:
                idle.sendall(claim)
            time.sleep(0.5)
            assert kept and all(map(os.path.exists, kept)) and send(8, 100).status_code == 200
            for idle in sockets:
                idle.close()
            assert not server.share
        finally:
            server.close()


def _files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]
