"""From conversations and images to model inputs."""

import inspect
import json

import numpy as np
import pytest
import torch
from conftest import PER_IMAGE, REFERENCE
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from dsvl import DSVLProcessor
from dsvl.processing_dsvl import MARK

EXPECTED = json.loads((REFERENCE / "I_text_side/expected.json").read_text())


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def encode(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}, **kwargs
    )


@pytest.fixture
def image(photographs):
    return photographs[0]


# -- the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in EXPECTED["prompter"] if name.startswith("first_message")])
def test_first_rounds_read_as_the_originals(processor, image, case):
    call = EXPECTED["prompter"][case]["call"]
    count = call.get("num_images", 1) if call["with_image"] else 0
    prompt = processor.apply_chat_template([user(*[image] * count, call["question"])], add_generation_prompt=True)
    expected = EXPECTED["prompter"][case]["string"]
    for number in range(1, count + 1):  # the original numbers its images later
        expected = expected.replace("### Image:", f"### Image {number}:", 1)
    assert prompt == "<s>" + expected


@pytest.mark.parametrize("case", [name for name in EXPECTED["prompter"] if name.startswith("later_message")])
def test_later_rounds_read_as_the_originals(processor, image, case):
    call = EXPECTED["prompter"][case]["call"]
    before = [user(image, "Which?"), assistant("This one.")]
    round_ = user(*[image] * call["num_images"], call["question"])
    prompt = processor.apply_chat_template([*before, round_], add_generation_prompt=True)
    expected = EXPECTED["prompter"][case]["string"]
    for number in range(2, call["num_images"] + 2):  # the first image stands in the first round
        expected = expected.replace("### Image:", f"### Image {number}:", 1)
    start = processor.apply_chat_template(before)
    assert prompt == start + expected and start.endswith("This one.</s>")


def test_images_are_numbered_over_the_whole_conversation(processor, image):
    question = "Compare the three pictures."
    numbering = EXPECTED["string_level_numbering"]
    three = [user(image, image, image, question)]
    assert processor.apply_chat_template(three, add_generation_prompt=True) == "<s>" + numbering["after"]
    rounds = [user(image, image, "Which?"), assistant("This one."), user(image, image, question)]
    prompt = processor.apply_chat_template(rounds, add_generation_prompt=True)
    assert prompt.endswith("This one.</s>" + numbering["offset2"])
    assert prompt.count("<s>") == 1


def test_number_after_repeats_the_number(processor, image):
    messages = [user(image, "?"), assistant("!"), user(image, "?")]
    prompt = processor.apply_chat_template(messages, number_after=True)
    assert "### Image 1:\n<image>\n(image 1)\n" in prompt and "### Image 2:\n<image>\n(image 2)\n" in prompt
    assert "(image" not in processor.apply_chat_template(messages)
    processor.number_after = True
    assert processor.apply_chat_template(messages) == prompt


def test_an_image_in_a_sentence_leaves_its_name_there(processor, image):
    prompt = processor.apply_chat_template([user(image, "Is ", image, " larger than ", image, "?")])
    assert "### Image 3:\n<image>\n\n### Question:\nIs Image 2 larger than Image 3?\n" in prompt
    trailing = processor.apply_chat_template([user("What is this?", image)])
    assert "### Image 1:\n<image>\n\n### Question:\nWhat is this?\n" in trailing


def test_a_system_message_replaces_the_system_sentence(processor):
    prompt = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, user("Hello")])
    assert prompt.startswith("<s>Be brief.\n\n### Question:\nHello")
    for wrong in (
        [user("a"), {"role": "tool", "content": "x"}],
        [user("a"), {"role": "assistant", "content": [{"type": "image"}]}],
    ):
        with pytest.raises(Exception, match="(Roles are user and assistant|Only a user's message)"):
            processor.apply_chat_template(wrong)


# -- model inputs ------------------------------------------------------------------------------------------------------


