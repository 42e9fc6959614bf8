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
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date
        raise ValueError(f"{path} is not YAML: {shortened(str(error), 2 * MAX_VALUE_CHARACTERS)}") from error
