"""The app: its routes, and how an answer comes from the engine to a client.

Owns what each address answers, the checks that need the model (prompt, context, template
switches), streams, and that an answer is no longer computed once nobody waits for it. What a body
may hold is `requests.py`'s, how answers are written `replies.py`'s, who is let in `guards.py`'s.
"""

import asyncio
import base64
import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from myna.data.encode import Encoder, Prompt
from myna.errors import ConfigError, DataError
from myna.inference.generate import Sampling
from myna.inference.server.api_error import ApiError
from myna.inference.server.engine import (
    Busy,
    Engine,
    Event,
    Failed,
    Finished,
    Piece,
    Stopping,
    Task,
    Ticket,
)
from myna.inference.server.guards import LOOPBACK, Guard, error_response
from myna.inference.server.limits import Limits
from myna.inference.server.metrics import CONTENT_TYPE, Metrics
from myna.inference.server.replies import (
    DONE,
    ChatReply,
    Choice,
    CompletionReply,
    Reply,
    as_event,
    model_entry,
    models_list,
)
from myna.inference.server.requests import (
    MAX_SEED,
    MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    read_request,
)
from myna.inference.speaker import Speaker

PAGE = Path(__file__).with_name("page.html")
"""The chat page: one file that loads nothing. Its scripts and styles stand in `<script>` and
`<style>` elements, whose hashes are all that its policy lets run: no attributes that hold code."""

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "tokenize"}
_BLOCK = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def create_app(
    engine: Engine,
    *,
    api_key: str | None = None,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
) -> Starlette:
    """The server's app over `engine`; see `Guard` for `api_key` and `hosts`."""
    limits = limits or Limits()
    routes = _Routes(engine, limits)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/healthz", routes.health),
            Route("/metrics", routes.show_metrics),
            Route("/v1/models", routes.list_models),
            Route("/v1/models/{name}", routes.show_model),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.complete, methods=["POST"]),
        ],
        middleware=[
            Middleware(
                Guard, api_key=api_key, hosts=hosts, limits=limits, front=routes.page_with(401)
            )
        ],
        exception_handlers={
            ApiError: routes.tell_error,
            HTTPException: routes.tell_status,
            Exception: routes.tell_bug,
        },
    )
    app.router.redirect_slashes = False  # a redirect would repeat the Host header
    return app


@dataclass(frozen=True)
class _Job:
    """A request that can be computed: its tasks and how their answers are written."""

    tasks: list[Task]
    reply: Reply
    model: str
    prompt_tokens: int
    stream: bool
    with_usage: bool


