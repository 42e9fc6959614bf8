"""Custom operators of PyTorch."""

import hashlib


def operator_namespace(module: str) -> str:
    """The namespace of a module's operators. It depends on the module's name, so that two copies of a file can be loaded in
    one process; the name is hashed, because operator names must be ASCII."""
    return f"dsvl_{hashlib.sha256(module.encode()).hexdigest()[:16]}"


__all__ = ["operator_namespace"]
