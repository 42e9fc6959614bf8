"""The ASGI application of `dsvl serve`. Its chat completions subclass the handler of transformers' server."""

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jinja2 import TemplateError
from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..chat.prompts import Prompt, count_positions, read_prompt
from ..composition.chat_template import check_template_variables
from ..image_layouts_dsvl import FRAME
from ..image_library import ImageLibrary, LibraryImage
from ..image_library.content_keys import preprocessing_version
from ..utils.hosts import LOOPBACK
from ..utils.transformers_names import ChatCompletionHandler, Modality
from .admission import RequestSlots, error_response
from .connections import BodyReader
from .engine import FAILURE, LIBRARY_IMAGES, Engine, Sampling, join_images
from .images import expand_videos, fetch_images, image_file, image_parts, load_image, measure_images
from .requests import ChatRequest, RequestError, RequestLimits, parse

logger = logging.getLogger(__name__)
DEFAULT_NEW_TOKENS = 1024  # as in the server of transformers
MAX_CHARACTERS_PER_TOKEN = 64  # more than the average of any text


class ChatCompletions(ChatCompletionHandler):
    """The ASGI application of `/v1/chat/completions`.

    The base class converts messages to the processor's format and formats responses. Its other features are not used,
    because they give clients control over the process: loading models by name, opening image paths and URLs, whole
    generation configs, chat template arguments, and the global random seed.

    Args:
        model: a DSVL model.
        processor: its processor.
        name: the model's name for clients.
        limits: the limits of the server.
        engine: generates the answers; its library keeps images.
    """

    def __init__(self, model: Any, processor: Any, name: str, limits: RequestLimits, engine: Engine) -> None:
        super().__init__(model_manager=None, generation_state=None)  # type: ignore[arg-type]  # replaced by model and engine
        self.model, self.processor, self.name, self.limits, self.engine = model, processor, name, limits, engine
        self.library = engine.library
        # An image is known by its file, and by what decides how it is read.
        self.reading_version = preprocessing_version(processor, limits.image_pixels)
        self.bodies = BodyReader()
        self.slots = RequestSlots(limits.requests)
        # Thread pools keep slow work out of the event loop. Few threads decode images, which limits memory. Each image is a
        # separate task, so concurrent requests alternate, and requests without images do not wait.
        self.reading = ThreadPoolExecutor(2, thread_name_prefix="dsvl-serve-read")
        self.preparing = ThreadPoolExecutor(2, thread_name_prefix="dsvl-serve-prepare")
        self.fetching = ThreadPoolExecutor(16, thread_name_prefix="dsvl-serve-fetch")  # for slow URLs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"  # never the client's id, which may not be unique
        try:
            with self.slots.take():
                pass  # refuse before reading the body
            body = await self._read(request)
            with self.slots.take():  # after reading, so that slow senders do not occupy a slot
                response = await _cancel_on_disconnect(receive, self._respond(body, request_id))
                del body
                await response(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.engine.release(request_id)

    @property
    def held(self) -> int:
        """The number of requests in progress."""
        return self.slots.held

    async def _read(self, request: Request) -> bytes:
        """Read the body within the limits.

        Its content type must be application/json, because browsers send that across origins only after a CORS preflight.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("Send the request with content-type application/json.", 415)
        return await self.bodies.read(request, self.limits)

    def _read_messages(self, body: bytes) -> tuple[ChatRequest, list[dict[str, Any]]]:
        """Parse a request; returns it, and its messages in the processor's format with images still encoded."""
        request = parse(body)
        request.stop_strings()
        if request.model != self.name:
            raise RequestError(
                f"This model does not exist; GET /v1/models lists {self.name!r}.", 404, "model_not_found", "model"
            )
        messages = self.get_processor_inputs_from_messages(request.plain_messages(), Modality.VLM)
        context = self.model.config.get_text_config().max_position_embeddings
        characters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if characters > MAX_CHARACTERS_PER_TOKEN * context:  # tokenizing it could take minutes
            raise RequestError(
                f"{characters} characters do not fit into the model's context of {context} tokens; shorten the messages.",
                code="context_length_exceeded",
                param="messages",
            )
        return request, messages

    def _prompt(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> Prompt:
        """The prompt of messages. Images are not decoded."""
        try:
            variables = check_template_variables(self.processor.chat_template, variables)
        except ValueError as error:
            raise RequestError(str(error), param="chat_template_kwargs") from None
        if self.processor.follows_size:
            measure_images(messages, self.limits)
        try:
            prompt = read_prompt(self.processor, messages, **variables)
        except TemplateError as error:  # the chat template refuses the order of roles
            raise RequestError(f"messages: {error}.", param="messages") from None
        tiles = sum(map(len, prompt.tile_lengths))
        if tiles > self.limits.tiles:
            raise RequestError(
                f"The images of the request take {tiles} tiles; the limit is {self.limits.tiles}. Send fewer or smaller "
                "images.",
                param="messages",
            )
        return prompt

    def source_of(self, data: bytes) -> str:
        """The name of an image file in the library."""
        return hashlib.sha256(self.reading_version.encode() + data).hexdigest()

    def find_images(
        self, parts: list[dict[str, Any]], lengths: list[list[int]]
    ) -> tuple[list[LibraryImage | None], list[str | None]]:
        """The images of a request that the library keeps, and the names of their files; None for the others.

        Args:
            lengths: of the tiles of each image, in the prompt.
        """
        assert self.library is not None
        found: list[LibraryImage | None] = []
        sources: list[str | None] = []
        for number, (part, own) in enumerate(zip(parts, lengths, strict=True), 1):
            data = image_file(part, number)
            source = None if data is None else self.source_of(data)
            known = None if source is None else self.library.find(source, number)
            sources.append(source)
            found.append(known if known is not None and known.lengths == own else None)
        return found, sources

    def preprocess_image(self, part: dict[str, Any], number: int, lengths: list[int]) -> dict[str, torch.Tensor]:
        """Decode and preprocess image `number` of a request.

        Args:
            lengths: of its tiles, in the prompt.

        Returns:
            The model inputs of the image: `pixel_values`, and what else the image layout needs.
        """
        image = load_image(part, number, self.limits)
        refused = RequestError(
            f"Image {number}, of {image.width} x {image.height} pixels, cannot be processed; pass another.",
            code="invalid_image",
            param="messages",
        )
        if self.processor.tile_lengths(image.height, image.width, bool(image.info.get(FRAME))) != lengths:
            logger.info("Refused an image of %d x %d pixels, whose header says something else", image.width, image.height)
            raise refused
        try:
            inputs = self.processor(images=[image], return_tensors="pt")
        except ValueError as error:
            logger.info("Refused an image: %s", error)
            raise refused from None
        return dict(inputs)

    def _sampling(self, request: ChatRequest, prompt_positions: int) -> Sampling:
        """The sampling parameters of a request. Defaults are those of the checkpoint's generation config.

        Raises:
            RequestError: if prompt and answer do not fit into the context, or the answer would exceed the server's limit.
        """
        context = self.model.config.get_text_config().max_position_embeddings
        available = context - prompt_positions
        requested = request.max_completion_tokens or request.max_tokens
        if available < (requested or 1):
            raise RequestError(
                f"The model's context is {context} tokens; messages and images take {prompt_positions}"
                + (f", and {requested} are requested for the answer" if requested else "")
                + ". Shorten one of them.",
                code="context_length_exceeded",
                param="messages",
            )
        if requested is not None and requested > self.limits.new_tokens:
            raise RequestError(f"An answer may have at most {self.limits.new_tokens} tokens.", param="max_completion_tokens")
        config = self.model.generation_config
        temperature = request.temperature
        if temperature is None:
            temperature = (config.temperature or 1.0) if config.do_sample else 0.0
        return Sampling(
            max_new_tokens=requested or min(DEFAULT_NEW_TOKENS, self.limits.new_tokens, available),
            temperature=temperature,
            top_p=request.top_p if request.top_p is not None else config.top_p or 1.0,
            top_k=config.top_k or 0,
            seed=request.seed,
            stop=request.stop_strings(),
        )

    async def _images(self, messages: list[dict[str, Any]], prompt: Prompt) -> dict[str, Any]:
        """The model inputs of the images of a request: as images of the library, if it can take them."""
        run = asyncio.get_running_loop().run_in_executor
        parts, lengths, library = image_parts(messages, self.limits), prompt.tile_lengths, self.library
        takes_library = library is not None and library.takes(self.model, prompt.ids, lengths)
        found: list[LibraryImage | None] = [None] * len(parts)
        sources: list[str | None] = [None] * len(parts)
        if takes_library:
            found, sources = await run(self.reading, self.find_images, parts, lengths)
        inputs: list[Any] = []
        for number, (part, own, known, source) in enumerate(zip(parts, lengths, found, sources, strict=True), 1):
            made: Any = known
            if made is not None:
                part.pop("url", None)  # frees its memory
            else:
                made = await run(self.preparing, self.preprocess_image, part, number, own)
                if library is not None and takes_library:
                    made = await run(self.preparing, library.image, made, own, number, source)
            inputs.append(made)
        if takes_library:
            return {LIBRARY_IMAGES: inputs} if inputs else {}
        return join_images(inputs)

    async def _respond(self, body: bytes, request_id: str) -> Response:
        """Generate the response; a streaming one has started when this returns."""
        run = asyncio.get_running_loop().run_in_executor
        request, messages = await run(self.reading, self._read_messages, body)
        del body  # frees the memory of the images while the answer is generated
        await run(self.fetching, fetch_images, messages, self.limits)
        await run(self.preparing, expand_videos, messages, self.processor.video_sampling, self.limits)
        prompt = await run(self.reading, self._prompt, messages, request.chat_template_kwargs)
        sampling = self._sampling(request, count_positions(self.model.config, prompt))
        images = await self._images(messages, prompt)
        del messages
        ids = torch.tensor([prompt.ids])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.processor.image_token_id).long(),
            **images,
        }
        arguments = (request_id, self.model, self.processor, self.name, inputs, sampling)
        if not request.stream:
            return await self._non_streaming(*arguments, gen_manager=self.engine)
        response = self._streaming(*arguments, gen_manager=self.engine)
        response.body_iterator = _with_done(response.body_iterator)
        return response


