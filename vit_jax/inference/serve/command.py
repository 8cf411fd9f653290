"""The command line, and the server that runs an application."""

import argparse
import dataclasses
import errno
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence

from vit_jax.checks import COUNT, Range, check_range
from vit_jax.errors import UserError
from vit_jax.inference import export
from vit_jax.inference.predictor import Predictor, next_power_of_two
from vit_jax.inference.serve.app import create_app
from vit_jax.inference.serve.limits import Limits

STOP_SECONDS = 30.0  # for what was accepted to be answered, after a signal
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
ALL_ADDRESSES = ("0.0.0.0", "::", "")  # of --host


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


def load(args: argparse.Namespace) -> Predictor:
    """Returns the artifact or the classifier that the command line names."""
    if not export.is_artifact(args.run):
        return export.load(args)
    for flag in ("step", "image_size", "grid", "num_heads", "class_names"):
        if getattr(args, flag) is not None:
            raise UserError(f"{args.run} is an exported artifact, whose {flag} can't be changed")
    return export.Exported.load(args.run)


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
