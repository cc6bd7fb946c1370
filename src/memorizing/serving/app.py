"""Routes, keys, limits and counts: an application of ASGI around one model with memories."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from memorizing.serving.answers import Answer, list_models, write_event
from memorizing.serving.line import Job, Line
from memorizing.serving.memories import SEPARATOR, Memories, unknown_memory
from memorizing.serving.requests import Ask, RequestError, parse_ask, parse_body, parse_text
from memorizing.serving.writing import Writer, Written

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_OPEN_PATHS = ("/", "/health")
"""What is answered without a key: it says nothing of what was read."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SWEEP_S = 10.0
_DRAINED = 16
"""Times the longest body is read, and left out, before it is refused."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Limits:
    """Of what requests may take."""

    waiting: int = 32
    """Requests that wait besides the one that runs."""
    seconds: float = 120.0
    """A request may run for."""
    prompt_tokens: int = 16_384
    new_tokens: int = 1_024
    body_bytes: int = 4 * 2**20


class Server:
    """What the routes share."""

    def __init__(
        self, name: str, memories: Memories, limits: Limits, api_key: str | None = None
    ) -> None:
        """Take a model with its memories, and begin to run jobs.

        Args:
            name: of the model, as requests say it.
            memories: of the model.
            limits: of requests.
            api_key: what clients must send; None answers clients of this machine only.
        """
        self.name, self.memories, self.limits = name, memories, limits
        self._key = api_key
        self._created = int(time.time())
        self.line = Line(limits.waiting)
        self.writer = Writer(memories, limits.prompt_tokens, limits.new_tokens)
        self._page = resources.files("memorizing.serving").joinpath("page.html").read_text("utf-8")
        self._make_metrics()

    def _make_metrics(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        from prometheus_client.process_collector import ProcessCollector

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._answered = Counter(
            "memorizing_requests",
            "Answers, by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self._tokens = Counter(
            "memorizing_tokens", "Tokens, read in prompts and written.", ["kind"], registry=registry
        )
        self._waited = Histogram(
            "memorizing_waiting_seconds", "From a request to its turn.", registry=registry
        )
        self._first = Histogram(
            "memorizing_first_token_seconds", "From its turn to the first token.", registry=registry
        )
        self._each = Histogram(
            "memorizing_token_seconds",
            "For each token after the first.",
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
        )
        for name, text, read in (
            ("waiting", "Requests that wait.", lambda: self.line.num_waiting),
            ("running", "Requests that run.", lambda: self.line.num_running),
            ("private_memories", "Memories that requests made.", lambda: self.memories.num_private),
        ):
            Gauge(f"memorizing_{name}", text, registry=registry).set_function(read)

    def build(self) -> Starlette:
        """The application; what runs is ended when it shuts down."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            ("GET", "/", self._show_page),
            ("GET", "/health", self._tell_health),
            ("GET", "/metrics", self._tell_metrics),
            ("GET", "/v1/models", self._list_models),
            ("GET", "/v1/models/{model:path}", self._find_model),
            ("POST", "/v1/completions", functools.partial(self._answer, is_chat=False)),
            ("POST", "/v1/chat/completions", functools.partial(self._answer, is_chat=True)),
            ("POST", "/v1/memories", self._read_text),
            ("DELETE", "/v1/memories/{memory}", self._forget),
        ]
        return Starlette(
            routes=[
                Route(path, self._guard(path, answer), methods=[method])
                for method, path, answer in routes
            ],
            lifespan=self._live,
            exception_handlers={HTTPException: self._refuse},
        )

    @contextlib.asynccontextmanager
    async def _live(self, app: Starlette) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(_SWEEP_S)
                self.memories.expire()

        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()
        await asyncio.to_thread(self.line.close)

    def _guard(
        self, path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that checks who asks, counts, and answers every failure as the interface does."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        async def guarded(request: Request) -> Response:
            try:
                self._check_client(request)
                response = await answer(request)
            except RequestError as error:
                response = _tell_error(error)
            except (_Gone, ClientDisconnect):
                response = Response(status_code=499)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                response = _tell_error(
                    RequestError(500, "this request failed in the server; see its log")
                )
            self._answered.labels(path, str(response.status_code)).inc()
            return response

        return guarded

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Paths and methods that are not there."""
        from starlette.exceptions import HTTPException

        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        self._answered.labels("other", str(error.status_code)).inc()
        return _tell_error(RequestError(error.status_code, f"there is no {what}; see /v1/models"))

    def _check_client(self, request: Request) -> None:
        """Refuse who has no key, and pages of other places that a browser shows.

        Raises:
            RequestError: as the interface has it.
        """
        host = _read_host(request.headers.get("host", ""))
        origin = request.headers.get("origin")
        if origin is not None and _read_place(origin) != request.headers.get("host"):
            raise RequestError(403, "a page of another place may not ask this server")
        if self._key is None:
            # A name that another's server gives to this machine would let its pages read ours.
            if host not in _LOOPBACK:
                raise RequestError(
                    403, f"this server answers to localhost, not to {host!r}, without an API key"
                )
        elif request.url.path not in _OPEN_PATHS:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
                raise RequestError(
                    401,
                    "the API key is missing or another one; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                )

    async def _read_body(self, request: Request) -> dict[str, Any]:
        most, num_bytes, content = self.limits.body_bytes, 0, bytearray()
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes <= most:
                content += piece
            # Clients read an answer when they have sent all; far too much is not waited for.
            if num_bytes > _DRAINED * most:
                break
        if num_bytes > most:
            raise RequestError(413, f"the body is longer than {most:,} bytes; send less")
        return parse_body(bytes(content))

    async def _show_page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self._page, headers=headers)

    async def _tell_health(self, request: Request) -> Response:
        return _write_json(
            {
                "status": "ok",
                "model": self.name,
                "chat": self.writer.can_chat,
                "running": self.line.num_running,
                "waiting": self.line.num_waiting,
            }
        )

    async def _tell_metrics(self, request: Request) -> Response:
        from prometheus_client import generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
        from starlette.responses import Response

        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _list_all(self) -> list[Any]:
        return list_models(self.name, self.memories.names, SEPARATOR, self._created)

    def list_names(self) -> list[str]:
        """Of the model without memory and with each, as requests say them."""
        return [one["id"] for one in self._list_all()]

    async def _list_models(self, request: Request) -> Response:
        return _write_json({"object": "list", "data": self._list_all()})

    async def _find_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        found = next((one for one in self._list_all() if one["id"] == name), None)
        if found is None:
            raise self._unknown_model(name)
        return _write_json(found)

    def _unknown_model(self, name: str) -> RequestError:
        known = ", ".join(self.list_names())
        return RequestError(
            404,
            f"there is no model {name!r}; there are {known}",
            code="model_not_found",
            param="model",
        )

    def _find_memory(self, ask: Ask) -> str | None:
        """The memory that a request names, in its model or beside it.

        Raises:
            RequestError: no such model or memory, or two.
        """
        rest = ask.model.removeprefix(self.name)
        is_plain = ask.model == self.name
        if not is_plain and not (ask.model.startswith(self.name) and rest.startswith(SEPARATOR)):
            raise self._unknown_model(ask.model)
        named = None if is_plain else rest.removeprefix(SEPARATOR)
        if named is not None and named not in self.memories.names:
            raise self._unknown_model(ask.model)
        if named is not None and ask.memory not in (None, named):
            raise RequestError(
                400,
                f"the model names the memory {named!r}, and memory is {ask.memory!r}",
                param="memory",
            )
        memory = named or ask.memory
        if memory is not None and not self.memories.knows(memory):
            raise unknown_memory(memory, self.memories.names)
        return memory

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        from starlette.background import BackgroundTask
        from starlette.responses import StreamingResponse

        ask = parse_ask(await self._read_body(request), is_chat=is_chat)
        memory = self._find_memory(ask)
        job = Job(lambda job: self.writer.write(job, ask, memory), self.limits.seconds)
        answer, asked_s = Answer(ask), time.monotonic()
        self.line.add(job)
        try:
            await _wait(request, job.wait())
            assert job.started_s is not None
            self._waited.observe(job.started_s - asked_s)
            if not ask.is_streamed:
                text, written = await _wait(request, _collect(job))
                self._count(written)
                return _write_json(answer.make_whole(text, written))
        except BaseException:
            self.line.drop(job)
            raise

        async def drop() -> None:
            self.line.drop(job)

        return StreamingResponse(
            self._stream(job, answer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
            # Also where the client goes away before anything is sent.
            background=BackgroundTask(drop),
        )

    async def _stream(self, job: Job, answer: Answer) -> AsyncIterator[bytes]:
        """The pieces of an answer."""
        try:
            for piece in answer.begin():
                yield piece
            while not isinstance(event := await job.wait(), Written):
                yield answer.go_on(event)
            self._count(event)
            for piece in answer.end(event):
                yield piece
        except RequestError as error:
            yield write_event(error.to_dict())

    def _count(self, written: Written) -> None:
        self._tokens.labels("prompt").inc(written.prompt_tokens)
        self._tokens.labels("completion").inc(written.new_tokens)
        self._first.observe(written.first_token_s)
        if written.new_tokens > 1:
            rest_s = written.seconds - written.first_token_s
            self._each.observe(rest_s / (written.new_tokens - 1))

    async def _read_text(self, request: Request) -> Response:
        text = parse_text(await self._read_body(request))
        self.memories.check_room(text)

        def read(job: Job) -> None:
            job.tell(self.memories.read(job, text))

        job = Job(read, self.limits.seconds)
        self.line.add(job)
        try:
            return _write_json(await _wait(request, job.wait()), status_code=201)
        finally:
            self.line.drop(job)

    async def _forget(self, request: Request) -> Response:
        name = request.path_params["memory"]
        self.memories.forget(name)
        return _write_json({"id": name, "object": "memory", "deleted": True})


class _Gone(Exception):
    """The client went away."""


def _write_json(value: Any, status_code: int = 200, headers: Any = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status_code, headers)


def _tell_error(error: RequestError) -> Response:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return _write_json(error.to_dict(), status_code=error.status, headers=headers)


def _read_place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _read_host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def _collect(job: Job) -> tuple[str, Written]:
    texts = []
    while not isinstance(event := await job.wait(), Written):
        texts.append(event)
    return "".join(texts), event


async def _wait(request: Request, told: Awaitable[Any]) -> Any:
    """What is told, unless the client goes away; the body was read already.

    Raises:
        _Gone: it did.
        RequestError: the job failed.
    """
    result, gone = asyncio.ensure_future(told), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise _Gone
        return result.result()
    finally:
        result.cancel()
        gone.cancel()
