"""The image library in conversations, in the evaluation and in the commands."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from model_server import draw_image, load_parts, make_served_checkpoint

from dsvl import cli
from dsvl.chat import DSVLChat
from dsvl.image_library import ImageLibrary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_checkpoint(tmp_path_factory.mktemp("library"))


@pytest.fixture
def chat_parts(checkpoint: Path) -> Any:
    return load_parts(checkpoint)


def conversation(parts: Any, **options: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """The answers of four turns with known and new images, and how many images each encoded and tokens it reused."""
    chat = DSVLChat(*parts, do_sample=False, max_new_tokens=6, **options)
    answers, costs = [], []
    for text, seeds in (("one", [1, 2]), ("two", []), ("three", [2]), ("four", [3, 1])):
        answers.append(chat.ask(text, [draw_image(seed) for seed in seeds]))
        costs.append((chat.last_turn.encoded_images, chat.last_turn.reused_tokens))
    return answers, costs


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_conversation_encodes_each_image_once(chat_parts: Any, cache: str) -> None:
    model, _ = chat_parts
    expected, costs = conversation(chat_parts, cache_implementation=cache)
    assert [encoded for encoded, _ in costs] == [2, 0, 1, 2]
    model.image_library = ImageLibrary(model, 2**26)
    answers, costs = conversation(chat_parts, cache_implementation=cache)
    assert answers == expected
    assert [encoded for encoded, _ in costs] == [2, 0, 0, 1]
    answers, again = conversation(chat_parts, cache_implementation=cache)  # another conversation
    assert answers == expected and [encoded for encoded, _ in again] == [0, 0, 0, 0]
    if cache == "dynamic":  # new images follow what the KV cache holds
        assert all(reused > 0 for _, reused in costs[1:])


def test_a_conversation_with_a_sliding_window(checkpoint: Path, chat_parts: Any, tmp_path: Path) -> None:
    """What has left the window cannot be followed by encoded images, so the text is computed again over the library."""
    from transformers import MistralConfig

    import dsvl

    sizes = dict(
        vocab_size=chat_parts[0].config.text_config.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    sizes |= dict(num_key_value_heads=2, sliding_window=16, max_position_embeddings=1024)
    torch.manual_seed(0)
    config = dsvl.DSVLConfig(
        chat_parts[0].config.vision_config,
        MistralConfig(**sizes, initializer_range=0.3, eos_token_id=None),
        **{
            name: getattr(chat_parts[0].config, name)
            for name in ("image_token_id", "image_layout", "image_positions", "max_tiles", "projector_type")
        },
    )
    model = dsvl.DSVLForConditionalGeneration(config).double().eval()
    model.generation_config = chat_parts[0].generation_config
    parts = model, chat_parts[1]
    expected, _ = conversation(parts)
    model.image_library = ImageLibrary(model, 2**26)
    answers, costs = conversation(parts)
    assert answers == expected
    assert [encoded for encoded, _ in costs] == [2, 0, 0, 1]


def test_a_question_that_cannot_be_answered_leaves_the_conversation(chat_parts: Any, monkeypatch: Any) -> None:
    model, _ = chat_parts
    model.image_library = ImageLibrary(model, 2**26)
    chat = DSVLChat(*chat_parts, do_sample=False, max_new_tokens=4)
    chat.ask("one", draw_image(1))
    before = list(chat.messages)
    with monkeypatch.context() as patch:
        patch.setattr(model.image_library, "_collect", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.ask("two", draw_image(2))
    assert chat.messages == before
    assert chat.ask("two", draw_image(2))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--image-cache", "much"],
            "'much' is not a size in bytes; pass a number with a unit, such as 8GiB or 500MB, or off",
        ),
        (["--image-cache", "0GiB"], "holds no image"),
        (["--image-cache", "900TiB"], "of main memory are available; pass less"),
        (["--image-cache", "off", "--image-cache-bits", "8"], "--image-cache-bits without an image library has no effect"),
        (["--image-cache", "1MiB", "--image-cache-dir", "/proc/nowhere"], "cannot hold images"),
    ],
)
def test_flags_that_cannot_be_followed(checkpoint: Path, capsys: Any, flags: list[str], said: str) -> None:
    with contextlib.suppress(SystemExit):  # of argparse
        assert cli.main(["serve", str(checkpoint), "--device", "cpu", *flags]) != 0
    assert said in capsys.readouterr().err


def test_the_evaluation_gives_the_same_answers(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("rapidfuzz")
    import json

    for seed in range(2):
        draw_image(seed).save(tmp_path / f"{seed}.png")
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": f"{number % 2}.png"}, {"type": "text", "text": text}],
                },
                {"role": "assistant", "content": "A dog."},
            ]
        }
        for number, text in enumerate(["one", "two", "three", "four", "five", "six"])
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = []
    for name, flags in (("without", []), ("with", ["--image-cache", "64MiB", "--image-cache-dir", str(tmp_path / "kept")])):
        out = tmp_path / f"{name}.jsonl"
        command = ["evaluate", str(checkpoint), str(tmp_path / "data.jsonl"), "--out", str(out), "--max-new-tokens", "6"]
        assert cli.main([*command, "--device", "cpu", "--batch-size", "4", *flags]) == 0, capsys.readouterr().err
        answers.append(sorted(line for line in out.read_text().splitlines() if '"answer"' in line))
    assert answers[0] == answers[1] and len(answers[0]) >= 6
    assert len(list((tmp_path / "kept").glob("*/*.safetensors"))) == 2


def test_a_library_needs_a_size() -> None:
    model = tiny_model()
    for sizes in ({"memory_bytes": 0}, {"memory_bytes": 1, "disk_bytes": 0}):
        with pytest.raises(ValueError, match="bytes hold no image; pass more"):
            ImageLibrary(model, **sizes)
