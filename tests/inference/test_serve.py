"""The server: answers, refusals, stopping, and its page in a browser."""

import base64
import contextlib
import http.client
import io
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from published import random_model

import vit_jax
from vit_jax.inference import export, serve
from vit_jax.inference.serve import command, service

for package in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(package)

NAMES = ("<img src=x onerror=document.title='run'>", *"bcdefghij")
LIMITS = serve.Limits(
    max_bytes=100_000, max_pixels=10_000, max_images=3, max_requests=2, max_batch=2
)


@pytest.fixture(scope="module")
def classifier():
    model, params, _ = random_model(depth=1, patch_size=16)
    return vit_jax.Classifier(model, params, (32, 32), class_names=NAMES)


@contextlib.contextmanager
def running(predictor):
    """Serves in a thread; yields the port."""
    app = serve.create_app(predictor, "a <model>", LIMITS, ["127.0.0.1", "*.example.com"])
    server = serve.create_server(app, LIMITS)
    with serve.listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(classifier):
    with running(classifier) as port:
        yield port


def request(port, method, path, body=None, **headers):
    """Returns (status, headers, contents) of a response; JSON is parsed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, response.headers, json.loads(content) if is_json else content.decode()


def multipart(**files):
    """Returns the arguments of `request` that send files, {name: contents}."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"; filename="%s.png"\r\n\r\n%s\r\n'
        % (name.encode(), name.encode(), content)
        for name, content in files.items()
    ]
    return dict(body=b"".join(parts) + b"--x--\r\n", Content_Type="multipart/form-data; boundary=x")


