"""The HTTP side: three routes, and transformers' own handler of chat completions behind them."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jinja2 import TemplateError
from openai.types import Model
from openai.types.shared import ErrorObject
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..chat.prompts import prompt_ids
from ..utils.transformers_names import ChatCompletionHandler, Modality
from .connections import Bodies
from .engine import FAILURE, Engine, Sampling
from .images import fetch_images, image_parts, load_image
from .requests import ChatRequest, Limits, RequestError, parse

logger = logging.getLogger(__name__)
DEFAULT_NEW_TOKENS = 1024  # as transformers' own server
CHARACTERS_PER_TOKEN = 64  # more than any text has on the average
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


class ChatCompletions(ChatCompletionHandler):
    """`/v1/chat/completions`, an ASGI application.

    The base class turns messages into the processor's and texts into the protocol's answers, streamed or whole. What it
    takes from a request beyond that is left out here: names of models, addresses and paths of images, whole generation
    configurations, arguments of the template, the seed of the process.

    Args:
        model: a DSVL model.
        processor: its processor.
        name: what clients call it.
        limits: what is taken on.
        engine: where answers come from.
    """

    def __init__(self, model: Any, processor: Any, name: str, limits: Limits, engine: Engine) -> None:
        super().__init__(model_manager=None, generation_state=None)  # type: ignore[arg-type]  # one model, and one engine
        self.model, self.processor, self.name, self.limits, self.engine = model, processor, name, limits, engine
        self.bodies = Bodies()
        self.held = 0
        # Beside the event loop. Decoding images takes time and memory, so never many at once; and requests take turns
        # image by image, so that nobody waits for all of another's, and texts for none.
        self.reading = ThreadPoolExecutor(2, thread_name_prefix="dsvl-serve-read")
        self.preparing = ThreadPoolExecutor(2, thread_name_prefix="dsvl-serve-prepare")
        self.fetching = ThreadPoolExecutor(16, thread_name_prefix="dsvl-serve-fetch")  # slow addresses hold nobody else up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"  # ours: a client's could be another's
        try:
            with self._place():
                pass  # nothing is read that would be refused
            body = await self._read(request)
            with self._place():  # only now: whoever is slow to send takes nobody's place
                response = await _while_there(receive, self._respond(body, request_id))
                del body
                await response(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is there to be told
        finally:
            self.engine.release(request_id)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self.held >= self.limits.requests:
            raise RequestError(
                f"The server holds {self.held} requests, as many as it takes; try again later.", 429, "rate_limit_exceeded"
            )
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def _read(self, request: Request) -> bytes:
        """The body, within its limits.

        JSON must be called so: a page in somebody's browser can send it here by that name only if it is asked first.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("Send the request with content-type application/json.", 415)
        return await self.bodies.read(request, self.limits)

    def _read_messages(self, body: bytes) -> tuple[ChatRequest, list[dict[str, Any]]]:
        """The request, and its messages as the processor takes them, but for the images."""
        asked = parse(body)
        asked.stops()
        if asked.model != self.name:
            raise RequestError(
                f"There is no such model here; GET /v1/models names {self.name!r}.", 404, "model_not_found", "model"
            )
        messages = self.get_processor_inputs_from_messages(asked.plain_messages(), Modality.VLM)
        context = self.model.config.get_text_config().max_position_embeddings
        characters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if characters > CHARACTERS_PER_TOKEN * context:  # not worth the minutes to count its tokens
            raise RequestError(
                f"The model's context is {context} tokens, far less than {characters} characters; shorten the messages.",
                code="context_length_exceeded",
                param="messages",
            )
        return asked, messages

    def _prompt(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The model inputs of messages, but for the images' pixels; (1, tokens) each."""
        try:
            ids = torch.tensor([prompt_ids(self.processor, messages)])
        except TemplateError as error:  # the template's own words about the order of roles
            raise RequestError(f"messages: {error}.", param="messages") from None
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.processor.image_token_id).long(),
        }

    def _pixels(self, part: dict[str, Any], number: int) -> torch.Tensor:
        """An image as the tower takes it, (1, 3, height, width)."""
        image = load_image(part, number, self.limits)
        try:
            return self.processor(text=self.processor.image_token, images=[image], return_tensors="pt")["pixel_values"]
        except ValueError as error:
            logger.info("An image was refused: %s", error)
            raise RequestError(
                f"Image {number}, of {image.width} x {image.height} pixels, cannot be taken; pass another.",
                code="invalid_image",
                param="messages",
            ) from None

    def _sampling(self, asked: ChatRequest, prompt_tokens: int) -> Sampling:
        """How to answer; what the request leaves open is the checkpoint's generation configuration.

        Raises:
            RequestError: if prompt and answer do not fit into the model's context.
        """
        context = self.model.config.get_text_config().max_position_embeddings
        left = context - prompt_tokens
        wanted = asked.max_completion_tokens or asked.max_tokens
        if left < (wanted or 1):
            raise RequestError(
                f"The model's context is {context} tokens; messages and images take {prompt_tokens}"
                + (f", and {wanted} are wanted for the answer" if wanted else "")
                + ". Shorten one of them.",
                code="context_length_exceeded",
                param="messages",
            )
        if wanted is not None and wanted > self.limits.new_tokens:
            raise RequestError(
                f"An answer takes {self.limits.new_tokens} tokens at most here.", param="max_completion_tokens"
            )
        config = self.model.generation_config
        temperature = asked.temperature
        if temperature is None:
            temperature = (config.temperature or 1.0) if config.do_sample else 0.0
        return Sampling(
            max_new_tokens=wanted or min(DEFAULT_NEW_TOKENS, self.limits.new_tokens, left),
            temperature=temperature,
            top_p=asked.top_p if asked.top_p is not None else config.top_p or 1.0,
            top_k=config.top_k or 0,
            seed=asked.seed,
            stop=asked.stops(),
        )

    async def _respond(self, body: bytes, request_id: str) -> Response:
        """The answer; one that is streamed has begun."""
        run = asyncio.get_running_loop().run_in_executor
        asked, messages = await run(self.reading, self._read_messages, body)
        del body  # as large as its images, and the answer may take long
        await run(self.fetching, fetch_images, messages, self.limits)
        inputs = await run(self.reading, self._prompt, messages)
        sampling = self._sampling(asked, inputs["input_ids"].shape[-1])
        parts = enumerate(image_parts(messages, self.limits), 1)
        pixels = [await run(self.preparing, self._pixels, part, number) for number, part in parts]
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        arguments = (request_id, self.model, self.processor, self.name, inputs, sampling)
        if not asked.stream:
            return await self._non_streaming(*arguments, gen_manager=self.engine)
        response = self._streaming(*arguments, gen_manager=self.engine)
        response.body_iterator = _closed(response.body_iterator)
        return response


