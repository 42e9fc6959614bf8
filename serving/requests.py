"""The schema of requests, the limits of the server, and error responses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_QUOTED = 60  # characters of a value that an error message quotes


class RequestError(Exception):
    """An error response in OpenAI's format.

    Args:
        message: what is wrong, what was expected, and what to do. Sent to the client, so it must not reveal local details.
        status (*optional*, defaults to 400): the HTTP status.
        code (*optional*): a machine-readable code, such as "context_length_exceeded".
        param (*optional*): the invalid field.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the server.

    Args:
        requests: concurrent requests, waiting ones included; more are refused with status 429.
        body_bytes: size of a request, images included.
        body_seconds: maximum time to send a request; less for a slow one (see `connections.BodyReader`).
        receiving_bytes: total size of the bodies that are being received.
        images: images per request.
        tiles: tiles of all images of a request, each an input of the vision tower (`image_layout="tiles"`).
        image_pixels: pixels of an image, or of a frame of a video.
        videos: videos per request.
        video_frames: frames of all videos of a request together; of longer videos, as many at equal distances.
        video_seconds: length of a video.
        decode_seconds: time to read a video.
        new_tokens: tokens of an answer.
        allow_urls: whether images are downloaded from public http(s) URLs.
    """

    requests: int = 128
    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    receiving_bytes: int = 2**30
    images: int = 8
    tiles: int = 128
    image_pixels: int = 25_000_000
    videos: int = 1
    video_frames: int = 64
    video_seconds: float = 600.0
    decode_seconds: float = 20.0
    new_tokens: int = 4096
    allow_urls: bool = False


class _Strict(BaseModel):
    """A JSON object. Unknown fields are refused, unless they are null or have their no-op value in `no_op`."""

    model_config = ConfigDict(extra="forbid")
    no_op: ClassVar[dict[str, Any]] = {}  # unsupported fields -> the value that has no effect

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None and not (name in cls.no_op and value == cls.no_op[name])
        }


# pydantic inserts the tags of union members into the paths of errors. Angle brackets distinguish them from field names.
def _text_or_list(error_message: str) -> Discriminator:
    def choose(value: Any) -> str | None:
        return "<list>" if isinstance(value, list) else "<text>" if isinstance(value, str) else None

    return Discriminator(choose, custom_error_type="text_or_list", custom_error_message=error_message)


def _by_field(field: str, *known: str) -> Discriminator:
    """Select a union member by a field; "<?>" for unknown values, a member with that field only, which then fails."""

    def choose(value: Any) -> str:
        name = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return f"<{name}>" if name in known else "<?>"

    return Discriminator(choose)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # ignored: the model's image layout decides


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(_Strict):
    url: str


class VideoPart(_Strict):
    """An extension of vLLM and of transformers' server."""

    type: Literal["video_url"]
    video_url: VideoURL


class _OtherPart(BaseModel):
    type: Literal["text", "image_url", "video_url"]


class _OtherMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")]
    | Annotated[_OtherPart, Tag("<?>")],
    _by_field("type", "text", "image_url", "video_url"),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")],
    _text_or_list("Input should be a text or a list of parts"),
]


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(_Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Strict):
    """An earlier answer. Clients may send back the empty fields of our responses."""

    no_op: ClassVar[dict[str, Any]] = {"tool_calls": [], "annotations": []}

    role: Literal["assistant"]
    content: Content
    name: str | None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[_OtherMessage, Tag("<?>")],
    _by_field("role", "system", "developer", "user", "assistant"),
]


class _PlainText(_Strict):
    type: Literal["text"]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """The supported fields of OpenAI's chat completions. Others are refused, so that none is silently ignored.

    The fields of the last group are accepted and have no effect.
    """

    no_op: ClassVar[dict[str, Any]] = {
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
        _text_or_list("Input should be a string or a list of strings"),
    ] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    chat_template_kwargs: dict[str, bool | int | str] = Field(default_factory=dict)  # as in vLLM and SGLang

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

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            RequestError: for more than 4, or if one is empty or has more than 256 characters.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > 4 or not all(0 < len(text) <= 256 for text in stops):
            raise RequestError("stop takes up to 4 strings of 1 to 256 characters each.", param="stop")
        return stops

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages as dicts for the handler of transformers. The role "developer" becomes "system"."""
        messages = [message.model_dump(include={"role", "content"}) for message in self.messages]
        for message in messages:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
        return messages


def parse(body: bytes) -> ChatRequest:
    """Parse and validate the body of a request.

    Raises:
        RequestError: for the first invalid field. Its value is quoted up to `MAX_QUOTED` characters.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        names = [str(part) for part in first["loc"] if not str(part).startswith("<")]
        raise RequestError(*_describe(".".join(map(_shorten, names)), first)) from None
    for number, message in enumerate(request.messages):
        if not isinstance(message, (SystemMessage, AssistantMessage)) or isinstance(message.content, str):
            continue
        for index, part in enumerate(message.content):
            if part.type != "text":
                field = f"messages.{number}.content.{index}"
                kind = "an image" if part.type == "image_url" else "a video"
                raise RequestError(
                    f"{field} is {kind} in a message of the role {message.role!r}; only user messages may have images.",
                    param=field,
                )
    return request


def _describe(field: str, error: "ErrorDetails") -> tuple[str, int, str | None, str | None]:
    """The arguments of `RequestError` for an invalid field."""
    if error["type"] == "extra_forbidden":
        return f"{field} is not supported; remove it.", 400, "unsupported_parameter", field
    if error["type"] == "missing":
        return f"{field} is missing, or null.", 400, None, field
    value = error["input"]
    if error["type"] == "literal_error" and isinstance(value, str):
        return f"{field}: {error['msg']}, not {_shorten(value)!r}.", 400, None, field
    for key, example in (("image_url", "image/png"), ("video_url", "video/mp4")):
        if isinstance(value, str) and field.endswith(f".{key}"):
            return f'{field} is a string; pass an object, {{"url": "data:{example};base64,..."}}.', 400, None, field
    return f"{field or 'The body'}: {error['msg']}.", 400, None, field or None


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "..."
