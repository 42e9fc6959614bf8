"""YAML files, read by the rules of YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

from .text import MAX_VALUE_CHARACTERS, shortened


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2 for numbers and booleans; PyYAML implements YAML 1.1."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, which keeps the last value of a key that is written twice; here it is an error."""
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """Read a YAML file. As in YAML 1.2, `1e-5` is a number; `no`, `off`, `yes` and `on` are strings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not valid YAML in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; pass a YAML file.")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}).") from error


def parse_yaml(text: str, where: str) -> Any:
    """The value of a text in YAML 1.2.

    Args:
        text (`str`): The text.
        where (`str`): Its origin, for messages.

    Raises:
        ValueError: If it is not valid YAML, or a key occurs twice; the message has the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(f"{where} is not YAML{line}: {shortened(str(error.problem), MAX_VALUE_CHARACTERS)}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date
        raise ValueError(f"{where} is not YAML: {shortened(str(error), 2 * MAX_VALUE_CHARACTERS)}") from error
