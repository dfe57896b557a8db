"""One line per event: a shard committed, a sample rejected, and every warning, as key=value or JSON.

The lines go to stderr, which is where a Ray job's log comes from. A value never breaks its line: what is not a plain
word is written as a JSON string.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, Literal

from pipeline.documents import ShardReceipt

LogFormat = Literal["none", "key_value", "json"]
PACKAGES = ("pipeline", "jobs")
_PLAIN = re.compile(r"[\w./:+%-]+", re.ASCII)

log = logging.getLogger(__name__)


def log_receipt(receipt: ShardReceipt) -> None:
    """A line for the shard, and one for each of its rejections."""
    counts = receipt.counts
    _event(
        "shard_committed",
        shard=receipt.shard_id,
        samples=counts.samples,
        clips=counts.clips_encoded,
        windows=counts.windows_stored,
        frames=counts.frames_stored,
        rejected=len(receipt.rejections),
        bytes=receipt.payload.size,
    )
    for rejection in receipt.rejections:
        _event(
            "rejected",
            shard=receipt.shard_id,
            key=rejection.key,
            scope=rejection.scope,
            stage=rejection.stage,
            error_class=rejection.error_class,
            message=rejection.message,
        )


def _event(name: str, **fields: Any) -> None:
    log.info(name, extra={"fields": fields})


class LineFormatter(logging.Formatter):
    """A record as one line."""

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        head = {"time": stamp, "level": record.levelname.lower()}
        said = {"event": record.getMessage()} if fields else {"event": "message", "text": record.getMessage()}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        line = head | said | fields
        if self._json:
            return json.dumps(line, ensure_ascii=False, default=str)
        return " ".join(f"{name}={_value(value)}" for name, value in line.items())


def _value(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class _Stderr(logging.Handler):
    """Whatever stderr is at the moment: a progress bar takes it over while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)  # noqa: T201 - the one place that writes lines
        except OSError:
            self.handleError(record)


def set_up_log(log_format: LogFormat) -> None:
    """Write the events and warnings of this process in that format; none leaves logging as it is. May be called
    again."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if isinstance(each, _Stderr)]:
            logger.removeHandler(handler)
        if log_format != "none":
            handler = _Stderr()
            handler.setFormatter(LineFormatter(log_format))
            logger.addHandler(handler)
    log.setLevel(logging.NOTSET if log_format == "none" else logging.INFO)
