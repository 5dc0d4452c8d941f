"""The HTTP client behind the command line and the demo; problems become exceptions."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from workers.json_lines import numbered

JSON = dict[str, Any]


class ApiError(Exception):
    """The service answered with a problem, or did not answer."""

    def __init__(self, status: int | None, detail: str, errors: Sequence[JSON] = ()) -> None:
        super().__init__(status, detail, errors)
        self.status = status
        self.detail = detail
        self.errors = errors

    def __str__(self) -> str:
        lines = [self.detail, *(f"  {error['field']}: {error['message']}" for error in self.errors)]
        return "\n".join(lines)


class Client:
    """Talks to one Errata service; thread-safe."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Sends one request; raises `ApiError` for anything but success."""
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            response = self._http.request(method, path, json=json, params=given, headers=headers)
        except httpx.TransportError as error:
            raise ApiError(None, f"no answer from {self.url}: {error}") from error
        if response.is_error:
            raise _problem(response)
        return response

    def get(self, path: str, **params: Any) -> JSON:
        return dict(self.call("GET", path, params=params).json())

    def post(self, path: str, body: object) -> JSON:
        return dict(self.call("POST", path, json=body).json())

    def pages(self, path: str, key: str, **params: Any) -> Iterator[JSON]:
        """Every item of a list, page after page."""
        cursor = None
        while True:
            page = self.get(path, cursor=cursor, **params)
            yield from page[key]
            cursor = page.get("next_cursor")
            if cursor is None:
                return

    def submit(self, edits: Sequence[Mapping[str, Any]], batch: int = 1000) -> list[JSON]:
        """Posts edits in calls of at most `batch`."""
        answers: list[JSON] = []
        for start in range(0, len(edits), batch):
            body = {"edits": list(edits[start : start + batch])}
            answers.extend(self.post("/edits", body)["edits"])
        return answers

    def ask(
        self, prompt: str, *, model: str = "errata", max_tokens: int = 32, stop: Sequence[str] = ()
    ) -> tuple[str, str]:
        """The greedy answer to `prompt`, and the version that gave it."""
        body: JSON = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if stop:
            body["stop"] = list(stop)
        response = self.call("POST", "/v1/completions", json=body)
        return response.json()["choices"][0]["text"], response.headers["X-Errata-Version"]


def read_jsonl(path: Path) -> list[JSON]:
    """The objects of a file with one a line; raises `BadLine` naming the bad line."""
    return [item for _, item in numbered(path)]


def _problem(response: httpx.Response) -> ApiError:
    try:
        body = response.json()
        return ApiError(response.status_code, body["detail"], body.get("errors", ()))
    except (ValueError, KeyError, TypeError):
        text = response.text.strip() or response.reason_phrase
        return ApiError(response.status_code, f"HTTP {response.status_code}: {text[:500]}")
