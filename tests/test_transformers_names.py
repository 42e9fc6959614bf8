"""Everything of transformers' that is not documented API is used through one file, and exists in the installed release.

After a release that renames something, one test here names it, and `transformers_dsvl.py` is the file to mend.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import DynamicLayer, StaticLayer

from dsvl import transformers_dsvl
from dsvl.transformers_dsvl import MEMBERS
from dsvl.utils import transformers_names
from dsvl.utils.transformers_names import MENTIONED

ROOT = Path(transformers_dsvl.__file__).parent
TRAVELLING = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*_dsvl.py"))}
GATE = "transformers_dsvl.py"
OUTSIDE = ("tests", "benchmarks", "examples")  # of the package
PACKAGE = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")])
    if path.relative_to(ROOT).parts[0] not in OUTSIDE
}
GATES = {GATE, "utils/transformers_names.py"}
DOCUMENTED = {"transformers.utils", "transformers.utils.logging"}
BASES = (GenerationMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin)
# Private names of torch's, which have been what they are for long.
TORCH = {"_compiled_call_impl", "_dynamo", "_version"}


def example(owner: type) -> Any:
    """Something that has the members of a class: an instance, where these come into being with it."""
    made = {transformers.Cache: DynamicCache, DynamicCache: DynamicCache}
    made |= {DynamicLayer: DynamicLayer, StaticLayer: lambda: StaticLayer(8)}
    return made[owner]() if owner in made else owner


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in MEMBERS.items() for name in names])
def test_the_installed_release_has(owner, name):
    has = hasattr(example(owner), name) or name in getattr(owner, "__annotations__", {})
    assert has, f"transformers {transformers.__version__}: {owner.__name__} has no {name}"


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MENTIONED.items() for name in names])
def test_the_installed_release_mentions(module, name):
    """Attributes that come into being while it generates: the source sets them."""
    source = Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")
    assert f".{name} =" in source, f"transformers {transformers.__version__}: {module} sets no {name}"


@pytest.mark.parametrize(("name", "module"), transformers_names.NAMES.items())
def test_the_installed_release_has_what_the_package_uses(name, module):
    assert hasattr(importlib.import_module(module), name), f"transformers {transformers.__version__}: {module} has no {name}"
    assert getattr(transformers_names, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in transformers_names.MEMBERS.items() for name in names]
)
def test_the_installed_release_has_the_methods_that_the_package_overrides(owner, name):
    module, _, attribute = owner.rpartition(".")
    assert hasattr(example(getattr(importlib.import_module(module), attribute)), name), f"{owner} has no {name}"


def test_inner_modules_of_transformers_are_imported_in_one_file():
    """In one for the code that travels, and in one for the rest."""

    def is_inner(module: Any, file: str) -> bool:
        documented = DOCUMENTED if file not in TRAVELLING else set()
        return str(module).startswith("transformers.") and module not in documented

    inner = [
        f"{file}:{node.lineno}"
        for file, tree in PACKAGE.items()
        if file not in GATES
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and is_inner(node.module, file))
        or (isinstance(node, ast.Import) and any(is_inner(alias.name, file) for alias in node.names))
    ]
    assert not inner, f"import it in one of {', '.join(sorted(GATES))}"


def test_overridden_methods_of_the_trainer_are_listed():
    listed = transformers_names.MEMBERS["transformers.Trainer"]
    overridden = {
        member.name
        for tree in PACKAGE.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
    }
    private = {n for n in overridden if n.startswith("_") and not n.startswith("__") and hasattr(transformers.Trainer, n)}
    assert private <= set(listed)


def test_private_members_are_listed():
    """What is overridden, called or read, and begins with an underscore, is ours, torch's, or listed."""
    ours = {"_text_config"}  # a view keeps it in its __dict__
    read: dict[str, str] = {}
    overridden: dict[str, str] = {}
    for file, tree in TRAVELLING.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute):
                (
                    ours.add(node.attr)
                    if isinstance(node.ctx, ast.Store)
                    else read.setdefault(node.attr, f"{file}:{node.lineno}")
                )
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.keyword):
                ours.add(str(node.arg))
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    targets = member.targets if isinstance(member, ast.Assign) else [getattr(member, "target", None)]
                    names = [getattr(target, "id", "") for target in targets] + [getattr(member, "name", "")]
                    overridden |= {name: f"{file}:{member.lineno}" for name in names}
    private = {name: place for name, place in read.items() if name.startswith("_") and not name.startswith("__")}
    inherited = {
        name: place
        for name, place in overridden.items()
        if name.startswith("_") and not name.startswith("__") and any(hasattr(base, name) for base in BASES)
    }
    listed = {name for names in (*MEMBERS.values(), *MENTIONED.values()) for name in names}
    unlisted = {n: p for n, p in private.items() if n not in ours | listed | TORCH}
    unlisted |= {n: p for n, p in inherited.items() if n not in listed}
    assert not unlisted, f"list them in MEMBERS of {GATE}"