async def _with_done(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Append the final `data: [DONE]`, which the handler of transformers does not send."""
    failed = False
    async with contextlib.aclosing(events) as open_events:  # type: ignore[type-var]
        async for event in open_events:
            failed = failed or event.startswith('data: {"error"')
            yield event
    if not failed:
        yield "data: [DONE]\n\n"


async def _cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """Await work, and cancel it when the client disconnects.

    Raises:
        ClientDisconnect: if the client disconnected.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
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
    limits: RequestLimits | None = None,
    max_batch: int = 16,
    allowed_hosts: tuple[str, ...] = LOOPBACK,
    library: ImageLibrary | None = None,
) -> Starlette:
    """Create the server's ASGI application.

    Args:
        model: a DSVL model; set to evaluation mode.
        processor: its processor.
        name: the model's name for clients.
        limits (*optional*): see `RequestLimits`.
        max_batch (*optional*, defaults to 16): requests per batch.
        allowed_hosts (*optional*, defaults to the loopback names): the accepted `Host` headers; ("*",) accepts any. This
            prevents DNS rebinding: a website cannot reach the server under its own name.
        library (*optional*): keeps images, so that they are encoded once.

    Returns:
        The application, with the `Engine` as `state.engine` and the `ChatCompletions` as `state.chat`.
    """
    engine = Engine(model.eval(), processor, max_batch, library=library)
    chat = ChatCompletions(model, processor, name, limits or RequestLimits(), engine)
    card = Model(id=name, created=int(time.time()), object="model", owned_by="dsvl")

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card.model_dump()]})

    async def get_model(request: Request) -> Response:
        if request.path_params["model"] != name:
            raise RequestError(f"This model does not exist; GET /v1/models lists {name!r}.", 404, "model_not_found", "model")
        return JSONResponse(card.model_dump())

    async def health(request: Request) -> Response:
        figures: dict[str, Any] = {"status": "ok", "held": chat.held, "generating": engine.running}
        if library is not None:
            figures["image_library"] = await asyncio.to_thread(library.statistics)
        return JSONResponse(figures)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for pool in (chat.reading, chat.preparing, chat.fetching):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(engine.stop)
        if library is not None:
            await asyncio.to_thread(library.tiers.flush)

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


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return error_response(error.message, error.status, error.code, error.param)
    assert isinstance(error, HTTPException)
    return error_response(str(error.detail), error.status_code)


def _failed(request: Request, error: Exception) -> Response:
    return error_response(FAILURE, 500)  # the log has the traceback
