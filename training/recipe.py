"""Recipes: YAML files of a training in several stages, and their arguments for each stage."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..composition.commands import add_parser as add_compose_parser
from ..utils.command_line import CommandParser, did_you_mean
from ..utils.yaml_files import parse_yaml
from .argument_parser import TrainParser
from .arguments import STAGE_VALUES, build_parser, check_values, read_mapping, yaml_flags

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a stage; part of the name of its directory
SHARED = ("stages", "compose", "description", "keep_stages")  # keys of a recipe that are no flags of dsvl train
# Fields that are settings of the whole run.
WHOLE_RUN = {
    "model": "a stage starts from the result of the stage before it",
    "output_dir": "a stage has a directory in the output of the recipe",
    "overwrite_output": "it applies to the whole run",
    "resume_from_checkpoint": "the whole run is resumed by the same command",
    "push_to_hub": "only the finished model is published",
    "hub_model_id": "only the finished model is published",
    "hub_token": "only the finished model is published",
    "hub_private_repo": "only the finished model is published",
    "hub_revision": "only the finished model is published",
    "use_cpu": "all stages run on the same devices",
    "ddp_backend": "all stages run in the same processes",
    "ddp_timeout": "all stages run in the same processes",
    "local_rank": "all stages run in the same processes",
    "lost_process_timeout": "all stages run in the same processes",
    "tf32": "it is a setting of the process",
    "full_determinism": "it is a setting of the process",
    "log_level": "it is a setting of the process",
    "log_level_replica": "it is a setting of the process",
}
# A value that no flag has, to tell which flags were given.
_MISSING = object()


class RecipeParser(TrainParser):
    """The parser of a stage, whose errors are exceptions, and in which nothing is required."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as a `ValueError`."""
        raise ValueError(f"{message}; dsvl train --help lists the flags, which are the keys of a stage.")


@dataclass(frozen=True)
class Recipe:
    """A recipe, as its file says, with the flags of the command line.

    Attributes:
        path: the file.
        shared: values of all stages, dest of a flag -> value as in YAML.
        stages: name of a stage -> its own values, in the order of the stages.
        compose: flags of `dsvl compose` without their dashes, if the recipe composes its model.
        flags: flags of the command line, which override the values of all stages.
        overrides: name of a stage -> its values from `--stage`, which override all others.
        given: the values of the flags of the command line, dest -> value.
        keep_stages: whether the models and checkpoints of earlier stages are kept.
    """

    path: Path
    shared: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    compose: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    keep_stages: bool = False

    @property
    def composes(self) -> bool:
        """Whether the model of the first stage is composed: `--model` of the command line replaces it."""
        return self.compose is not None and "model" not in self.given

    def values(self, name: str) -> tuple[dict[str, Any], set[str]]:
        """The values of a stage, and the names of those that are no defaults.

        Args:
            name: name of the stage.

        Returns:
            Dest of a flag of `dsvl train` -> value; and the dests that the recipe or the command line sets.

        Raises:
            ValueError: if a value has the wrong type.
        """
        parser = _parser(RecipeParser)
        overrides = self.overrides.get(name, {})
        unset = {dest for dest, value in overrides.items() if value is None}
        written = {dest: value for dest, value in (self.shared | self.stages[name]).items() if dest not in unset}
        argv = [*yaml_flags(written), *self.flags, *yaml_flags(overrides)]
        return vars(parser.parse_args(argv)), set(_given(parser, argv))

    def checked_values(self, name: str, model: str | None = None) -> dict[str, Any]:
        """The checked values of a stage, for `build_arguments`.

        Args:
            name: name of the stage.
            model: directory of the model that the stage starts from, *optional*, defaults to `model` of the recipe.

        Raises:
            ValueError: if they do not go together, or the stage has no data; the message names the stage.
        """
        with naming_stage(name):
            values, given = self.values(name)
            if values.get("data") is None:
                raise ValueError(f"no data; pass --stage {name}.data=FILE, or set `data:` of the stage in {self.path}.")
            values = check_values(values | {"model": None} if model else values, given)
            return values | ({"model": model} if model else {})


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Add the name of a stage to errors that a user can fix."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"stage '{name}': {error}") from error


