"""A Hub to test with: repositories, commits and files of the Hugging Face Hub's protocol, as much as huggingface_hub asks for, in this process."""

import base64
import hashlib
import json
import logging
from contextlib import contextmanager
from threading import Thread

from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server


class Hub:
    """What the server holds.

    `commits` is the history of every repository, oldest first: a hash, a title and all files by path; `visibility` what its maker wanted. With
    `refuse`, a number and a status, it takes so many commits more and answers the next ones with the status. `asked` is every request.
    """

    def __init__(self):
        self.commits, self.visibility, self.asked, self.refuse = {}, {}, [], None
        self.url = ""

    def create(self, repository, files=()):
        self.commits[repository] = []
        return self.commit(repository, "initial commit", {".gitattributes": b"", **dict(files)})

    def commit(self, repository, title, files):
        history = self.commits[repository]
        whole = {**(history[-1][2] if history else {}), **files}
        oid = hashlib.sha1(f"{repository} {len(history)} {title}".encode()).hexdigest()
        history.append((oid, title, whole))
        return oid

    def titles(self, repository):
        return [title for _, title, _ in self.commits[repository]]

    def at(self, repository, revision):
        """The commit of a revision, or the answer that there is none."""
        if repository not in self.commits:
            return _missing("RepoNotFound")
        found = [each for each in self.commits[repository] if revision in (each[0], "main")]
        return found[-1] if found else _missing("RevisionNotFound")


def _missing(code):
    return Response(code, 404, {"X-Error-Code": code, "X-Error-Message": code})


def _entry(path, data):
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def _tree(files, folder, recursive):
    """Entries below a folder, None where there is no such folder."""
    start = f"{folder}/" if folder else ""
    inside = {path: data for path, data in files.items() if path.startswith(start)}
    if folder and not inside:
        return None
    parts = [path.removeprefix(start).split("/") for path in inside]
    folders = {start + "/".join(each[:depth]) for each in parts for depth in range(1, len(each))}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    entries += [_entry(path, data) for path, data in inside.items()]
    return [each for each in entries if recursive or "/" not in each["path"].removeprefix(start)]


def application(hub):
    app = Flask("hub")
    api = "/api/<any(models, datasets):kind>/<user>/<name>"

    @app.before_request
    def _asked():
        hub.asked.append(f"{request.method} {request.path}")

    @app.post("/api/repos/create")
    def create():
        body = request.json
        kind = f"{body.get('type') or 'model'}s"
        repository = (kind, f"{body['organization']}/{body['name']}")
        if repository in hub.commits:
            return jsonify(error="You already created this model repo", url=f"{hub.url}/{repository[1]}"), 409
        hub.create(repository)
        hub.visibility[repository] = body.get("visibility", "public")
        return jsonify(url=f"{hub.url}/{repository[1]}", name=repository[1])

    @app.get(api)
    @app.get(f"{api}/revision/<path:revision>")
    def info(kind, user, name, revision="main"):
        found = hub.at((kind, f"{user}/{name}"), revision)
        if isinstance(found, Response):
            return found
        return jsonify(id=f"{user}/{name}", modelId=f"{user}/{name}", sha=found[0], private=True, tags=[], downloads=0, likes=0, siblings=[])

    @app.get(f"{api}/tree/<revision>")
    @app.get(f"{api}/tree/<revision>/<path:folder>")
    def tree(kind, user, name, revision, folder=""):
        found = hub.at((kind, f"{user}/{name}"), revision)
        if isinstance(found, Response):
            return found
        listed = _tree(found[2], folder, request.args.get("recursive") == "true")
        if listed is None:
            return _missing("EntryNotFound")
        start, page = int(request.args.get("cursor", 0)), 7
        answer = jsonify(listed[start : start + page])
        if start + page < len(listed):
            recursive = request.args.get("recursive")
            answer.headers["Link"] = f'<{hub.url}{request.path}?recursive={recursive}&cursor={start + page}>; rel="next"'
        return answer

    @app.get("/<user>/<name>/resolve/<revision>/<path:path>")
    @app.get("/<any(datasets):kind>/<user>/<name>/resolve/<revision>/<path:path>")
    def resolve(user, name, revision, path, kind="models"):
        found = hub.at((kind, f"{user}/{name}"), revision)
        if isinstance(found, Response):
            return found
        if path not in found[2]:
            return _missing("EntryNotFound")
        answer = Response(found[2][path], mimetype="application/octet-stream")
        answer.set_etag(_entry(path, found[2][path])["oid"])
        answer.headers["X-Repo-Commit"] = found[0]
        answer.accept_ranges = "bytes"
        return answer.make_conditional(request, accept_ranges=True, complete_length=len(found[2][path]))

    @app.post(f"{api}/preupload/<revision>")
    def preupload(kind, user, name, revision):
        found = hub.at((kind, f"{user}/{name}"), revision)
        if isinstance(found, Response):
            return found
        return jsonify(files=[{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in request.json["files"]])

    @app.post(f"{api}/commit/<revision>")
    def commit(kind, user, name, revision):
        repository = (kind, f"{user}/{name}")
        found = hub.at(repository, revision)
        if isinstance(found, Response):
            return found
        if hub.refuse is not None:
            left, status = hub.refuse
            if not left:
                return jsonify(error="not now"), status
            hub.refuse = (left - 1, status)
        lines = [json.loads(line) for line in request.data.splitlines()]
        (header,) = (each["value"] for each in lines if each["key"] == "header")
        if revision != "main":
            return jsonify(error="you can only commit to a branch"), 400
        if header.get("parentCommit") not in (None, found[0]):
            return jsonify(error="the repository has moved on"), 412
        added = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"}
        assert len(added) == len(lines) - 1, "nothing but files is added"
        oid = hub.commit(repository, header["summary"], added)
        return jsonify(success=True, commitOid=oid, commitUrl=f"{hub.url}/{user}/{name}/commit/{oid}")

    return app


@contextmanager
def serving():
    """A Hub that listens at its `url`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    hub = Hub()
    server = make_server("127.0.0.1", 0, application(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
