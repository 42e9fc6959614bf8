"""A language model's chat template keeps what it renders, with images, protected special tokens and marked answers."""

import json
from typing import Any

import pytest
from chat_formats import FORMATS, ChatFormat
from conftest import save_tiny_llama, tiny_tower_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, GenerationConfig

import dsvl
import dsvl.data as dsvl_data
from dsvl.chat.prompts import read_prompt
from dsvl.cli import main
from dsvl.composition.chat_template import (
    chat_template_name,
    check_template_takes,
    check_template_variables,
    choose_chat_template,
    end_of_turn_ids,
    original_chat_template,
    prepare_chat_template,
)
from dsvl.evaluation.questions import Questions
from dsvl.processing_dsvl import MARK, DSVLProcessor
from dsvl.training.collator import ConversationCollator

TOOLS_TAKEN = ("mistral", "qwen2_5", "qwen3")
THINKING = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
IMAGE = {"type": "image"}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Look up a word.", "parameters": {}}}


def user(*parts: Any) -> dict[str, Any]:
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    return {"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}


def assistant(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | keys


def render(tokenizer: Any, messages: Any, template: str | None = None, **options: Any) -> str:
    """The rendered text; white space marks of protection are removed."""
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return text.replace(MARK, "")


def answers(tokenizer: Any, messages: Any, template: str, **options: Any) -> list[str]:
    """The marked spans of a conversation."""
    from dsvl.utils.transformers_names import render_jinja_template

    variables = tokenizer.special_tokens_map | options
    (text,), (spans,) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    return [text[start:end].replace(MARK, "") for start, end in spans]


PREPARED: dict[str, tuple[Any, str]] = {}


def prepared(name: str, **variables: Any) -> tuple[Any, str]:
    """A tokenizer of the format with its prepared template, and the template."""
    key = name + repr(variables)
    if key not in PREPARED:
        tokenizer = FORMATS[name].tokenizer()
        PREPARED[key] = tokenizer, prepare_chat_template(FORMATS[name].template, tokenizer, variables)
    return PREPARED[key]


@st.composite
def conversations(draw: Any, format_: ChatFormat, typed: bool = False) -> list[dict[str, Any]]:
    """Turns of texts with white space, tags that templates cut at, and, on request, special tokens that somebody typed."""
    pieces = [
        "Yes",
        "a circle.",
        " ",
        "\n",
        "\n\n",
        "  two ",
        "<think>",
        "</think>",
        "<tool_response>",
        "é",
        "{{ x }}",
        "###",
    ]
    if typed:
        pieces += [format_.eos, format_.end, *format_.special, *([format_.bos] if format_.bos else []), "<image>"]
    text = st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join)
    messages = []
    if format_.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(text)), assistant(draw(st.one_of(text, st.just(""))))]
    return messages


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_texts_render_as_by_the_language_models_own_template(name: str, data: Any) -> None:
    tokenizer, template = prepared(name)
    messages = data.draw(conversations(FORMATS[name]))
    options = data.draw(st.sampled_from(THINKING))
    assert render(tokenizer, messages, template, **options) == render(tokenizer, messages, FORMATS[name].template, **options)
    prompt = {"add_generation_prompt": True} | options
    for end in range(1, len(messages) + 1):
        if messages[end - 1]["role"] == "user":
            own = render(tokenizer, messages[:end], FORMATS[name].template, **prompt)
            assert render(tokenizer, messages[:end], template, **prompt) == own


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "qwen3"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_answer_is_what_follows_its_prompt_up_to_the_end_of_turn(name: str, data: Any) -> None:
    """For templates that do not change earlier turns: prompt and answer are a prefix of the conversation."""
    tokenizer, template = prepared(name)
    messages = data.draw(conversations(FORMATS[name]))
    if name == "mistral":  # it has the system message in a last question only
        messages = [message for message in messages if message["role"] != "system"]
    whole = render(tokenizer, messages, FORMATS[name].template)
    expected = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(tokenizer, messages[:index], FORMATS[name].template, add_generation_prompt=True)
            assert whole.startswith(prompt)
            end = whole.index(FORMATS[name].end, len(prompt)) + len(FORMATS[name].end)
            expected.append(whole[len(prompt) : end])
    assert answers(tokenizer, messages, template) == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data(), options=st.sampled_from(THINKING))
