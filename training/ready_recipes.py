"""The recipes that the package contains: `dsvl train --list-recipes`, and a recipe by its name."""

import logging
from pathlib import Path

from ..utils.command_line import did_you_mean
from ..utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def ready_recipes() -> dict[str, Path]:
    """The recipes of the package, name -> file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: a path, or the name of a recipe of the package. A local file of that name is preferred, which is logged.

    Raises:
        ValueError: if there is neither.
    """
    ready = ready_recipes()
    if Path(name).is_file():
        if name in ready:
            logger.warning("%s is read from this directory, not the recipe of that name in the package.", name)
        return Path(name)
    if name in ready:
        logger.info("Recipe %s of the package: %s", name, ready[name])
        return ready[name]
    if name.endswith((".yaml", ".yml")):
        return Path(name)  # reading it raises FileNotFoundError
    raise ValueError(
        f"{name} is neither a file nor a recipe of the package; the recipes are {', '.join(ready)} (dsvl train "
        f"--list-recipes){did_you_mean(name, list(ready)) or '.'}"
    )


def list_recipes() -> None:
    """Print the name and the description of each recipe of the package."""
    ready = ready_recipes()
    width = max(map(len, ready))
    for name, path in ready.items():
        print(f"{name:{width}}  {' '.join(read_yaml(path)['description'].split())}")
