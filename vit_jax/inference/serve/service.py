"""Answers requests by a model: images in, classes and attention maps out."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import os

import numpy as np

from vit_jax.errors import UserError, first_line
from vit_jax.inference.batching import Batcher
from vit_jax.inference.predictor import Predictor
from vit_jax.inference.serve.limits import Limits, Refusal, limited, refuse
from vit_jax.inference.serve.metrics import Metrics

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the first frame, if there are several
NUM_DECODERS = min(4, os.cpu_count() or 1)  # images decoded at a time
READ_SECONDS = 30.0  # for a request to arrive
TOP = 5


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


def data_url(view: np.ndarray) -> str:
    """Returns a view, uint8 (H, W, C), as the URL of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(view[..., 0] if view.shape[-1] == 1 else view).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