def test_qwen3_trains_on_earlier_answers_without_their_thoughts(data: Any, options: dict[str, Any]) -> None:
    tokenizer, template = prepared("qwen3")
    words = st.text("abc .\n", max_size=6)
    thoughts, texts = data.draw(st.lists(words, min_size=3, max_size=3)), data.draw(st.lists(words, min_size=3, max_size=3))
    inline = data.draw(st.booleans())
    messages = []
    for thought, text in zip(thoughts, texts, strict=True):
        answer = assistant(f"<think>{thought}</think>{text}") if inline else assistant(text, reasoning_content=thought)
        messages += [user("Why?"), answer]
    shown = [text.lstrip("\n") if inline else text for text in texts]
    last = shown[-1].lstrip("\n")
    last_thought = thoughts[-1].strip("\n")
    # With thinking, the model writes its thoughts; without, an empty pair of tags is part of the prompt.
    expected = f"<think>\n{last_thought}\n</think>\n\n{last}<|im_end|>"
    if options.get("enable_thinking") is False:
        expected = expected.removeprefix("<think>\n")
        if not last_thought:
            expected = expected.removeprefix("\n</think>\n\n")
    assert answers(tokenizer, messages, template, **options) == [*(text + "<|im_end|>" for text in shown[:-1]), expected]


def test_qwen3_without_thinking_trains_on_the_answers_alone() -> None:
    tokenizer, template = prepared("qwen3", enable_thinking=False)
    messages = [user("One?"), assistant("1."), user("Two?"), assistant("2.")]
    assert answers(tokenizer, messages, template) == ["1.<|im_end|>", "2.<|im_end|>"]
    prompt = render(tokenizer, messages[:1], template, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = render(tokenizer, messages[:1], template, add_generation_prompt=True, enable_thinking=True)
    assert thinking.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_typed_special_tokens_are_text_for_processor_tokenizer_and_server(name: str, data: Any) -> None:
    tokenizer, template = prepared(name)
    processor = processor_of(tokenizer, template)
    messages = data.draw(conversations(FORMATS[name], typed=True))
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"] == ids
    served = tokenizer.apply_chat_template(messages, tokenize=False)  # as a server renders it, by itself
    assert tokenizer(served, add_special_tokens=False)["input_ids"] == ids
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    neutral = [message | {"content": _without(message["content"], special)} for message in messages]
    expected = tokenizer(render(tokenizer, neutral, FORMATS[name].template), add_special_tokens=False)["input_ids"]
    numbers = set(tokenizer.convert_tokens_to_ids(sorted(special)))
    assert [id for id in ids if id in numbers] == [id for id in expected if id in numbers]
    text = render(tokenizer, messages, FORMATS[name].template)
    raw = tokenizer(text, add_special_tokens=False)["input_ids"]  # SentencePiece puts a space behind special tokens
    assert tokenizer.decode(ids).replace(" ", "") == tokenizer.decode(raw).replace(" ", "")


def _without(text: str, special: set[str]) -> str:
    """The text with another in the place of each special token; as long as there are none, so that it is not empty."""
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "typed")
    return text


def processor_of(tokenizer: Any, template: str) -> DSVLProcessor:
    tokenizer.chat_template = template
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return DSVLProcessor(image_processor, tokenizer, image_seq_length=5, chat_template=template)


@pytest.mark.parametrize("name", FORMATS)
def test_labels_are_the_tokens_of_the_answers(name: str) -> None:
    tokenizer, template = prepared(name)
    processor = processor_of(tokenizer, template)
    messages = [user("What is it?"), assistant("A red circle."), user("Sure?"), assistant("Yes, I am.")]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    labelled = [id for id, mask in zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True) if mask]
    spans = answers(tokenizer, messages, template)
    assert [text.strip().removeprefix("<think>\n\n</think>\n\n") for text in spans] == [
        "A red circle." + FORMATS[name].end,
        "Yes, I am." + FORMATS[name].end,
    ]
    assert labelled.count(tokenizer.convert_tokens_to_ids(FORMATS[name].end)) == 2
    assert tokenizer.decode(labelled).replace(" ", "") == "".join(spans).replace(" ", "")


