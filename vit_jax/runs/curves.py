"""A run's numbers as TensorBoard's curves."""

import logging
import pathlib
import time
from collections.abc import Callable

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

logger = logging.getLogger("vit_jax")


class Curves:
    """An events file, written in the caller's thread: it ends where the disk is full, not the run.

    tensorboardX's SummaryWriter has a thread for it, which an error ends, and then a full queue
    holds up the run forever.
    """

    def __init__(self, workdir, first_step: int):
        """What an earlier start wrote after `first_step` isn't shown any more."""
        self.events = EventsWriter(str(pathlib.Path(workdir) / "events"))
        start = SessionLog(status=SessionLog.START)
        self.write(Event(step=first_step + 1, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.write(Event(step=step, summary=summary.scalar(name, value)))

    def write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.attempt(lambda events: events.write_event(event))

    def flush(self) -> None:
        self.attempt(EventsWriter.flush)

    def close(self) -> None:
        self.attempt(EventsWriter.close)

    def attempt(self, action: Callable[[EventsWriter], None]) -> None:
        """Gives up at the first failure: a reader stops at an event that is cut off."""
        if self.events is None:
            return
        try:
            action(self.events)
        except OSError as error:
            self.events = None
            logger.error(
                f"TensorBoard's events can't be written ({error.strerror}): they end here, the "
                "run goes on; metrics.jsonl has the numbers"
            )
