"""The ASGI application: what is at each path."""

import contextlib
import pathlib
from collections.abc import Sequence

from vit_jax.inference.predictor import Predictor
from vit_jax.inference.serve.limits import Limits, refuse
from vit_jax.inference.serve.service import Service

# The page is self-contained, and nothing else may be loaded or run.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
)


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


async def refuse_path(request, error):
    return refuse(error.status_code, error.detail, error.headers)


async def report_failure(request, error):
    return refuse(500, "The server failed; its log tells why")  # the exception is logged
