"""`dsvl serve`: random requests are answered correctly or refused with a clear error."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_server import NAME, data_url, draw_image, load_parts, make_served_checkpoint
from starlette.testclient import TestClient

from dsvl.serving.app import build_app
from dsvl.serving.requests import RequestLimits

IMAGES = [draw_image(seed) for seed in range(3)]
URLS = [data_url(image) for image in IMAGES]
BROKEN = ["", "x", "http://127.0.0.1/a.png", "data:image/png;base64,!!!", "data:,x", URLS[0][:-200], "file:///etc/passwd"]
TOKENS, MAX_TOKENS = 3, 5  # of an answer

QUICK: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(codec="utf-8"), max_size=20)


def with_noise(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = anything) -> st.SearchStrategy[Any]:
    """Mostly valid values."""
    return st.integers(0, 19).flatmap(lambda number: bad if number == 0 else good)


text_parts = st.fixed_dictionaries({"type": st.just("text"), "text": with_noise(texts)})
urls = with_noise(st.sampled_from(URLS), st.sampled_from(BROKEN) | anything)
addresses = st.fixed_dictionaries({"url": urls}, optional={"detail": st.sampled_from(["auto", "low", "high", None, "best"])})
image_parts = st.fixed_dictionaries({"type": st.just("image_url"), "image_url": with_noise(addresses)})
other_parts = st.fixed_dictionaries({"type": st.sampled_from(["image", "input_audio", "file", "video_url", 5, None])})
parts = with_noise(text_parts | image_parts, other_parts | anything)
contents = with_noise(texts | st.lists(parts, min_size=1, max_size=3))
users = st.fixed_dictionaries(
    {"role": st.just("user"), "content": contents},
    optional={"name": st.sampled_from(["a", None]), "weight": with_noise(st.none())},
)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": with_noise(texts)},
    optional={"tool_calls": st.sampled_from([[], None, [{"id": "1"}]]), "refusal": st.sampled_from([None, "no"])},
)
systems = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "tool"]), "content": contents})


@st.composite
def conversations(draw: Any) -> Any:
    messages = [draw(systems)] if draw(st.integers(0, 3)) == 0 else []
    for _ in range(draw(st.integers(0, 1))):
        messages += [draw(users), draw(answers)]
    messages.append(draw(users))
    return messages if draw(st.integers(0, 9)) else draw(st.permutations(messages))


numbers = st.floats(0, 2) | st.sampled_from([0, -0.0, 1, 2, 1e-300, 5e-324, 2.0000001, -1, 1e308])
options = {
    "temperature": with_noise(numbers),
    "top_p": with_noise(st.floats(0, 1) | st.sampled_from([0, 1, 1e-300, 5e-324])),
    "seed": with_noise(st.integers(-(2**63), 2**63)),
    "stop": with_noise(texts | st.lists(texts, max_size=5) | st.none()),
    "n": st.sampled_from([1, None, 2, 0]),
    "stream": st.sampled_from([False, None, "no"]),
    "max_completion_tokens": st.sampled_from([None, TOKENS, 0, -1, 10**6, 1.5]),
    "response_format": st.sampled_from([None, {"type": "text"}, {"type": "json_object"}]),
    "logprobs": st.sampled_from([None, False, True]),
    "frequency_penalty": st.sampled_from([None, 0, 0.0, 0.5]),
    "tools": st.sampled_from([None, [], [{"type": "function"}]]),
    "tool_choice": st.sampled_from([None, "none", "auto"]),
    "logit_bias": st.sampled_from([None, {}, {"5": 100}]),
    "modalities": st.sampled_from([None, ["text"], ["text", "audio"]]),
    "reasoning_effort": st.sampled_from([None, "low"]),
    "metadata": with_noise(st.dictionaries(texts, texts, max_size=2)),
    "unheard_of": anything,
}
requests = st.fixed_dictionaries(
    {"model": with_noise(st.just(NAME)), "messages": with_noise(conversations()), "max_tokens": with_noise(st.just(TOKENS))},
    optional={name: with_noise(values, st.none() | anything) for name, values in options.items()},
)


@st.composite
def few_options(draw: Any) -> dict[str, Any]:
    """A request with few options, so that many are valid."""
    request = draw(requests)
    kept = set(draw(st.lists(st.sampled_from(sorted(options)), max_size=2)))
    return {name: value for name, value in request.items() if name not in options or name in kept}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = load_parts(make_served_checkpoint(tmp_path_factory.mktemp("serving")))
    app = build_app(model, processor, NAME, RequestLimits(new_tokens=MAX_TOKENS), allowed_hosts=("testserver",))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, model, processor


def _expected(model: Any, processor: Any, request: dict[str, Any], tokens: int) -> str:
    """The greedy answer to the request's messages, without a server."""
    own = []
    for message in request["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "text", "text": part["text"]}
                if part["type"] == "text"
                else {"type": "image", "image": IMAGES[URLS.index(part["image_url"]["url"])]}
                for part in content
            ]
        own.append({"role": message["role"].replace("developer", "system"), "content": content})
    inputs = processor.apply_chat_template(
        own, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check(served: Any, request: dict[str, Any]) -> bool:
    """Send a request and check the response; returns whether it was answered."""
    client, model, processor = served
    body = json.dumps(request).encode()
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    told = answer.json()
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, (answer.status_code, request)
        assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}
        assert 5 < len(told["error"]["message"]) < 600
        return False
    (choice,) = told["choices"]
    tokens = told["usage"]["completion_tokens"]
    assert tokens == (request.get("max_completion_tokens") or request.get("max_tokens") or MAX_TOKENS) or request.get("stop")
    assert choice["finish_reason"] in ("stop", "length")
    greedy = not request.get("temperature") or request["temperature"] < 1e-4
    if greedy and not request.get("stop"):
        assert choice["message"]["content"] == _expected(model, processor, request, tokens)
    return True


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(request=few_options() | requests)
def test_a_request_is_answered_correctly_or_refused_clearly(served: Any, request: Any) -> None:
    check(served, request)


def test_most_of_them_are_answered(served: Any) -> None:
    """Otherwise the previous test would not test answers."""
    answered = []

    @settings(max_examples=60, **QUICK)
    @given(request=few_options())
    def count(request: Any) -> None:
        answered.append(check(served, request))

    count()
    assert sum(answered) > len(answered) / 4 and not all(answered)


@pytest.mark.slow
@settings(max_examples=1000, **QUICK | {"derandomize": False, "print_blob": True})
@given(request=few_options() | requests)
def test_a_thousand_requests(served: Any, request: Any) -> None:
    check(served, request)


@settings(max_examples=100, **QUICK)
@given(body=st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_a_random_body_is_refused_clearly(served: Any, body: bytes) -> None:
    client, _, _ = served
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
