"""DSVLChat: answers equal those of the whole conversation from scratch, and each turn computes only what is new."""

import json
from contextlib import nullcontext
from random import Random
from typing import Any

import pytest
import tokenizers
import torch
from conftest import FAMILIES, run_uncompiled, tiny_tower_config
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsvl import DSVLConfig, DSVLForConditionalGeneration
from dsvl.chat import DSVLChat
from dsvl.chat.detokenizer import stream_text
from dsvl.data.conversations import load_conversations

PER_IMAGE, NEW = 5, 8


def make_model(
    processor: Any, family: str = "llama", attention: str = "mmca", positions: str = "token", **text: Any
) -> DSVLForConditionalGeneration:
    config = FAMILIES[family]()
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 4096} | text
    for name, value in text.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    whole = DSVLConfig(
        tiny_tower_config(),
        config,
        multimodal_attention=attention,
        image_positions=positions,
        image_token_id=processor.image_token_id,
    )
    model = DSVLForConditionalGeneration(whole).to(torch.float64).eval()
    model.generation_config.eos_token_id = None  # random models may generate it at once
    return model


def draw_image(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def prompt(processor: Any, messages: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def from_scratch(model: Any, processor: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The token ids of the answer, computed without a cache."""
    inputs = prompt(processor, messages)
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


class Meter:
    """Counts the images and tokens that go through a model."""

    def __init__(self, model: Any) -> None:
        self.images: list[int] = []
        self.tokens: list[int] = []
        body = model.model
        body.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: self.images.append(len(args[0])), with_kwargs=True
        )
        body.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.tokens.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )

    def read(self) -> tuple[int, int]:
        """Encoded images and prefilled tokens since the last call."""
        counts = sum(self.images), self.tokens[0]
        self.images.clear()
        self.tokens.clear()
        return counts


TURNS = [("What is it?", [0, 1]), ("And why?", []), ("Compare them.", [2]), ("So?", []), ("The last.", [3])]


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "static, a step ahead"])
@pytest.mark.parametrize(("family", "positions"), [("llama", "image"), ("llama", "token"), ("qwen3", "token")])
def test_each_turn_answers_as_from_scratch_and_computes_only_what_is_new(
    processor, monkeypatch, family, positions, cache, attention
):
    model, end = (
        make_model(processor, family, attention, positions),
        {"forced_eos_token_id": processor.tokenizer.eos_token_id},
    )
    if cache == "static, a step ahead":  # as on an accelerator, without compilation
        cache = "static"
        run_uncompiled(monkeypatch, model)
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False, cache_implementation=cache, **end)
    meter, held = Meter(model), torch.zeros(0, dtype=torch.long)
    for text, numbers in TURNS:
        answer = chat.ask(text, [draw_image(number) for number in numbers])
        encoded, prefilled = meter.read()
        cost, ids = chat.last_turn, prompt(processor, chat.messages[:-1])["input_ids"][0]
        # Everything computed before is reused, as far as the answers are tokenized as they were generated.
        common = int((held == ids[: len(held)]).cumprod(0).sum())
        assert cost.reused_tokens == common and cost.prompt_tokens == len(ids)
        assert (encoded, prefilled) == (len(numbers), len(ids) - common)
        assert encoded == cost.encoded_images
        assert cost.answer_ids == from_scratch(model, processor, chat.messages[:-1], **end)
        assert answer == chat.messages[-1]["content"]
        assert answer == processor.tokenizer.decode(cost.answer_ids, skip_special_tokens=True)
        held = torch.cat([ids, torch.tensor(cost.answer_ids[:-1])])  # the last one was not run through the model
        meter.read()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * len(TURNS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_a_decoder_with_a_window_answers_as_if_from_scratch(processor, family, cache, caplog):
    """Such a cache cannot be cropped: after a change of an earlier message everything is computed again."""
    model = make_model(processor, family)
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False, cache_implementation=cache)
    for text, numbers in TURNS:
        chat.ask(text, [draw_image(number) for number in numbers])
        assert chat.last_turn.answer_ids == from_scratch(model, processor, chat.messages[:-1])
    for text in ("Another.", "Yet another."):
        chat.messages[2]["content"] = text
        check_next(chat, 4)
        assert chat.last_turn.reused_tokens == 0
    assert sum("left its " in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_first_image_may_come_late(processor, cache):
    """Before it, MMCA equals causal attention, and the cached keys stay valid."""
    chat = DSVLChat(make_model(processor), processor, max_new_tokens=NEW, do_sample=False, cache_implementation=cache)
    for text, numbers in [("Hello.", []), ("Who are you?", []), ("Look.", [0]), ("And?", [])]:
        chat.ask(text, [draw_image(number) for number in numbers])
        assert chat.last_turn.answer_ids == from_scratch(chat.model, processor, chat.messages[:-1])
    assert chat.last_turn.reused_tokens > 0


@pytest.mark.parametrize("reference", ["mmca_reference", "reversed", "dynamic positions"])
def test_where_reuse_is_not_exact_everything_is_computed_again(processor, reference):
    text = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}} if "dyn" in reference else {}
    model = make_model(processor, attention=reference if reference == "mmca_reference" else "mmca", **text)
    model.config.reversed_images = reference == "reversed"
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False)
    for seen, (text, numbers) in enumerate(TURNS[:3]):
        chat.ask(text, [draw_image(number) for number in numbers])
        assert chat.last_turn.reused_tokens == 0 and chat.last_turn.encoded_images == (2, 2, 3)[seen]
        assert chat.last_turn.answer_ids == from_scratch(model, processor, chat.messages[:-1])


@pytest.fixture
def chat(processor):
    """A conversation of three turns with three images."""
    chat = DSVLChat(make_model(processor), processor, max_new_tokens=NEW, do_sample=False)
    for text, numbers in TURNS[:3]:
        chat.ask(text, [draw_image(number) for number in numbers])
    return chat


def check_next(chat: DSVLChat, encoded: int, images: Any = ()) -> None:
    """The next answer is that of the current conversation, and encodes the expected number of images."""
    chat.ask("And now?", images)
    assert chat.last_turn.answer_ids == from_scratch(chat.model, chat.processor, chat.messages[:-1])
    assert chat.last_turn.encoded_images == encoded


def reword(chat):
    chat.messages[2]["content"] = "And why not?"
    return 1  # the images of the first turn stay; that of the third moves


def delete(chat):
    del chat.messages[2:4]
    return 1


def forget_the_first(chat):
    del chat.messages[:2]
    return 1


def forget_the_last(chat):
    del chat.messages[-2:]
    return 0


def instruct(chat):
    chat.messages.insert(0, {"role": "system", "content": "Be short."})
    return 3


def exchange(chat):
    chat.messages[0]["content"][1] = {"type": "image", "image": draw_image(7)}
    return 2


def swap(chat):
    parts = chat.messages[0]["content"]
    parts[0], parts[1] = parts[1], parts[0]
    return 3


def draw(chat):
    chat.messages[0]["content"][1]["image"].paste((255, 0, 0), (0, 0, 20, 20))
    return 2


def equal_pixels(chat):
    for number in (0, 1):
        chat.messages[0]["content"][number] = {"type": "image", "image": draw_image(number)}
    return 0


@pytest.mark.parametrize(
    "edit", [reword, delete, forget_the_first, forget_the_last, instruct, exchange, swap, draw, equal_pixels]
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_edited_conversation_reuses_the_unchanged_prefix(chat, edit, cache):
    chat.generation["cache_implementation"] = cache
    check_next(chat, 0 if cache == "dynamic" else 3)  # another kind of cache starts empty
    check_next(chat, edit(chat))
    check_next(chat, 1, draw_image(9))


def test_drawing_on_an_image_afterwards_does_not_change_the_conversation(chat):
    image = draw_image(5)
    chat.ask("This?", image)
    image.paste((0, 255, 0), (0, 0, 30, 30))
    assert chat.messages[-2]["content"][0]["image"].tobytes() == draw_image(5).tobytes()
    check_next(chat, 0)


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_stopped_answer_is_what_was_yielded(chat, pieces):
    before = list(chat.messages)
    stream = chat.stream("Tell me a long story.", draw_image(6), max_new_tokens=200)
    given = [next(stream) for _ in range(pieces)]
    with pytest.raises(RuntimeError, match=r"still being given") if pieces else nullcontext():
        assert pieces == 0 or chat.ask("Hello?")
    stream.close()
    assert chat.messages[: len(before)] == before
    assert [message["content"] for message in chat.messages[len(before) + 1 :]] == (["".join(given)] if pieces else [])
    assert len(chat.last_turn.answer_ids) < 200
    check_next(chat, 0)


def test_an_interruption_before_the_first_piece_removes_the_question(chat, monkeypatch):
    before = list(chat.messages)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dsvl.chat.conversation.stream_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("What?", draw_image(6))
    assert chat.messages == before
    check_next(chat, 0)


def test_a_failed_answer_leaves_the_conversation_as_it_was(chat, monkeypatch):
    before = list(chat.messages)
    with monkeypatch.context() as patch:
        patch.setattr(chat.model.lm_head, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.ask("What?", draw_image(6))
    assert chat.messages == before
    check_next(chat, 3)  # the state of its cache is unknown


def test_a_full_context_is_an_error_or_drops_the_oldest_turns(chat, processor, caplog):
    chat.messages.insert(0, {"role": "system", "content": "Be short."})
    need = len(processor.apply_chat_template(chat.messages, tokenize=True, return_dict=True)["input_ids"][0]) + NEW
    chat.context_length = need
    with pytest.raises(ValueError, match=rf"The context holds {need} tokens, but .*overflow='drop'"):
        chat.ask("Once more?", draw_image(8))
    assert len(chat.messages) == 7 and not caplog.records
    chat.overflow = "drop"
    chat.ask("Once more?", draw_image(8))
    assert "the oldest turn" in caplog.text
    assert chat.last_turn.prompt_tokens + NEW <= need
    assert [message["role"] for message in chat.messages] == ["system"] + ["user", "assistant"] * 3
    assert chat.messages[1]["content"] == "And why?"
    assert chat.last_turn.answer_ids == from_scratch(chat.model, chat.processor, chat.messages[:-1])
    with pytest.raises(ValueError, match=r"the last question alone"):
        chat.ask("word " * 200, [draw_image(8)] * 10)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_where_images_share_positions_the_context_is_measured_in_them(processor, cache):
    """Except that a static cache has memory for so many tokens."""
    model = make_model(processor, positions="image", max_position_embeddings=300)
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False, cache_implementation=cache)
    images = [draw_image(number) for number in range(20)]
    if cache == "static":
        with pytest.raises(ValueError, match=r"The context holds 300 tokens, but \d+ tokens of the last question alone"):
            chat.ask("What?", images)
        return
    chat.ask("What?", images)
    assert chat.last_turn.prompt_tokens > 300
    assert chat.last_turn.answer_ids == from_scratch(model, processor, chat.messages[:-1])
    with pytest.raises(ValueError, match=r"The context holds 300 positions, but \d+ positions of conversation"):
        chat.ask("word " * 20, images)


def test_a_saved_conversation_can_be_continued_elsewhere(chat, tmp_path):
    for _ in range(2):  # the second replaces the first
        chat.save(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert files[0] == "conversation.jsonl" and len(files) == 4
    other = DSVLChat(chat.model, chat.processor, **chat.generation)
    other.load(tmp_path / "saved")
    assert other.ask("And now?", draw_image(4)) == chat.ask("And now?", draw_image(4))
    assert other.last_turn.answer_ids == chat.last_turn.answer_ids
    sample = load_conversations(tmp_path / "saved" / "conversation.jsonl")[0]  # it is also a training sample
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * 3


def test_a_conversation_of_version_0_1_loads_and_its_images_are_replaced(chat, tmp_path):
    """Its images were called picture-*.png."""
    folder = tmp_path / "saved"
    chat.save(folder)
    file = folder / "conversation.jsonl"
    file.write_text(file.read_text().replace('"image-', '"picture-'))
    for image in list(folder.glob("image-*.png")):
        image.rename(image.with_name(image.name.replace("image-", "picture-")))
    before = [message["content"] for message in chat.messages if isinstance(message["content"], str)]
    chat.load(folder)
    assert [message["content"] for message in chat.messages if isinstance(message["content"], str)] == before
    chat.save(folder)
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 4 and not any(name.startswith("picture-") for name in names)


def test_names_of_version_0_1_are_deprecated(chat):
    with pytest.warns(DeprecationWarning, match=r"use last_turn"):
        assert chat.last_round is chat.last_turn
    with pytest.warns(DeprecationWarning, match=r"use dropped_turns"):
        assert chat.last_turn.dropped_rounds == 0


def test_a_loaded_conversation_opens_nothing_outside_its_directory(chat, tmp_path):
    folder = tmp_path / "saved"
    chat.save(folder)
    draw_image(0).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    stored = json.loads((folder / "conversation.jsonl").read_text())
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "http://127.0.0.1/secret.png"):
        stored["messages"][0]["content"][0]["path"] = path
        (folder / "conversation.jsonl").write_text(json.dumps(stored))
        before = list(chat.messages)
        with pytest.raises(ValueError, match=r"neither a text nor an image|does not exist"):
            chat.load(folder)
        assert chat.messages == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"notes.txt is not part of a saved conversation"):
        chat.save(tmp_path / "mine")


def test_pieces_are_whole_characters_and_add_up_to_the_answer(processor):
    tokenizer = processor.tokenizer
    text = "Eine süße Ente, 五只鸭子 🦆🦆.\n  Indented, twice"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids) and len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    cut = ids[: ids.index(tokenizer.convert_tokens_to_ids("<0xF0>")) + 2]  # within a character
    assert "".join(stream_text(tokenizer, cut)) == tokenizer.decode(cut)


def _byte_level():
    """A byte-level tokenizer, like those of GPT-2 and Qwen, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_pieces_of_random_tokens_add_up_to_the_decoded_text(processor, kind):
    tokenizer = processor.tokenizer if kind == "sentencepiece" else _byte_level()
    random = Random(0)
    for _ in range(200):
        ids = [random.randrange(len(tokenizer)) for _ in range(random.randrange(1, 40))]
        pieces = list(stream_text(tokenizer, ids))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["words", "bytes", "one byte", "special"])
def test_the_detokenizer_is_linear(processor, kind):
    """Decoding the whole answer for each token would decode eight million tokens here."""
    tokenizer = _byte_level() if "byte" in kind else processor.tokenizer
    text = {"words": "a red cup, ", "bytes": "五只鸭子 "}.get(kind, "")
    ids = tokenizer(text * 2000, add_special_tokens=False)["input_ids"][:4000]
    ids = {"one byte": tokenizer("ö")["input_ids"][-1:], "special": tokenizer("</s>")["input_ids"][-1:]}.get(kind, ids)
    ids = (ids * 4000)[:4000]
    decoded = 0

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, token_ids, **options):
            nonlocal decoded
            decoded += len(token_ids)
            return tokenizer.decode(token_ids, **options)

    pieces = list(stream_text(Counting(), ids))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded < 100 * len(ids)


def test_invalid_options_are_refused(chat):
    with pytest.raises(ValueError, match=r"overflow='wrap' is not known"):
        DSVLChat(chat.model, chat.processor, overflow="wrap")
    with pytest.raises(ValueError, match=r"num_beams=1"):
        chat.ask("What?", num_beams=2)
    with pytest.raises(ValueError, match=r"cache_implementation='quantized'"):
        chat.ask("What?", cache_implementation="quantized")


def test_the_checkpoints_cache_implementation_is_used(processor):
    model = make_model(processor)
    model.generation_config.cache_implementation = "static"
    model.config.text_config.use_cache = False  # as training leaves it
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False)
    for text, numbers in TURNS[:2]:
        chat.ask(text, [draw_image(number) for number in numbers])
    assert chat.prompt_cache.static and chat.last_turn.reused_tokens > 0
    model.generation_config.cache_implementation = None
    assert chat.last_turn.answer_ids == from_scratch(model, processor, chat.messages[:-1])


def test_an_id_without_a_token_is_no_text(tokenizer):
    """The embedding is padded to a multiple of 64 rows, so it has more rows than the tokenizer has tokens."""
    known = tokenizer("a cup", add_special_tokens=False)["input_ids"]
    ids = [*known[:1], len(tokenizer) + 5, *known[1:]]
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(known)
