"""Recording without Ray, and the page that is made of the nodes' pages."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service import metrics
from service.api import metrics as page
from service.api import problems
from service.errors import NotFound

pytestmark = pytest.mark.anyio

X = "# HELP x_total X.\n# TYPE x_total counter\n"
Y = "# TYPE y gauge\n"
PAGES = {
    "/a": X + 'x_total{node="a"} 1.0\n' + Y + 'y{node="a"} 2.0\n',
    "/b": Y + 'y{node="b"} 3.0\n' + X + 'x_total{node="b"} 4.0\n',
}


@pytest.fixture
async def nodes() -> AsyncIterator[str]:
    """The URL of a server with a page for each of two nodes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        body = PAGES[path].encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


async def scrape(urls: Sequence[str]) -> httpx.Response:
    app = FastAPI()
    app.state.exporters = lambda: urls
    problems.install(app)
    app.include_router(page.router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
        return await client.get("/metrics")


async def test_one_page_of_all_nodes(nodes: str) -> None:
    answer = await scrape([f"{nodes}/a", f"{nodes}/b", "http://127.0.0.1:1/away"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == page.CONTENT_TYPE
    families = list(text_string_to_metric_families(answer.text))
    assert [(one.name, one.type, len(one.samples)) for one in families] == [
        ("x", "counter", 2),
        ("y", "gauge", 2),
    ]


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:1/metrics"]])
async def test_no_node_answers(urls: list[str]) -> None:
    answer = await scrape(urls)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert "no node gives its metrics" in answer.json()["detail"]


def test_without_ray_recording_does_nothing() -> None:
    with metrics.query("v1"):
        pass
    with pytest.raises(NotFound), metrics.query("v1"):
        raise NotFound("no v1")
    pace = metrics.Pace()
    pace.piece()
    pace.piece()
    metrics.answered("v1", 3, 4)
    metrics.staged(0.1, 100)
    metrics.verification_failed()
    metrics.resident(2, 100)
    metrics.fenced()
    metrics.committed(0.1)
    metrics.rollout_ended("committed", 0.1)
    metrics.canary(0.05)
    metrics.retried("died")