async def _closed(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The events of a stream, and the mark of its end, which transformers' handler leaves out."""
    failed = False
    async with contextlib.aclosing(events) as kept:  # type: ignore[type-var]
        async for event in kept:
            failed = failed or event.startswith('data: {"error"')
            yield event
    if not failed:
        yield "data: [DONE]\n\n"


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work gives; it is given up when the client goes.

    Raises:
        ClientDisconnect: then.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def build_app(
    model: Any,
    processor: Any,
    name: str,
    limits: Limits | None = None,
    max_batch: int = 16,
    allowed_hosts: tuple[str, ...] = LOOPBACK,
) -> Starlette:
    """The server's ASGI application.

    Args:
        model: a DSVL model; it is put into evaluation mode.
        processor: its processor.
        name: what clients call the model.
        limits: what it takes on; see `Limits`.
        max_batch: so many answers are generated together.
        allowed_hosts: names under which it answers; a page in a browser that gives its own name this machine's address
            would use another. ("*",) for any.

    Returns:
        the application; `state.engine` and `state.chat` are its parts.
    """
    engine = Engine(model.eval(), processor, max_batch)
    chat = ChatCompletions(model, processor, name, limits or Limits(), engine)
    described = Model(id=name, created=int(time.time()), object="model", owned_by="dsvl")

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described.model_dump()]})

    async def get_model(request: Request) -> Response:
        if request.path_params["model"] != name:
            raise RequestError(
                f"There is no such model here; GET /v1/models names {name!r}.", 404, "model_not_found", "model"
            )
        return JSONResponse(described.model_dump())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "held": chat.held, "generating": engine.running})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for pool in (chat.reading, chat.preparing, chat.fetching):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(engine.stop)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/", list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", get_model, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _refused, Exception: _failed},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)],
        lifespan=lifespan,
    )
    app.state.engine, app.state.chat = engine, chat
    return app


def _error(message: str, status: int, code: str | None = None, param: str | None = None) -> Response:
    kind = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    body = ErrorObject(message=message, type=kind, code=code, param=param).model_dump(
        include={"message", "type", "code", "param"}
    )
    headers = {429: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(status)
    return JSONResponse({"error": body}, status, headers=headers)


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return _error(error.message, error.status, error.code, error.param)
    assert isinstance(error, HTTPException)
    return _error(str(error.detail), error.status_code)


def _failed(request: Request, error: Exception) -> Response:
    return _error(FAILURE, 500)  # the server's log has the trace
