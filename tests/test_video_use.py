"""Videos where they are used: chat, terminal, server, page, evaluation, training, `dsvl data show`, TRL."""

import base64
import json
from pathlib import Path

import pytest
import torch
from model_server import NAME, served
from training_runs import make_checkpoint
from transformers import AutoProcessor
from videos import encoded, index_of

from dsvl.chat import DSVLChat
from dsvl.chat.terminal import Terminal, dropped_files
from dsvl.cli import main
from dsvl.data import load_conversations
from dsvl.data.show import show, show_page
from dsvl.evaluation.answer_records import read_records
from dsvl.image_reading_dsvl import read_image
from dsvl.serving.requests import RequestLimits
from dsvl.training.collator import ConversationCollator
from dsvl.training.feature_cache import FeatureCache, fill_cache, image_key
from dsvl.utils.model_loading import load_checkpoint
from dsvl.video_reading_dsvl import read_video

pytest.importorskip("av")

CLIP = encoded(11, size=(56, 40))  # a second: frames at 0, 0.5 and 1 s
URL = "data:video/mp4;base64," + base64.b64encode(CLIP).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_checkpoint(folder, max_position_embeddings=512, initializer_range=0.3)
    (folder / "a.mp4").write_bytes(CLIP)
    (folder / "cut.mp4").write_bytes(CLIP[:600])
    video = {"type": "video", "path": "a.mp4"}
    turns = [{"role": "user", "content": [video, {"type": "text", "text": "a word"}]}, {"role": "assistant", "content": "b"}]
    own = [{"role": "user", "content": [video | {"max_frames": 2}, {"type": "text", "text": "ab"}]}, turns[1]]
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in (turns, own))
    (folder / "data.jsonl").write_text(text)
    return folder


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder / "model")


# -- chat ------------------------------------------------------------------------------------------------------------------


def test_a_chat_answers_about_a_video_as_generate_does_and_reuses_it(parts, folder):
    model, processor = parts
    chat = DSVLChat(model, processor, max_new_tokens=4)
    answer = chat.ask("What?", videos=folder / "a.mp4")
    parts = [{"type": "video", "path": str(folder / "a.mp4")}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert chat.last_turn.prompt_tokens == inputs["input_ids"].shape[1] and chat.last_turn.encoded_images == 3
    ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert chat.last_turn.answer_ids == ids.tolist()
    assert answer == chat.messages[-1]["content"]
    chat.ask("And?")
    assert chat.last_turn.encoded_images == 0 and chat.last_turn.reused_tokens >= inputs["input_ids"].shape[1]


def test_saved_conversations_keep_frames(parts, folder, tmp_path):
    chat = DSVLChat(*parts, max_new_tokens=3)
    chat.messages += [{"role": "user", "content": [{"type": "video", "path": str(folder / "a.mp4")}]}]
    chat.save(tmp_path / "saved")
    assert [part["time"] for part in chat.messages[0]["content"]] == ["0.0 s", "0.5 s", "1.0 s"]
    other = DSVLChat(*parts, max_new_tokens=3)
    other.load(tmp_path / "saved")
    found = other.messages[0]["content"]
    assert [(part["time"], part["frame"], part["frames"]) for part in found] == [
        ("0.0 s", 1, 3),
        ("0.5 s", 2, 3),
        ("1.0 s", 3, 3),
    ]
    assert [index_of(part["image"]) for part in found] == [0, 5, 10] and found[0]["image"].info["dsvl_frame"]
    (sample,) = load_conversations(tmp_path / "saved" / "conversation.jsonl", for_training=False)
    assert len(sample["messages"][0]["content"]) == 3


def test_the_terminal_takes_videos(parts, folder, capsys):
    terminal = Terminal(DSVLChat(*parts, max_new_tokens=2), input)
    terminal.handle(f"/video {folder / 'a.mp4'}")
    assert "(1 video added to the next question; 3 frames of 1.1 s)" in capsys.readouterr().out
    terminal.handle("What?")
    assert terminal.chat.last_turn.encoded_images == 3 and terminal.pending_videos == []
    assert dropped_files(f"'{folder}/a.mp4' What?") == ("What?", [f"{folder}/a.mp4"])
    terminal.handle(f"'{folder}/a.mp4'")
    assert len(terminal.pending_videos) == 1
    with pytest.raises(ValueError, match="cut.mp4 cannot be read: .*the file is cut|pass a whole video"):
        terminal.handle(f"/video {folder / 'cut.mp4'}")
    with pytest.raises(ValueError, match="/video takes the paths of videos"):
        terminal.handle("/video")
    assert len(terminal.pending_videos) == 1


# -- server ----------------------------------------------------------------------------------------------------------------


def question(*urls):
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def test_the_server_answers_about_videos_within_its_limits(parts, folder):
    from openai import BadRequestError

    limits = RequestLimits(videos=1, video_frames=2, video_seconds=5)
    with served(*parts, limits) as server:
        client = server.client()

        def ask(messages):
            return client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)

        model, processor = parts
        processor.max_frames, before = 2, processor.max_frames
        expected = DSVLChat(model, processor, max_new_tokens=4).ask("What?", videos=CLIP)
        processor.max_frames = before
        assert ask(question(URL)).choices[0].message.content == expected
        long = "data:video/mp4;base64," + base64.b64encode(encoded([0, 9])).decode()
        cut = "data:video/mp4;base64," + base64.b64encode(CLIP[:600]).decode()
        for messages, words in (
            (question(URL, URL), "2 videos; the limit is 1"),
            (question(long), "Video 1 cannot be decoded: it lasts"),
            (question(cut), "Video 1 cannot be decoded: "),
            (question("data:video/mp4;base64,§"), "Video 1 is not a valid base64 data URL"),
            (question("https://example.org/a.mp4"), "Video 1 is an http(s) URL, which this server does not download"),
            (question(str(folder / "a.mp4")), "neither a data URL nor an http"),
        ):
            with pytest.raises(BadRequestError) as caught:
                ask(messages)
            assert words in caught.value.message and str(folder) not in caught.value.message


