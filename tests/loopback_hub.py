"""A Hub on 127.0.0.1 for tests: keeps repositories in memory and answers the calls that pushing and loading make.

Every file is a "regular" file (part of the commit request), so no large-file storage is involved.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER = "tester"


class Repository:
    def __init__(self, private):
        self.private = private
        self.files = {}
        self.commits = []

    @property
    def sha(self):
        listing = "".join(f"{name}{_digest(data)}" for name, data in sorted(self.files.items()))
        return _digest(listing.encode())


def _digest(data):
    return hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def repositories(self):
        return self.server.repositories

    def _answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code):
        self._answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _serve(self):
        body = self._body()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.server.read_only and self.command == "POST":
            return self._answer({"error": "You are not allowed to write here"}, 403)
        if parts == ["api", "whoami-v2"]:
            return self._answer({"name": OWNER, "type": "user", "orgs": []})
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repository = self.repositories.get("/".join(parts[2:4]))
            if repository is None:
                return self._missing("RepoNotFound")
            return self._model_api("/".join(parts[2:4]), repository, parts[4:], body)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._missing("RepoNotFound")

    do_GET = do_HEAD = do_POST = _serve

    def _create(self, request):
        name = (
            request["name"] if "/" in request["name"] else f"{request.get('organization') or OWNER}/{request['name']}"
        )
        url = f"{self.server.address}/{name}"
        if name in self.repositories:
            return self._answer({"url": url, "error": "exists"}, 409)
        self.repositories[name] = Repository(bool(request.get("private")) or request.get("visibility") == "private")
        return self._answer({"url": url, "name": name, "id": name})

    def _model_api(self, name, repository, action, body):
        if action[:1] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if action[:1] == ["commit"]:
            return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        if action[:1] == ["tree"]:
            files = repository.files.items()
            return self._answer(
                [{"type": "file", "path": p, "size": len(data), "oid": _digest(data)} for p, data in files]
            )
        if not action or action[0] == "revision":
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            return self._answer(
                {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings, "tags": []}
            )
        return self._missing("EntryNotFound")

    def _commit(self, name, repository, operations):
        header = next(item["value"] for item in operations if item["key"] == "header")
        paths = []
        for item in operations:
            if item["key"] == "file":
                repository.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                paths.append(item["value"]["path"])
        repository.commits.append({"summary": header["summary"], "paths": sorted(paths)})
        url = f"{self.server.address}/{name}/commit/{repository.sha}"
        return self._answer({"success": True, "commitOid": repository.sha, "commitUrl": url})

    def _resolve(self, name, revision, path):
        repository = self.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound")
        if revision not in ("main", repository.sha):
            return self._missing("RevisionNotFound")
        if path not in repository.files:
            return self._missing("EntryNotFound")
        data = repository.files[path]
        return self._answer(data, X_Repo_Commit=repository.sha, ETag=f'"{_digest(data)}"')


def serve(read_only=False):
    """Starts the server in a thread; returns it (`.address`, `.repositories`, `.shutdown()`)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.read_only = {}, read_only
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