def noise(seed=0, size=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def assert_classes(answer, expected):
    rows = [(row["class"], row["probability"]) for row in answer["classes"]]
    assert [name for name, _ in rows] == [name for name, _ in expected]
    np.testing.assert_allclose([p for _, p in rows], [p for _, p in expected], atol=1e-6)


def test_answers_are_those_of_the_classifier(port, classifier):
    expected = classifier([noise(i) for i in range(3)], top=3)
    for i in range(3):
        status, _, answer = request(port, "POST", "/classify?top=3", encode(noise(i)))
        assert status == 200
        assert_classes(answer["images"][0], expected[i])
    files = multipart(**{f"image{i}": encode(noise(i)) for i in range(3)})
    body = files["body"]
    for files["body"] in (body, re.sub(rb' name="\w+"', b' name="image"', body)):
        status, _, answer = request(port, "POST", "/classify?top=3", **files)
        assert [image["name"] for image in answer["images"]] == [f"image{i}.png" for i in range(3)]
        for image, best in zip(answer["images"], expected, strict=True):
            assert_classes(image, best)


def test_attention_comes_with_the_view(port, classifier):
    content = encode(noise())
    _, _, answer = request(port, "POST", "/classify?attention=true", content)
    (image,) = answer["images"]
    np.testing.assert_allclose(image["attention"], classifier.attention(noise())[0], atol=1e-6)
    view = Image.open(io.BytesIO(base64.b64decode(image["view"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(view), classifier.views(noise())[0])


def test_refusals(port):
    """Each has a status and a line; a header alone is enough to refuse too many pixels."""
    png, jpeg = encode(noise()), encode(noise(), "JPEG")
    bomb = encode(np.zeros((5000, 5000), np.uint8))
    assert len(bomb) < LIMITS.max_bytes
    for path, arguments, status, message in (
        ("/classify", dict(body=b""), 400, "The image is empty"),
        ("/classify", dict(body=b"hello"), 415, "This is no image of the formats JPEG, PNG"),
        ("/classify", dict(body=jpeg[:-500]), 400, "can't be decoded: .*truncated"),
        ("/classify", dict(body=png[:100] + bytes(500) + png[600:]), 400, "can't be decoded"),
        ("/classify", dict(body=bomb[:100]), 413, "has 5000 x 5000 pixels; at most 10,000"),
        ("/classify", dict(body=bytes(10**6)), 413, "too large: at most 100,000 bytes"),
        ("/classify", dict(body=iter([bytes(10**5)] * 2)), 413, "too large"),  # of unknown length
        ("/classify", multipart(a=png, b=b"hello"), 415, "b.png: This is no image"),
        ("/classify", multipart(a=png, b=png, c=png, d=png), 400, "Maximum number of files is 3"),
        ("/classify", multipart(), 400, "The request has no files"),
        ("/classify", multipart(a=png) | dict(body=png), 400, "Invalid multipart"),
        ("/classify?top=none", dict(body=png), 400, "top is 'none'; it must be a whole number"),
        (f"/classify?top={'1' * 5000}", dict(body=png), 400, "top is '1{20}'; it must be a whole"),
        ("/classify?attention=1", dict(body=png), 400, "attention is '1'; it must be true"),
        ("/nothing", dict(body=png), 404, "Not Found"),
    ):
        got, _, answer = request(port, "POST", path, **arguments)
        assert (got, list(answer)) == (status, ["error"])
        assert re.search(message, answer["error"])
    assert request(port, "GET", "/classify")[0] == 405
    assert request(port, "POST", "/classify", png)[0] == 200  # no slot is lost


def send_half(port, content):
    """Returns a socket on which the first half of a request was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST /classify HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content[: len(content) // 2])
    return connection


def send_rest(connection, content) -> bytes:
    """Returns the start of the response to what `send_half` began."""
    with connection:
        connection.sendall(content[len(content) // 2 :])
        return connection.recv(20)


def requests_in_flight(port) -> int:
    _, _, text = request(port, "GET", "/metrics")
    return int(float(re.search(r"^vit_jax_requests_in_flight (\S+)", text, re.MULTILINE)[1]))


def is_listening(port) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionError:
        return False
    return True


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_too_many_at_once(port):
    content = encode(noise())
    open_requests = [send_half(port, content) for _ in range(LIMITS.max_requests)]
    wait_for(lambda: requests_in_flight(port) == LIMITS.max_requests)
    status, headers, answer = request(port, "POST", "/classify", content)
    assert (status, headers["retry-after"]) == (503, "1")
    assert "2 requests are being answered" in answer["error"]
    assert request(port, "GET", "/healthz")[0] == 200
    for connection in open_requests:
        assert send_rest(connection, content).startswith(b"HTTP/1.1 200")


def test_a_refused_image_leaves_no_work_outside_of_the_limit(port, monkeypatch):
    """The request counts until its other images are done too."""
    content, decode = encode(noise()), service.decode
    started, proceed, answers = threading.Event(), threading.Event(), []

    def slow_decode(file, *arguments):
        if file == content:
            started.set()
            assert proceed.wait(60)
        return decode(file, *arguments)

    monkeypatch.setattr(service, "decode", slow_decode)
    files = multipart(a=b"hello", b=content)
    client = threading.Thread(
        target=lambda: answers.append(request(port, "POST", "/classify", **files))
    )
    client.start()
    assert started.wait(60)
    for _ in range(20):  # round trips, in which the refusal would be answered
        assert requests_in_flight(port) == 1
    assert not answers
    proceed.set()
    client.join()
    assert answers[0][0] == 415
    assert requests_in_flight(port) == 0


def test_failures_are_told_in_the_log_only(port, classifier, monkeypatch, caplog):
    def fail(*_):
        raise KeyError("a secret")

    monkeypatch.setattr(type(classifier), "top_classes", fail)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    status, _, answer = request(port, "POST", "/classify", encode(noise()))
    assert (status, answer) == (500, {"error": "The server failed; its log tells why"})
    wait_for(lambda: "a secret" in caplog.text)  # logged after the answer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_is_told(classifier, monkeypatch):
    with running(classifier) as port:
        assert request(port, "GET", "/healthz")[0] == 200

        def end(batcher):
            raise MemoryError

        monkeypatch.setattr(service.Batcher, "next_batch", end)
        assert request(port, "POST", "/classify", encode(noise()))[0] == 200
        wait_for(lambda: request(port, "GET", "/healthz")[0] == 503)
        assert request(port, "POST", "/classify", encode(noise()))[0] == 500


def test_names_of_the_server(port):
    """Other names than its own may be an attack on a visitor's browser (DNS rebinding)."""
    for host, status in (
        ("127.0.0.1", 200),
        ("127.0.0.1:80", 200),
        ("a.example.com", 200),
        ("example.org", 400),
        ("127.0.0.1.example.org", 400),
    ):
        assert request(port, "GET", "/healthz", Host=host)[0] == status

    def names(*arguments):
        return command.parse_allowed_hosts(command.parse_flags(["run", *arguments]))

    own = ["localhost", "127.0.0.1", "[::1]"]
    assert names("--host=a") == [*own, "a"]
    assert names("--host=fe80::1", "--allowed_hosts=b, *.c") == [*own, "[fe80::1]", "b", "*.c"]
    assert names("--host=0.0.0.0") == ["*"]
    assert "*" not in names("--host=0.0.0.0", "--allowed_hosts=b")


def test_too_many_connections(port):
    """The limit leaves room for connections that wait, and for reasons of refusals."""
    with contextlib.ExitStack() as stack:
        for _ in range(4 * LIMITS.max_requests + 32):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        assert request(port, "GET", "/healthz")[0] == 503
    wait_for(lambda: request(port, "GET", "/healthz")[0] == 200)


def test_request_that_does_not_arrive(port, monkeypatch):
    monkeypatch.setattr(service, "READ_SECONDS", 0.1)
    with send_half(port, encode(noise())) as connection:
        assert connection.recv(20).startswith(b"HTTP/1.1 408")
    send_half(port, encode(noise())).close()  # nor does its client wait
    wait_for(lambda: requests_in_flight(port) == 0)


def test_an_exported_artifact_is_served_without_attention(classifier, tmp_path):
    export.save(classifier, tmp_path)
    with running(vit_jax.Exported.load(tmp_path)) as port:
        _, _, answer = request(port, "POST", "/classify", encode(noise()))
        assert_classes(answer["images"][0], classifier(noise())[0])
        assert request(port, "GET", "/model")[2]["attention"] is False
        status, _, answer = request(port, "POST", "/classify?attention=true", encode(noise()))
        assert (status, answer["error"][:39]) == (400, "This model is an exported artifact, whi")


def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch):
    with serve.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        for arguments, message in (
            (["a", f"--port={port}"], f"Port {port} of 127.0.0.1 is in use: give another --port"),
            (["a", "--port=70000"], "--port is 70000; it must be from 0 to 65535"),
            (["a", "--port=0", "--host=256.0.0.1"], "Can't listen on 256.0.0.1"),
            ([str(tmp_path / "none"), "--port=0"], "There is no"),
            (["a", "--max_batch=12"], "--max_batch is 12; it must be a power of two"),
            (["a", "--allowed_hosts=a*"], "--allowed_hosts has 'a*'; * may only be all or the"),
            (["a", "--max_megabytes=-1"], "--max_megabytes is -1.0; it must be a number > 0"),
        ):
            assert serve.main(arguments) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main(["a"]) == 2
    assert "the package uvicorn: pip install -r requirements-serve.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_stops_it_once_everything_is_answered(classifier, tmp_path):
    export.save(classifier, tmp_path)
    command = [sys.executable, "-m", "vit_jax.inference.serve", str(tmp_path), "--port=0"]
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            port = next(int(m[1]) for line in server.stdout if (m := re.search(r":(\d+)/$", line)))
            content = encode(noise())
            connection = send_half(port, content)
            wait_for(lambda port=port: requests_in_flight(port) == 1)
            server.send_signal(number)
            wait_for(lambda port=port: not is_listening(port))
            assert send_rest(connection, content).startswith(b"HTTP/1.1 200")
            assert server.wait(timeout=60) == 0


@pytest.mark.slow
def test_under_load():
    import load

    result = load.load_server(None, num_clients=8, seconds=8)
    assert result.right > 50
    assert result.refused > 0
    assert not result.wrong
    assert not result.lost
    assert result.memory[-1] - result.memory[-2] < 64 * 2**20
    assert result.exit_code == 0


@pytest.mark.slow
def test_the_page_in_a_browser(port, classifier, tmp_path):
    """An image that is chosen and one that is dropped; names are text, whatever is in them."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("needs chromium")
    files = [tmp_path / "a<b>.png", tmp_path / "broken.png"]
    files[0].write_bytes(encode(noise()))
    files[1].write_bytes(b"hello")
    (best, *_), errors = classifier(noise())[0], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=390, height=844))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_input_files("#files", files[0])
        page.locator("li").first.wait_for()
        assert page.locator("h2").inner_text() == "a<b>.png"
        row = page.locator("li").first.locator("span").all_inner_texts()
        assert row == [best[0], f"{best[1]:.1%}"]
        assert page.locator("canvas[role=img]").count() == 1
        assert page.title() == "a <model>"
        drop = """name => { const data = new DataTransfer(); data.items.add(new File(["x"], name));
            dispatchEvent(new DragEvent("drop", { dataTransfer: data })); }"""
        page.evaluate(drop, files[1].name)
        page.locator(".error").wait_for()
        assert "This is no image" in page.locator(".error").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert not errors