# -- page ------------------------------------------------------------------------------------------------------------------


def test_the_page_takes_videos(parts, folder):
    pytest.importorskip("gradio")
    from dataclasses import replace

    from dsvl.page.limits import PageLimits, Refusal
    from dsvl.page.sessions import ChatSessions, PageQuestion
    from dsvl.page.uploads import open_upload

    limits = PageLimits(video_frames=2)
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=3), limits)
    asked = PageQuestion("What?", [str(folder / "a.mp4")])
    assert sessions.ask("one", asked).done.result(60)
    conversation = sessions.conversations["one"]
    times = [part["time"] for part, file in conversation.image_parts() if file == asked.files[0]]
    assert times == ["0.0 s", "1.0 s"] and conversation.pixel_bytes > 0
    sessions.leave("one")  # decoded frames are freed
    assert conversation.pixel_bytes == 0
    assert sessions.ask("one", PageQuestion("And?", [])).done.result(60)
    images = [part["image"] for part, _ in conversation.image_parts()]
    assert [index_of(image) for image in images] == [0, 10]
    sessions.close()
    for changed, words in (
        ({"video_bytes": 10}, "at most 10 are taken"),
        ({"video_seconds": 0.5}, "it lasts"),
        ({"image_pixels": 10}, "56 x 40 pixels"),
    ):
        with pytest.raises(Refusal, match=words):
            open_upload(asked.files[0], replace(limits, **changed))
    with pytest.raises(Refusal, match="cut.mp4 cannot be decoded"):
        open_upload(str(folder / "cut.mp4"), limits)


# -- data and training -----------------------------------------------------------------------------------------------------


