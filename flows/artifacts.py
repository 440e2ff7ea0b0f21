"""What a run shows in Prefect's dashboard: progress bars, a summary, tables and the preview grid.

They belong to the flow run or task run that calls these functions, from synchronous code. Artifacts of one key are
versions of each other on the Artifacts page. The grid is an image artifact, and stands in the Markdown summary too: the
page of an image artifact prints its URL below the picture, which here is all of it in base64 (seen on Prefect 3.8.8).
"""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectHTTPStatusError

from flows import server
from flux2_core import escape

LOG = logging.getLogger(__name__)
EVERY_S = 5.0  # about 100 updates a second are possible; a person looks once in a while
IMAGE_BYTES = 4_000_000  # travels through the server's database and inside one API answer


class Progress:
    """One progress bar: made once, updated at most every `every_s` seconds, 100 when it is done."""

    def __init__(
        self, key: str, description: str, *, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Show the bar at 0 %."""
        self._every_s, self._clock = every_s, clock
        self._shown_s = clock()
        self._percent = 0.0
        self._id = _shown(description, lambda: create_progress_artifact(0.0, artifact_key(key), description))

    def update(self, done: float, total: float) -> None:
        """Show `done` of `total` units, unless the bar was updated less than `every_s` ago and this is not the end."""
        percent = 100.0 if total <= 0 else min(100.0, 100.0 * done / total)
        due = self._clock() - self._shown_s >= self._every_s
        if self._id is None or percent == self._percent or not (due or percent == 100.0):
            return
        self._shown_s = self._clock()
        one = cast(UUID, self._id)  # a coroutine only inside a running event loop
        if _shown(f"progress of {percent:.0f} %", lambda: update_progress_artifact(one, progress=percent)):
            self._percent = percent


def summary(
    key: str,
    title: str,
    tables: Mapping[str, Mapping[str, Any]],
    *,
    png: bytes | None = None,
    description: str | None = None,
) -> None:
    """Show a summary: a heading, a picture where there is one, and a table of names and values under each heading."""
    cell = escape.markdown
    lines = [f"## {cell(title)}"]
    if png is not None:
        lines += ["", f"![{cell(title)}]({_url(png)})"]
    for heading, rows in tables.items():
        lines += ["", f"| {cell(heading)} | |", "|---|---|"]
        lines += [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    _shown(title, lambda: create_markdown_artifact("\n".join(lines), key=artifact_key(key), description=description))


def table(key: str, rows: Sequence[Mapping[str, Any]], *, description: str | None = None) -> None:
    """Show a table, one mapping from column to value per row; the dashboard reads every text in it as Markdown."""
    escaped = [{name: escape.markdown(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    _shown(key, lambda: create_table_artifact(escaped, key=artifact_key(key), description=description))


def picture(key: str, png: bytes, *, description: str | None = None) -> None:
    """Show a PNG in the dashboard, whose bytes travel inside the artifact: no file has to be reachable from a browser.

    Raises:
        ValueError: the picture is larger than `IMAGE_BYTES`.
    """
    url = _url(png)
    _shown(key, lambda: create_image_artifact(url, key=artifact_key(key), description=description))


def artifact_key(name: str) -> str:
    """`name` as a key that Prefect allows: `My_run.v2` becomes `my-run-v2`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "cacheloom"


def _shown(what: str, show: Callable[[], object]) -> object:
    """Have the server show something; one that cannot be reached must not end hours of work, and is asked next time."""
    if server.gone():
        return None
    try:
        return show() or True
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        LOG.warning("%s could not be shown: %s", what, error)
        return None


def _url(png: bytes) -> str:
    if len(png) > IMAGE_BYTES:
        raise ValueError(f"a picture of {len(png)} bytes is too large for an artifact: at most {IMAGE_BYTES}, scale it")
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
