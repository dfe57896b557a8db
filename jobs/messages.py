"""Errors a user can act on, as one message instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from pipeline.errors import PipelineError


@contextmanager
def report_errors(*, code: int = 1) -> Iterator[None]:
    """The project's own errors become one message and this exit code; everything else keeps its traceback."""
    try:
        yield
    except PipelineError as error:
        console = Console(stderr=True, markup=False, highlight=False)
        console.print(f"error: {type(error).__name__}: {error}", soft_wrap=True)
        sys.exit(code)
