"""`utils/atomic_files.py`: a file or a directory gets its name only when it is complete."""

import pytest

from dsvl.utils.atomic_files import atomic_directory, atomic_path, check_new_directory, write_atomically


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, concurrent):
    path = tmp_path / "state.json"
    write_atomically(path, "old", concurrent)
    with atomic_path(path, concurrent) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_file_keeps_its_old_content(tmp_path, error):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(error), atomic_path(path) as partial:
        partial.write_text("ne")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_directory_is_deleted(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_directory_may_exist_if_it_is_empty(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as partial:
        (partial / "config.json").write_text("{}")
        assert not list(target.iterdir())
    assert [path.name for path in target.iterdir()] == ["config.json"]
    with pytest.raises(FileExistsError, match="is not empty"):
        check_new_directory(target)
