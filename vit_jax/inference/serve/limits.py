"""What a server accepts, and how it refuses the rest."""

import dataclasses

from vit_jax.inference.predictor import BATCH_SIZE


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