def test_a_batch_mixes_samples_with_no_one_and_many_images(processor, photographs):
    conversations = [
        [user("Hello"), assistant("Hi")],
        [user(photographs[0], "What?"), assistant("A woman.")],
        [
            user(photographs[1], photographs[2], "Which?"),
            assistant("The cup."),
            user(photographs[3], "And?"),
            assistant("No."),
        ],
    ]
    inputs = encode(processor, conversations, return_assistant_tokens_mask=True)
    assert inputs["pixel_values"].shape == (4, 3, 28, 28)
    images = inputs["input_ids"] == processor.image_token_id
    assert images.sum(-1).tolist() == [0, PER_IMAGE, 3 * PER_IMAGE]
    assert inputs["mm_token_type_ids"].equal(images.long())
    answers = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], torch.as_tensor(inputs["assistant_masks"]), strict=True)
    ]
    assert answers == ["Hi</s>", "A woman.</s>", "The cup.</s>No.</s>"]
    # reading order
    alone = [encode(processor, [user(p, "?")])["pixel_values"] for p in photographs[:4]]
    assert inputs["pixel_values"].equal(torch.cat(alone))


def test_images_come_as_pil_path_or_array(processor, image, tmp_path):
    path = tmp_path / "image.png"
    image.save(path)
    expected = encode(processor, [user(image, "?")])["pixel_values"]
    for content in ({"image": str(path)}, {"path": str(path)}, {"url": str(path)}, {"image": np.asarray(image)}):
        messages = [{"role": "user", "content": [{"type": "image", **content}, {"type": "text", "text": "?"}]}]
        assert encode(processor, messages)["pixel_values"].equal(expected)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert processor(text="<image>", images=tensor, return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


def test_the_call_expands_each_placeholder(processor, photographs):
    inputs = processor(
        text=["a <image> b <image>", "c", "<image>"], images=[photographs[:2], [], [photographs[2]]], padding=True
    )
    assert [sum(row) for row in inputs["mm_token_type_ids"]] == [2 * PER_IMAGE, 0, PER_IMAGE]
    assert processor.model_input_names == ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"]
    assert processor._get_num_multimodal_tokens([(10, 10), (500, 20)]).num_image_tokens == [PER_IMAGE] * 2


def test_a_rendered_conversation_gets_no_second_beginning(processor, image):
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}
    expected = processor.apply_chat_template([message], tokenize=True, return_dict=True)["input_ids"][0]
    text = processor.apply_chat_template([message])
    for texts, images in ((text, image), ([text], [[image]]), ([text, text], [[image], [image]])):
        for row in processor(text=texts, images=images)["input_ids"]:
            assert row == expected and row.count(processor.tokenizer.bos_token_id) == 1
    assert processor(text="Hello")["input_ids"][0][0] == processor.tokenizer.bos_token_id


def test_saved_and_loaded_it_does_the_same(processor, image, tmp_path):
    processor.number_after = True
    processor.save_pretrained(tmp_path)
    loaded = DSVLProcessor.from_pretrained(tmp_path)
    messages = [user(image, "Say <image> </s>"), assistant("x")]
    one, two = encode(processor, messages), encode(loaded, messages)
    assert all(one[key].equal(two[key]) for key in one)