# -- images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "visualchat"])
def test_images_stand_where_the_user_put_them_and_are_numbered(name: str) -> None:
    tokenizer, template = prepared(name)
    messages = [user("Is ", IMAGE, " like ", IMAGE, "?"), assistant("No."), user(IMAGE, "And this?"), assistant("No.")]
    as_text = [
        user("Is Image 1:\n<image>\n like Image 2:\n<image>\n?"),
        assistant("No."),
        user("Image 3:\n<image>\nAnd this?"),
        assistant("No."),
    ]
    assert render(tokenizer, messages, template) == render(tokenizer, as_text, FORMATS[name].template)
    numbered = render(tokenizer, [user("Look", IMAGE)], template, number_after=True)
    assert numbered == render(tokenizer, [user("Look\nImage 1:\n<image>\n(image 1)")], FORMATS[name].template)
    processor = processor_of(tokenizer, template)
    ids = tokenizer(processor.apply_chat_template(messages), add_special_tokens=False)["input_ids"]
    assert ids.count(processor.image_token_id) == 3
    with pytest.raises(Exception, match="role assistant cannot hold a part of type image"):
        render(tokenizer, [user("?"), {"role": "assistant", "content": [IMAGE]}], template)
    with pytest.raises(Exception, match="cannot hold a part of type audio"):
        render(tokenizer, [user({"type": "audio"}, "?")], template)


# -- tools ---------------------------------------------------------------------------------------------------------------


def calling(text: str = "") -> list[dict[str, Any]]:
    function = {"name": "lookup", "arguments": {"word": "circle <|im_end|></s> [1, 2]"}}
    call = {"type": "function", "id": "call00001", "function": function}
    result = {"role": "tool", "name": "lookup", "tool_call_id": "call00001", "content": "round </s><|im_end|>"}
    return [user("Look it up"), assistant(text, tool_calls=[call]), result, assistant("It is round.")]


@pytest.mark.parametrize("name", TOOLS_TAKEN)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_tools_pass_through(name: str, tools: Any) -> None:
    tokenizer, template = prepared(name)
    messages = calling()
    own = render(tokenizer, messages, FORMATS[name].template, tools=tools)
    assert render(tokenizer, messages, template, tools=tools) == own
    first, second = answers(tokenizer, messages, template, tools=tools)
    assert "lookup" in first and first.endswith(FORMATS[name].end) and second.endswith("It is round." + FORMATS[name].end)
    assert own.count(first) == 1 and "round </s>" not in first
    ids = tokenizer.apply_chat_template(messages, chat_template=template, tools=tools, tokenize=True)["input_ids"]
    harmless = json.loads(json.dumps(messages).replace("</s>", "").replace("<|im_end|>", ""))
    ends = render(tokenizer, harmless, FORMATS[name].template, tools=tools).count(FORMATS[name].end)
    assert ids.count(tokenizer.convert_tokens_to_ids(FORMATS[name].end)) == ends
    carried = [messages[0] | {"tools": tools}, *messages[1:]]  # as the data carry them
    assert render(tokenizer, carried, template) == own


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in TOOLS_TAKEN])
def test_tools_that_a_template_would_drop_are_refused(name: str) -> None:
    tokenizer, template = prepared(name)
    with pytest.raises(Exception, match="takes no tools"):
        render(tokenizer, [user("?")], template, tools=[TOOL])
    with pytest.raises(Exception, match="tool|roles must alternate"):
        render(tokenizer, calling(), template)


# -- preparation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_prepared_template_is_prepared_anew(name: str) -> None:
    tokenizer, template = prepared(name)
    assert original_chat_template(template) == FORMATS[name].template.removesuffix("\n")
    assert prepare_chat_template(template, tokenizer) == template
    assert end_of_turn_ids(template, tokenizer) == [tokenizer.convert_tokens_to_ids(FORMATS[name].end)]
    tokenizer = FORMATS[name].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]}, replace_extra_special_tokens=False)
    ids = tokenizer.apply_chat_template(
        [user("<new>")], chat_template=prepare_chat_template(template, tokenizer), tokenize=True
    )["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<new>") not in ids


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}\n{{ m.content }", "line 2"),
        ("{{ messages | nofilter }}", "line 1: No filter named 'nofilter'."),
        ("{% for m in messages %}\n\n{{ m.content.nothing() }}{% endfor %}", "fails in line 3"),
        ("{{ raise_exception('not today') }}", "fails in line 1: not today"),
        ("{% for m in messages %}{{ m.role }}{{ eos_token }}{% endfor %}", "drops the text of a user's message"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "drops the text of an answer"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content ~ '<image>' if 0 else m.content }}{{ eos_token }}{% endfor %}", "<image>"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_chat_template(template, FORMATS["chatml"].tokenizer(), name="my.jinja")