def read_recipe(path: Path, flags: Sequence[str] = ()) -> Recipe | None:
    """Read a recipe and check its form; the values of its stages are checked by `Recipe.checked_values`.

    Args:
        path: the file.
        flags: flags of the command line, *optional*.

    Returns:
        The recipe; None if the file has no `stages`, so that it contains the flags of one training.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a recipe.
        SystemExit: for an unknown flag of the command line.
    """
    content = read_mapping(path)
    if "stages" not in content:
        return None
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    parser = _parser(RecipeParser)
    own = {key: content[key] for key in SHARED if key in content}
    shared = _known({key: value for key, value in content.items() if key not in SHARED}, parser, str(path))
    stages = _stages(own["stages"], parser, path)
    keep = own.get("keep_stages", False)
    if not isinstance(keep, bool):
        raise ValueError(f"{path}: `keep_stages` is {keep!r}; expected true or false.")
    compose = own.get("compose")
    if compose is not None and shared.get("model") is not None:
        raise ValueError(f"{path} has both `model` and `compose`, which makes a model; keep one of them.")
    if compose is not None and not isinstance(compose, dict):
        raise ValueError(f"{path}: `compose` is {compose!r}; expected flags of dsvl compose, such as `vision: NAME`.")
    given = _given(_parser(TrainParser), list(flags))
    overrides = _overrides(given.pop(STAGE_VALUES, []), stages, parser)
    return Recipe(path, shared, stages, compose, tuple(flags), overrides, given, bool(given.get("keep_stages")) or keep)


def compose_arguments(values: Mapping[str, Any], out: str) -> argparse.Namespace:
    """The arguments of `dsvl compose` from the `compose` mapping of a recipe.

    Args:
        values: flags without their dashes -> value.
        out: directory of the composed checkpoint.

    Raises:
        ValueError: for an unknown key, a missing one or a wrong value.
    """
    commands: Any = argparse.ArgumentParser(prog="dsvl").add_subparsers(parser_class=_ComposeParser)
    add_compose_parser(commands)
    parser = commands.choices["compose"]
    known = [action.dest for action in parser._actions if action.dest not in ("help", "out")]
    for key in values:
        if str(key).replace("-", "_") not in known:
            raise ValueError(
                f"compose: unknown key {key}; the keys are {', '.join(known)}{did_you_mean(str(key), known) or '.'}"
            )
    flags: list[str] = []
    for key, value in values.items():
        name = f"--{str(key).replace('_', '-')}"
        if isinstance(value, bool):  # flags without a value; false is the default, or the negated flag where there is one
            negated = f"--no-{name[2:]}"
            flags += [name] if value else [negated] if negated in parser._option_string_actions else []
        else:
            flags += yaml_flags({name[2:]: value})
    return parser.parse_args([*flags, "--out", out])


class _ComposeParser(CommandParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"compose: {message}; dsvl compose --help lists the flags, which are its keys.")


def _parser(kind: type[TrainParser]) -> TrainParser:
    parser = build_parser(kind)
    for action in parser._actions:
        action.required = False  # a recipe may set it
    return parser


def _given(parser: TrainParser, argv: Sequence[str]) -> dict[str, Any]:
    """The values of flags that were given, dest -> value."""
    unset = {action.dest: _MISSING for action in parser._actions} | {STAGE_VALUES: None}  # argparse appends to its value
    values = vars(parser.parse_args(argv, argparse.Namespace(**unset)))
    return {dest: value for dest, value in values.items() if value is not _MISSING and (dest != STAGE_VALUES or value)}