def test_the_same_numbers_with_torchvision_and_without(photographs):
    if not is_torchvision_available():
        pytest.skip("torchvision is not installed; without it there is one form alone")
    from transformers import CLIPImageProcessorPil

    sizes = dict(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    pil, tensor = CLIPImageProcessorPil(**sizes), CLIPImageProcessor(**sizes)
    assert type(tensor) is not type(pil)
    one, two = (p(images=photographs, return_tensors="pt")["pixel_values"] for p in (pil, tensor))
    assert (one - two).abs().mean() < 0.01 and (one - two).abs().max() < 0.2  # a grey level is about 0.015


# -- text that looks like something else -------------------------------------------------------------------------------


def byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a text about images and nothing else, " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_a_typed_special_token_is_text(kind, image):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizer") if kind == "sentencepiece" else byte_level_tokenizer()
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = DSVLProcessor(image_processor, tokenizer, image_seq_length=PER_IMAGE)
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    said = f"What is an <image> and {eos}{pad}?"
    inputs = encode(processor, [user(image, said), assistant("An <image>.")], return_assistant_tokens_mask=True)
    ids = inputs["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == PER_IMAGE
    assert (ids == tokenizer.eos_token_id).sum() == 1 and (ids == tokenizer.pad_token_id).sum() == 0
    text = processor.decode(ids)
    assert said in text and MARK not in text  # to the letter
    mask = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert processor.decode(ids[mask]) == "An <image>." + eos
    # the prompt as a string can be tokenized later
    prompt = processor.apply_chat_template([user(image, said), assistant("An <image>.")])
    assert processor(text=prompt, images=image, add_special_tokens=False)["input_ids"][0] == ids.tolist()


def test_none_among_lists_of_images_is_a_text_without_images(processor, image):
    """As TRL passes the images of a batch."""
    inputs = processor(text=["a", "<image>b"], images=[None, [image]], padding=True)
    assert [ids.count(processor.image_token_id) for ids in inputs["input_ids"]] == [0, PER_IMAGE]
    with pytest.raises(ValueError, match=r"name \[1, 1\] images .* but \[0, 1\] were given"):
        processor(text=["<image>", "<image>"], images=[None, [image]])


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_images_and_placeholders_are_counted_for_each_sample(processor, image):
    with pytest.raises(ValueError, match=r"name \[1, 2\] images .* but \[2, 1\] were given; pass the images of each"):
        processor(text=["<image>", "<image><image>"], images=[[image, image], [image]])
    with pytest.raises(ValueError, match=r"name \[1\] images .* but \[0\] were given"):
        processor(text="<image>")
    with pytest.raises(ValueError, match=r"name \[0\] images .* but \[1\] were given"):
        processor(text="a", images=image)
    with pytest.raises(ValueError, match=r"name \[2\] images .* but \[1\] were given"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": image}]}], tokenize=True
        )


def test_truncation_that_would_cut_an_image_is_refused(processor, image):
    with pytest.raises(ValueError, match=r"left \[3\] of \[5\] image tokens .* raise max_length"):
        processor(text="<image> and", images=image, truncation=True, max_length=4)
    with pytest.raises(ValueError, match=r"left \[0\] of \[5\] image tokens"):
        processor(text="a b c d <image>", images=image, truncation=True, max_length=3)
    cut = processor(text="<image> and so on and on", images=image, truncation=True, max_length=8)
    assert len(cut["input_ids"][0]) == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "missing", "array"])
def test_an_image_that_cannot_be_decoded_is_named(processor, image, damage, tmp_path):
    path = tmp_path / f"{damage}.png"
    image.resize((64, 64)).save(path)
    content = path.read_bytes()
    source = str(path)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("not an image")
    elif damage == "missing":
        path.unlink()
    else:
        source = np.zeros(7)
    good = Image.new("RGB", (30, 30))
    with pytest.raises(ValueError, match="The image .* cannot be decoded"):
        encode(processor, [{"role": "user", "content": [{"type": "image", "image": image} for image in (good, source)]}])


def test_a_slow_tokenizer_is_refused(processor):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not backed by the `tokenizers` library"):
        DSVLProcessor(processor.image_processor, Slow())


def test_the_call_shows_its_signature(processor):
    parameters = inspect.signature(processor.__call__).parameters
    assert list(parameters) == ["images", "text", "image_features", "image_sizes", "kwargs"]


@pytest.mark.parametrize("flat", [True, False])
def test_keywords_reach_their_part(processor, image, flat):
    images = {"crop_size": {"height": 14, "width": 14}, "size": {"shortest_edge": 14}, "do_normalize": False}
    text = {"padding": "max_length", "max_length": 30, "padding_side": "right"}
    given = images | text if flat else {"images_kwargs": images, "text_kwargs": text}
    inputs = processor(text="<image> x", images=image, return_tensors="pt", **given)
    assert inputs["pixel_values"].shape == (1, 3, 14, 14) and inputs["pixel_values"].min() >= 0
    assert inputs["input_ids"].shape == (1, 30) and inputs["input_ids"][0, -1] == processor.tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_what_no_part_takes_is_refused(processor, image, name):
    with pytest.raises(TypeError, match=f"{name}= cannot be processed"):
        processor(text="<image> x", images=image, **{name: [1]})
