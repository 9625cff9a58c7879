"""Kills at any moment: training continues to the same weights, and committed or acknowledged data is kept."""

import os
import random
import signal
import time

import pytest

from tests.attacks.kills import contents, start
from tests.retrieval_rice.index import test_attacks as index_attacks
from tests.train_rice.runs import assert_same_weights, free_port

_KILLED = -signal.SIGKILL


def train(pipe, arguments):
    import train_rice

    original = train_rice.RiceTrainer.training_step

    def training_step(self, *args, **kwargs):
        pipe.send("step")
        return original(self, *args, **kwargs)

    train_rice.RiceTrainer.training_step = training_step
    train_rice.main(arguments)


def serve(pipe, arguments):
    from rice_cli import main

    main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [14])
def test_killed_training_continues_to_the_same_weights(command, finished, tmp_path, count, kills):
    rng, survived, runs = random.Random(0), 0, 0
    while survived < kills:
        folder = tmp_path / f"run {runs}"
        child, pipe = start(__file__, train, command(folder))
        steps, last = 0, rng.randint(1, 2)
        try:
            while True:
                pipe.recv()
                steps += 1
                if steps == last:
                    # In the step, the validation after it, or while a checkpoint is written.
                    time.sleep(rng.choice((0.0, 0.02, 0.1, 0.3)))
                    os.kill(child.pid, signal.SIGKILL)
        except EOFError:
            child.join()
        assert child.exitcode in (0, _KILLED)
        survived += child.exitcode == _KILLED
        if child.exitcode == 0:
            assert_same_weights(folder, finished)
            runs += 1
    child, _ = start(__file__, train, command(folder))
    child.join()
    assert child.exitcode == 0
    assert_same_weights(folder, finished)
    count("kills survived", "training", survived)


@pytest.mark.slow
def test_a_killed_index_keeps_committed_images(shop, tmp_path, count):
    rng = random.Random(1)
    assert len(index_attacks.survive_adding(tmp_path / "added", 12, rng)) > 12
    index_attacks.survive_compacting(tmp_path / "compacted", 12, rng)
    for number in range(3):
        assert index_attacks.survive_building(shop, tmp_path / f"built {number}", 4, rng) > 0
    count("kills survived", "index", 36)


@pytest.mark.slow
def test_a_killed_service_keeps_acknowledged_changes(shop, make_index_model, tmp_path, count):
    httpx = pytest.importorskip("httpx", reason="needs the extra serve")
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from retrieval_rice.index import GalleryIndex
    from tests.retrieval_rice.service.pictures import draw, png

    model = make_index_model(fusion_weight=0.01)
    model.save_pretrained(tmp_path / "model")
    shop.processor.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "index")
    GalleryIndex.build(model, shop.processor, shop.rows, progress=False, output_dir=folder)
    rng, known, port = random.Random(2), {row["image_id"] for row in shop.rows}, free_port()
    words = ["serve", "--shop", folder, "--model", str(tmp_path / "model"), "--device", "cpu", "--precision", "fp32"]
    for number in range(10):
        child, _ = start(__file__, serve, [*words, "--port", str(port)])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_until_ready(client, child)
            at, i = time.monotonic() + rng.uniform(0.05, 0.6), 0
            while time.monotonic() < at:
                name = f"new {number} {i}"
                i += 1
                files = {"images": (f"{i}.png", png(draw(100 * number + i)))}
                answer = client.put("/v1/shops/x/images", files=files, data={"image_ids": name})
                assert answer.status_code == 200, answer.text
                known.add(name)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == _KILLED
        assert set(GalleryIndex.load(folder, model).image_ids()) >= known
    count("kills survived", "service", 10)
    assert len(known) > len(shop.rows) + 10


def _wait_until_ready(client, child) -> None:
    import httpx

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert child.is_alive()
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the service does not answer")


PUBLISH = """
import os
os.environ["TQDM_DISABLE"] = "1"
pid = os.fork()
if pid == 0:
    status = 1
    try:
        from rice_cli import main
        status = main(words)
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)
result = pid
"""


@pytest.mark.slow
def test_killed_publishing_uploads_all_files_or_none(hub, client, tiny_checkpoint, count):
    """Kills after each request that the Hub was sent."""
    before = contents(tiny_checkpoint)
    words = ["publish", str(tiny_checkpoint), "--without_results", "--license", "apache-2.0"]

    def publish(repo: str) -> int:
        return client(PUBLISH, words=[words[0], words[1], repo, *words[2:]])

    def wait(pid: int) -> int:
        return client("import os\nresult = os.waitpid(pid, 0)[1]", pid=pid)

    assert wait(publish("someone/whole")) == 0
    whole, survived, asked = set(hub.files("someone/whole")), 0, 0
    while survived < 10:
        asked += 1
        repo = f"someone/killed-{asked}"
        hub.requests.clear()
        pid = publish(repo)
        while sum(hub.requests.values()) < 1 + asked % 8 and _is_alive(pid):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == signal.SIGKILL:
            survived += 1
        if ("models", repo) in hub.repos:
            assert set(hub.files(repo)) in (set(), whole)
        assert wait(publish(repo)) == 0 and set(hub.files(repo)) == whole
        assert contents(tiny_checkpoint) == before
    count("kills survived", "publish", survived)


def _is_alive(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


if __name__ == "child":
    import torch

    name, pipe, *arguments = globals()["call"]
    torch.set_num_threads(1)
    globals()[name](pipe, *arguments)
