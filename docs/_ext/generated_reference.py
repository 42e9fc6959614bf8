"""Write the generated part of the reference when the build starts.

`reference/generated/` gets one page for each command, made from its argparse parser, the table of `TrainingArguments`, a
page of autodoc directives for every public name of the package, and the figures in `benchmarks/results`.
"""

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from dsvl import cli

ROOT = Path(__file__).resolve().parents[2]

# The public modules, and what each is for.
MODULES = {
    "dsvl": "Models, composition and saving",
    "dsvl.chat": "Conversations",
    "dsvl.data": "Training data",
    "dsvl.video_reading_dsvl": "Video",
    "dsvl.training": "Training",
    "dsvl.migration": "Migration",
    "dsvl.hub_card": "Model cards",
}

# Folders of benchmarks/results -> their title, and the targets of the Makefile that reproduce them.
DEVICES = {
    "h100": ("Figures of an NVIDIA H100", "bench-gpu"),
    "h200": ("Figures of an NVIDIA H200", "bench-gpu"),
    "h200-x2": ("Figures of two NVIDIA H200", "bench-gpu"),
    "cpu": ("Figures of a CPU", "bench|bench-serving"),
}
COLUMNS = {  # a key of a result -> its column
    "ms": "ms",
    "ms_per_step": "ms a step",
    "speed": "speed",
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "tokens_per_second": "tokens/s",
    "tflop_per_s": "TFLOP/s",
    "tflop_per_second": "TFLOP/s",
    "utilisation": "utilization",
    "weights_gb_per_s": "weights, GB/s",
    "peak_gib": "peak, GiB",
    "total_gib": "total, GiB",
    "planned_gib": "planned, GiB",
    "left_out": "not measured",
    "skipped": "not measured",
}


def setup(app: Any) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "reference" / "generated"))
    return {"parallel_read_safe": True}


