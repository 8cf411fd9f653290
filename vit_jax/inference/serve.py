"""Classifies images over HTTP.

    python -m vit_jax.inference.serve runs/digits --port=8000
    curl --data-binary @digit.png http://127.0.0.1:8000/classify
    curl -F a=@digit_0.png -F b=@digit_1.png "http://127.0.0.1:8000/classify?top=3"

`http://127.0.0.1:8000/` is a page to drop images on. docs/deploy.md has the answers, the limits and
their statuses. Needs the packages in requirements-serve.txt; for an exported artifact, neither
Flax nor optax.
"""

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import logging
import os
import pathlib
import signal
import socket
import sys
import warnings
from collections.abc import Sequence

import numpy as np

from vit_jax.checks import COUNT, Range, check_range
from vit_jax.errors import UserError, first_line
from vit_jax.inference import export
from vit_jax.inference.batching import Batcher
from vit_jax.inference.predictor import BATCH_SIZE, Predictor, next_power_of_two

logger = logging.getLogger("vit_jax")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the first frame, if there are several
NUM_DECODERS = min(4, os.cpu_count() or 1)  # images decoded at a time
READ_SECONDS = 30.0  # for a request to arrive
STOP_SECONDS = 30.0  # for what was accepted to be answered, after a signal
TOP = 5
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
ALL_ADDRESSES = ("0.0.0.0", "::", "")  # of --host
# The page is self-contained, and nothing else may be loaded or run.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        max_bytes: of a request.
        max_pixels: of an image; decoding takes 10 to 18 bytes for each.
        max_images: in a request.
        max_requests: at a time.
        max_batch: images computed together, a power of two.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 32 * 10**6
    max_images: int = 32
    max_requests: int = 64
    max_batch: int = BATCH_SIZE


