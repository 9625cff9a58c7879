"""Tokens, and limits on simultaneous requests."""

import threading

import pytest

from retrieval_rice.service import command
from retrieval_rice.service.gate import is_loopback, read_token
from rice_cli import main
from tests.retrieval_rice.service.pictures import frame_files
from tests.retrieval_rice.service.test_recognise import refusal

SECRET = "a-secret-of-some-length"


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.0.7", False), ("shop.example", False), ("", False)],
)  # fmt: skip
def test_other_machines_need_a_token(monkeypatch, host, alone):
    assert is_loopback(host) == alone
    monkeypatch.delenv("RICE_TOKEN", raising=False)
    if alone:
        assert read_token(host) is None
    else:
        with pytest.raises(ValueError, match="RICE_TOKEN is not set"):
            read_token(host)
    monkeypatch.setenv("RICE_TOKEN", SECRET)
    assert read_token(host) == SECRET


@pytest.mark.parametrize("token", ["", "fifteen-letters", "a secret with some spaces", "ein-schlüssel-mit-ü-drin"])
def test_an_invalid_token_is_refused(monkeypatch, token):
    monkeypatch.setenv("RICE_TOKEN", token)
    with pytest.raises(ValueError, match="at least 16 characters"):
        read_token("127.0.0.1")


def test_requests_need_the_token(make_service):
    client = make_service(token=SECRET).client
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert client.get(path).status_code == 200
    wrong = [None, SECRET, f"Basic {SECRET}", "Bearer", "Bearer ", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}"]
    for header in wrong:
        headers = {} if header is None else {"authorization": header}
        for method, path in (
            ("POST", "/v1/recognise"), ("GET", "/metrics"), ("PUT", "/v1/shops/x/images"), ("GET", "/v1/streams/x"),
            ("DELETE", "/v1/shops/x/images"), ("GET", "/nothing"), ("POST", "/healthz/../v1/recognise"),
        ):  # fmt: skip
            answer = client.request(method, path, headers=headers)
            assert "RICE_TOKEN" in refusal(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
    for kind in ("Bearer", "bearer"):
        headers = {"authorization": f"{kind} {SECRET}"}
        assert client.post("/v1/recognise", files=frame_files(1), headers=headers).status_code == 200
    assert 'rice_requests_total{route="other",status="401"}' in client.get("/metrics", headers=headers).text


def test_excess_requests_are_told_to_retry(make_service, monkeypatch):
    served = make_service(max_requests=2)
    encode, inside, go_on = served.recogniser.model.encode_frames, threading.Semaphore(0), threading.Event()

    def wait(*arguments):
        inside.release()
        go_on.wait(30)
        return encode(*arguments)

    monkeypatch.setattr(served.recogniser.model, "encode_frames", wait)
    answers = []

    def ask() -> None:
        answers.append(served.client.post("/v1/recognise", files=frame_files(1)).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    inside.acquire()
    threads[1].start()
    while "rice_queue 2.0" not in served.client.get("/metrics").text:
        pass
    refused = served.client.post("/v1/recognise", files=frame_files(1))
    assert refusal(refused, 503).startswith("2 requests are in progress") and int(refused.headers["retry-after"]) > 0
    # Whoever asks for no work is answered.
    assert served.client.get("/healthz").json() == {"alive": True}
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    assert served.client.post("/v1/recognise", files=frame_files(1)).status_code == 200


def test_an_idle_connection_frees_its_place(make_service, monkeypatch):
    import asyncio

    from retrieval_rice.service import gate

    monkeypatch.setattr(gate, "IDLE_SECONDS", 0.2)
    served = make_service(max_requests=1)
    sent = []

    async def receive():
        if not sent_parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": sent_parts.pop(), "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", b"5000"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/v1/recognise", "query_string": b"", "raw_path": b"",
             "headers": headers, "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80), "client": None,
             "http_version": "1.1"}  # fmt: skip
    for parts in ([], [b"--x\r\n"]):
        sent_parts = list(parts)
        sent.clear()
        asyncio.run(served.client.app(dict(scope), receive, send))
        assert sent[0]["status"] == 408 and b"Nothing was sent for 0.2 s" in sent[1]["body"] and len(sent) == 2
    assert served.client.post("/v1/recognise", files=frame_files(1)).status_code == 200


def test_unknown_addresses_and_methods_get_a_sentence(make_service):
    client = make_service().client
    assert refusal(client.get("/"), 404) == "There is no such address here; see /openapi.json."
    assert refusal(client.get("/docs"), 404)
    answer = client.get("/v1/recognise")
    assert (
        refusal(answer, 405) == "This address needs another method; see /openapi.json."
        and answer.headers["allow"] == "POST"
    )
    # Behind a proxy a redirection would lead to an address of the service's own, without TLS.
    assert refusal(client.post("/v1/recognise/", follow_redirects=False), 404)
    assert client.get("/healthz", params={"seen": "1"}).status_code == 200
    # The body of an unknown length is not read.
    answer = client.post("/v1/recognise", content=iter([b"x"]))
    assert refusal(answer, 411) == "The request must give its length (Content-Length)."
    assert 'route="other",status="404"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 allows other machines"),
        (["--source", "studio"], "--source studio: write NAME=ADDRESS"),
        (["--source", "a=x", "--source", "a=y"], "--source a=y: write NAME=ADDRESS"),
        (["--max_requests", "0"], "--max_requests must be at least 1"),
        (["--batch_ms", "-1"], "--batch_ms must be from 0"),
        (["--batch_ms", "nan"], "--batch_ms must be from 0"),
        (["--precision", "int8"], "--precision int8 needs an exported model"),
        ([], "there is no checkpoint folder"),
    ],
)
def test_mistakes_end_the_command_with_a_sentence(monkeypatch, capsys, tmp_path, options, words):
    monkeypatch.delenv("RICE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--shop", str(tmp_path / "i"), "--model", str(tmp_path / "m"), *options])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words.lower() in error.lower() and "Traceback" not in error


def test_a_missing_package_is_named(monkeypatch):
    import builtins

    imported = builtins.__import__

    def without(name, *arguments, **settings):
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return imported(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the package uvicorn: pip install 'rice-retrieval\[serve\]'"):
        command._packages()
