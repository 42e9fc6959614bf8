"""What may be asked, and what is answered to anything else."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


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
        body_bytes: of a request, its pictures included.
        body_seconds: to send it.
        pictures: of a request.
        picture_pixels: of a picture.
        new_tokens: of an answer.
        allow_urls: fetch pictures from public http(s) addresses.
    """

    requests: int = 128
    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    pictures: int = 8
    picture_pixels: int = 25_000_000
    new_tokens: int = 4096
    allow_urls: bool = False


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Text(_Strict):
    type: Literal["text"]
    text: str


class Address(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # every picture takes the same number of tokens


class Picture(_Strict):
    type: Literal["image_url"]
    image_url: Address


class Instruction(_Strict):
    role: Literal["system", "developer"]
    content: str | list[Text]
    name: str | None = None


class Question(_Strict):
    role: Literal["user"]
    content: str | list[Annotated[Text | Picture, Field(discriminator="type")]]
    name: str | None = None


class Answer(_Strict):
    """As the client got it: fields that are empty in our answers may come back."""

    role: Literal["assistant"]
    content: str | list[Text]
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: None = None
    function_call: None = None
    tool_calls: None = None


class _PlainText(_Strict):
    type: Literal["text"]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """The fields of OpenAI's chat completions that are followed; any other is refused, so that none is ignored in silence.

    Those of the last group change no answer.
    """

    model: str
    messages: list[Annotated[Instruction | Question | Answer, Field(discriminator="role")]] = Field(min_length=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
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
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
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
        RequestError: naming the first field that is wrong; its content is not repeated.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # The names of the alternatives stand in the path as well; a field's own name is in small letters.
        place = ".".join(str(part) for part in first["loc"] if str(part) == str(part).lower())
        if first["type"] == "extra_forbidden":
            raise RequestError(
                f"{place} is not supported; leave it out.", code="unsupported_parameter", param=place
            ) from None
        raise RequestError(f"{place or 'The body'}: {first['msg']}.", param=place or None) from None
