#!/bin/sh
# mypy over the package. The checkout may have any name, but the package in it is called dsvl: it is seen through a link.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$root" "$link/dsvl"
cd "$link"
exec_path="${BIN:-$root/.venv/bin}"
"$exec_path/mypy" --config-file dsvl/pyproject.toml dsvl/*.py dsvl/acceleration dsvl/chat dsvl/composition dsvl/data dsvl/demo dsvl/environment dsvl/evaluation dsvl/hub_card dsvl/migration dsvl/page dsvl/publishing dsvl/serving dsvl/training dsvl/utils