class _Routes:
    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._created = int(time.time())
        self._metrics = Metrics()
        self._page = PAGE.read_text(encoding="utf-8")
        self._policy = _policy(self._page)
        self._switched = lru_cache(maxsize=32)(_switched)

    async def page(self, request: Request) -> Response:
        return self.page_with(200)

    def page_with(self, status: int) -> Response:
        return Response(
            self._page,
            status_code=status,
            media_type="text/html",
            headers={"Content-Security-Policy": self._policy, "X-Frame-Options": "DENY"},
        )

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def show_metrics(self, request: Request) -> Response:
        text = self._metrics.as_text(self._engine.load())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def list_models(self, request: Request) -> Response:
        return JSONResponse(models_list(self._engine.models, self._created))

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._speaker(name)
        return JSONResponse(model_entry(name, self._created))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self._chat_job)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, self._completion_job)

    async def tell_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError), "registered for it"
        self._metrics.count_request(_endpoint(request), error.status)
        return error_response(error)

    async def tell_status(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it"
        text = {404: "There is nothing at this address.", 405: "This address takes no such method."}
        told = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
        told.headers.update(error.headers or {})
        return await self.tell_error(request, told)

    async def tell_bug(self, request: Request, error: Exception) -> Response:
        # The traceback goes to the server's own log; a client learns nothing of it.
        return await self.tell_error(
            request, ApiError(500, "This is a bug of the server; its log says more.", code="bug")
        )

    def _speaker(self, name: str) -> Speaker:
        speaker = self._engine.models.get(name)
        if speaker is None:
            names = ", ".join(sorted(self._engine.models))
            raise ApiError(
                404,
                f"There is no such model here; there are {names}.",
                param="model",
                code="model_not_found",
            )
        return speaker

    async def _answer(self, request: Request, prepare: Callable[[bytes], _Job]) -> Response:
        _check_content_type(request)
        body = await request.body()
        # Rendering and tokenizing may take long: never in the event loop.
        job = await run_in_threadpool(prepare, body)
        answers = _Answers(self._engine, job, self._limits)
        if job.stream:
            self._metrics.count_request(_endpoint(request), 200)
            return _EventStream(answers, self._metrics)
        with answers:
            gone = asyncio.ensure_future(_gone(request.receive))
            whole = asyncio.ensure_future(answers.collect())
            try:
                await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
                if not whole.done():
                    self._metrics.count_disconnect()
                    return Response(status_code=499)  # nobody reads it
                choices = whole.result()
            finally:
                gone.cancel()
                whole.cancel()
        answers.count(self._metrics)
        self._metrics.count_request(_endpoint(request), 200)
        return JSONResponse(job.reply.whole(choices))

    def _chat_job(self, body: bytes) -> _Job:
        wanted = read_request(ChatRequest, body)
        speaker = self._speaker(wanted.model)
        encoder = speaker.encoder
        if wanted.chat_template_kwargs:
            switches = tuple(sorted(wanted.chat_template_kwargs.items()))
            encoder = self._switched(encoder, switches)
        messages = [message.read() for message in wanted.messages]
        tools = [tool.model_dump() for tool in wanted.tools] if wanted.tools else None
        try:
            prompt = encoder.prompt(messages, tools)
        except DataError as error:
            param = "tools" if str(error).startswith("The tools") else "messages"
            raise ApiError(400, _first_line(error), param=param, code="invalid_prompt") from None
        return self._job(wanted, speaker, [prompt], "messages", self._limits.default_tokens)

    def _completion_job(self, body: bytes) -> _Job:
        wanted = read_request(CompletionRequest, body)
        speaker = self._speaker(wanted.model)
        prompts = []
        for text in wanted.prompt:
            try:
                prompts.append(speaker.encoder.text_prompt(text))
            except DataError as error:
                raise ApiError(
                    400, _first_line(error), param="prompt", code="invalid_prompt"
                ) from None
        default = self._limits.default_completion_tokens
        return self._job(wanted, speaker, prompts, "prompt", default)

    def _job(
        self,
        wanted: ChatRequest | CompletionRequest,
        speaker: Speaker,
        prompts: Sequence[Prompt],
        param: str,
        default_tokens: int,
    ) -> _Job:
        tasks = []
        for number, prompt in enumerate(prompts):
            room = _room(speaker, prompt, wanted, param)
            for index in range(wanted.choices):
                seed = wanted.seed
                if seed is not None:  # one seed for all would draw the same answer n times
                    seed = (seed + number * wanted.choices + index) % (MAX_SEED + 1)
                sampling = Sampling(
                    max_new_tokens=min(room, wanted.limit or default_tokens),
                    temperature=wanted.temperature,
                    # Greedy answers take the likeliest token, which every nucleus holds.
                    top_p=None if wanted.temperature == 0 else wanted.top_p,
                    seed=seed,
                )
                tasks.append(
                    Task(
                        wanted.model,
                        prompt.ids,
                        sampling,
                        stop=tuple(wanted.stop or ()),
                        logprobs=wanted.wanted_logprobs,
                    )
                )
        chats = isinstance(wanted, ChatRequest)
        kind = ChatReply if chats else CompletionReply
        with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        reply = kind(
            id=f"{'chatcmpl' if chats else 'cmpl'}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=wanted.model,
            prompt_tokens=prompt_tokens,
            with_usage=with_usage,
            with_logprobs=wanted.wanted_logprobs is not None,
        )
        return _Job(tasks, reply, wanted.model, prompt_tokens, bool(wanted.stream), with_usage)


class _Answers:
    """The answers of one request, from the engine's thread to the event loop.

    Leaving the `with` block, or closing the stream, ends what is still being computed. Raises
    ApiError where the engine takes no more.
    """

    def __init__(self, engine: Engine, job: _Job, limits: Limits) -> None:
        self.job = job
        self.choices = [Choice(index) for index in range(len(job.tasks))]
        self._limits = limits
        self._started = time.monotonic()
        self._first: float | None = None
        self._arrivals: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._arrivals.put_nowait, (index, event))

        self._ticket = _submit(engine, job.tasks, tell, limits)

    def __enter__(self) -> "_Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is still being computed."""
        self._ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[Choice, Piece | Finished]]:
        """What arrives, noted in `choices`, until all answers have ended.

        Raises ApiError for an answer that failed.
        """
        open_choices = len(self.choices)
        while open_choices:
            index, event = await self._arrivals.get()
            if self._first is None:
                self._first = time.monotonic()
            choice = self.choices[index]
            if isinstance(event, Failed):
                raise ApiError(503, event.text, code="engine_failed")
            if isinstance(event, Finished):
                open_choices -= 1
                choice.reason, choice.num_tokens = event.reason, event.num_tokens
                choice.text = event.text
            else:
                choice.tokens += event.tokens
            yield choice, event

    async def collect(self) -> list[Choice]:
        """All answers, whole."""
        async for _ in self.events():
            pass
        return self.choices

    def count(self, metrics: Metrics) -> None:
        """Note what was computed."""
        end = time.monotonic()
        metrics.count_answer(
            self.job.model,
            prompt_tokens=self.job.prompt_tokens,
            drawn_tokens=sum(choice.num_tokens for choice in self.choices),
            first=(self._first or end) - self._started,
            whole=end - self._started,
        )


