"""A small Hub on this machine for the real client, and processes with that client to run code in."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "hf_SecretTokenOfTheTests"
TEXT = (".json", ".sha256", ".md", ".py", ".txt", ".jsonl", ".gitattributes", ".yaml")
ROUTES = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<call>preupload|commit|commits|tree|paths-info|revision|branch)(?:/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?)?"
    r"|/(?P<data>datasets/)?(?P<name>[^/]+/[^/]+?)(?P<batch>\.git/info/lfs/objects/batch)"
    r"|/(?P<prefix>datasets/)?(?P<owner>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.*)"
)


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def commit_id(self, revision: str) -> str:
        return hashlib.sha1(f"{revision}{len(self.branches[revision])}".encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        return next((name for name in self.branches if revision in (name, self.commit_id(name))), None)


@dataclass
class LocalHub:
    """What the server holds and counts, and the faults it is asked to show."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    requests: Counter = field(default_factory=Counter)
    tokens: set[str] = field(default_factory=lambda: {TOKEN})
    read_only: bool = False
    unreachable: bool = False
    allowed_uploads: int | None = None
    dropped_uploads: int = 0
    failing_calls: dict[str, int] = field(default_factory=dict)

    def heal(self) -> None:
        """Takes back all faults."""
        self.tokens, self.read_only, self.unreachable, self.failing_calls = {TOKEN}, False, False, {}
        self.allowed_uploads, self.dropped_uploads = None, 0

    def add(self, repo: str, files: dict[str, bytes], private: bool = True) -> None:
        """Puts a model there, as if somebody had pushed it."""
        self.repos["models", repo] = Repo(private, {"main": [files]})

    def files(self, repo: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        return self.repos[kind, repo].branches[revision][-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *arguments) -> None:
        pass

    def reply(self, status: int, body=None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        self.reply(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def handle_call(self) -> None:
        if self.hub.unreachable:
            self.close_connection = True
            return self.connection.close()
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        self.hub.requests[f"{self.command} {path}"] += 1
        for part, status in self.hub.failing_calls.items():
            if part in path:
                return self.refuse(status, "out of order")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            return self.refuse(401, "Invalid credentials in Authorization header")
        if path.startswith("/upload/"):
            return self.upload(path.removeprefix("/upload/"))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if not token and self.command in ("POST", "PUT", "DELETE"):
            return self.refuse(401, "Authentication is needed")
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if self.hub.read_only and self.command == "POST" and "/paths-info/" not in path:
            return self.refuse(403, "this token may only read")
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        match = ROUTES.fullmatch(path)
        if match is None:
            return self.refuse(404, f"this server does not know {path}")
        found = match.groupdict()
        kind = found["kind"] or ("datasets" if found["data"] or found["prefix"] else "models")
        name = found["repo"] or found["name"] or found["owner"]
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not token):
            return self.refuse(401, "Repository not found", "RepoNotFound")
        if found["batch"]:
            return self.batch(json.loads(self.body))
        wanted = found["revision"] or found["rev"] or "main"
        if found["call"] == "branch":
            repo.branches[wanted] = [dict(repo.branches["main"][-1])]
            return self.reply(200)
        revision = repo.find(wanted)
        if revision is None:
            return self.refuse(404, f"no revision {wanted}", "RevisionNotFound")
        if found["file"] is not None:
            return self.resolve(repo, revision, found["file"])
        return self.call(found["call"], repo, kind, name, revision, found["path"] or "")

    do_GET = do_HEAD = do_POST = do_PUT = handle_call

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        kind = f"{wanted.get('type') or 'model'}s"
        exists = (kind, name) in self.hub.repos
        if not exists:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repos[kind, name] = Repo(bool(private))
        prefix = "" if kind == "models" else f"{kind}/"
        self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name})

    def batch(self, wanted: dict) -> None:
        objects = []
        for item in wanted["objects"]:
            known = item["oid"] in self.hub.blobs
            action = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}", "header": {}}}
            objects.append({**item, **({} if known else {"actions": action})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.hub.dropped_uploads:
            self.hub.dropped_uploads -= 1
            self.close_connection = True
            return self.connection.close()
        if self.hub.allowed_uploads is not None and len(self.hub.uploads) >= self.hub.allowed_uploads:
            return self.refuse(400, "no more for now")
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.hub.uploads.append(oid)
        self.reply(200)

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        data = repo.branches[revision][-1].get(path)
        commit = repo.commit_id(revision)
        if data is None:
            return self.reply(404, {"error": path}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.reply(200, data, ETag=etag, X_Repo_Commit=commit, Content_Type="application/octet-stream")

    def call(self, call: str | None, repo: Repo, kind: str, name: str, revision: str, path: str) -> None:
        files = repo.branches[revision][-1]
        if call == "preupload":
            asked = json.loads(self.body)["files"]
            modes = {item["path"]: "regular" if item["path"].endswith(TEXT) else "lfs" for item in asked}
            chosen = [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]
            return self.reply(200, {"files": chosen})
        if call == "commit":
            return self.commit(repo, kind, name, revision)
        if call == "commits":
            commit = {"id": repo.commit_id(revision), "title": "", "message": "", "authors": []}
            return self.reply(200, [{**commit, "date": "2026-01-01T00:00:00.000Z"}])
        if call == "tree":
            inside = {p: data for p, data in files.items() if p.startswith(f"{path}/" if path else "")}
            if path and not inside:
                return self.refuse(404, f"{path} is not there", "EntryNotFound")
            return self.reply(200, self.entries(inside, path))
        if call == "paths-info":
            asked = (
                json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
            )
            folders = {p for p in asked if any(f.startswith(f"{p}/") for f in files)}
            found = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)]
            return self.reply(200, found + [self.entry(p, files[p]) for p in asked if p in files])
        commit, siblings = repo.commit_id(revision), [{"rfilename": p} for p in files]
        about = {"_id": "0" * 24, "id": name, "private": repo.private, "sha": commit, "siblings": siblings}
        self.reply(200, {**about, "tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"})

    @staticmethod
    def entry(path: str, data: bytes) -> dict:
        found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if not path.endswith(TEXT):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def entries(self, inside: dict[str, bytes], folder: str) -> list[dict]:
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return [self.entry(p, data) for p, data in inside.items()]
        start = len(folder) + 1 if folder else 0
        folders = {p[:start] + p[start:].split("/")[0] for p in inside if "/" in p[start:]}
        found = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)]
        return found + [self.entry(p, data) for p, data in inside.items() if "/" not in p[start:]]

    def commit(self, repo: Repo, kind: str, name: str, revision: str) -> None:
        files = dict(repo.branches[revision][-1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[revision].append(files)
        commit = repo.commit_id(revision)
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.hub.url}/{prefix}{name}/commit/{commit}"
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


@pytest.fixture(scope="session")
def running_hub():
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(running_hub):
    """The server, without faults. Repositories stay from test to test, so each test uses names of its own."""
    running_hub.heal()
    running_hub.requests.clear()
    running_hub.uploads.clear()
    running_hub.blobs.clear()
    yield running_hub
    running_hub.heal()


@pytest.fixture(scope="session")
def hub_environment(running_hub, tmp_path_factory):
    """A function that gives the environment of a client process; keyword arguments add variables."""

    def environment(**extra: str) -> dict[str, str]:
        dropped = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        own = {
            "HF_ENDPOINT": running_hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path_factory.getbasetemp() / "client_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "NO_PROXY": "127.0.0.1",
        }
        return {**kept, **own, **extra}

    return environment


WORKER = """
import contextlib, io, json, logging, runpy, sys, traceback

replies = sys.stdout
logging.basicConfig(level=logging.INFO)
for line in sys.stdin:
    script, arguments = json.loads(line)
    said, error, value = io.StringIO(), None, None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            value = runpy.run_path(script, init_globals=arguments).get("result")
        except SystemExit as end:
            error = f"exit {end.code}"
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([error, value, said.getvalue()]), file=replies, flush=True)
"""


class Client:
    """A process with the real client that runs one script after another, since importing transformers takes long."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.log = folder, folder / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.said, self.number = "", 0

    def attempt(self, code: str, **arguments) -> tuple[str | None, object, str]:
        """Runs `code` with `arguments` as its globals: `(error or None, what it left in result, what it said)`."""
        self.number += 1
        script = self.folder / f"script_{self.number}.py"
        script.write_text(code)
        self.process.stdin.write(json.dumps([str(script), arguments], default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        error, value, said = json.loads(line)
        self.said += said
        return error, value, said

    def __call__(self, code: str, **arguments):
        """Like `attempt`, for code that must not fail; returns its result."""
        error, value, said = self.attempt(code, **arguments)
        assert error is None, f"{said}\n{error}"
        return value

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def client(hub_environment, tmp_path_factory):
    """A client process that can import this project and is logged in."""
    client = Client(tmp_path_factory.mktemp("client"), hub_environment(PYTHONPATH=str(REPOSITORY)))
    yield client
    client.close()


@pytest.fixture(scope="session")
def fresh_process(hub_environment, tmp_path_factory):
    """A function that runs code in a process of its own in which this project cannot be imported."""
    packages = [path.name for path in REPOSITORY.iterdir() if (path / "__init__.py").is_file()]
    block = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    check = (
        f"\nstray = [m for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').startswith("
        f"{str(REPOSITORY)!r}) and '.venv' not in m.__file__]\nassert not stray, stray\n"
    )

    def run(code: str, **extra: str) -> str:
        folder = tmp_path_factory.mktemp("fresh")
        (folder / "script.py").write_text(block + code + check)
        done = subprocess.run(
            [sys.executable, "-P", "script.py"],
            cwd=folder,
            env=hub_environment(**extra),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder with an untrained RICE of a few thousand weights and its processor."""
    import torch

    from modeling_rice import RiceConfig, RiceModel
    from processing_rice import build_processor, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    RiceModel(RiceConfig(vision_config=vision, projection_dim=32, decoder_num_heads=2)).save_pretrained(folder)
    build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20), 32, 16, 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mini(tmp_path_factory):
    """A rendered mini LPR4M of four training livestreams and one test livestream."""
    from data_rice.mini_lpr4m import render_mini_lpr4m

    sizes = {"num_train_lives": 4, "num_test_lives": 1, "products_per_live": 5, "clips_per_product": 2}
    folder = tmp_path_factory.mktemp("data") / "mini"
    return render_mini_lpr4m(folder, **sizes, num_frames=3, image_size=32, num_workers=1, progress=False)