class Refusal(Exception):
    """A request that isn't answered: an HTTP status, and a message of one line."""

    def __init__(self, status: int, message: str, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def decode(content: bytes, predictor: Predictor, max_pixels: int) -> np.ndarray:
    """Returns the view of an image file, uint8 (H, W, C).

    Raises:
        Refusal: no image, a damaged one, or one with too many pixels, which isn't decoded.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise Refusal(400, "The image is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size  # of the header
            if width * height > max_pixels:
                raise Refusal(
                    413, f"The image has {width} x {height} pixels; at most {max_pixels:,} are read"
                )
            return predictor.views(image)[0]
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise Refusal(413, f"The image has more than {max_pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise Refusal(415, f"This is no image of the formats {', '.join(FORMATS)}") from None
    except UserError as error:
        raise Refusal(400, str(error)) from None
    except Exception as error:  # Pillow raises many kinds for files that are damaged
        raise Refusal(400, f"The image can't be decoded: {first_line(error)}") from None


class Service:
    """Answers requests by a model."""

    def __init__(self, predictor: Predictor, name: str, limits: Limits):
        """Compiles the model for every size of batch, and starts the threads.

        Args:
            predictor: a Classifier, or an Exported, which has no attention maps.
            name: of the model, for the page.
            limits: what is accepted.
        """
        self.predictor, self.name, self.limits = predictor, name, limits
        self.metrics = Metrics()
        self.in_flight = 0
        self.decoders = concurrent.futures.ThreadPoolExecutor(NUM_DECODERS)
        self.classes = self.batcher(self.probabilities, limits.max_batch)
        self.maps = None
        if hasattr(predictor, "attention"):
            from vit_jax.inference.classifier import ATTENTION_BATCH_SIZE  # imports Flax

            self.maps = self.batcher(predictor.attention, ATTENTION_BATCH_SIZE)

    def batcher(self, function, max_batch: int) -> Batcher:
        """Returns a batcher of a function of views, compiled for each power of two."""
        view = (*self.predictor.image_size, self.predictor.channels)
        for exponent in range(max_batch.bit_length()):
            function(np.zeros((2**exponent, *view), np.uint8))
        return Batcher(function, max_batch, self.metrics.batch_size.observe)

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        predictor = self.predictor
        return predictor.map_batches(predictor.forward, views, self.limits.max_batch)

    def batchers(self) -> list[Batcher]:
        return [batcher for batcher in (self.classes, self.maps) if batcher]

    def close(self) -> None:
        """Ends the threads."""
        for batcher in self.batchers():
            batcher.close()
        self.decoders.shutdown()

    async def classify(self, request):
        """Answers POST /classify: an image, or several as multipart/form-data."""
        from python_multipart.exceptions import FormParserError
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        receive = limited(request.receive, request.headers, self.limits.max_bytes)
        try:
            response = JSONResponse(await self.images(Request(request.scope, receive)))
        except Refusal as refusal:
            response = refuse(refusal.status, refusal.message, refusal.headers)
        except HTTPException as error:  # multipart/form-data that can't be read
            response = refuse(error.status_code, error.detail)
        except FormParserError:  # the same, in older versions of Starlette
            response = refuse(400, "Invalid multipart data.")
        except ClientDisconnect:
            response = refuse(400, "The request ended early")
        except Exception:
            self.metrics.responses.labels(500).inc()
            raise
        self.metrics.responses.labels(response.status_code).inc()
        return response

    async def images(self, request) -> dict:
        """Returns what is answered about the images of a request."""
        with self.slot(), self.metrics.seconds.time():
            top, attention = self.options(request.query_params)
            try:
                async with asyncio.timeout(READ_SECONDS):
                    files = await self.read(request)
            except TimeoutError:
                raise Refusal(408, f"The request didn't arrive within {READ_SECONDS:g} s") from None
            answers = await self.answers(files, top, attention)
        self.metrics.images.inc(len(answers))
        return {"images": answers}

    async def answers(self, files: list, top: int, attention: bool) -> list[dict]:
        """Returns what is answered about each image; raises the first failure."""
        work = (self.answer(*file, top, attention) for file in files)
        # Waits for all of them after a failure too: the slot is free once nothing is left to do.
        results = await asyncio.gather(*work, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    @contextlib.contextmanager
    def slot(self):
        """Counts a request that is being answered; raises Refusal if there are too many."""
        if self.in_flight >= self.limits.max_requests:
            raise Refusal(
                503,
                f"{self.in_flight} requests are being answered, the most at a time: try again",
                {"Retry-After": "1"},
            )
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    def options(self, query) -> tuple[int, bool]:
        """Returns how many classes to answer, and whether attention too."""
        top, attention = query.get("top", str(TOP)), query.get("attention", "false")
        if not top.isdecimal() or len(top) > 6 or int(top) < 1:
            raise Refusal(400, f"top is {top[:20]!r}; it must be a whole number from 1 to 999999")
        if attention not in ("true", "false"):
            raise Refusal(400, f"attention is {attention[:20]!r}; it must be true or false")
        if attention == "true" and self.maps is None:
            raise Refusal(400, "This model is an exported artifact, which has no attention maps")
        return int(top), attention == "true"

    async def read(self, request) -> list[tuple[str | None, bytes]]:
        """Returns the images of a request, (file name or None, contents)."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return [(None, await request.body())]
        async with request.form(max_files=self.limits.max_images) as form:
            files = [value for _, value in form.multi_items() if not isinstance(value, str)]
            if not files:
                raise Refusal(400, "The request has no files: send each image as a part")
            return [(file.filename, await file.read()) for file in files]

    async def answer(self, name: str | None, content: bytes, top: int, attention: bool) -> dict:
        """Returns what is answered about an image."""
        loop = asyncio.get_running_loop()
        arguments = content, self.predictor, self.limits.max_pixels
        try:
            view = await loop.run_in_executor(self.decoders, decode, *arguments)
        except Refusal as refusal:
            if name is None:
                raise
            raise Refusal(refusal.status, f"{name}: {refusal.message}") from None
        results = [self.classes.submit(view)]
        if attention:
            results.append(self.maps.submit(view))
        probabilities, *maps = await asyncio.gather(*map(asyncio.wrap_future, results))
        best = self.predictor.top_classes(probabilities, top)
        answer = {} if name is None else {"name": name}
        answer["classes"] = [{"class": label, "probability": value} for label, value in best]
        if attention:
            answer |= {"attention": maps[0].tolist(), "view": data_url(view)}
        return answer

    async def model(self, request):
        """Answers GET /model: what the model is, and what the server accepts."""
        from starlette.responses import JSONResponse

        predictor = self.predictor
        return JSONResponse(
            {
                "name": self.name,
                "image_size": predictor.image_size,
                "channels": predictor.channels,
                "class_names": [predictor.class_name(i) for i in range(predictor.num_classes)],
                "attention": self.maps is not None,
                "limits": dataclasses.asdict(self.limits),
            }
        )


class Metrics:
    """What `/metrics` tells, in Prometheus' text format."""

    def __init__(self):
        import prometheus_client as prometheus

        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        registry = dict(namespace="vit_jax", registry=self.registry)
        self.responses = prometheus.Counter(
            "responses", "Responses to /classify, by status", ["status"], **registry
        )
        self.images = prometheus.Counter("images", "Images classified", **registry)
        self.in_flight = prometheus.Gauge(
            "requests_in_flight", "Requests being answered", **registry
        )
        sizes = [2**exponent for exponent in range(11)]
        self.batch_size = prometheus.Histogram(
            "batch_size", "Images computed together", buckets=sizes, **registry
        )
        self.seconds = prometheus.Histogram(
            "request_seconds", "Time to answer an accepted request", **registry
        )


def data_url(view: np.ndarray) -> str:
    """Returns a view, uint8 (H, W, C), as the URL of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(view[..., 0] if view.shape[-1] == 1 else view).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def limited(receive, headers: dict, max_bytes: int):
    """Returns an ASGI `receive` that raises Refusal instead of more than `max_bytes`."""
    refusal = Refusal(413, f"The request is too large: at most {max_bytes:,} bytes are read")
    num_received = 0

    async def limited_receive():
        nonlocal num_received
        if int(headers.get("content-length", 0)) > max_bytes:
            raise refusal
        message = await receive()
        num_received += len(message.get("body", b""))
        if num_received > max_bytes:
            raise refusal
        return message

    return limited_receive


def refuse(status: int, message: str, headers: dict | None = None):
    """Returns the response of a status other than 200."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": message}, status, headers)


