"""The tiers of the image library: bounds, order, damaged files, killed writers, several processes and threads."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, random_images, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from library_writers import ENTRIES, LIMIT, entry, same
from training_runs import environment

from dsvl.image_library import ImageLibrary
from dsvl.image_library.disk_store import DiskStore, checksum
from dsvl.image_library.memory_tier import MemoryTier
from dsvl.image_library.pinned_arena import PinnedArena
from dsvl.image_library.preload import image_files
from dsvl.utils.byte_sizes import format_size, parse_size

SIZE = 2**26


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "lease", "release", "clear"]), st.integers(0, 7), st.integers(1, 40)),
    max_size=60,
)


@settings(deadline=None, max_examples=100)
@given(OPERATIONS, st.integers(1, 100))
def test_a_memory_tier_drops_the_least_recently_used(operations: list[tuple[str, int, int]], limit: int) -> None:
    """Against a model of it, in random operations; the bytes never exceed the limit."""
    tier, expected = MemoryTier(limit), OrderedDict[str, int]()
    leases: dict[str, list[Any]] = {}
    for operation, number, size in operations:
        key = str(number)
        if operation == "put":
            kept = tier.put(key, {"keys": torch.zeros(size, dtype=torch.uint8)})
            if key in expected:
                expected.move_to_end(key)
                assert kept
                continue
            free = [other for other in expected if not leases.get(other)]
            room = limit - sum(expected.values()) + sum(expected[other] for other in free)
            assert kept == (size <= room)
            if kept:
                for other in free:
                    if sum(expected.values()) + size <= limit:
                        break
                    del expected[other]
                expected[key] = size
        elif operation == "get":
            assert (tier.get(key) is None) == (key not in expected)
            if key in expected:
                expected.move_to_end(key)
        elif operation == "lease":
            lease = tier.lease(key)
            assert (lease is None) == (key not in expected)
            if lease is not None:
                expected.move_to_end(key)
                leases.setdefault(key, []).append(lease)
            del lease
        elif operation == "release" and leases.get(key):
            leases[key].pop()
        elif operation == "clear":
            tier.clear()
            expected.clear()
            leases.clear()
        assert tier.names() == list(expected) and tier.bytes == sum(expected.values()) <= limit
        assert tier.leased == sum(bool(leases.get(other)) for other in expected)


def test_files_are_found_again_and_equal(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kept", "abc", SIZE)
    assert store.get("keys-1") is None and store.put("keys-1", entry(1)) and store.put("keys-1", entry(1))
    again = DiskStore(tmp_path / "kept", "abc", SIZE)
    assert same(again.get("keys-1"), entry(1)) and len(again) == 1
    assert DiskStore(tmp_path / "kept", "def", SIZE).get("keys-1") is None  # of other weights
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0  # for its owner alone


def test_the_least_recently_used_files_are_deleted(tmp_path: Path) -> None:
    DiskStore(tmp_path, "abc", SIZE).put("one", entry(0))
    size = DiskStore(tmp_path, "abc", SIZE).bytes
    store, other = DiskStore(tmp_path, "abc", 4 * size + 4096), DiskStore(tmp_path, "def", 4 * size + 4096)
    for number, (where, key) in enumerate([(store, "two"), (other, "three"), (store, "four")]):
        assert where.put(key, entry(number))
        os.utime(where.path(key), (1000 + number, 1000 + number))
    os.utime(store.path("one"), (999, 999))
    assert store.get("one") is not None  # used again
    assert store.put("five", entry(5))
    assert store.bytes <= store.limit and "two" not in store and "one" in store and "three" in other
    assert not store.put("large", entry(6, size)) and "one" in store  # which could never fit
    assert DiskStore(tmp_path, "abc", 2 * size).bytes <= 2 * size  # a smaller limit than before


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other", "pickle", "text"])
def test_a_damaged_file_is_a_miss(tmp_path: Path, damage: str, caplog: Any) -> None:
    store = DiskStore(tmp_path, "abc", SIZE)
    store.put("one", entry(1))
    path = store.path("one")
    data = path.read_bytes()
    if damage == "other":  # a whole file of another key
        store.put("two", entry(2))
        os.replace(store.path("two"), path)
    elif damage == "pickle":
        torch.save(entry(1), path)
    else:
        middle = len(data) * 3 // 4
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"cut": data[:-10], "empty": b"", "flipped": flipped, "text": b"not an image"}[damage])
    assert store.get("one") is None
    assert store.damaged == 1 and "which is damaged" in caplog.text and not path.exists()
    assert store.put("one", entry(1)) and same(store.get("one"), entry(1))


def test_a_damaged_file_is_encoded_again(tmp_path: Path) -> None:
    model, inputs = tiny_model(), batch("tItItt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for _ in range(2):
        model.image_library = ImageLibrary(model, SIZE, directory=tmp_path)
        assert model.generate(**inputs, max_new_tokens=6, do_sample=False).equal(expected)
        model.image_library.tiers.flush()
        path = sorted(tmp_path.glob("*/*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-1])
    assert (model.image_library.counts.misses, model.image_library.tiers.disk_hits) == (1, 1)
    assert model.image_library.statistics()["damaged"] == 1


def test_a_later_process_finds_the_images_of_the_same_weights(tmp_path: Path) -> None:
    inputs = batch("tItItt")
    model = tiny_model()
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for seed, misses in ((0, 2), (0, 0), (1, 2), (0, 0)):
        model = tiny_model(seed=seed)
        model.image_library = ImageLibrary(model, SIZE, directory=tmp_path)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert ids.equal(expected) == (seed == 0)
        assert model.image_library.counts.misses == misses
        model.image_library.tiers.flush()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_training_does_not_write_the_images_of_every_step(tmp_path: Path) -> None:
    model, inputs = tiny_model(), batch("tItt")
    model.image_library = ImageLibrary(model, SIZE, directory=tmp_path)
    for _ in range(3):
        model.generate(**inputs, max_new_tokens=1)
        with torch.no_grad():
            model.model.multi_modal_projector.weight.mul_(1.5) if hasattr(model.model.multi_modal_projector, "weight") else [
                parameter.mul_(1.5) for parameter in model.model.multi_modal_projector.parameters()
            ]
    model.image_library.tiers.flush()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1


def test_what_was_not_written_is_written_when_it_is_used_again(tmp_path: Path, monkeypatch: Any) -> None:
    model, inputs = tiny_model(), batch("tIIItt")
    model.image_library = library = ImageLibrary(model, SIZE, directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(library.tiers.writer, "put", lambda key, tensors: False)
        model.generate(**inputs, max_new_tokens=1)
    assert len(library.tiers.unwritten) == 3 and len(list(tmp_path.glob("*/*.safetensors"))) == 0
    model.generate(**inputs, max_new_tokens=1)
    library.tiers.flush()
    assert len(library.tiers.unwritten) == 0 and len(list(tmp_path.glob("*/*.safetensors"))) == 3


@pytest.mark.slow
def test_writers_may_be_killed_at_any_moment_and_share_a_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("library_writers.py")), str(tmp_path)]
    said = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert said.stdout.split() == [str(-signal.SIGKILL)] * 10 + ["0", "0"], said.stderr
    for name in ("killed", "shared"):
        store = DiskStore(tmp_path / name, "abc", LIMIT)
        assert not list(store.root.glob("*/*.partial"))  # of processes that are gone
        assert len(store) > 0 and store.bytes <= LIMIT
        for number in range(ENTRIES):
            assert str(number) not in store or same(store.get(str(number)), entry(number))
        assert store.damaged == 0


def test_the_partial_file_of_a_running_process_stays(tmp_path: Path) -> None:
    DiskStore(tmp_path, "abc", SIZE)
    mine = tmp_path / "abc" / f"x.safetensors.{os.getpid()}.partial"
    mine.write_bytes(b"half")
    DiskStore(tmp_path, "abc", SIZE)
    assert mine.exists()
    os.utime(mine, (1, 1))
    DiskStore(tmp_path, "abc", SIZE)
    assert not mine.exists()  # no write takes so long


def test_many_threads(tmp_path: Path) -> None:
    """Leases, evictions and reads from disk at the same time: what is found is what was put."""
    model = tiny_model()
    size = 5 * ImageLibrary(model, SIZE).token_bytes(model)
    library = ImageLibrary(model, 4 * size, directory=tmp_path)
    images = random_images(8)
    exact = model.encode_images(images)
    for number in range(8):
        library.add(model, {"pixel_values": images[number : number + 1]}, [5], source=str(number))
    library.tiers.flush()
    wrong: list[int] = []
    stop = threading.Event()

    def read(seed: int) -> int:
        generator, found = random.Random(seed), 0
        while not stop.is_set():
            number = generator.randrange(8)
            image = library.find(str(number), 1)
            if image is not None:
                found += 1
                tensors = image.leases[0].tensors
                if not tensors["keys"].allclose(exact[number].keys) or not tensors["values"].allclose(exact[number].values):
                    wrong.append(number)
        return found

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, seed) for seed in range(8)]
        for number in range(30):
            chosen = [random.Random(number).randrange(8) for _ in range(3)]
            made = [library.image({"pixel_values": images[index : index + 1]}, [5], 1) for index in chosen]
            cache = library.generation_inputs(model, made)["image_cache"]
            torch.testing.assert_close(cache.keys, exact[chosen].keys)
            assert library.tiers.memory.bytes <= 4 * size
        stop.set()
        assert all(reader.result() > 0 for reader in readers)
    assert not wrong and library.tiers.memory.leased <= 3


def test_an_arena_reuses_what_is_freed() -> None:
    """Random copies and deletions: what is held does not change, and everything is free at the end."""
    arena, generator = PinnedArena(2**18), random.Random(0)
    held: dict[int, Any] = {}
    refused = 0
    for step in range(400):
        if held and generator.random() < 0.45:
            del held[generator.choice(list(held))]
        made = arena.copy(entry(step, generator.randrange(1, 3000)))
        refused += made is None
        if made is not None:
            held[step] = made, {name: tensor.clone() for name, tensor in made.items()}
            assert all(tensor.data_ptr() % 64 == 0 for tensor in made.values())
        del made
        assert all(same(one, other) for one, other in held.values())
    assert refused > 0 and arena.bytes == arena.limit
    view = next(iter(held.values()))[0]["values"][0]
    held.clear()
    whole = entry(1, arena.largest // 24)
    assert arena.copy(whole) is None  # the view holds a part
    del view
    assert same(arena.copy(whole), whole)
    assert arena.copy(entry(1, arena.largest)) is None


def test_an_arena_fills_its_memory() -> None:
    """Slabs are powers of two; smaller ones take what is left of another limit."""
    arena = PinnedArena(2**16 + 2**14 + 2**13 + 100)
    held = [made for number in range(30) if (made := arena.copy({"keys": torch.full((2**12,), number, dtype=torch.uint8)}))]
    assert arena.bytes == sum(tensors["keys"].nbytes for tensors in held) == arena.limit - 100
    assert all((tensors["keys"] == number).all() for number, tensors in enumerate(held))


def test_a_library_in_an_arena() -> None:
    """As on a GPU: images are dropped until there is room, and answers are the same."""
    model, inputs = tiny_model(), batch("tIIItt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    model.image_library = library = ImageLibrary(model, 2**17)
    library.tiers.arena = PinnedArena(2**14)  # smaller than the tier
    for number in range(6):
        other = batch("tIt") | {"pixel_values": random_images(1, seed=number + 20)}
        model.generate(**other, max_new_tokens=1)
        assert model.generate(**inputs, max_new_tokens=6, do_sample=False).equal(expected)
    assert library.tiers.memory.evicted > 0 and library.tiers.arena.bytes <= 2**14


def test_sizes() -> None:
    for text, size in (("8GiB", 2**33), ("500 MB", 5 * 10**8), ("1.5T", 3 * 2**39), ("10", 10), ("2kib", 2048), ("1b", 1)):
        assert parse_size(text) == size
    for text in ("", "GiB", "-1GiB", "8 gallons", "1e3MB", "nan"):
        with pytest.raises(ValueError, match="is not a size in bytes; pass a number with a unit"):
            parse_size(text)
    assert [format_size(size) for size in (10, 1536, 2**33, 2**41)] == ["10 bytes", "1.5 KiB", "8 GiB", "2 TiB"]


def test_the_files_of_preload(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.jpg", "more/c.png", ".hidden", "more/.thumb"):
        (tmp_path / name).write_bytes(b"")
    assert image_files([tmp_path, tmp_path / "b.png"]) == [tmp_path / name for name in ("a.jpg", "b.png", "more/c.png")]
    with pytest.raises(FileNotFoundError, match="does not exist; pass image files"):
        image_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        image_files([tmp_path / "empty"])


def test_a_checksum_covers_names_types_and_shapes() -> None:
    one = entry(1)
    others = [
        {"keys": one["keys"]},
        {"keys": one["values"], "values": one["keys"]},
        {name: tensor.view(torch.float16) for name, tensor in one.items()},
        {name: tensor.view(2, 60_000) for name, tensor in one.items()},
    ]
    assert len({checksum(made) for made in (one, *others)}) == 5
    assert json.dumps(checksum(one)) == json.dumps(checksum(entry(1)))
