"""A server that speaks Google Cloud Storage's JSON protocol on a loopback port, with faults.

    with BucketServer() as server:
        subprocess.run(command, env=server.environment)  # gs://bar exists

Objects are kept in memory. Writes honor `ifGenerationMatch`, as a lease requires. To try something
by hand, run `python tests/bucket_server.py`, which prints the environment to set.
"""

import dataclasses
import email.parser
import email.policy
import hashlib
import http.server
import itertools
import json
import os
import re
import threading
import time
import urllib.parse

BUCKET = "bar"
NO_PROXY = "127.0.0.1,localhost"


@dataclasses.dataclass
class Faults:
    """What goes wrong; may be changed while the server runs.

    Attributes:
        error_every: every n-th request is answered 503; 0: none.
        drop_every: the connection of every n-th request is closed without an answer; 0: none.
        is_gone: nothing is answered.
        denied: every request is answered with this status, 401 or 403; 0: none.
        read_only: writes are answered 403.
    """

    error_every: int = 0
    drop_every: int = 0
    is_gone: bool = False
    denied: int = 0
    read_only: bool = False


class BucketServer:
    """The server, in threads of this process.

    Attributes:
        objects: {name: Object} of the bucket.
        faults: what goes wrong.
        url: such as http://127.0.0.1:9023.
        num_requests, num_faults: counts.
    """

    def __init__(self, port: int = 0):
        self.objects, self.faults = {}, Faults()
        self.uploads = {}  # id -> (name, query) of resumable uploads
        self.num_requests = self.num_faults = 0
        self.lock = threading.Lock()
        self.generations = itertools.count(time.time_ns() // 1000)
        handler = type("BoundHandler", (Handler,), {"bucket": self})
        self.server = Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that let gcsfs and TensorStore find the server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_HOST": "127.0.0.1:1",  # or they look for a cloud's credentials
            "NO_PROXY": NO_PROXY,
            "no_proxy": NO_PROXY,
        }

    def clear(self) -> None:
        """Removes all objects, and lets nothing go wrong."""
        self.objects, self.faults, self.num_requests, self.num_faults = {}, Faults(), 0, 0

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of the objects that begin with a prefix, in order."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name].content

    def write(self, name: str, content: bytes, query: dict) -> "Object | None":
        """Writes an object; returns None if the request's precondition fails."""
        with self.lock:
            existing = self.objects.get(name)
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != (existing.generation if existing else 0):
                return None
            self.objects[name] = Object(name, content, next(self.generations))
            return self.objects[name]


