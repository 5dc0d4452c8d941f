"""/metrics: what the nodes of the cluster export to Prometheus, in one page."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable, Sequence

import httpx
from fastapi import APIRouter, Request, Response

from service.errors import Unavailable

Exporters = Callable[[], Sequence[str]]
"""URLs of the nodes' pages; blocks; raises `Unavailable`."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCRAPE_S = 5.0
TLS = ssl.create_default_context()
"""Made once: to make one halts the process for tens of ms."""

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus text; the service's own metrics are named `ray_errata_…`.

    Nodes that do not answer are left out; 503 if none does.
    """
    urls = await asyncio.to_thread(request.app.state.exporters)
    async with httpx.AsyncClient(timeout=SCRAPE_S, trust_env=False, verify=TLS) as client:
        found = await asyncio.gather(*(_page(client, url) for url in urls))
    pages = [page for page in found if page is not None]
    if not pages:
        raise Unavailable(f"no node gives its metrics; asked: {', '.join(urls) or 'none'}")
    text = await asyncio.to_thread(_joined, pages)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def _page(client: httpx.AsyncClient, url: str) -> str | None:
    try:
        answer = await client.get(url)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        log.warning("no metrics from %s: %r", url, error)
        return None
    return answer.text


def _joined(pages: Iterable[str]) -> str:
    """One page, in which the samples of a metric follow each other, whichever node they are of."""
    headings: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        name = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, name, *_ = line.split(" ", 3)
                headings.setdefault(name, {}).setdefault(kind, line)
            elif line and not line.startswith("#"):
                samples.setdefault(name, []).append(line)
    lines = (
        line
        for name, of_name in samples.items()
        for line in (*headings.get(name, {}).values(), *of_name)
    )
    return "\n".join(lines) + "\n"
