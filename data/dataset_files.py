"""Opens data sets: a file, an image folder, a table of the `datasets` library, or a data set on the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.text import shortened
from .record_readers import CSV_DELIMITERS, CsvRecords, JsonRecords, Records, TarRecords
from .sample_errors import stops_the_run

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
TAR_SUFFIX = ".tar"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of an image folder, as in `datasets`
FILE_FORMATS = "JSON lines or a JSON array (.jsonl, .ndjson, .json, also .gz), .csv, .tsv, .parquet, .arrow, .tar"


class TableRecords(Records):
    """Rows of a `datasets.Dataset`; images and videos are not decoded.

    Args:
        rows (`datasets.Dataset`): The data set.
        source, root: See `Records`.
    """

    def __init__(self, rows: Any, source: str, root: Path | None) -> None:
        self.source, self.root, self.keys = source, root, list(rows.column_names)
        self._count = len(rows)
        self._features = without_decoding(rows.features)
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return self._count

    def location(self, index: int) -> str:
        return f"{self.source}, row {index}"

    def read(self, index: int) -> Any:
        return self._rows[index]

    def parse(self, raw: Any) -> dict[str, Any]:
        (row,) = raw.to_pylist()
        return without_nones(self._features.decode_example(row))


def open_records(source: str | Path, split: str = "train") -> Records:
    """Open a file, a directory or a data set on the Hub.

    Args:
        source (`str` or `Path`): See `load_conversations`.
        split (`str`, *optional*, defaults to `"train"`): The split, if the data set has several.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If its format is unknown.
    """
    path = Path(source)
    reader = reader_of(path)
    if reader is not None:
        check_is_file(path)
        return reader(path)
    metadata = metadata_of(path, split)
    if metadata is not None:
        return open_records(metadata)
    root = path if path.is_dir() else path.parent if path.is_file() else None
    return TableRecords(open_table(str(source), split), str(source), root)


def reader_of(path: Path) -> Callable[[Path], Records] | None:
    """The reader for a file of this name; None if `datasets` reads it."""
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix in JSON_SUFFIXES:
        return JsonRecords
    if suffix in CSV_DELIMITERS:
        return CsvRecords
    return TarRecords if path.suffix == TAR_SUFFIX else None


def metadata_of(path: Path, split: str) -> Path | None:
    """The metadata file of an image folder, in the folder or in its subfolder for this split."""
    if not path.is_dir():
        return None
    return next((file for folder in (path, path / split) for name in METADATA if (file := folder / name).is_file()), None)


def check_is_file(path: Path) -> None:
    """Raise `FileNotFoundError` if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; pass a JSON lines file, a Parquet file or a data set's name.")


def check_is_hub_name(source: str) -> None:
    """Raise an error for a path, before it is looked up as a name on the Hub."""
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{source} has an unknown format; expected {FILE_FORMATS}, a directory, or a data set's name.")
    if not path.exists() and (path.suffix or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"{source} does not exist; pass a file, a directory or a data set's name on the Hub.")


def open_table(source: str, split: str = "train") -> Any:
    """Open a Parquet or Arrow file, a directory written by `datasets`, or a data set on the Hub, as `datasets.Dataset`."""
    datasets = import_datasets()
    path = Path(source)
    if path.suffix in TABLE_SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass one, or a data set's name.")
        return load_table(source, path.suffix[1:], data_files=source, split="train")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(source)
        return loaded if isinstance(loaded, datasets.Dataset) else _split(loaded, split, source)
    check_is_hub_name(source)
    return _split(load_table(source, source), split, source)


def import_datasets() -> Any:
    """Import the optional package `datasets`.

    Raises:
        ImportError: With the command that installs it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{error}; Parquet, saved data sets and names on the Hub need it: pip install 'dsvl[data]'", name="datasets"
        ) from error
    return datasets


def load_table(source: str, *args: Any, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset(*args, **kwargs)`; errors name a local source."""
    datasets = import_datasets()
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # Arrow and datasets raise many types of errors, which rarely name the file
        if stops_the_run(error) or not Path(source).exists():
            raise
        raise ValueError(f"{source} cannot be read: {shortened(str(error.__cause__ or error))}.") from error


def without_decoding(feature: Any) -> Any:
    """A copy of a feature of `datasets`, or of a dict of features, that does not decode images and videos."""
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Video)):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return type(feature)({key: without_decoding(inner) for key, inner in feature.items()})
    inner = getattr(feature, "feature", None)  # of a sequence
    return feature if inner is None else type(feature)(without_decoding(inner))


def without_nones(value: Any) -> Any:
    """Remove keys whose value is None, which Arrow adds to every message and part."""
    if isinstance(value, dict):
        return {key: without_nones(element) for key, element in value.items() if element is not None}
    return [without_nones(element) for element in value] if isinstance(value, list) else value


def _split(loaded: Any, split: str, source: str) -> Any:
    if split not in loaded:
        raise ValueError(f"{source} has the splits {list(loaded)}, not {split!r}.")
    return loaded[split]
