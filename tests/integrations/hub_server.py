"""A hub on this machine: an HTTP server that speaks the part of the hub's API that huggingface_hub uses for models.

It is a process of its own that can be killed and started again: repositories, blobs, the log of requests and what it
was told to do wrong lie in its folder. `python hub_server.py FOLDER PORT`.
"""

# ruff: noqa: N815, RET502, RET503  names of http.server; `return self._answer(...)` ends a handler

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

if TYPE_CHECKING:
    import pytest

TOKEN, READ_TOKEN, OWNER = "hf_" + "planted" * 5, "hf_" + "reading" * 5, "me"
FOLDERS = ("repos", "blobs")  # of the server's own
LARGE = (".safetensors",)  # goes to large-file storage, like files of more than 10 MB


def use_hub(url: str, patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask the hub at `url`, in this process and those it starts."""
    from huggingface_hub import constants

    patch.setenv("HF_ENDPOINT", url)
    patch.setattr(constants, "ENDPOINT", url)  # read from the environment once, at import
    place = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)


class Hub:
    """The server's process, seen from a test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def empty(self) -> Hub:
        """Without repositories, orders and a log of requests, whether it runs or not."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in FOLDERS:
            (self.folder / name).mkdir()
        return self

    def start(self) -> Hub:
        """Start its process, unless it runs."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, __file__, str(self.folder), str(self.port)]
            self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                urlopen(f"{self.url}/alive", timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return self
        raise RuntimeError("the hub does not start")

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return int(self._process.pid)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def order(self, *orders: dict[str, Any]) -> None:
        """What to do wrong: {"on": regex of 'METHOD path', "status" or "drop" or "until": ..., "times": n}.

        `until` is a file: the answer waits until it exists.
        """
        (self.folder / "orders.json").write_text(json.dumps(orders))

    def is_obeying(self) -> bool:
        """Whether it has begun to do all that was ordered."""
        return not any(order["times"] for order in json.loads((self.folder / "orders.json").read_text() or "[]"))

    def requests(self, pattern: str = "") -> list[dict[str, Any]]:
        log = self.folder / "requests.jsonl"
        text = log.read_text() if log.exists() else ""
        lines = [
            json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")
        ]  # not one half written
        return [line for line in lines if re.search(pattern, line["request"])]

    def uploads(self) -> Counter[str]:
        """How often each large blob was stored, by sha256."""
        return Counter(r["request"].split("/")[-1] for r in self.requests("^PUT") if r["status"] == 200)

    def repo(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / "repos" / f"{name.replace('/', '--')}.json").read_text())
        return values

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repo = self.repo(name)
        entries = repo["commits"][repo["branches"][branch]]["files"]
        return {path: (self.folder / "blobs" / (e["sha256"] or e["oid"])).read_bytes() for path, e in entries.items()}


class Store:
    """Repositories and blobs in a folder; one request at a time changes them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        for name in FOLDERS:
            (folder / name).mkdir(exist_ok=True)

    def path(self, repo: str) -> Path:
        return self.folder / "repos" / f"{repo.replace('/', '--')}.json"

    def load(self, repo: str) -> Any:
        return json.loads(self.path(repo).read_text()) if self.path(repo).exists() else None

    def save(self, repo: str, values: dict[str, Any]) -> None:
        part = self.path(repo).with_suffix(".part")
        part.write_text(json.dumps(values))
        part.rename(self.path(repo))

    def blob(self, name: str) -> Path:
        return self.folder / "blobs" / name

    def put(self, name: str, content: bytes) -> None:
        part = self.blob(f"{name}.{threading.get_ident()}.part")
        part.write_bytes(content)
        part.rename(self.blob(name))

    def commit(self, values: dict[str, Any], branch: str, title: str, files: dict[str, Any]) -> str:
        parent = values["branches"].get(branch)
        sha = hashlib.sha1(json.dumps([parent, title, files]).encode()).hexdigest()
        values["commits"][sha] = {"parent": parent, "title": title, "files": files}
        values["branches"][branch] = sha
        return sha


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        self.place = unquote(urlsplit(self.path).path)
        self.request_name = f"{self.command} {self.place}"
        order = self._order()
        if "until" in order:
            self.rfile.read(int(self.headers.get("content-length", 0)) // 2)
            while not Path(order["until"]).exists():
                time.sleep(0.02)
        if "drop" in order:
            self._log(0)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if "status" in order:
            return self._answer(order["status"], {"error": "told so"}, order.get("headers", {}))
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, self.request_name):
                with self.store.lock:
                    getattr(self, method)(*found.groups())
                    return None
        return self._answer(404, {"error": "no such place"})

    def _order(self) -> dict[str, Any]:
        """The first order for this request that is not used up."""
        path = self.store.folder / "orders.json"
        with self.store.lock:
            orders = json.loads(path.read_text()) if path.exists() else []
            for order in orders:
                if order["times"] and re.search(order["on"], self.request_name):
                    order["times"] -= 1
                    path.write_text(json.dumps(orders))
                    return dict(order)
        return {}

    def _log(self, status: int) -> None:
        line = {"request": self.request_name, "status": status, "body": getattr(self, "body", b"").decode("latin-1")}
        with (self.store.folder / "requests.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._log(status)
        self.send_response(status)
        for name, text in {"content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _may(self, repo: str | None, write: bool) -> bool:
        """Whether the request is allowed; else it is answered."""
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        values = self.store.load(repo) if repo else None
        if token and token not in (TOKEN, READ_TOKEN):
            self._answer(401, {"error": "no"}, {"x-error-message": "Invalid credentials in Authorization header"})
        elif write and token != TOKEN:
            self._answer(403, {"error": "no"}, {"x-error-message": "You need write permission"})
        elif repo and (values is None or (values["private"] and not token)):
            self._answer(401 if not token else 404, {"error": "no"}, {"x-error-code": "RepoNotFound"})
        else:
            return True
        return False

    def alive(self) -> None:
        self._answer(200, {})

    def create(self) -> None:
        if not self._may(None, write=True):
            return
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            return self._answer(403, {"error": "no"}, {"x-error-message": "You don't have the rights"})
        if self.store.load(repo):
            return self._answer(409, {"url": f"http://{self.headers['host']}/{repo}"})
        values = {"private": asked.get("visibility") == "private", "branches": {}, "commits": {}}
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.store.put(git_blob(attributes), attributes)
        entry = {"oid": git_blob(attributes), "size": len(attributes), "sha256": None}
        self.store.commit(values, "main", "initial commit", {".gitattributes": entry})
        self.store.save(repo, values)
        self._answer(200, {"url": f"http://{self.headers['host']}/{repo}"})

    def branch(self, repo: str, name: str) -> None:
        if self._may(repo, write=True):
            values = self.store.load(repo)
            if name in values["branches"]:
                return self._answer(409, {"error": "it is there"})
            values["branches"][name] = values["branches"]["main"]
            self.store.save(repo, values)
            self._answer(200, {})

    def validate_yaml(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, branch: str) -> None:
        if self._may(repo, write=True):
            files = {path: entry["sha256"] or entry["oid"] for path, entry in self._files(repo, branch).items()}
            answer = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) or file["size"] > 10_000_000 else "regular",
                    "shouldIgnore": False,
                    "oid": files.get(file["path"]),
                }
                for file in json.loads(self.body)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": answer})

    def lfs_batch(self, repo: str) -> None:
        if self._may(repo, write=True):
            objects = []
            for asked in json.loads(self.body)["objects"]:
                upload = {"href": f"http://{self.headers['host']}/lfs/{asked['oid']}"}
                verify = {"href": f"http://{self.headers['host']}/{repo}.git/info/lfs/verify"}
                has = self.store.blob(asked["oid"]).exists()
                objects.append(asked if has else {**asked, "actions": {"upload": upload, "verify": verify}})
            self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "another content than its sha256 says"})
        self.store.put(oid, self.body)
        self._answer(200, {})

    def lfs_verify(self, repo: str) -> None:
        if self._may(repo, write=True):
            asked = json.loads(self.body)
            blob = self.store.blob(asked["oid"])
            good = blob.exists() and blob.stat().st_size == asked["size"]
            self._answer(200 if good else 404, {})

    def commit(self, repo: str, branch: str) -> None:
        if not self._may(repo, write=True):
            return
        files, title = dict(self._files(repo, branch)), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                content = base64.b64decode(value["content"])
                self.store.put(git_blob(content), content)
                files[value["path"]] = {"oid": git_blob(content), "size": len(content), "sha256": None}
            elif item["key"] == "lfsFile":
                if not self.store.blob(value["oid"]).exists():
                    return self._answer(400, {"error": f"the large file {value['path']} was not uploaded"})
                pointer = git_blob(f"version 1\noid sha256:{value['oid']}\nsize {value['size']}\n".encode())
                files[value["path"]] = {"oid": pointer, "size": value["size"], "sha256": value["oid"]}
            elif item["key"] == "deletedFolder":
                doomed = [path for path in files if path.startswith(value["path"])]
                if not doomed:
                    return self._answer(404, {"error": "no"}, {"x-error-code": "EntryNotFound"})
                for path in doomed:
                    del files[path]
            else:
                return self._answer(400, {"error": f"what is {item['key']}?"})
        values = self.store.load(repo)
        sha = self.store.commit(values, branch, title, files)
        self.store.save(repo, values)
        self._answer(200, {"commitUrl": f"http://{self.headers['host']}/{repo}/commit/{sha}", "commitOid": sha})

    def tree(self, repo: str, revision: str) -> None:
        if self._may(repo, write=False) and (files := self._known(repo, revision)) is not None:
            self._answer(200, [_entry(path, entry) for path, entry in files.items()])

    def info(self, repo: str, revision: str | None = None) -> None:
        if self._may(repo, write=False) and (files := self._known(repo, revision or "main")) is not None:
            values = self.store.load(repo)
            sha = values["branches"].get(revision or "main", revision)
            siblings = [{"rfilename": path} for path in files]
            self._answer(200, {"id": repo, "sha": sha, "private": values["private"], "siblings": siblings})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if self._may(repo, write=False) and (files := self._known(repo, revision)) is not None:
            if path not in files:
                return self._answer(404, {"error": "no"}, {"x-error-code": "EntryNotFound"})
            entry = files[path]
            name = entry["sha256"] or entry["oid"]
            headers = {"etag": f'"{name}"', "x-repo-commit": self.store.load(repo)["branches"].get(revision, revision)}
            self._answer(200, self.store.blob(name).read_bytes(), headers)

    def _known(self, repo: str, revision: str) -> dict[str, Any] | None:
        values = self.store.load(repo)
        if revision not in values["branches"] and revision not in values["commits"]:
            self._answer(404, {"error": "no"}, {"x-error-code": "RevisionNotFound"})
            return None
        return self._files(repo, revision)

    def _files(self, repo: str, revision: str) -> dict[str, Any]:
        values = self.store.load(repo)
        files: dict[str, Any] = values["commits"][values["branches"].get(revision, revision)]["files"]
        return files


def _entry(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    values = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    if entry["sha256"]:
        values["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
    return values


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "GET /alive": "alive",
    "POST /api/repos/create": "create",
    "POST /api/validate-yaml": "validate_yaml",
    f"POST /api/models/{REPO}/branch/(.+)": "branch",
    f"POST /api/models/{REPO}/preupload/(.+)": "preupload",
    f"POST /api/models/{REPO}/commit/(.+)": "commit",
    f"GET /api/models/{REPO}/tree/(.+)": "tree",
    f"GET /api/models/{REPO}/revision/(.+)": "info",
    f"GET /api/models/{REPO}": "info",
    f"POST /{REPO}[.]git/info/lfs/objects/batch": "lfs_batch",
    f"POST /{REPO}[.]git/info/lfs/verify": "lfs_verify",
    "PUT /lfs/([0-9a-f]{64})": "lfs_put",
    f"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)": "resolve",
}

if __name__ == "__main__":
    Handler.store = Store(Path(sys.argv[1]))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
