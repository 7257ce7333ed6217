"""TensorBoard events: curves of a training loop, to watch while it runs."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from barber_jax.console.extras import needs
from barber_jax.console.files import expand, writing

FLUSH_SECONDS = 10.0
"""Seconds after which written values are at the latest in the file, where TensorBoard sees them."""


class EventLog:
    """Writes scalars to an event file of its own in a folder that `tensorboard --logdir` is given.

    Written by the calling thread: tensorboardX's SummaryWriter has a thread that dies of a full disk, after which its
    caller waits forever.

    Args:
        folder: created where it does not exist. Files of earlier runs in it stay.
        start: steps done by an earlier process, where a run is resumed. What that process wrote of later steps is no
            longer shown.

    Raises:
        BarberError: tensorboardX is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, start: int = 0):
        with needs("log"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
        folder = expand(folder)
        self._folder, self._event, self._summary = folder, Event, Summary
        self._flushed = time.monotonic()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The name has the time in seconds, so two processes could have the same.
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            if start:
                begun = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(step=start + 1, session_log=begun, wall_time=time.time()))
            self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values of a step, such as `{"train/loss": 0.6}`.

        Raises:
            BarberError: the file cannot be written.
        """
        summary = self._summary(
            value=[self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        )
        now = time.monotonic()
        with writing(self._folder):
            self._writer.write_event(self._event(step=step, summary=summary, wall_time=time.time()))
            if now - self._flushed >= FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = now

    def close(self) -> None:
        """Write what is not in the file yet, and close it, unless it is closed. Raises BarberError if that fails."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with writing(self._folder):
                writer.close()