def _known(values: Mapping[str, Any], parser: TrainParser, where: str) -> dict[str, Any]:
    """The values of a mapping with the dests of their flags as keys.

    Raises:
        ValueError: for an unknown key, or two names of one flag.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        dest = _dest(key, parser, where)
        action = next(action for action in parser._actions if action.dest == dest)
        if isinstance(value, list) and action.nargs not in ("+", "*"):
            mixture = "; for several files, write a mixture (a YAML file with `datasets`)" if dest == "data" else ""
            raise ValueError(f"{where}: {key} takes one value, not a list of {len(value)}{mixture}.")
        if dest in found:
            raise ValueError(f"{where}: {key} is set twice, under two names; keep one of them.")
        found[dest] = value
    return found


def _dest(key: str, parser: TrainParser, where: str) -> str:
    """The dest of a flag from its name in a recipe."""
    flag = parser._option_string_actions.get(f"--{str(key).replace('_', '-')}")
    if flag is None or flag.dest in ("help", "help_all", "list_recipes", "keep_stages", STAGE_VALUES):
        known = {name[2:].replace("-", "_") for name in parser._option_string_actions if name.startswith("--")}
        raise ValueError(
            f"{where}: unknown key {key}; keys are the flags of dsvl train without their dashes"
            f"{did_you_mean(str(key), sorted(known | {*SHARED})) or '.'}"
        )
    return flag.dest


def _stages(content: Any, parser: TrainParser, path: Path) -> dict[str, dict[str, Any]]:
    """The values of the stages by their names."""
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: `stages` is {content!r}; expected a list of stages, such as `- name: align`.")
    stages: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(content, 1):
        if not isinstance(stage, dict):
            raise ValueError(f"{path}: stage {number} is {stage!r}; expected a mapping with `name` and flags of dsvl train.")
        name = stage.get("name")
        if name is None:
            raise ValueError(f"{path}: stage {number} has no name; add a line such as `name: align`.")
        if not NAME.fullmatch(str(name)):
            raise ValueError(f"{path}: stage {number} has the name {name!r}; choose one of letters, digits, - and _.")
        if str(name) in stages:
            raise ValueError(f"{path}: two stages have the name {name!r}; rename one of them.")
        where = f"{path}: stage '{name}'"
        for key in ("compose", "stages", "keep_stages", "description"):
            if key in stage:
                raise ValueError(f"{where}: {key} belongs to the whole recipe; move it out of the stage.")
        own = {key: value for key, value in stage.items() if key != "name"}
        for key in own:
            if reason := WHOLE_RUN.get(_dest(key, parser, where)):
                raise ValueError(f"{where}: {key} in a stage: {reason}; move it out of the stage, or drop it.")
        stages[str(name)] = _known(own, parser, where)
    return stages


def _overrides(written: Sequence[str], stages: Mapping[str, Any], parser: TrainParser) -> dict[str, dict[str, Any]]:
    """The values of `--stage NAME.KEY=VALUE`, by stage."""
    found: dict[str, dict[str, Any]] = {}
    for text in written:
        target, equals, value = text.partition("=")
        name, dot, key = target.partition(".")
        if not (equals and dot and key):
            raise ValueError(f"--stage {text}: expected NAME.KEY=VALUE, such as {next(iter(stages))}.data=FILE.")
        if name not in stages:
            raise ValueError(
                f"--stage {text}: no stage has the name {name}; the stages are {', '.join(stages)}"
                f"{did_you_mean(name, list(stages)) or '.'}"
            )
        dest = _dest(key, parser, f"--stage {text}")
        if dest in WHOLE_RUN:
            raise ValueError(f"--stage {text}: {WHOLE_RUN[dest]}; pass it for the whole run, or drop it.")
        found.setdefault(name, {})[dest] = (
            parse_yaml(value, f"--stage {text}") if value[:1] in ("[", "{") or value in ("null", "~") else value
        )
    return found
