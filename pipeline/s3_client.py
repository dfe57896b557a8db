"""What we ask of the S3 client (s3fs over aiobotocore) beyond its defaults: more attempts, and an end to every wait.

The client waits for ever where a server takes a connection and then neither reads nor answers an upload: its read
timeout begins when the last byte is sent. Here every request has a deadline that grows with its body.

The only file that knows aiobotocore; imported when an S3 URL is opened.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ReadTimeoutError

from pipeline.errors import StorageError

RETRIES = {"mode": "standard", "total_max_attempts": 8}
"""Of one request, with waits that grow to 20 s: about half a minute of a store that is gone."""
ANSWER_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 256 << 10
RETRY_SETTINGS = ("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE")
ENDPOINT_SETTINGS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class DeadlineSession(AIOHTTPSession):
    """HTTP requests that fail, and are tried again, if their reply does not begin in time."""

    async def send(self, request: Any) -> Any:
        headers = request.headers
        size = int(headers.get("X-Amz-Decoded-Content-Length") or headers.get("Content-Length") or 0)
        try:
            return await asyncio.wait_for(super().send(request), ANSWER_SECONDS + size / SLOWEST_BYTES_PER_SECOND)
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from error


def s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """fsspec options for S3 with our defaults. What the options or the environment say stands.

    StorageError for an endpoint that is no URL.
    """
    _require_url("options.endpoint_url", options.get("endpoint_url"))
    for name in ENDPOINT_SETTINGS:
        _require_url(name, os.environ.get(name))
    config: dict[str, Any] = {"http_session_cls": DeadlineSession}
    if not any(os.environ.get(name) for name in RETRY_SETTINGS):
        config["retries"] = dict(RETRIES)
    return {**options, "config_kwargs": {**config, **options.get("config_kwargs", {})}}


def _require_url(name: str, endpoint: str | None) -> None:
    """The endpoint is not shown: it may hold a password, which the client would not use but would print."""
    if not endpoint:
        return
    scheme, separator, rest = endpoint.partition("://")
    if scheme not in ("http", "https") or not separator:
        raise StorageError(f"{name}: expected http://HOST:PORT or https://HOST, got no such scheme")
    if "@" in rest.partition("/")[0]:
        raise StorageError(
            f"{name}: it holds a user or a password; expected http://HOST:PORT, and credentials in AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY"
        )