class Server(http.server.ThreadingHTTPServer):
    """Serves each connection in a thread; clients that are killed don't matter to it."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass


@dataclasses.dataclass
class Object:
    name: str
    content: bytes
    generation: int
    updated: str = dataclasses.field(
        default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    )

    def as_json(self) -> dict:
        return {
            "kind": "storage#object",
            "name": self.name,
            "bucket": BUCKET,
            "id": f"{BUCKET}/{self.name}/{self.generation}",
            "generation": str(self.generation),
            "metageneration": "1",
            "size": str(len(self.content)),
            "timeCreated": self.updated,
            "updated": self.updated,
            "contentType": "application/octet-stream",
            "etag": hashlib.md5(self.content).hexdigest(),
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request after another of a connection; `bucket` is the server's."""

    protocol_version = "HTTP/1.1"
    bucket: BucketServer

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(6, 1, True)  # TCP_NODELAY

    def answer(self):
        """Reads a request, and answers it or lets it fail."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = self.read_chunks()
        path, _, query = self.path.partition("?")
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(query).items()}
        if self.fails():
            return
        self.route(path, query, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def fails(self) -> bool:
        """Whether the request meets with a fault, which is then sent."""
        bucket, faults = self.bucket, self.bucket.faults
        with bucket.lock:
            bucket.num_requests += 1
            number = bucket.num_requests
        writes = self.command != "GET"
        if faults.is_gone or (faults.drop_every and number % faults.drop_every == 0):
            self.close_connection = True
        elif faults.error_every and number % faults.error_every == 0:
            self.error(503, "Backend Error")
        elif faults.denied:
            who = "Anonymous caller" if faults.denied == 401 else "somebody@example.com"
            self.error(faults.denied, f"{who} does not have storage.objects.get access.")
        elif faults.read_only and writes:
            self.error(403, "somebody@example.com does not have storage.objects.create access.")
        else:
            return False
        with bucket.lock:
            bucket.num_faults += 1
        return True

    def route(self, path: str, query: dict, content: bytes) -> None:
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(match[1], query, content)
        if match := re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path):
            name = match[2] and urllib.parse.unquote(match[2].partition("/rewriteTo/")[0])
            if match[1] != BUCKET:
                return self.error(404, "The specified bucket does not exist.")
            if "/rewriteTo/" in path:
                return self.copy(name, path.partition("/rewriteTo/")[2])
            if name is not None:
                return self.object(name, query)
            return self.list(query) if path.rstrip("/").endswith("/o") else self.describe()
        return self.error(404, f"Not Found: {path}")

    def describe(self) -> None:
        self.send_json({"kind": "storage#bucket", "name": BUCKET, "location": "US"})

    def object(self, name: str, query: dict) -> None:
        """Reads, describes or removes an object."""
        found = self.bucket.objects.get(name)
        if found is None:
            return self.error(404, f"No such object: {BUCKET}/{name}")
        if self.command == "DELETE":
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != found.generation:
                return self.error(412, "Precondition Failed")
            with self.bucket.lock:
                self.bucket.objects.pop(name, None)
            return self.send(204, b"")
        if query.get("alt") != "media" and not self.path.startswith("/download"):
            return self.send_json(found.as_json())
        if query.get("ifGenerationNotMatch") == str(found.generation):
            return self.send(304, b"")
        return self.send_content(found)

    def send_content(self, found: Object) -> None:
        """Sends an object, or the range of it that was asked for."""
        headers, content = {"x-goog-generation": str(found.generation)}, found.content
        if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            start = int(span[1]) if span[1] else size - int(span[2])
            end = int(span[2]) + 1 if span[1] and span[2] else size
            if start >= size:
                return self.error(416, "Requested range not satisfiable")
            headers["Content-Range"] = f"bytes {start}-{min(end, size) - 1}/{size}"
            return self.send(206, content[start:end], headers)
        return self.send(200, content, headers)

    def list(self, query: dict) -> None:
        """Lists objects, and with a delimiter the folders, that begin with a prefix."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        for name in self.bucket.names(prefix):
            if name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                continue
            folder, has_more, _ = name[len(prefix) :].partition(delimiter or "\0")
            if delimiter and has_more:
                folders.add(f"{prefix}{folder}{delimiter}")
            elif found := self.bucket.objects.get(name):
                items.append(found.as_json())
        found = sorted(items, key=lambda item: item["name"])
        start, limit = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
        page = {"kind": "storage#objects", "items": found[start : start + limit]}
        if start == 0 and folders:
            page["prefixes"] = sorted(folders)
        if start + limit < len(found):
            page["nextPageToken"] = str(start + limit)
        self.send_json(page)

    def upload(self, bucket: str, query: dict, content: bytes) -> None:
        """Takes a simple, a multipart or a resumable upload."""
        if bucket != BUCKET:
            return self.error(404, "The specified bucket does not exist.")
        if upload_id := query.get("upload_id"):
            return self.resume_upload(upload_id, content)
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "resumable":
            upload_id = str(next(self.bucket.generations))
            name = name or json.loads(content)["name"]
            self.bucket.uploads[upload_id] = (name, query, bytearray())
            location = f"{self.bucket.url}{self.path.partition('?')[0]}?upload_id={upload_id}"
            return self.send(200, b"", {"Location": location})
        if kind == "multipart":
            header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.parser.BytesParser(policy=email.policy.HTTP)
            metadata, data = message.parsebytes(header + content).iter_parts()
            name = name or json.loads(metadata.get_payload(decode=True))["name"]
            content = data.get_payload(decode=True)
        return self.finish_upload(name, content, query)

    def resume_upload(self, upload_id: str, content: bytes) -> None:
        """Takes a part of a resumable upload."""
        name, query, received = self.bucket.uploads[upload_id]
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        if span[1]:
            received[int(span[1]) :] = content
        if span[2] in ("*", None) or len(received) < int(span[2]):
            last = {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
            return self.send(308, b"", last)
        return self.finish_upload(name, bytes(received), query)

    def finish_upload(self, name: str, content: bytes, query: dict) -> None:
        written = self.bucket.write(name, content, query)
        if written is None:
            return self.error(412, "At least one of the pre-conditions you specified did not hold.")
        return self.send_json(written.as_json())

    def copy(self, name: str, target: str) -> None:
        found = self.bucket.objects.get(name)
        if found is None:
            return self.error(404, f"No such object: {BUCKET}/{name}")
        target = urllib.parse.unquote(target.partition("/o/")[2])
        written = self.bucket.write(target, found.content, {})
        return self.send_json({"done": True, "resource": written.as_json()})

    def error(self, status: int, message: str) -> None:
        error = {"code": status, "message": message, "errors": [{"message": message}]}
        self.send(status, json.dumps({"error": error}).encode())

    def send_json(self, content: dict) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    with BucketServer(int(os.environ.get("PORT", 9023))) as running:
        for variable, value in running.environment.items():
            print(f"export {variable}={value}", flush=True)
        while True:
            time.sleep(3600)