def test_batches_hold_the_frames_that_read_video_gives(processor, folder):
    data = load_conversations(folder / "data.jsonl")
    collator = ConversationCollator(processor)
    batch = collator([data[0], data[1]])
    frames = [*read_video(CLIP)[0], *read_video(CLIP, max_frames=2)[0]]
    expected = processor(images=frames, text="<image>" * 5, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert [collator.packed_size(data[index])[1] for index in (0, 1)] == [3, 2]
    size = collator.measure(data[0])
    assert size.images == 3 and size.tokens == int(batch["attention_mask"][0].sum())
    assert collator.packed_size(data[0])[0] == size.tokens


def test_the_feature_cache_tells_frames_apart(folder, processor, tmp_path):
    model, _ = load_checkpoint(str(folder / "model"), "cpu")
    data = load_conversations(folder / "data.jsonl")
    tower = model.model.vision_tower
    cache = FeatureCache(tmp_path / "cache", {"tower": "t"})
    fill_cache(cache, [data], tower, model.config, processor, sampling=processor.video_sampling)
    assert len(cache) == 5  # the samplings of the two conversations differ
    batch = ConversationCollator(processor, features=cache)([data[0]])
    pixels = ConversationCollator(processor)([data[0]])
    assert torch.equal(batch["input_ids"], pixels["input_ids"])
    expected = model.get_image_features(pixels["pixel_values"]).last_hidden_state
    assert torch.allclose(batch["image_features"].float(), expected.float(), atol=1e-5)
    frames = processor.expand_videos(data[0]["messages"])[0]["content"][:3]
    assert len({image_key(part["image"]) for part in frames}) == 3


def test_a_training_stores_how_videos_are_sampled(folder, tmp_path):
    out = tmp_path / "out"
    flags = ["--max-steps", "2", "--use-cpu", "--report-to", "none", "--video-fps", "5", "--max-frames", "4"]
    packing = ["--packing", "--max-length", "256", "--max-images-per-pack", "6"]
    status = main(
        [
            "train",
            "--model",
            str(folder / "model"),
            "--data",
            str(folder / "data.jsonl"),
            "--output",
            str(out),
            *flags,
            *packing,
        ]
    )
    assert not status
    trained = AutoProcessor.from_pretrained(out)
    assert (trained.video_fps, trained.max_frames) == (5.0, 4)


def test_data_show_shows_frames(folder, processor, tmp_path):
    text = "".join(show(str(folder / "data.jsonl"), 1, processor))
    assert "3 images (3 frames of videos; the model sees" in text and "Video 1:\n<image>0.0 s\n<image>0.5 s" in text
    assert "### Video 1:" in "".join(show(str(folder / "data.jsonl"), 1))
    show_page(str(folder / "data.jsonl"), tmp_path / "page.html", 1, processor)
    assert (
        "Video 1 at 0.5 s: 56 x 40" in (tmp_path / "page.html").read_text()
        or "Video 1 at 0.5 s" in (tmp_path / "page.html").read_text()
    )


def test_evaluation_asks_about_videos(folder, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    model, data = str(folder / "model"), str(folder / "data.jsonl")
    assert not main(["evaluate", model, data, "--out", str(out), "--device", "cpu", "--max-new-tokens", "4"])
    records = read_records(out)
    assert [record.images for record in records] == [[str(folder / "a.mp4")]] * 2
    loaded = load_checkpoint(str(folder / "model"), "cpu")
    assert records[0].answer == DSVLChat(*loaded, max_new_tokens=4).ask("a word", videos=CLIP).strip()
    report = tmp_path / "report.html"
    assert not main(["compare", str(out), "--html", str(report)]) and "data:image/jpeg" in report.read_text()


def test_trl_data_hold_frames_as_images_with_a_time(folder, processor):
    pytest.importorskip("datasets")
    from dsvl.data import trl_dataset

    rows = trl_dataset(folder / "data.jsonl", sampling=processor.video_sampling)
    first = rows[0]
    assert [index_of(image) for image in first["images"]] == [0, 5, 10]
    assert read_image(first["images"][0]).info.get("dsvl_frame")
    parts = first["messages"][0]["content"]
    assert [part.get("time") for part in parts] == ["0.0 s", "0.5 s", "1.0 s", None]
    text = processor.apply_chat_template(first["messages"], tokenize=False)
    assert "Video 1:\n<image>0.0 s\n" in text
