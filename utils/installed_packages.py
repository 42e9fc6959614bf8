"""Which packages are installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