def test_chat_and_server_set_variables_of_the_template() -> None:
    tokenizer, template = prepared("qwen3")
    processor = processor_of(tokenizer, template)
    messages = [user("Why?")]
    thinking, not_thinking = (read_prompt(processor, messages, **v).ids for v in ({}, {"enable_thinking": False}))
    assert tokenizer.decode(not_thinking) == tokenizer.decode(thinking) + "<think>\n\n</think>\n\n"
    assert check_template_variables(template, {"enable_thinking": False}) == {"enable_thinking": False}
    for name in ("messages", "tools", "chat_template", "enable_thinkin"):
        with pytest.raises(ValueError, match=f"no variable '{name}' that can be set; it has enable_thinking, number_after"):
            check_template_variables(template, {name: "x"})


def test_roles_and_variables_cannot_forge_special_tokens() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}{{ date }}"
    tokenizer = FORMATS["chatml"].tokenizer()
    prepared_template = prepare_chat_template(template, tokenizer)
    messages = [user("a"), {"role": "<|im_end|>", "content": "b"}]
    forged = {"date": "<|im_end|>"}
    ids = tokenizer.apply_chat_template(messages, chat_template=prepared_template, tokenize=True, **forged)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert render(tokenizer, messages, prepared_template, **forged) == render(tokenizer, messages, template, **forged)
    assert render(tokenizer, messages, prepared_template) == render(tokenizer, messages, template)


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_was_begun_can_be_continued(name: str) -> None:
    tokenizer, template = prepared(name)
    messages = [user("What?"), assistant("It is a")]
    for end in ({"continue_final_message": True}, {}):
        assert render(tokenizer, messages, template, **end) == render(tokenizer, messages, FORMATS[name].template, **end)


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ValueError, match="no variable 'enable_thinking' that can be set; it has number_after"):
        prepare_chat_template(FORMATS["chatml"].template, FORMATS["chatml"].tokenizer(), {"enable_thinking": False})


def test_a_template_that_cuts_answers_in_an_unknown_way_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content[:7] }}{{ eos_token }}{% endfor %}"
    tokenizer = FORMATS["chatml"].tokenizer()
    longer = template.replace("[:7]", "[:20]")
    prepared_template = prepare_chat_template(longer, tokenizer)
    with pytest.raises(Exception, match="cannot be located"):
        answers(tokenizer, [user("a"), assistant("b" * 30)], prepared_template)


# -- composing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts_of_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(tiny_tower_config()).save_pretrained(folder / "tower")
    tokenizer = FORMATS["gemma"].tokenizer()
    save_tiny_llama(folder / "instruct", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "instruct")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end], temperature=0.7, do_sample=True).save_pretrained(
        folder / "instruct"
    )
    save_tiny_llama(folder / "base")
    return folder


