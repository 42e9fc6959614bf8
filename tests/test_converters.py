"""Each data set in its published schema is converted to exactly these conversations; errors name the record."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from raw_data import (
    COCO,
    answer,
    as_base64,
    ask,
    llava_record,
    write_coco,
    write_image,
    write_json,
    write_llava,
    write_mimicit,
)

from dsvl.data import load_conversations
from dsvl.data.convert import convert
from dsvl.data.converters import CONVERTERS
from dsvl.data.converters.coco import DESCRIBE, WHY


@pytest.fixture
def root(tmp_path, photographs):
    write_coco(tmp_path / "raw", photographs)
    return tmp_path / "raw"


def samples(root, name, out=None, **options):
    """The lines of a converted data set, with image paths relative to the root."""
    out = out or root.parent / "out"
    report = convert(name, root, out, **options)
    lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    folder = root if root.is_dir() else root.parent
    for line in lines:
        resolved = [(out / image).resolve() for image in line["images"]]
        assert all(path.is_file() for path in resolved)
        line["images"] = [str(p.relative_to(folder if p.is_relative_to(folder) else out)) for p in resolved]
    assert len(load_conversations(out / f"{name}.jsonl")) == report.samples == len(lines)
    return lines, report


def coco(*numbers):
    return [f"coco/train2017/{COCO[number]}" for number in numbers]


# -- COCO --------------------------------------------------------------------------------------------------------------


def test_llava_keeps_the_first_turn_and_the_images_position(root):
    write_llava(root)
    lines, _ = samples(root, "llava")
    assert lines == [
        {"messages": [ask(None, "What do you see?"), answer("An astronaut.")], "images": coco(0)},
        {"messages": [ask("Describe this.", None), answer("A cup\nof coffee.")], "images": coco(1)},
        {"messages": [ask("Why is she glad?", None), answer("She flies.")], "images": coco(0)},
    ]


def test_llava_dial_keeps_all_turns(root):
    write_llava(root)
    (line,), _ = samples(root, "llava_dial")
    messages = [ask(None, "What animal is it?"), answer("A cat."), ask("What colour?"), answer("Ginger.")]
    assert line == {"messages": messages, "images": coco(2)}


def aokvqa_record(**changes):
    record = {
        "split": "train",
        "image_id": 33471,
        "question_id": "q1",
        "question": "What is she?",
        "choices": ["a cook", "an astronaut", "a pilot", "a nun"],
        "correct_choice_idx": 1,
        "direct_answers": ["astronaut"] * 10,
        "rationales": ["She wears a space suit.", "There is a rocket", "She wears a space suit."],
    }
    return record | changes


def test_aokvqa_asks_why_and_answers_with_each_reason_once(root):
    other = aokvqa_record(question_id="q2", image_id=52846, question="What is in it?", rationales=["It is brown."])
    write_json(root / "aokvqa/annotations/aokvqa_v1p0_train.json", [aokvqa_record(), other])
    lines, _ = samples(root, "aokvqa")
    for line, question in zip(lines, ("What is she?", "What is in it?"), strict=True):
        image, text = line["messages"][0]["content"]
        assert image == {"type": "image"}
        assert text["text"] in [f"{question} {ending}" for ending in WHY]
    assert [line["messages"][1] for line in lines] == [
        answer("The answer is an astronaut. Because She wears a space suit. There is a rocket."),
        answer("The answer is an astronaut. Because It is brown."),
    ]
    assert [line["images"] for line in lines] == [coco(0), coco(1)]


def test_captions_of_val_and_test_are_skipped(root, photographs):
    def image(number, split, folder):
        name = f"COCO_{folder}_{number:012d}.jpg"
        write_image(root / "coco/2014" / folder / name, photographs[number])
        sentences = [{"tokens": [], "raw": f"caption {number}.{k}", "imgid": number, "sentid": k} for k in range(2)]
        return {"filepath": folder, "filename": name, "imgid": number, "split": split, "sentids": [], "sentences": sentences}

    splits = [("train", "train2014"), ("val", "val2014"), ("restval", "val2014"), ("test", "val2014")]
    images = [image(number, *split) for number, split in enumerate(splits)]
    write_json(root / "coco_caption/dataset.json", {"images": images, "dataset": "coco"})
    lines, report = samples(root, "coco_caption")
    assert [line["images"] for line in lines] == [
        ["coco/2014/train2014/COCO_train2014_000000000000.jpg"],
        ["coco/2014/val2014/COCO_val2014_000000000002.jpg"],
    ]
    for number, line in zip((0, 2), lines, strict=True):
        assert line["messages"][0]["content"][1]["text"] in DESCRIBE
        assert line["messages"][1] in [answer(f"caption {number}.{k}") for k in range(2)]
    assert report.skipped == {"split val": 1, "split test": 1}


def test_minigpt4(root, photographs):
    write_image(root / "cc_sbu_align/image/2.jpg", photographs[0])
    write_image(root / "cc_sbu_align/image/7.jpg", photographs[1])
    annotations = [{"image_id": "2", "caption": "A woman smiles. "}, {"image_id": "7", "caption": "Coffee."}]
    write_json(root / "cc_sbu_align/filter_cap.json", {"annotations": annotations})
    lines, _ = samples(root, "minigpt4")
    assert [(line["images"], line["messages"][1]) for line in lines] == [
        (["cc_sbu_align/image/2.jpg"], answer("A woman smiles.")),
        (["cc_sbu_align/image/7.jpg"], answer("Coffee.")),
    ]


# -- OCR-VQA -----------------------------------------------------------------------------------------------------------


def test_ocr_vqa_skips_covers_of_one_pixel_and_other_splits(root, photographs):
    def book(split, suffix=".jpg"):
        return {
            "imageURL": f"http://ecx.images-amazon.com/images/I/51{suffix}?x=1",
            "questions": ["Who wrote this book?", "What is its genre? "],
            "answers": ["Ann Author", "Travel"],
            "title": "A title",
            "authorName": "Ann Author",
            "genre": "Travel",
            "split": split,
        }

    write_image(root / "OCR_VQA/images/B1.jpg", photographs[0])
    write_image(root / "OCR_VQA/images/B2.png", photographs[1])
    write_image(root / "OCR_VQA/images/B3.jpg", photographs[1], size=(1, 1))
    write_json(root / "OCR_VQA/dataset.json", {"B2": book(1, ".png"), "B3": book(1), "B9": book(2), "B1": book(1)})
    lines, report = samples(root, "ocr_vqa")
    messages = [ask(None, "Who wrote this book?"), answer("Ann Author"), ask("What is its genre?"), answer("Travel")]
    assert lines == [{"messages": messages, "images": [f"OCR_VQA/images/{name}"]} for name in ("B2.png", "B1.jpg")]
    assert report.skipped == {"an image of one pixel, a placeholder for a missing image": 1, "split 2": 1}
    assert report.examples["split 2"] == ["B9"]


# -- MIMIC-IT ----------------------------------------------------------------------------------------------------------


def cgd(number):
    return "CGD_IMG_" + COCO[number].removesuffix(".jpg")


def test_a_turn_belongs_to_the_conversation_that_names_it_first(root):
    pair = [cgd(0), cgd(1)]
    data = {
        "CGD_INS_3": ("What differs?", "One is a woman.", pair, ["CGD_INS_1"]),
        "CGD_INS_1": ("And the colours?", "Orange and brown.", pair, ["CGD_INS_3"]),
        "CGD_INS_2": ("Which has a cat?", "The second.", [cgd(0), cgd(2)], ["CGD_INS_1", "CGD_INS_9"]),
    }
    write_mimicit(root, "CGD", data)
    lines, report = samples(root, "otter_mimicit_cgd")
    first = [
        ask(None, None, "What differs?"),
        answer("One is a woman."),
        ask("And the colours?"),
        answer("Orange and brown."),
    ]
    assert lines == [
        {"messages": first, "images": coco(0, 1)},
        {"messages": [ask(None, None, "Which has a cat?"), answer("The second.")], "images": coco(0, 2)},
    ]
    assert report.dropped == {"a related instruction that is not in the file": 1}


@pytest.mark.parametrize("form", ["json", "parquet"])
@pytest.mark.parametrize("name", ["SD", "SN", "TVC", "VST"])
def test_images_inside_a_file_are_extracted(root, photographs, name, form):
    images = {f"{name}_IMG_{number}": as_base64(photographs[number % 3]) for number in range(10)}
    images[f"{name}_IMG_3"] = as_base64(photographs[0], "PNG")
    images[f"{name}_IMG_4"] = "bm8gcGljdHVyZQ=="
    if form == "json":
        write_json(root / f"MIMIC-IT/{name}.json", images)
    else:
        (root / "MIMIC-IT").mkdir()
        table = pyarrow.table({"base64": list(images.values()), "__index_level_0__": list(images)})
        pyarrow.parquet.write_table(table, root / f"MIMIC-IT/{name}.parquet")
    ids = list(images)
    data = {
        f"{name}_INS_1": ("What differs?", "A hat.", [ids[1], ids[3]], []),
        f"{name}_INS_2": ("Where is it?", "There.", [ids[2], "gone", ids[4]], [f"{name}_INS_3"]),
        f"{name}_INS_3": ("And now?", "Here.", [ids[2], ids[5]], []),
        f"{name}_INS_4": ("Nothing left?", "Nothing.", ["gone"], []),
        f"{name}_INS_5": ("Too many?", "Nine.", [i for i in ids if i != ids[4]], []),
    }
    write_mimicit(root, name, data)
    lines, report = samples(root, f"otter_mimicit_{name.lower()}")
    assert lines[:2] == [
        {
            "messages": [ask(None, None, "What differs?"), answer("A hat.")],
            "images": [f"images/{name}/{ids[1]}.jpg", f"images/{name}/{ids[3]}.png"],
        },
        {
            "messages": [ask(None, "Where is it?"), answer("There."), ask(None, "And now?"), answer("Here.")],
            "images": [f"images/{name}/{ids[2]}.jpg", f"images/{name}/{ids[5]}.jpg"],
        },
    ]
    assert len(lines) == (3 if name == "SD" else 2)
    too_many = {} if name == "SD" else {"more than 8 images": 1}
    assert report.skipped == {"no image": 1} | too_many
    assert report.dropped == {"an image that is not in the image file": 2}


def test_llava_otter_blend_shows_the_images_in_their_order(root):
    write_llava(root)
    data = {
        "CGD_INS_1": ("Which flies?", "The first.", [cgd(0), cgd(1)], []),
        "CGD_INS_2": ("Which barks?", "Neither.", [cgd(1), "CGD_IMG_000000000001"], []),
        "CGD_INS_3": ("Order?", "Wrong.", ["CGD_IMG_000000000001", cgd(1)], []),
    }
    write_mimicit(root, "CGD", data)
    write_image(root / "coco/train2017/000000000001.jpg", Image.new("RGB", (20, 20)))
    lines, report = samples(root, "llava_otter_blend")
    about_0 = [ask(None, "What do you see?"), answer("An astronaut."), ask("And behind her?"), answer("A flag.")]
    about_0 += [ask("Why is she glad?"), answer("She flies.")]
    about_1 = [ask("Describe this.", None), answer("A cup\nof coffee.")]
    assert lines == [
        {"messages": [*about_0, *about_1, ask("Which flies?"), answer("The first.")], "images": coco(0, 1)},
        {
            "messages": [*about_1, ask(None, "Which barks?"), answer("Neither.")],
            "images": [*coco(1), "coco/train2017/000000000001.jpg"],
        },
    ]
    assert report.skipped == {"no LLaVA conversation about an image before the last": 1}


# -- SparklesDialogue --------------------------------------------------------------------------------------------------

TAG = "<Img><ImageHere></Img>"


def sparkles(root, photographs, *dialogues, part="SparklesDialogueCC"):
    for other in ("SparklesDialogueCC", "SparklesDialogueVG"):
        write_json(root / f"{other}/annotations/{other}.json", [])
    for number in (14, 1417, 3, *range(20, 29)):
        write_image(root / f"{part}/images/{number}.jpg", photographs[number % 3])
    write_json(root / f"{part}/annotations/{part}.json", [{"dialogue": dialogue} for dialogue in dialogues])


def turn(role, content, *images):
    message = {"role": role, "content": content}
    return message | {"images": [{"image_id": i, "caption": "a"} for i in images]} if role == "user" else message


def test_images_are_words_and_ids_that_nest_are_kept_apart(root, photographs):
    dialogue = [
        turn("user", f"Could IMAGE#1417{TAG} lead to IMAGE#14{TAG}? Look at IMAGE#1417.", "14", "1417"),
        turn("assistant", "IMAGE#1417 comes before IMAGE#14."),
        turn("user", f"IMAGE#3{TAG} is beside IMAGE#14{TAG}; and IMAGE#3", "3", "14"),
        turn("assistant", "Yes, IMAGE#3."),
    ]
    sparkles(root, photographs, dialogue, part="SparklesDialogueVG")
    (line,), _ = samples(root, "sparkles_dialogue")
    assert line == {
        "messages": [
            ask("Could ", None, " lead to ", None, "? Look at Image 1."),
            answer("Image 1 comes before Image 2."),
            ask(None, "Image 3 is beside Image 2; and Image 3"),
            answer("Yes, Image 3."),
        ],
        "images": [f"SparklesDialogueVG/images/{number}.jpg" for number in (1417, 14, 3)],
    }


def test_an_images_name_at_either_end_of_a_question_is_read(root, photographs, processor):
    dialogue = [
        turn("user", f"IMAGE#14{TAG} IMAGE#3{TAG} or IMAGE#1417{TAG}", "3", "14", "1417"),
        turn("assistant", "Both."),
    ]
    sparkles(root, photographs, dialogue)
    (line,), _ = samples(root, "sparkles_dialogue")
    text = processor.apply_chat_template(line["messages"], tokenize=False)
    assert "### Image 3:\n<image>\n\n### Question:\nImage 1 Image 2 or Image 3\n\n" in text


@pytest.mark.parametrize(
    ("dialogue", "reason"),
    [
        ([turn("assistant", "Hm."), turn("user", f"IMAGE#3{TAG}", "3")], "the roles are assistant, user"),
        ([turn("user", f"IMAGE#3{TAG}", "3"), turn("user", "and?")], "the roles are user, user"),
        ([turn("user", f"IMAGE#3{TAG}?", "3", "14"), turn("assistant", "a")], "has the images"),
        ([turn("user", f"IMAGE#99{TAG}?", "99"), turn("assistant", "a")], "99.jpg does not exist"),
    ],
)
def test_the_error_for_a_broken_dialogue_names_its_number(root, photographs, dialogue, reason):
    good = [turn("user", f"IMAGE#3{TAG}?", "3"), turn("assistant", "a")]
    sparkles(root, photographs, good, dialogue)
    with pytest.raises(ValueError, match=rf"sparkles_dialogue, record SparklesDialogueCC: 1: .*{reason}"):
        samples(root, "sparkles_dialogue")
    (line,), report = samples(root, "sparkles_dialogue", out=root.parent / "other", on_bad_sample="skip")
    assert report.skipped == {"broken": 1}


def test_dialogues_with_many_images_or_unknown_names_are_skipped(root, photographs):
    ids = [str(number) for number in range(20, 29)]
    many = [turn("user", " ".join(f"IMAGE#{i}{TAG}" for i in ids), *ids), turn("assistant", "a")]
    unknown = [turn("user", f"IMAGE#3{TAG}?", "3"), turn("assistant", "As in IMAGE#55.")]
    good = [turn("user", f"IMAGE#3{TAG}?", "3"), turn("assistant", "a")]
    sparkles(root, photographs, many, unknown, good)
    _, report = samples(root, "sparkles_dialogue")
    assert report.skipped == {"more than 8 images": 1, "an image that is named but not shown": 1}


# -- public formats ------------------------------------------------------------------------------------------------------


def test_llava_conversations_with_no_one_and_several_images(root):
    several = llava_record("x", "Is <image> before <image>?", "Yes.") | {"image": coco(0, 1)}
    none = {"id": "t", "conversations": llava_record("x", "Hello?", "Hello.")["conversations"]}
    unnamed = llava_record(coco(2)[0], "What is it?", "A cat.")
    write_json(root / "mine.json", [several, none, unnamed])
    lines, _ = samples(root / "mine.json", "llava_conversations")
    assert lines == [
        {"messages": [ask("Is ", None, " before ", None, "?"), answer("Yes.")], "images": coco(0, 1)},
        {"messages": [ask("Hello?"), answer("Hello.")], "images": []},
        {"messages": [ask(None, "What is it?"), answer("A cat.")], "images": coco(2)},
    ]


@pytest.mark.parametrize(
    "keys", [("conversations", "from", "value", "human", "gpt"), ("messages", "role", "content", "user")]
)
def test_sharegpt_in_both_spellings(root, keys):
    turns, role, text, human = keys[:4]
    gpt = keys[4] if len(keys) > 4 else "assistant"
    talk = [{role: human, text: "<image>What is it?"}, {role: gpt, text: "A woman."}]
    records = [{turns: talk, "images": coco(0), "system": "Be brief."}, {turns: [{**talk[0], text: "Hi."}, talk[1]]}]
    (root / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    lines, _ = samples(root / "mine.jsonl", "sharegpt")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert lines == [
        {"messages": [system, ask(None, "What is it?"), answer("A woman.")], "images": coco(0)},
        {"messages": [ask("Hi."), answer("A woman.")], "images": []},
    ]


def test_cauldron_rows_from_parquet_with_images_inside(root, photographs):
    import datasets

    texts = [{"user": "What is <image>?", "assistant": "A token.", "source": "x"}, {"user": "Two?", "assistant": "Yes."}]
    rows = {"images": [[photographs[0].resize((9, 8)), photographs[1].resize((7, 6))], []], "texts": [texts, texts[1:]]}
    features = {"images": datasets.List(datasets.Image()), "texts": datasets.Dataset.from_dict(rows).features["texts"]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(root / "rows.parquet")
    lines, _ = samples(root / "rows.parquet", "cauldron")
    # Its "<image>" is text.
    messages = [ask(None, None, "What is <image>?"), answer("A token."), ask("Two?"), answer("Yes.")]
    assert [line["messages"] for line in lines] == [messages, [ask("Two?"), answer("Yes.")]]
    sizes = [Image.open(root / path).size for path in lines[0]["images"]]
    assert sizes == [(9, 8), (7, 6)] and lines[1]["images"] == []


# -- all of them -------------------------------------------------------------------------------------------------------


def test_every_data_set_of_deepspeed_visualchat_has_a_converter():
    names = [
        "aokvqa",
        "coco_caption",
        "llava",
        "llava_dial",
        "llava_otter_blend",
        "minigpt4",
        "ocr_vqa",
        "sparkles_dialogue",
    ]
    names += [f"otter_mimicit_{name}" for name in ("cgd", "sd", "sn", "tvc", "vst")]
    assert set(CONVERTERS) == {*names, "llava_conversations", "sharegpt", "cauldron"}
