"""Chat templates: a language model's own format, with images, protected special tokens and marks of the answers.

A template of a language model renders texts. `prepare_chat_template` puts it, unchanged, into `chat_template.jinja`, which
does the rest inside Jinja, so that a processor, a bare tokenizer and a server that renders the template by itself agree.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes

from ..processing_dsvl import CHAT_TEMPLATE, extend_tokenizer
from ..utils.transformers_names import render_jinja_template

logger = logging.getLogger(__name__)

LANGUAGE, VISUALCHAT = "language", "visualchat"  # the language model's own format, and DeepSpeed-VisualChat's
CHOICES = {LANGUAGE: "language, the language model's own", VISUALCHAT: "visualchat, DeepSpeed-VisualChat's"}
WRAPPER = Path(__file__).with_name("chat_template.jinja")
TEMPLATE_KEYS = ("tools", "tool_calls", "reasoning_content")  # of messages, that a chat template may not take
# Variables that transformers sets, and functions.
RESERVED = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    "namespace",
    "dict",
}
RESERVED |= {"range", "lipsum", "cycler", "joiner", *(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "image"))}
# Protects the special tokens in the value of a variable.
PROTECTED = "{{%- if {0} is defined -%}}{{{{- protect({0}, current) -}}}}{{%- set {0} = current.value -%}}{{%- endif -%}}"
ROLES = ("system", "user", "assistant", "tool")
DEFAULT = re.compile(r"^\{%- set (?!mark_answers)(\w+) = \1 if \1 is defined else (.*) -%\}$", re.MULTILINE)
WRITTEN = "{#- Written by dsvl.compose"  # how a prepared template begins

QUESTION, ANSWER, RESULT, ARGUMENT, SYSTEM = "dsvlquestion", "dsvlanswer", "dsvlresult", "dsvlargument", "dsvlsystem"
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": {}}}
CUTTING_METHODS = ("split", "rsplit", "startswith", "endswith", "partition", "rpartition", "find", "rfind", "replace")


def choose_chat_template(choice: str | Path | None, tokenizer: Any) -> tuple[str, str]:
    """The chat template that a name or file stands for.

    Args:
        choice: `"language"` (the tokenizer's own), `"visualchat"`, or the path of a Jinja file; None is `"language"` if the
            tokenizer has a template, else `"visualchat"`.
        tokenizer: the language model's tokenizer.

    Returns:
        The choice, `"language"`, `"visualchat"` or the name of the file, and the template.

    Raises:
        ValueError: if the tokenizer has no template, or the choice is neither a name nor a file of text.
    """
    own = tokenizer.chat_template
    if choice is None:
        choice = LANGUAGE if own else VISUALCHAT
    if choice == VISUALCHAT:
        return VISUALCHAT, CHAT_TEMPLATE
    if choice == LANGUAGE:
        if not own:
            raise ValueError(
                "The language model's tokenizer has no chat template (a base model has none); pass chat_template="
                "'visualchat' or the path of a Jinja file."
            )
        return LANGUAGE, own if isinstance(own, str) else _joined(own)
    path = Path(choice)
    if not path.is_file():
        raise ValueError(f"chat_template={str(choice)!r} is neither 'language' nor 'visualchat' nor a file.")
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error}).") from error


def _joined(templates: Mapping[str, str]) -> str:
    """One template from several by name, of which transformers takes `tool_use` if there are tools, else `default`."""
    if "default" not in templates:
        raise ValueError(
            f"The tokenizer has the chat templates {', '.join(sorted(templates))}, and none of the name 'default'; pass "
            "chat_template='visualchat' or the path of a Jinja file."
        )
    if unused := sorted(set(templates) - {"default", "tool_use"}):
        logger.warning("The language model's chat templates %s are not kept; only default and tool_use are.", unused)
    if "tool_use" not in templates:
        return templates["default"]
    bodies = [templates[name].removesuffix("\n") for name in ("tool_use", "default")]
    return '{% if tools %}{{ "" }}' + bodies[0] + '{{ "" }}{% else %}{{ "" }}' + bodies[1] + '{{ "" }}{% endif %}'


def prepare_chat_template(
    template: str, tokenizer: Any, variables: Mapping[str, Any] | None = None, name: str | None = None
) -> str:
    """A chat template for DSVL from one that renders texts, such as a language model's.

    What the template renders for texts stays the same. In addition, in the result:

    - images stand in the text where the user put them, as `Image 1:\\n<image>`, and `\\n(image 1)` if the variable
      `number_after` is true. A template that mentions `<image>` places them by itself;
    - special tokens that stand in messages, tools or documents are text;
    - the assistant's tokens, end of turn included, are marked by `{% generation %}`, whether the template has such marks
      (they are kept, and extended by the end of turn) or not;
    - tools, tool calls and messages of the roles tool and system that the template would drop raise.

    Args:
        template: a Jinja template.
        tokenizer: the language model's tokenizer, which is extended (`extend_tokenizer`). Its special tokens are written
            into the result, so prepare the template again after adding some.
        variables: defaults of the template's variables, such as `{"number_after": True, "enable_thinking": False}`,
            *optional*; a caller's own values take precedence. Defaults to those of a template that was prepared before.
        name: what the template is called in errors and in the result, *optional*.

    Returns:
        The prepared template; a template that was prepared before is prepared anew.

    Raises:
        ValueError: if the template cannot be used; the message has its line.
    """
    extend_tokenizer(tokenizer)
    body = original_chat_template(template).removesuffix("\n")  # as Jinja does
    if variables is None:
        variables = {key: json.loads("null" if value == "none" else value) for key, value in DEFAULT.findall(template)}
    if name is None:
        name = chat_template_name(template) if template.startswith(WRITTEN) else "chat template"
    takes_parts, marked = "<image>" in body, _call_marks(body)
    tree = _parse(marked, name)
    check_template_variables(body, variables)
    probe = _Probe(body, tokenizer, name)
    starts: dict[str, list[str]] = {}
    for token in probe.special:
        starts.setdefault(token[:2], []).append(token)
        if len(token) == 1:
            logger.warning("The special token %r has one character, so a message that holds it holds the token.", token)
    return _fill(
        NAME=name,
        PROTECTED="\n".join(PROTECTED.format(variable) for variable in sorted(_undeclared(tree) - RESERVED)),
        DEFAULTS=_defaults({"number_after": False} | dict(variables)),
        SPECIAL_TOKENS=_literal(starts),
        ENDS_OF_TURN=_literal(probe.ends_of_turn(takes_parts)),
        SEPARATORS=_literal(_separators(tree)),
        HAS_MARKS=json.dumps(marked != body),
        TAKES_PARTS=json.dumps(takes_parts),
        TAKES_TIMES=json.dumps("part.time" in body),
        DROPPED=_literal(probe.dropped()),
        DROPPED_WITH_TOOLS=_literal(probe.dropped([TOOL])),
        KNOWN_ROLES=_literal(sorted({*ROLES, *_constants(tree)}) if probe.drops_unknown_roles() else []),
        TAKES_TOOLS=json.dumps("tools" in _undeclared(tree)),
        BODY=marked,
    )


def chat_template_name(template: str | None) -> str:
    """What a checkpoint's chat template is: `"language"`, `"visualchat"`, the name of a file, or `"its own"`."""
    if template == CHAT_TEMPLATE:
        return VISUALCHAT
    match = re.match(re.escape(WRITTEN) + r" around a chat template \((.*?)\), which", template or "")
    return match[1] if match else "its own"


def check_template_takes(messages: list[dict[str, Any]], template: str) -> None:
    """Check that a chat template reads what the messages of a data set hold besides role and content.

    Args:
        messages: as `data.complete_messages` returns them.
        template: the chat template of a processor.

    Raises:
        ValueError: for `tools`, `tool_calls` or `reasoning_content` that would be dropped.
    """
    held = [key for key in TEMPLATE_KEYS if any(message.get(key) for message in messages)]
    if not held:
        return
    text = _original(template)
    taken = {"reasoning_content": ("reasoning_content", "thinking")}  # gpt-oss's name of it
    if dropped := [key for key in held if not any(name in text for name in taken.get(key, (key,)))]:
        raise ValueError(f"the sample has {' and '.join(dropped)}, which the chat template does not take; remove them.")


def check_template_variables(template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Check that a chat template has variables that a user sets.

    Args:
        template: the chat template of a processor.
        variables: such as `{"enable_thinking": False}`.

    Returns:
        The variables.

    Raises:
        ValueError: for a variable that the template does not read, or that it gets from transformers.
    """
    known = template_variables(_original(template))
    for name in variables:
        if name not in known:
            known_names = ", ".join(sorted(known))
            raise ValueError(f"The chat template has no variable {name!r} that can be set; it has {known_names}.")
    return dict(variables)


@cache  # a server asks for each request
def template_variables(template: str) -> frozenset[str]:
    """The variables of a template that a caller can set: those that it reads and does not set, or asks whether they are."""
    tree = _parse(_call_marks(template), "chat template")
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    asked = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    return frozenset({"number_after"} | (_undeclared(tree) - RESERVED - (own - asked)))


def original_chat_template(template: str) -> str:
    """The template that was given to `prepare_chat_template`; any other template is returned as it is."""
    if not template.startswith(WRITTEN):
        return template
    before, after = WRAPPER.read_text(encoding="utf-8").split("@BODY@")
    before, after = before[before.rindex("\n") :], after[: after.index("\n")]
    return _generation_marks(template.split(before, 1)[1].split(after, 1)[0])


_original = cache(original_chat_template)


def end_of_turn_ids(template: str, tokenizer: Any) -> list[int]:
    """The ids of the special tokens that end an answer, or a call of a tool, in a chat template."""
    probe = _Probe(original_chat_template(template), tokenizer, "chat template")
    return sorted({tokenizer.convert_tokens_to_ids(probe.last_special(end)) for end in probe.last_ends()})


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])


def _parse(template: str, name: str) -> nodes.Template:
    try:
        tree = _environment().parse(template)
        _undeclared(tree)  # which finds unknown filters
        return tree
    except jinja2.TemplateSyntaxError as error:
        message = str(error.message).rstrip(".")
        raise ValueError(f"{name} is not a valid Jinja template: line {error.lineno}: {message}.") from error


def _undeclared(tree: nodes.Template) -> set[str]:
    return jinja2.meta.find_undeclared_variables(tree)


def _constants(tree: nodes.Template) -> set[str]:
    return {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}


def _fill(**values: str) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], WRAPPER.read_text(encoding="utf-8"))


def _defaults(variables: Mapping[str, Any]) -> str:
    line = "{{%- set {0} = {0} if {0} is defined else {1} -%}}"
    return "\n".join(line.format(name, _literal(value)) for name, value in variables.items())


def _literal(value: Any) -> str:
    """A JSON value in Jinja, whose literals are those of JSON, except that escapes have 16 bits."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _call_marks(template: str) -> str:
    """The template with calls of the macro `mark` in the place of `{% generation %}`; white space is handled alike."""
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1call mark()\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endcall\2", opened)


def _generation_marks(template: str) -> str:
    """The inverse of `_call_marks`."""
    marks: list[bool] = []

    def restored(match: re.Match[str]) -> str:
        if match[2] == "endcall":
            return match[1] + ("endgeneration" if marks.pop() else "endcall")
        marks.append(match[2] == "call mark()")
        return match[1] + ("generation" if marks[-1] else match[2])

    return re.sub(r"(\{%[-+]?\s*)(call mark\(\)|call\b|endcall)", restored, template)


def _separators(tree: nodes.Template) -> list[str]:
    """The constants by which a template may cut or test texts, such as `</think>`."""
    found: set[Any] = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in CUTTING_METHODS:
            found |= {argument.value for argument in call.args if isinstance(argument, nodes.Const)}
    for comparison in tree.find_all(nodes.Compare):
        if isinstance(comparison.expr, nodes.Const) and any(operand.op.endswith("in") for operand in comparison.ops):
            found.add(comparison.expr.value)
    return sorted((text for text in found if isinstance(text, str) and text.strip()), key=lambda text: (-len(text), text))


class _Probe:
    """Short conversations, rendered by a template to find out what it takes."""

    def __init__(self, template: str, tokenizer: Any, name: str) -> None:
        self.template, self.tokenizer, self.name = template, tokenizer, name
        self.special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})

    def render(self, *messages: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> str:
        """What the template makes of the messages.

        Raises:
            ValueError: if it raises; the message has the line.
        """
        try:
            (text,), _ = render_jinja_template(
                [list(messages)], tools=tools, chat_template=self.template, **self.tokenizer.special_tokens_map
            )
        except Exception as error:  # a template can raise anything
            raise ValueError(f"{self.name} fails{_line(error)}: {error}") from error
        return str(text)

    def ends_of_turn(self, takes_parts: bool) -> list[str]:
        """What ends an answer: special tokens that follow each other, or one. It may differ within a conversation.

        Raises:
            ValueError: if the template drops questions or answers, or ends answers without a special token.
        """
        if takes_parts and "<image>" not in self.render(_user([{"type": "image"}, {"type": "text", "text": QUESTION}])):
            raise ValueError(f"{self.name} mentions <image>, but renders no <image> for a part of type image.")
        ends = self.last_ends()
        continued = self._attempt(_user(QUESTION), _assistant(ANSWER), _user(RESULT))
        header, between = continued.split(QUESTION)[0], continued.split(ANSWER)[-1].split(RESULT)[0]
        earlier = self._end(between[: len(between) - _common_suffix(between, header)])
        if not earlier:  # the whole of it may be a header; but every message may end with the same
            end_of_question = self._end(self._attempt(_user(QUESTION)).split(QUESTION)[-1])
            earlier = os.path.commonprefix([self._end(between), end_of_question])
        return sorted({*ends, *([earlier] if self._specials(earlier) else [])})

    def last_ends(self) -> list[str]:
        """What ends a last answer, and a last call of a tool; raises `ValueError`, see `ends_of_turn`."""
        text = self.render(_user(QUESTION), _assistant(ANSWER))
        for word, what in ((QUESTION, "a user's message"), (ANSWER, "an answer")):
            if word not in text:
                raise ValueError(f"{self.name} drops the text of {what}; it rendered {text[:200]!r}.")
        end = self._end(text.split(ANSWER)[-1])
        if not end:
            raise ValueError(
                f"{self.name} ends an answer with {text.split(ANSWER)[-1][:40]!r}, which is no special token, so the model "
                "could not end its answers; add eos_token after the answer, or choose chat_template='visualchat'."
            )
        call = self._attempt(_user(QUESTION), _call())
        return sorted({end, self._end(call.split(ARGUMENT)[-1]) or end} if ARGUMENT in call else {end})

    def last_special(self, text: str) -> str:
        """The special token at the end of a text."""
        return max((token for token in self.special if text.endswith(token)), key=len)

    def dropped(self, tools: list[dict[str, Any]] | None = None) -> list[str]:
        """The roles of messages, and keys of them, that the template drops without an error."""
        called = [_user(QUESTION), _call()]
        answered = [*called, _result(), _assistant(ANSWER)]
        attempts = {
            "system": (SYSTEM, [[{"role": "system", "content": SYSTEM}, _user(QUESTION)]]),
            "tool": (RESULT, [answered]),
            "tool_calls": (ARGUMENT, [called, [*called, _user(QUESTION)], answered]),
        }
        return [
            name
            for name, (word, conversations) in attempts.items()
            if any(self._drops(word, messages, tools) for messages in conversations)
        ]

    def drops_unknown_roles(self) -> bool:
        """Whether the template drops messages of a role that it does not know without an error."""
        return self._drops(SYSTEM, [_user(QUESTION), {"role": "dsvlrole", "content": SYSTEM}, _user(QUESTION)])

    def _drops(self, word: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> bool:
        text = self._attempt(*messages, tools=tools)
        return bool(text) and word not in text

    def _attempt(self, *messages: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> str:
        try:
            return self.render(*messages, tools=tools)
        except ValueError:  # the template says by itself that it does not take them
            return ""

    def _specials(self, text: str) -> list[str]:
        return [token for token in self.special if token in text]

    def _end(self, text: str) -> str:
        """The first special token of a text with those that follow it directly; empty without one."""
        found = [(text.index(token), -len(token), token) for token in self._specials(text)]
        if not found:
            return ""
        start, _, end = min(found)
        while following := [token for token in self.special if text.startswith(token, start + len(end))]:
            end += max(following, key=len)
        return end


def _line(error: BaseException) -> str:
    """Where in a template an error was raised."""
    lines, step = [], error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            lines.append(step.tb_lineno)
        step = step.tb_next
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return "" if line is None else f" in line {line}"


def _common_suffix(text: str, other: str) -> int:
    """How many characters two texts share at their end."""
    return len(os.path.commonprefix([text[::-1], other[::-1]]))


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _call() -> dict[str, Any]:
    function = {"name": "lookup", "arguments": {"word": ARGUMENT}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00001", "function": function}],
    }


def _result() -> dict[str, Any]:
    return {"role": "tool", "name": "lookup", "tool_call_id": "call00001", "content": RESULT}
