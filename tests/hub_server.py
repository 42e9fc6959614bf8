"""An in-memory Hub that implements what `huggingface_hub` uses to create, commit, list and download.

The real client talks to it with `HF_ENDPOINT` set to its address and `HF_HUB_DISABLE_XET=1` (files are then uploaded by
git-LFS); `connect` does so in this process. It refuses a commit that names an LFS object which was never uploaded, and
writing, or reading a private repository, without the token.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers

TOKEN = "hf_" + "t" * 34
OWNER = "me"
LFS_SUFFIXES = (".safetensors",)


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.blob_id


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch, or refs/pr/N -> commit

    def __post_init__(self) -> None:
        self.add_commit("main", {}, "initial commit")

    def add_commit(self, ref: str, files: dict[str, File], title: str) -> str:
        seed = f"{len(self.commits)} {title}"
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit], self.refs[ref] = files, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    """The server; use it as a context.

    Attributes:
        repositories: by their full names.
        uploaded: the LFS objects that arrived, by their sha256.
        log: (method, path) of every request.
        before: called with (method, path) before a request is answered; raise `Refused` to refuse it, or ConnectionError to
            hang up without an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        commit = repository.resolve(revision)
        assert commit is not None, revision
        return {name: file.content for name, file in repository.commits[commit].items()}

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        self.server_close()


def connect(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a client of the server, with its token."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # transformers keeps a client of the first address
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        self.server.log.append((self.command, url.path))
        try:
            self.server.before(self.command, url.path)
            with self.server.lock:
                content, headers = self._route(
                    [unquote(part) for part in url.path.split("/")[1:]], parse_qs(url.query), body
                )
            status = 200
        except ConnectionError:
            self.close_connection = True
            return
        except Refused as refused:
            status, headers = refused.status, {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            content = refused.__dict__.get("content", {"error": str(refused)})
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # -- routes ----------------------------------------------------------------------------------------------------------

    def _route(self, path: list[str], query: dict[str, list[str]], body: bytes) -> tuple[Any, dict[str, str]]:
        match path:
            case ["api", "whoami-v2"]:
                return {"name": OWNER, "type": "user", "orgs": []}, {}
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}, {}
            case ["api", "repos", "create"]:
                return self._create(json.loads(body)), {}
            case ["api", "models", owner, name, *rest]:
                return self._api(f"{owner}/{name}", rest, query, body), {}
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._writable(f"{owner}/{name.removesuffix('.git')}")
                return self._batch(json.loads(body)), {}
            case ["lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise Refused(400, message="the object is not what its name says")
                self.server.uploaded[oid] = body
                return {}, {}
            case [owner, name, "resolve", revision, *parts]:
                return self._download(f"{owner}/{name}", revision, "/".join(parts))
        raise Refused(404, message=f"no such address: {path}")

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        self._token()
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.server.address}/{name}"}
        if name in self.server.repositories:
            conflict = Refused(409, message="You already created this model repo")
            conflict.content = url  # type: ignore[attr-defined]
            raise conflict
        self.server.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        return url

    def _api(self, repo_id: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> Any:
        match rest:
            case [] | ["revision", _]:
                repository, commit = self._commit(repo_id, rest[1] if rest else "main")
                names = [{"rfilename": name} for name in repository.commits[commit]]
                return {"id": repo_id, "sha": commit, "private": repository.private, "siblings": names, "tags": []}
            case ["refs"]:
                refs = [
                    {"name": name, "ref": name, "targetCommit": commit}
                    for name, commit in self._readable(repo_id).refs.items()
                ]
                pulls = [ref for ref in refs if ref["name"].startswith("refs/pr/")]
                return {
                    "branches": [ref for ref in refs if ref not in pulls],
                    "converts": [],
                    "tags": [],
                    "pullRequests": pulls,
                }
            case ["branch", branch]:
                repository = self._writable(repo_id)
                if branch in repository.refs:
                    raise Refused(409, message="Reference already exists")
                repository.refs[branch] = repository.refs["main"]
                return {}
            case ["tree", revision, *parts]:
                return self._tree(repo_id, revision, "/".join(parts))
            case ["preupload", revision]:
                return self._preupload(repo_id, revision, json.loads(body))
            case ["commit", revision]:
                lines = [json.loads(line) for line in body.splitlines()]
                return self._make_commit(repo_id, revision, lines, "create_pr" in query)
        raise Refused(404, message=f"no such address: {rest}")

    def _tree(self, repo_id: str, revision: str, folder: str) -> list[dict[str, Any]]:
        repository, commit = self._commit(repo_id, revision)
        entries: list[dict[str, Any]] = []
        for name, file in repository.commits[commit].items():
            if not folder or name.startswith(f"{folder}/"):
                entry = {"type": "file", "path": name, "size": len(file.content), "oid": file.blob_id}
                entries.append(
                    entry | ({"lfs": {"size": len(file.content), "oid": file.oid, "pointerSize": 1}} if file.lfs else {})
                )
        if folder and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        return entries

    def _preupload(self, repo_id: str, revision: str, asked: dict[str, Any]) -> dict[str, Any]:
        self._writable(repo_id)
        repository, commit = self._commit(repo_id, revision)
        answers = []
        for file in asked["files"]:
            there = repository.commits[commit].get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there.oid if there else None}
            )
        return {"files": answers}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked["objects"]:
            upload = {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.server.uploaded else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def _make_commit(self, repo_id: str, revision: str, lines: list[dict[str, Any]], as_pull: bool) -> dict[str, Any]:
        repository = self._writable(repo_id)
        _, commit = self._commit(repo_id, revision)
        files, title = dict(repository.commits[commit]), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.uploaded:
                    raise Refused(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.server.uploaded[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, message=f"unknown: {key}")
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        made = repository.add_commit(f"refs/pr/{number}" if as_pull else revision, files, title)
        address = f"{self.server.address}/{repo_id}"
        pull = {"pullRequestUrl": f"{address}/discussions/{number}"} if as_pull else {}
        return {"success": True, "commitOid": made, "commitUrl": f"{address}/commit/{made}", **pull}

    def _download(self, repo_id: str, revision: str, name: str) -> tuple[bytes, dict[str, str]]:
        repository, commit = self._commit(repo_id, revision)
        file = repository.commits[commit].get(name)
        if file is None:
            raise Refused(404, "EntryNotFound", f"{name} does not exist")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        return file.content, headers

    # -- who may do what ---------------------------------------------------------------------------------------------------

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _token(self) -> None:
        if not self._has_token():
            raise Refused(401, message="Invalid username or password.")

    def _readable(self, repo_id: str) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self._has_token()):
            raise Refused(401, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        self._token()
        return self._readable(repo_id)

    def _commit(self, repo_id: str, revision: str) -> tuple[Repository, str]:
        repository = self._readable(repo_id)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit
