"""Loads the server with good and damaged images at once, and checks every answer.

    PYTHONPATH=. python tests/load.py                       # a small random model, 16 clients, 30 s
    PYTHONPATH=. python tests/load.py --run=runs/digits --clients=4 --seconds=10

One image in ten is damaged. A good one must be answered with the classes of `Classifier`, a
damaged one refused with its status, none lost. Prints the server's memory before and after.
"""

import argparse
import collections
import dataclasses
import http.client
import io
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from PIL import Image
from published import random_params, write_run
from whole_runs import ROOT, quick_config

import vit_jax
from vit_jax import models

NUM_IMAGES = 200  # different good ones
TOLERANCE = 1e-5  # of probabilities
WARM_UP_SECONDS = 5.0


@dataclasses.dataclass
class Result:
    """What the clients saw.

    Attributes:
        right: good images with the right classes.
        refused: damaged images with the right status.
        wrong: descriptions of all other answers.
        lost: descriptions of requests without an answer.
        seconds: how long each request took.
        memory: the server's resident bytes: ready, warmed up, at the end.
        exit_code: of the server, after SIGTERM.
    """

    right: int = 0
    refused: int = 0
    wrong: list = dataclasses.field(default_factory=list)
    lost: list = dataclasses.field(default_factory=list)
    seconds: list = dataclasses.field(default_factory=list)
    memory: list = dataclasses.field(default_factory=list)
    exit_code: int | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="what to serve; default: a small random model")
    parser.add_argument("--clients", type=int, default=16, help="how many send at a time")
    parser.add_argument("--seconds", type=float, default=30.0, help="for how long")
    args = parser.parse_args()
    result = load_server(args.run, args.clients, args.seconds)
    print(describe(result))
    return 1 if result.wrong or result.lost or result.exit_code else 0


def write_random_run(folder):
    """Writes a run of a small random model of color images of 32x32."""
    config = quick_config(num_classes=10, image_size=32)
    config.dataset.channels = 3
    params = random_params(models.from_config(config), (32, 32))
    return write_run(
        pathlib.Path(folder) / "run", config, class_names=tuple("abcdefghij"), params=params
    )


def load_server(run, num_clients: int, seconds: float) -> Result:
    """Starts a server, sends it images for a time, and stops it.

    Args:
        run: what to serve; None: a small random model.
        num_clients: how many send at a time.
        seconds: for how long.
    """
    if run is None:
        with tempfile.TemporaryDirectory() as folder:
            return load_server(write_random_run(folder), num_clients, seconds)
    classifier = vit_jax.Classifier.load(run)
    good, damaged = good_images(classifier), damaged_images()
    command = [sys.executable, "-m", "vit_jax.inference.serve", str(run), "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    result, end = Result(), threading.Event()
    try:
        port = next(int(m[1]) for line in server.stdout if (m := re.search(r":(\d+)/$", line)))
        result.memory.append(resident_bytes(port))
        clients = [
            threading.Thread(target=client, args=(port, seed, good, damaged, result, end))
            for seed in range(num_clients)
        ]
        for thread in clients:
            thread.start()
        warm_up = min(WARM_UP_SECONDS, seconds / 2)
        time.sleep(warm_up)
        result.memory.append(resident_bytes(port))
        time.sleep(seconds - warm_up)
        end.set()
        for thread in clients:
            thread.join()
        result.memory.append(resident_bytes(port))
        server.send_signal(signal.SIGTERM)
        result.exit_code = server.wait(timeout=60)
    finally:
        end.set()
        server.kill()
    return result


def client(port: int, seed: int, good, damaged, result: Result, end: threading.Event) -> None:
    """Sends one image after another on one connection."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not end.is_set():
        is_damaged = rng.random() < 0.1
        content, expected = rng.choice(damaged if is_damaged else good)
        start = time.perf_counter()
        try:
            connection.request("POST", "/classify", content)
            response = connection.getresponse()
            status, answer = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            result.lost.append(repr(error))
            connection.close()
            continue
        result.seconds.append(time.perf_counter() - start)
        if is_damaged and status == expected and "error" in answer:
            result.refused += 1
        elif not is_damaged and status == 200 and is_right(answer, expected):
            result.right += 1
        else:
            result.wrong.append((status, str(answer)[:200], str(expected)[:200]))


def is_right(answer: dict, expected: list[tuple[str, float]]) -> bool:
    """Whether an answer has the expected classes, in order."""
    (image,) = answer["images"]
    rows = [(row["class"], row["probability"]) for row in image["classes"]]
    names, probabilities = zip(*rows, strict=True)
    expected_names, expected_probabilities = zip(*expected, strict=True)
    close = np.allclose(probabilities, expected_probabilities, rtol=0, atol=TOLERANCE)
    return close and names == expected_names


def good_images(classifier) -> list[tuple[bytes, list]]:
    """Returns images of many sizes and formats as (file, the classifier's classes)."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(NUM_IMAGES):
        height, width = rng.integers(8, 500, 2)
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        content = encode(image, ("JPEG", "PNG", "WEBP")[i % 3])
        images.append((content, Image.open(io.BytesIO(content))))
    classes = classifier([image for _, image in images])
    return [(content, best) for (content, _), best in zip(images, classes, strict=True)]


def damaged_images() -> list[tuple[bytes, int]]:
    """Returns what isn't an image, or too large, as (contents, the status it must have)."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    jpeg, png = (encode(Image.fromarray(noise), kind) for kind in ("JPEG", "PNG"))
    bomb = encode(Image.new("1", (30_000, 30_000)), "PNG")
    return [
        (b"", 400),
        (b"hello", 415),
        (noise.tobytes(), 415),
        (jpeg[: len(jpeg) // 2], 400),
        (png[: len(png) // 2], 400),
        (png[:200] + bytes(1000) + png[1200:], 400),
        (bomb, 413),
        (bytes(17 * 2**20), 413),
    ]


def encode(image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def resident_bytes(port: int) -> int:
    """Returns the server's memory, as it reports it itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return int(float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]))


def describe(result: Result) -> str:
    """Returns a few lines for people."""
    median, slowest = np.quantile(result.seconds, [0.5, 0.99]) * 1000
    megabytes = " -> ".join(f"{size / 2**20:.1f}" for size in result.memory)
    wrong = collections.Counter(map(str, result.wrong)).most_common(3)
    return "\n".join(
        [
            f"{result.right:,} good images answered right, {result.refused:,} damaged refused",
            f"{len(result.wrong)} answered wrong, {len(result.lost)} lost {wrong or ''}".strip(),
            f"latency: median {median:.0f} ms, 99% below {slowest:.0f} ms",
            f"memory of the server, MiB: {megabytes} (ready, warmed up, at the end)",
            f"exit code after SIGTERM: {result.exit_code}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
