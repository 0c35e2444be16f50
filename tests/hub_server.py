"""A small stand-in for the Hub's HTTP API on the loopback: models, files in git or by LFS, one token that may write.

It serves what `huggingface_hub` asks for without Xet (`HF_HUB_DISABLE_XET=1`), and keeps every request for a test to
look at. `HF_ENDPOINT` is its `url`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    method: str
    path: str
    headers: dict  # by lower-case names
    body: bytes


class HubServer:
    """A context in which the server runs.

    Args:
        token: what a request that writes must be authorized with.
        reading_token: one that is known, and may not write.
        refused: a regular expression; requests to paths that it is found in are answered with 403.

    Attributes:
        url: its endpoint.
        files: {repository's id: {path: content}}.
        requests: all that it was asked, in order.
    """

    def __init__(self, token, refused=None, reading_token=None):
        self.token, self.refused, self.reading_token = token, refused, reading_token
        self.files, self.objects, self.requests = {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo_id) -> str:
        """The hash of what the repository has now."""
        state = [(path, hashlib.sha1(content).hexdigest()) for path, content in sorted(self.files[repo_id].items())]
        return hashlib.sha1(json.dumps([repo_id, state]).encode()).hexdigest()

    # The API: each takes the request and its path's groups, and returns a status, an answer and headers.

    def create(self, request):
        wanted = json.loads(request.body)
        repo_id = f"{wanted['organization'] or 'you'}/{wanted['name']}"
        status = 409 if repo_id in self.files else 200
        self.files.setdefault(repo_id, {})
        return status, {"url": f"{self.url}/{repo_id}"}, {}

    def validate_card(self, request):
        return 200, {"errors": [], "warnings": []}, {}

    def choose_modes(self, request, repo_id):
        files = [
            {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if is_large(file["path"]) else "regular"}
            for file in json.loads(request.body)["files"]
        ]
        return 200, {"files": files}, {}

    def start_uploads(self, request, repo_id):
        wanted = json.loads(request.body)["objects"]
        objects = [
            one | {"actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}
            for one in wanted
            if one["oid"] not in self.objects
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, request, oid):
        self.objects[oid] = request.body
        return (200 if hashlib.sha256(request.body).hexdigest() == oid else 400), {}, {}

    def add_commit(self, request, repo_id):
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                self.files[repo_id][value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.files[repo_id][value["path"]] = self.objects[value["oid"]]
        oid = self.commit(repo_id)
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}, {}

    def describe(self, request, repo_id, revision=None):
        siblings = [{"rfilename": path} for path in sorted(self.files[repo_id])]
        return 200, {"id": repo_id, "sha": self.commit(repo_id), "siblings": siblings, "private": False}, {}

    def check_writing(self, request, repo_id):
        return 200, {}, {}

    def list_tree(self, request, repo_id, revision):
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(self.files[repo_id].items())
        ]
        return 200, entries, {}

    def serve(self, request, repo_id, revision, path):
        headers = {"X-Repo-Commit": self.commit(repo_id)}
        if path not in self.files[repo_id]:
            return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
        content = self.files[repo_id][path]
        return 200, content, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}

    REPO = r"([^/]+/[^/]+)"
    ROUTES = (
        ("POST", "/api/repos/create", create),
        ("POST", "/api/validate-yaml", validate_card),
        ("POST", f"/api/models/{REPO}/preupload/main", choose_modes),
        ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", start_uploads),
        ("PUT", "/objects/([0-9a-f]{64})", upload),
        ("POST", f"/api/models/{REPO}/commit/main", add_commit),
        ("GET", f"/api/models/{REPO}/auth-check/write", check_writing),
        ("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?", describe),
        ("GET", f"/api/models/{REPO}/tree/([^/]+)", list_tree),
        ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", serve),
    )

    def answer(self, request):
        """A status, an answer (bytes, or what is sent as JSON) and headers."""
        path, method = unquote(urlsplit(request.path).path), "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, respond in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method != route_method or match is None:
                continue
            writes = method == "POST" or respond is HubServer.check_writing
            sent = request.headers.get("authorization")
            if writes and self.reading_token is not None and sent == f"Bearer {self.reading_token}":
                return 403, {"error": "You don't have the rights to write here."}, {}
            if writes and sent != f"Bearer {self.token}":
                return 401, {"error": "Invalid username or password."}, {}
            if self.refused is not None and re.search(self.refused, path):
                return 403, {"error": "This repository is locked."}, {}
            if respond is not HubServer.create and "/" in "".join(match.groups()[:1]):
                if match.group(1) not in self.files:
                    return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            return respond(self, request, *match.groups())
        return 404, {"error": f"No such route: {request.method} {path}"}, {}


def is_large(path) -> bool:
    return path.endswith((".safetensors", ".png"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        self.hub.requests.append(request)
        status, answer, headers = self.hub.answer(request)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def log_message(self, *args):
        pass
