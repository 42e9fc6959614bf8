"""What may be asked, and what is answered to anything else."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SHOWN = 60  # characters of a value that a message repeats


class RequestError(Exception):
    """What a client is told: an OpenAI error body.

    Args:
        message: what is wrong, what was expected, what to do; nothing of this machine.
        status: of HTTP.
        code: for programs ("context_length_exceeded", ...).
        param: the field at fault.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Args:
        requests: held at once, those that wait included; more are refused with status 429.
        body_bytes: of a request, its images included.
        body_seconds: to send it, at most; less for one that comes slowly (`connections.Bodies`).
        receiving_bytes: of all bodies that are being received.
        images: of a request.
        image_pixels: of an image.
        new_tokens: of an answer.
        allow_urls: fetch images from public http(s) addresses.
    """

    requests: int = 128
    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    receiving_bytes: int = 2**30
    images: int = 8
    image_pixels: int = 25_000_000
    new_tokens: int = 4096
    allow_urls: bool = False


class _Strict(BaseModel):
    """An object whose unknown fields are refused. A field that is null, or empty as `idle` has it, asks for nothing."""

    model_config = ConfigDict(extra="forbid")
    idle: ClassVar[dict[str, Any]] = {}  # fields that are not followed -> the value that asks for nothing

    @model_validator(mode="before")
    @classmethod
    def _drop_idle(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None and not (name in cls.idle and value == cls.idle[name])
        }


# The names of alternatives stand in the paths of pydantic's errors; in angle brackets, they are told from fields' names.
def _text_or_list(otherwise: str) -> Discriminator:
    def choose(value: Any) -> str | None:
        return "<list>" if isinstance(value, list) else "<text>" if isinstance(value, str) else None

    return Discriminator(choose, custom_error_type="text_or_list", custom_error_message=otherwise)


def _named(field: str, *known: str) -> Discriminator:
    """The alternative that a field names; "<?>", an object of nothing but this field, if it names none."""

    def choose(value: Any) -> str:
        name = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return f"<{name}>" if name in known else "<?>"

    return Discriminator(choose)


class Text(_Strict):
    type: Literal["text"]
    text: str


class Address(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # every image takes the same number of tokens


class Image(_Strict):
    type: Literal["image_url"]
    image_url: Address


class _OtherPart(BaseModel):
    type: Literal["text", "image_url"]


class _OtherMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]


Part = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Image, Tag("<image_url>")] | Annotated[_OtherPart, Tag("<?>")],
    _named("type", "text", "image_url"),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")],
    _text_or_list("Input should be a text or a list of parts"),
]


class Instruction(_Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class Question(_Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class Answer(_Strict):
    """As the client got it: fields that are empty in our answers may come back."""

    idle: ClassVar[dict[str, Any]] = {"tool_calls": [], "annotations": []}

    role: Literal["assistant"]
    content: Content
    name: str | None = None


Message = Annotated[
    Annotated[Instruction, Tag("<system>")]
    | Annotated[Instruction, Tag("<developer>")]
    | Annotated[Question, Tag("<user>")]
    | Annotated[Answer, Tag("<assistant>")]
    | Annotated[_OtherMessage, Tag("<?>")],
    _named("role", "system", "developer", "user", "assistant"),
]


class _PlainText(_Strict):
    type: Literal["text"]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """The fields of OpenAI's chat completions that are followed; any other is refused, so that none is ignored in silence.

    Those of the last group change no answer.
    """

    idle: ClassVar[dict[str, Any]] = {
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "function_call": "none",
        "logit_bias": {},
        "modalities": ["text"],
    }

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
        _text_or_list("Input should be a text or a list of texts"),
    ] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    n: Literal[1] | None = None
    response_format: _PlainText | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop texts.

        Raises:
            RequestError: for more than four, an empty one or one of more than 256 characters.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > 4 or not all(0 < len(text) <= 256 for text in stops):
            raise RequestError("stop takes up to 4 texts of 1 to 256 characters each.", param="stop")
        return stops

    def plain_messages(self) -> list[dict[str, Any]]:
        """As transformers' handler takes them; a developer's message is a system message."""
        messages = [message.model_dump(include={"role", "content"}) for message in self.messages]
        for message in messages:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
        return messages


def parse(body: bytes) -> ChatRequest:
    """A request's body, checked.

    Raises:
        RequestError: naming the first field that is wrong; of its content, at most the beginning is repeated.
    """
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        names = [str(part) for part in first["loc"] if not str(part).startswith("<")]
        raise RequestError(*_told(".".join(map(_short, names)), first)) from None
    for number, message in enumerate(asked.messages):
        if not isinstance(message, (Instruction, Answer)) or isinstance(message.content, str):
            continue
        for index, part in enumerate(message.content):
            if part.type == "image_url":
                place = f"messages.{number}.content.{index}"
                raise RequestError(
                    f"{place} is an image in a message of the role {message.role!r}; images stand in user messages.",
                    param=place,
                )
    return asked


def _told(place: str, error: "ErrorDetails") -> tuple[str, int, str | None, str | None]:
    """What is said of a field that is wrong: message, status, code, param."""
    if error["type"] == "extra_forbidden":
        return f"{place} is not supported; leave it out.", 400, "unsupported_parameter", place
    if error["type"] == "missing":
        return f"{place} is missing, or null.", 400, None, place
    said = error["input"]
    if error["type"] == "literal_error" and isinstance(said, str):
        return f"{place}: {error['msg']}, not {_short(said)!r}.", 400, None, place
    if isinstance(said, str) and place.endswith(".image_url"):
        return f'{place} is a text; pass an object, {{"url": "data:image/png;base64,..."}}.', 400, None, place
    return f"{place or 'The body'}: {error['msg']}.", 400, None, place or None


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
