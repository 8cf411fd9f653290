"""A run's metrics as curves for TensorBoard."""

import logging
import pathlib
import time
from collections.abc import Callable

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

logger = logging.getLogger("vit_jax")


class Curves:
    """Writes a TensorBoard events file; a full disk ends the file, not the run.

    Writes in the caller's thread. The thread of tensorboardX's SummaryWriter dies on an error, and
    the run would then wait forever once its queue is full.
    """

    def __init__(self, workdir, first_step: int | None = None):
        """Opens a new file.

        Args:
            workdir: the folder to write to.
            first_step: TensorBoard hides what earlier files have after it; None: nothing.
        """
        self.events = EventsWriter(str(pathlib.Path(workdir) / "events"))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self.write(Event(step=first_step + 1, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to the curve of each name."""
        for name, value in values.items():
            self.write(Event(step=step, summary=summary.scalar(name, value)))

    def write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.call(lambda events: events.write_event(event))

    def flush(self) -> None:
        self.call(EventsWriter.flush)

    def close(self) -> None:
        self.call(EventsWriter.close)

    def call(self, action: Callable[[EventsWriter], None]) -> None:
        """Calls `action` with the file, until an error: readers stop at a truncated event."""
        if self.events is None:
            return
        try:
            action(self.events)
        except OSError as error:
            self.events = None
            logger.error(
                f"TensorBoard's events can't be written ({error.strerror}): the curves end here. "
                "The run continues, and metrics.jsonl has all numbers"
            )