def create_app(
    predictor: Predictor,
    name: str,
    limits: Limits | None = None,
    allowed_hosts: Sequence[str] = ("*",),
):
    """Returns an ASGI application, for any server of them; compiles the model.

    Args:
        predictor: a Classifier or an Exported.
        name: of the model, for the page.
        limits: None: the defaults.
        allowed_hosts: the names that a request's Host header may have; "*" allows any.
    """
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    service = Service(predictor, name, limits or Limits())
    page = pathlib.Path(__file__).with_name("page.html").read_text()

    async def refuse_path(request, error):
        return refuse(error.status_code, error.detail, error.headers)

    async def report_failure(request, error):
        return refuse(500, "The server failed; its log tells why")  # the exception is logged

    async def show_page(request):
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def show_metrics(request):
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def health(request):
        if not all(batcher.is_alive() for batcher in service.batchers()):
            return refuse(503, "A thread of the server has ended: start it again")
        return JSONResponse({"status": "ok"})

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.close()

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)
    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/classify", service.classify, methods=["POST"]),
            Route("/model", service.model),
            Route("/metrics", show_metrics),
            Route("/healthz", health),
        ],
        middleware=[hosts],
        exception_handlers={HTTPException: refuse_path, Exception: report_failure},
        lifespan=lifespan,
    )


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; raises UserError if that's impossible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OverflowError:
        raise UserError(f"--port is {port}; it must be from 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"Port {port} of {host} is in use: give another --port") from None
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise UserError(f"Can't listen on {host}, port {port}: {reason}") from None


def load(args: argparse.Namespace) -> Predictor:
    """Returns the artifact or the classifier that the command line names."""
    if not export.is_artifact(args.run):
        return export.load(args)
    for flag in ("step", "image_size", "grid", "num_heads", "class_names"):
        if getattr(args, flag) is not None:
            raise UserError(f"{args.run} is an exported artifact, whose {flag} can't be changed")
    return export.Exported.load(args.run)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.inference.serve",
        description="Classifies images over HTTP, by a run, weights, or an exported artifact.",
    )
    export.add_model_flags(parser)
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all of this machine"
    )
    parser.add_argument(
        "--allowed_hosts",
        metavar="NAME,NAME",
        help="further names that requests may call the server by, such as the one that a proxy "
        "passes on; *.example.com: all below it; *: any, as with --host=0.0.0.0",
    )
    for field in dataclasses.fields(Limits):
        if field.name not in ("max_bytes", "max_pixels"):
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--max_megabytes", type=float, default=Limits.max_bytes / 2**20)
    parser.add_argument("--max_megapixels", type=float, default=Limits.max_pixels / 10**6)
    return parser.parse_args(arguments)


