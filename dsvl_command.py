"""The console script `dsvl`, outside of the package so that `dsvl --help` does not import torch."""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run the command. `dsvl/__init__.py`, which registers the classes with transformers, is executed when it is needed."""
    spec = find_spec("dsvl")
    assert spec is not None and spec.loader is not None
    loader, package = spec.loader, module_from_spec(spec)
    sys.modules["dsvl"] = package  # so that its modules can be imported
    return import_module("dsvl.cli").main(import_package=lambda: loader.exec_module(package))


if __name__ == "__main__":
    sys.exit(main())