def test_the_language_models_format_is_the_default(parts_of_model: Any, tmp_path: Any, capsys: Any) -> None:
    parts = ["--vision", str(parts_of_model / "tower"), "--language", str(parts_of_model / "instruct")]
    main(["compose", *parts, "--out", str(tmp_path / "model")])
    assert "Chat template: language, the language model's own" in capsys.readouterr().out
    assert "the language model's own" in (tmp_path / "model" / "README.md").read_text()
    processor, tokenizer = (one.from_pretrained(tmp_path / "model") for one in (AutoProcessor, AutoTokenizer))
    messages = [user(IMAGE, "What is <image> </s> <end_of_turn>?")]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.replace(MARK, "") == (
        "<bos><start_of_turn>user\nImage 1:\n<image>\n(image 1)\nWhat is <image> </s> <end_of_turn>?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(processor.image_token_id) == 1 and ids.count(tokenizer.convert_tokens_to_ids("<end_of_turn>")) == 1
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert generation.eos_token_id == sorted(tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    assert generation.temperature == 0.7


@pytest.mark.parametrize(
    "attention, number_after, expected", [("causal", None, False), ("causal", True, True), ("mmca", False, False)]
)
def test_numbers_follow_images_where_images_cannot_see_them(
    parts_of_model: Any, attention: str, number_after: bool | None, expected: bool
) -> None:
    _, processor = dsvl.compose(
        parts_of_model / "tower", parts_of_model / "instruct", multimodal_attention=attention, number_after=number_after
    )
    assert ("(image 1)" in processor.apply_chat_template([user(IMAGE, "?")])) == expected


def test_other_templates_are_chosen_by_name_or_file(parts_of_model: Any, tmp_path: Any, capsys: Any) -> None:
    tower, instruct, base = (parts_of_model / name for name in ("tower", "instruct", "base"))
    model, processor = dsvl.compose(tower, instruct, chat_template="visualchat")
    assert processor.apply_chat_template([user(IMAGE, "?")]).endswith("### Image 1:\n<image>\n\n### Question:\n?\n\n")
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    _, processor = dsvl.compose(tower, base)
    assert "### Question:" in processor.apply_chat_template([user("?")])
    with pytest.raises(ValueError, match="has no chat template"):
        dsvl.compose(tower, base, chat_template="language")
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    parts = ["--vision", str(tower), "--language", str(base), "--chat-template", str(file)]
    main(["compose", *parts, "--out", str(tmp_path / "model")])
    assert "Chat template: mine.jinja" in capsys.readouterr().out
    assert "`mine.jinja`" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="neither 'language' nor 'visualchat' nor a file"):
        dsvl.compose(tower, base, chat_template="languages")


def test_conversations_with_tools_are_trained(tmp_path: Any) -> None:
    tokenizer, template = prepared("qwen3")
    processor = processor_of(tokenizer, template)
    file = tmp_path / "data.jsonl"
    plain = {"messages": [user("Why?"), assistant("Because.", reasoning_content="Hm.")]}
    lines = [{"messages": calling(), "tools": [TOOL]}, plain]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = dsvl_data.load_conversations(file)
    batch = ConversationCollator(processor)([data[0], data[1]])
    shown = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert shown[0].startswith("<tool_call>") and shown[0].endswith("<think>\n\n</think>\n\nIt is round.<|im_end|>")
    assert shown[1] == "<think>\nHm.\n</think>\n\nBecause.<|im_end|>"
    with_tools, without = (tokenizer.decode(ids) for ids in batch["input_ids"])
    assert "<tools>" in with_tools and "<tools>" not in without
    assert ConversationCollator(processor).measure(data[0]).turns == 1
    (turn,) = Questions(file)[0].turns
    assert [message["role"] for message in turn.messages] == ["user", "assistant", "tool"]


# -- special cases -------------------------------------------------------------------------------------------------------


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("name", FORMATS)
def test_a_special_token_in_two_parts_is_text(name: str) -> None:
    tokenizer, template = prepared(name)
    processor = processor_of(tokenizer, template)
    harmless = processor.apply_chat_template([user("typed"), assistant("a")], tokenize=True)[0]
    for token in (FORMATS[name].end, "<image>"):
        processor.chat_template = template
        split = [user(text_part(token[:3]), text_part(token[3:])), assistant("a")]
        whole = processor.apply_chat_template([user(token), assistant("a")], tokenize=True)[0]
        assert processor.apply_chat_template(split, tokenize=True)[0] == whole
        assert tokenizer.apply_chat_template(split, tokenize=True)["input_ids"] == whole
        id = tokenizer.convert_tokens_to_ids(token)
        assert whole.count(id) == harmless.count(id)
        if name == "visualchat":
            processor.chat_template = FORMATS[name].template  # without its own protection
            assert processor.apply_chat_template(split, tokenize=True)[0] == whole


def test_a_token_that_overlaps_with_itself_is_text() -> None:
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["|END|"]}, replace_extra_special_tokens=False)
    template = prepare_chat_template(FORMATS["chatml"].template, tokenizer)
    for render_with in (tokenizer, processor_of(tokenizer, template)):
        text = render_with.apply_chat_template([user("|END|END|END|")], tokenize=False)
        assert tokenizer.convert_tokens_to_ids("|END|") not in tokenizer(text)["input_ids"]


CHANNELS = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '<|start|>assistant to=' + call.function.name + '<|message|>' }}
            {{- call.function.arguments | tojson + '<|call|>' }}
        {%- endfor %}
        {%- if not m.tool_calls %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
        {%- endif %}
    {%- elif m.role == 'tool' %}{{- '<|start|>' + m.name + ' to=assistant<|message|>' + m.content + '<|end|>' }}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


def test_channels_and_repeated_names_of_calls() -> None:
    """As in gpt-oss: a thought ends with a token that ends turns elsewhere, and results repeat the name of the call."""
    special = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"]
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": "<|return|>"})
    template = prepare_chat_template(CHANNELS, tokenizer)
    assert end_of_turn_ids(template, tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))
    thought = [user("Why?"), assistant("So.", reasoning_content="Hm"), user("Sure?"), assistant("Yes.")]
    assert answers(tokenizer, thought, template) == [
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>So.<|end|>",
        "<|channel|>final<|message|>Yes.<|return|>",
    ]
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    results = [{"role": "tool", "name": "look", "content": text} for text in ("one", "two")]
    messages = [user("Look"), assistant("", tool_calls=[call, call]), *results, assistant("Seen.")]
    assert answers(tokenizer, messages, template) == [
        " to=look<|message|>{}<|call|><|start|>assistant to=look<|message|>{}<|call|>",
        "<|channel|>final<|message|>Seen.<|return|>",
    ]
    check_template_takes(thought, template)