class _EventStream(Response):
    """Answers as server-sent events; what is left of them is not computed if the client goes."""

    def __init__(self, answers: _Answers, metrics: Metrics) -> None:
        super().__init__(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._answers = answers
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        sent = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({gone, sent}, return_when=asyncio.FIRST_COMPLETED)
            if sent.done():
                sent.result()
                self._answers.count(self._metrics)
            else:
                self._metrics.count_disconnect()
        finally:
            self._answers.close()
            for task in (gone, sent):
                task.cancel()
            await asyncio.gather(gone, sent, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        job = self._answers.job
        openings = [job.reply.opening(choice.index) for choice in self._answers.choices]
        for opening in filter(None, openings):
            yield as_event(opening)
        try:
            async for choice, event in self._answers.events():
                if isinstance(event, Finished):
                    yield as_event(job.reply.chunk(choice.index, "", (), event.reason))
                else:
                    yield as_event(job.reply.chunk(choice.index, event.text, event.tokens, None))
        except ApiError as error:
            yield as_event(error.as_json())
            return
        if job.with_usage:
            yield as_event(job.reply.usage_chunk(self._answers.choices))
        yield DONE


def _submit(
    engine: Engine, tasks: Sequence[Task], tell: Callable[[int, Event], None], limits: Limits
) -> Ticket:
    later = {"Retry-After": str(limits.retry_seconds)}
    try:
        return engine.submit(tasks, tell)
    except Busy:
        raise ApiError(
            429,
            "Too many answers are waiting; ask again in a moment.",
            code="queue_full",
            headers=later,
        ) from None
    except Stopping:
        raise ApiError(503, "The server is about to end.", code="stopping", headers=later) from None
    except ConfigError as error:  # options that contradict each other
        raise ApiError(400, str(error), code="invalid_value") from None


def _room(
    speaker: Speaker, prompt: Prompt, request: ChatRequest | CompletionRequest, param: str
) -> int:
    """Tokens that an answer may have.

    Raises ApiError where the prompt leaves no room, or less than was asked for.
    """
    try:
        speaker.check_fits(prompt.ids)
    except DataError as error:
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
    wanted = request.limit
    if speaker.context is None:
        return wanted or MAX_TOKENS
    room = speaker.context - len(prompt.ids)
    if wanted is not None and wanted > room:
        name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
        raise ApiError(
            400,
            f"{name} is {wanted:,}, the prompt has {len(prompt.ids):,} tokens, and the model's "
            f"context holds {speaker.context:,}, prompt and answer together: there is room for "
            f"{room:,}.",
            param=name,
            code="context_length_exceeded",
        )
    return room


def _switched(encoder: Encoder, switches: tuple[tuple[str, bool | str], ...]) -> Encoder:
    """The encoder with other switches of its template.

    Raises ApiError for names that the template does not read.
    """
    template = encoder.template
    known = template.renderer.variables(template.source) - _RESERVED - set(template.special_tokens)
    for name, _ in switches:
        if name not in known:
            raise ApiError(
                400,
                f"chat_template_kwargs: the chat template of this model reads no {name}; it reads "
                f"{', '.join(sorted(known)) or 'none'}.",
                param=f"chat_template_kwargs.{name}",
                code="unsupported_parameter",
            )
    options = {**template.options, **dict(switches)}
    try:
        return Encoder(
            encoder.tokenizer,
            replace(template, options=options),
            stop_ids=encoder.stop_ids,
            system=encoder.system,
        )
    except (ConfigError, DataError) as error:
        raise ApiError(
            400, str(error), param="chat_template_kwargs", code="invalid_value"
        ) from None


def _first_line(error: DataError) -> str:
    """What was found; how rows of a data file are mended does not help a client."""
    return str(error).partition("\n")[0]


async def _gone(receive: Receive) -> None:
    """Wait until the client is not there any more."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request) -> None:
    """A page of another origin can post forms and plain text without being asked, but no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "The body has to be sent as application/json.", code="unsupported_media_type"
        )


def _endpoint(request: Request) -> str:
    """The route of a request as a label; addresses that there are not share one."""
    route: Any = request.scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "other"


def _policy(page: str) -> str:
    """A content security policy that lets run what stands in the page, and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _BLOCK.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    rules = [f"{kind}-src {' '.join(found)}" for kind, found in hashes.items()]
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *rules, "frame-ancestors 'none'"])