def parse_limits(args: argparse.Namespace) -> Limits:
    """Returns the limits; raises UserError for an impossible one."""
    for name in ("max_images", "max_requests", "max_batch"):
        check_range(f"--{name}", getattr(args, name), COUNT)
    for name in ("max_megabytes", "max_megapixels"):
        check_range(f"--{name}", getattr(args, name), Range(0, 10**4, above=True))
    if args.max_batch != next_power_of_two(args.max_batch) or args.max_batch > 1024:
        raise UserError(f"--max_batch is {args.max_batch}; it must be a power of two, up to 1024")
    return Limits(
        max_bytes=int(args.max_megabytes * 2**20),
        max_pixels=int(args.max_megapixels * 10**6),
        max_images=args.max_images,
        max_requests=args.max_requests,
        max_batch=args.max_batch,
    )


def parse_allowed_hosts(args: argparse.Namespace) -> list[str]:
    """Returns what a request's Host header may be; raises UserError for an impossible pattern.

    Else a page of any site could reach the server through a visitor's browser, by a name that it
    points to the loopback address (DNS rebinding).
    """
    if args.allowed_hosts is None and args.host in ALL_ADDRESSES:
        return ["*"]
    names = [name.strip() for name in (args.allowed_hosts or "").split(",") if name.strip()]
    for name in names:
        if name != "*" and "*" in name.removeprefix("*."):
            raise UserError(f"--allowed_hosts has {name!r}; * may only be all or the start, as *.")
    return [*LOOPBACK_NAMES, f"[{args.host}]" if ":" in args.host else args.host, *names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_flags(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        limits, allowed_hosts = parse_limits(args), parse_allowed_hosts(args)
        check_packages()
        with listen(args.host, args.port) as listener:  # before the model takes its time
            print(f"Loading and compiling {args.run} ...", flush=True)
            name = os.path.basename(os.path.abspath(args.run))  # the page doesn't tell where it is
            app = create_app(load(args), name, limits, allowed_hosts)
            run(create_server(app, limits), listener)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before it was ready
        print("Interrupted", file=sys.stderr)
        return 130
    return 0


def check_packages() -> None:
    """Raises UserError if a package of requirements-serve.txt is missing."""
    try:
        import PIL.Image  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"The server needs the package {error.name}: pip install -r requirements-serve.txt"
        ) from None


def create_server(app, limits: Limits):
    """Returns the uvicorn.Server of an application."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        # With connections that wait, or are refused with a reason; beyond, uvicorn refuses them.
        limit_concurrency=4 * limits.max_requests + 32,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def run(server, listener: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C, and then answers what was accepted."""
    from PIL import Image

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the client is told
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` has its own limit
    host, port = listener.getsockname()[:2]
    # Uvicorn raises the signals that ended it again, for these handlers: the exit code is 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    print(f"Ready: http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
    server.run(sockets=[listener])
    print("Stopped", flush=True)


if __name__ == "__main__":
    sys.exit(main())
