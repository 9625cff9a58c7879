"""`rice serve` as processes: replicas that share an index, and signals."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from retrieval_rice.index import GalleryIndex
from tests.retrieval_rice.service.pictures import draw, frame_files, png

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
REFRESH_S = 0.5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def shop_files(make_index_model, index_processor, make_shop_rows, tmp_path):
    """A checkpoint and an index of twenty pictures."""
    model = make_index_model(fusion_weight=0.01)
    model.save_pretrained(tmp_path / "model")
    index_processor.save_pretrained(tmp_path / "model")
    index = str(tmp_path / "shop.index")
    GalleryIndex.build(model, index_processor, make_shop_rows(20), progress=False, output_dir=index)
    return SimpleNamespace(model=str(tmp_path / "model"), index=index, built=model, processor=index_processor)


@pytest.fixture
def start(shop_files):
    """A function that starts a service and waits until it is ready."""
    started = []

    def start(*options, environment=None) -> SimpleNamespace:
        port = free_port()
        command = [sys.executable, "rice_cli.py", "serve", "--shop", shop_files.index, "--model", shop_files.model]
        command += [
            "--port",
            str(port),
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--refresh",
            str(REFRESH_S),
            *options,
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(process.communicate())
            try:
                if client.get("/readyz").status_code == 200:
                    return SimpleNamespace(process=process, client=client)
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the service does not answer")

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def best(client: httpx.Client, number: int) -> str:
    answer = client.post("/v1/recognise", files=frame_files(number))
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"][0]["image_id"]


def test_replicas_see_each_others_writes_during_compaction(start, shop_files):
    first, second = start(), start()
    failures, rounds, over = [], [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=second.client.base_url, timeout=60) as client:
            while not over.is_set():
                answer = client.post("/v1/recognise", files=frame_files(3))
                rounds.append(answer.status_code)
                if answer.status_code != 200 or answer.json()["hits"][0]["image_id"] != "p3":
                    failures.append(answer.text)

    def compact() -> None:
        index = GalleryIndex.load(shop_files.index, shop_files.built, shop_files.processor)
        while not over.is_set():
            index.compact()
            time.sleep(0.2)

    threads = [threading.Thread(target=ask), threading.Thread(target=compact)]
    for thread in threads:
        thread.start()
    try:
        for number in range(50, 55):
            files = {"images": (f"{number}.png", png(draw(number)))}
            written = first.client.put("/v1/shops/x/images", files=files, data={"image_ids": f"new-{number}"})
            assert written.status_code == 200, written.text
            assert best(first.client, number) == f"new-{number}"
            time.sleep(REFRESH_S + 0.1)
            assert best(second.client, number) == f"new-{number}"
        gone = second.client.request("DELETE", "/v1/shops/x/images", params={"image_id": "new-50"})
        assert gone.json()["changed"] == 1
        time.sleep(REFRESH_S + 0.1)
        assert best(first.client, 50) != "new-50"
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == [] and len(rounds) > 5


def test_a_signal_ends_the_service_after_open_requests(start):
    service = start("--batch_ms", "1500")
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(service.client.post("/v1/recognise", files=frame_files(2)))
    )
    asking.start()
    time.sleep(0.7)
    service.process.send_signal(signal.SIGTERM)
    asking.join()
    assert [answer.status_code for answer in answers] == [200]
    output, errors = service.process.communicate(timeout=60)
    assert service.process.returncode == 0 and output.endswith("the service has stopped\n"), errors
    assert "Traceback" not in errors


def test_a_token_admits_other_machines(start):
    secret = "a-secret-of-some-length"
    service = start("--host", "0.0.0.0", environment={"RICE_TOKEN": secret})
    assert service.client.post("/v1/recognise", files=frame_files(2)).status_code == 401
    service.client.headers["authorization"] = f"Bearer {secret}"
    assert best(service.client, 2) == "p2"
