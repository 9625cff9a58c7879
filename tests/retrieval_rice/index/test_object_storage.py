"""The same index in object storage, against a local server that speaks S3."""

import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

from retrieval_rice.index import GalleryIndex

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    """Address of an S3 server with the bucket "shops"."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("needs moto_server on the PATH: pip install 'moto[server]', in an environment of its own")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [program, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/shops", method="PUT"), timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    return "s3://shops"


def test_a_shop_in_object_storage(shop, bucket):
    uri, options = f"{bucket}/one", {"progress": False, "batch_size": 3, "commit_every": 3}
    with pytest.raises(FileNotFoundError, match="there is no index in s3://shops/one"):
        GalleryIndex.load(uri, shop.model)
    rows, clips = shop.make_rows(12), shop.clips(1, 11)
    local = GalleryIndex.build(shop.model, shop.processor, rows[:10], **options)
    index = GalleryIndex.build(shop.model, shop.processor, rows[:10], output_dir=uri, **options)
    assert [[hit.image_id for hit in answer.hits] for answer in index.search(clips)] == [
        [hit.image_id for hit in answer.hits] for answer in local.search(clips)
    ]
    replica = GalleryIndex.load(uri, shop.model, refresh_s=0)
    first = replica.version
    index.add(rows[10:])
    index.remove(["p0"])
    index.compact()
    assert replica.image_ids() == [f"p{i}" for i in range(1, 12)]
    near = {hit.image_id for hit in replica.search(clips[1], live_id="y", rerank=None)[0].hits}
    assert near == {f"p{i}" for i in range(1, 12, 2)}
    replica.restore(first)
    index.refresh()
    assert index.image_ids() == [f"p{i}" for i in range(10)]
    # A shop that changed, and one of other settings in its place.
    assert len(GalleryIndex.build(shop.model, shop.processor, rows, output_dir=uri, **options)) == 12
    options |= {"dtype": "float32", "overwrite": True}
    assert len(GalleryIndex.build(shop.model, shop.processor, rows[:5], output_dir=uri, **options)) == 5