def test_an_end_of_turn_of_two_tokens_is_trained_whole() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|><|im_end|>\n{% endfor %}"
    tokenizer = FORMATS["chatml"].tokenizer()
    prepared_template = prepare_chat_template(template, tokenizer)
    assert answers(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")], prepared_template) == [
        "assistant: b<|im_start|><|im_end|>",
        "assistant: d<|im_start|><|im_end|>",
    ]
    assert end_of_turn_ids(prepared_template, tokenizer) == [tokenizer.eos_token_id]


def test_empty_messages_are_rendered() -> None:
    template = "{% for m in messages if m.content or m.role == 'assistant' %}{{ m.role }} {{ m.content }}<|im_end|>"
    template += "{% endfor %}"
    tokenizer = FORMATS["chatml"].tokenizer()
    messages = [{"role": "system", "content": ""}, user("a"), assistant("b"), user("c"), assistant("")]
    prepared_template = prepare_chat_template(template, tokenizer)
    assert render(tokenizer, messages, prepared_template) == render(tokenizer, messages, template)
    assert answers(tokenizer, messages, prepared_template) == ["assistant b<|im_end|>", "assistant <|im_end|>"]


def test_calls_and_unknown_roles_that_a_template_drops_are_refused() -> None:
    tokenizer, template = prepared("gemma")
    with pytest.raises(Exception, match="drops the key tool_calls"):
        render(tokenizer, calling("ok")[:2], template)
    tokenizer, template = prepared("qwen3")
    with pytest.raises(Exception, match="drops messages of the role ipython"):
        render(tokenizer, [user("a"), {"role": "ipython", "content": "lost"}], template)
    for content, message in (([{"type": "text"}], "part of type text"), (5, "neither a text nor a list"), ({}, "neither")):
        with pytest.raises(Exception, match=message):
            render(tokenizer, [user("a") | {"content": content}], template)


def test_a_template_prepared_anew_keeps_its_defaults_and_name() -> None:
    tokenizer = FORMATS["qwen3"].tokenizer()
    variables = {"number_after": True, "enable_thinking": False}
    template = prepare_chat_template(FORMATS["qwen3"].template, tokenizer, variables, "language")
    assert prepare_chat_template(template, tokenizer) == template
    assert chat_template_name(template) == "language"
    assert prepare_chat_template(template, tokenizer, {}) != template


def test_a_tokenizer_with_several_templates(parts_of_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = FORMATS["qwen3"].tokenizer()
    default, tool_use = FORMATS["chatml"].template, FORMATS["qwen3"].template
    tokenizer.chat_template = {"default": default, "tool_use": tool_use, "rag": default}
    name, template = choose_chat_template(None, tokenizer)
    assert name == "language" and "chat templates rag are not kept" in caplog.text.replace("['rag']", "rag")
    template = prepare_chat_template(template, tokenizer)
    assert render(tokenizer, [user("a")], template) == render(tokenizer, [user("a")], default)
    assert render(tokenizer, calling(), template, tools=[TOOL]) == render(tokenizer, calling(), tool_use, tools=[TOOL])
    tokenizer.chat_template = {"rag": default}
    with pytest.raises(ValueError, match="none of the name 'default'"):
        choose_chat_template(None, tokenizer)


def test_many_special_tokens_cost_little() -> None:
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|reserved_{n}|>" for n in range(1000)]}, replace_extra_special_tokens=False
    )
    template = prepare_chat_template(FORMATS["chatml"].template, tokenizer)
    ids = tokenizer.apply_chat_template([user("<|reserved_999|>")], chat_template=template, tokenize=True)["input_ids"]
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids([f"<|reserved_{n}|>" for n in range(1000)]))
    assert '"<|": ["<|im_end|>"' in template  # looked up by their first characters