def write_pages(folder: Path) -> None:
    """Write all generated pages.

    Args:
        folder: created if it does not exist; only files whose content changed are written.
    """
    pages = {f"{name}.md": command_page(name) for name in cli.COMMANDS}
    pages["training-arguments.md"] = import_module("dsvl.training.training_arguments_table").markdown()
    pages["python.md"] = python_page()
    pages |= {f"figures-{device}.md": figures_page(device) for device in DEVICES}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("*.md")) - {folder / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# -- commands ------------------------------------------------------------------------------------------------------------


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        name: a key of `dsvl.cli.COMMANDS`.
    """
    if name == "train":  # its flags are the fields of three dataclasses
        return import_module("dsvl.training.arguments").build_parser()
    commands = argparse.ArgumentParser(prog="dsvl").add_subparsers()
    import_module(f"dsvl.{cli.COMMANDS[name][1]}").add_parser(commands)
    return commands.choices[name]


def command_page(name: str) -> str:
    """A command's page in Markdown: usage, and a table of every argument of it and of its subcommands."""
    parser = command_parser(name)
    about = cli.COMMANDS[name][0].replace("->", "→")
    lines = [f"# dsvl {name}", "", f"{about[0].upper()}{about[1:].rstrip('.')}.", ""]
    for one in parsers(parser):
        if one is not parser:
            lines += [f"## {_name(one)}", ""]
        lines += ["```text", _usage(one), "```", ""]
        for title, actions in _groups(one).items():
            lines += [f"**{title[0].upper()}{title[1:]}**", "", "| argument | default | |", "|---|---|---|"]
            lines += [_row(one, action) for action in actions]
            lines.append("")
    return "\n".join(lines)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser itself if it has arguments of its own, or its subcommands' parsers."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield parser
    for action in nested:
        yield from action.choices.values()


def _name(parser: argparse.ArgumentParser) -> str:
    return re.sub(r"^.*?dsvl ", "dsvl ", parser.prog)


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(_name(parser), width=100)
    if parser.usage:
        return f"usage: {parser.usage}"
    formatter.add_usage(None, parser._actions, parser._mutually_exclusive_groups)
    return formatter.format_help().strip()


def _groups(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """Arguments by the title of their group."""
    if hasattr(parser, "groups"):
        return {title: actions for title, actions in parser.groups(everything=True).items() if actions}
    groups = {}
    for group in parser._action_groups:
        title = {"positional arguments": "arguments", "options": "options"}.get(group.title or "", group.title or "")
        if actions := [one for one in group._group_actions if one.dest != "help" and one.help != argparse.SUPPRESS]:
            groups[title] = actions
    return groups


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    flags = (
        [flag for flag in action.option_strings if "_" not in flag]
        or action.option_strings
        or [action.metavar or action.dest]
    )
    if action.default is True and action.nargs == "?":  # transformers' parser adds a second action for the opposite
        flags = [*flags, *(f"--no-{flag[2:]}" for flag in flags)]
    taken = "" if action.nargs == 0 or not action.option_strings or isinstance(action.default, bool) else _values(action)
    text = " ".join((action.help or "").replace("%%", "%").split())
    default = _default(action)
    if found := re.search(r"\s*\(default:? ([^()]*)\)|\.? ?\bdefault: ([^.]*)$", text, re.IGNORECASE):
        default, text = (found[1] or found[2]), text[: found.start()] + text[found.end() :]
    if action.choices and len(list(action.choices)) <= 8:
        choices = ", ".join(f"`{one}`" for one in action.choices)
        text = f"{text.rstrip('.')}: {choices}" if text else choices
    text = re.sub(r"(?<![`\w-])--[a-z][\w-]*", r"`\g<0>`", text)
    names = ", ".join(f"`{flag}{' ' + taken if taken and flag == flags[-1] else ''}`" for flag in flags)
    return f"| {names} | {_cell(default)} | {_cell(text)} |"


def _values(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        name = action.metavar
    else:
        kind = getattr(action.type, "__name__", "")
        name = {"int": "N", "float": "X"}.get(kind, "VALUE")
    return f"{name} ..." if action.nargs in ("+", "*") else name


def _default(action: argparse.Action) -> str:
    if action.required or not action.option_strings:
        return "required"
    if action.default in (None, "", [], argparse.SUPPRESS):
        return ""
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    value = getattr(action.default, "value", action.default)
    return f"`{' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


# -- Python --------------------------------------------------------------------------------------------------------------


def python_page() -> str:
    """Autodoc directives for every name in the `__all__` of the public modules."""
    lines = ["# Python API", "", "Import what is documented here; everything else may change without notice.", ""]
    for module_name, about in MODULES.items():
        module = import_module(module_name)
        lines += [f"## {about}", "", f"`{module_name}`", "", "```{eval-rst}"]
        for name in sorted(module.__all__):
            lines += _directives(module_name, name, getattr(module, name))
        lines += ["```", ""]
    return "\n".join(lines)


def _directives(module: str, name: str, value: Any) -> list[str]:
    if inspect.ismodule(value):
        return []
    if not inspect.isclass(value):
        return [f".. autofunction:: {module}.{name}", ""]
    lines = [f".. autoclass:: {module}.{name}", ""]
    for member, directive in _members(value).items():
        lines.append(f"   .. {directive}:: {module}.{name}.{member}")
    return [*lines, ""]


def _members(value: type) -> dict[str, str]:
    """Public methods and properties with a docstring that this package defines -> the directive that documents each."""
    found: dict[str, str] = {}
    for cls in value.__mro__:
        if not cls.__module__.startswith("dsvl"):
            continue
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)
            directive = "autoproperty" if isinstance(member, property) else "automethod"
            documented = directive == "autoproperty" or inspect.isfunction(function)
            if documented and not name.startswith("_") and function.__doc__:
                found.setdefault(name, directive)
    return found


# -- benchmarks ----------------------------------------------------------------------------------------------------------


def figures_page(device: str) -> str:
    """All results of a device as tables, each with the command that reproduces it.

    Args:
        device: a folder of `benchmarks/results`.
    """
    title, targets = DEVICES[device]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = "".join(re.findall(rf"^(?:{targets}):(?: \$\(\w+\)/ready)*\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    assert recipe, targets
    lines = [
        f"# {title}",
        "",
        "Times are medians, with the range in parentheses, unless a section says otherwise."
        " Speed is relative to the first row of a group.",
        "",
    ]
    for path in sorted((ROOT / "benchmarks" / "results" / device).glob("*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"## {path.stem.replace('_', ' ').capitalize()}", ""]
        if command := re.search(rf"python (benchmarks/.*) --out \S*/{path.name}\b.*$", recipe, re.MULTILINE):
            lines += ["```bash", f"python {command[1]} --out {path.name}", "```", ""]
        versions = [f"{name} {held[name]}" for name in ("torch", "transformers") if held.get(name)]
        lines += [", ".join([held["device"], *versions]) + ".", ""]
        plot = path.with_suffix(".svg")
        if plot.exists():
            lines += [f"![{path.stem}](../../../benchmarks/results/{device}/{plot.name})", ""]
        found = held["results"]
        if isinstance(found, list):
            if "row" in found[0]:  # of scaling.py
                found = {f"{row.pop('row')}, processes: {row.pop('processes')}": row for row in found}
            else:  # of image_parallel.py
                lines += ["Times are those of the fastest timed step.", ""]
                found = {f"{row['tokens']:,} tokens, processes: {row['processes']}": row for row in found}
        lines += _figures_table(list(_results(found))) + [""]
    return "\n".join(lines)


def _results(found: dict[str, Any], names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The innermost dictionaries, with the names that lead to them."""
    values = {key: value for key, value in found.items() if not isinstance(value, dict)}
    if names and values:
        yield names, values
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _results(value, (*names, key))


def _figures_table(rows: list[tuple[tuple[str, ...], dict[str, Any]]]) -> list[str]:
    columns = list(dict.fromkeys(COLUMNS[key] for key in COLUMNS if any(key in values for _, values in rows)))
    lines = ["| " + " | ".join(["", *columns, "other"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for names, values in rows:
        cells = dict.fromkeys(columns, "")
        for key, value in values.items():
            if key in COLUMNS:
                low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
                spread = (
                    f" ({_number(low)} to {_number(high)})" if key.startswith(("ms", "tokens")) and low is not None else ""
                )
                cells[COLUMNS[key]] = _number(value) + spread
        other = [
            f"{key.replace('_', ' ')} {_number(value)}"
            for key, value in values.items()
            if key not in COLUMNS and not key.endswith(("_low", "_high")) and not isinstance(value, list)
            if key not in ("rounds", "device", "torch")
        ]
        lines.append("| " + " | ".join([_cell("; ".join(names)), *cells.values(), _cell(", ".join(other))]) + " |")
    return lines


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
