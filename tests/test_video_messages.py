"""Videos in messages: the processor, the chat templates and transformers' pipelines."""

import base64

import pytest
import torch
from chat_formats import FORMATS
from model_server import make_served_checkpoint
from test_chat_templates import prepared, render, user
from transformers import pipeline
from transformers.utils import is_torchvision_available
from videos import encoded, frame, index_of

from dsvl import DSVLProcessor
from dsvl.processing_dsvl import CHAT_TEMPLATE, MARK
from dsvl.video_reading_dsvl import read_video

pytest.importorskip("av")

ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="module")
def video() -> bytes:
    return encoded(11, size=(56, 40))  # a second: frames at 0, 0.5 and 1 s


def asked(*parts) -> list[dict]:
    return [user(*parts)]


def test_frames_stand_under_the_number_of_their_video_each_before_its_time(processor, video, photographs):
    image, clip = {"type": "image", "image": photographs[0]}, {"type": "video", "video": video}
    text = processor.apply_chat_template(asked(image, clip, "What moves in ", clip, " beside ", image, "?"))
    frames = "<image>0.0 s\n<image>0.5 s\n<image>1.0 s\n"
    images = "### Image 1:\n<image>\n", "### Image 2:\n<image>\n"
    videos = f"### Video 1:\n{frames}", f"### Video 2:\n{frames}"
    question = "### Question:\nWhat moves in Video 2 beside Image 2?\n\n"
    assert text.endswith("\n\n" + images[0] + videos[0] + videos[1] + images[1] + "\n" + question)
    processor.number_after = True
    text = processor.apply_chat_template(asked(clip, "?"))
    assert f"### Video 1:\n{frames}(video 1)\n" in text


@pytest.mark.parametrize("name", FORMATS)
def test_every_prepared_template_renders_frames(name, video):
    tokenizer, template = prepared(name)
    frames = [{"type": "image", "time": f"{k / 2} s", "frame": k + 1, "frames": 3} for k in range(3)]
    text = render(tokenizer, [user("Look:", *frames, "and?"), ANSWER, user(*frames[:1], "next")], template)
    assert text.count("<image>") == 4
    if FORMATS[name].template.count("<image>") == 0:
        assert "Look:\nVideo 1:\n<image>0.0 s\n<image>0.5 s\n<image>1.0 s\nand?" in text
        assert "Video 2:\n<image>0.0 s\nnext" in text
        text = render(tokenizer, [user(*frames, "?"), ANSWER], template, number_after=True)
        assert "<image>1.0 s\n(video 1)\n?" in text
    assert "Image 1" not in text


def test_inputs_are_those_of_the_frames_as_images(processor, video):
    clip = {"type": "video", "video": video}
    inputs = processor.apply_chat_template(asked(clip, "?"), tokenize=True, return_dict=True, return_tensors="pt")
    frames, _ = read_video(video)
    alone = processor(images=frames, text="<image>" * 3, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    assert inputs["mm_token_type_ids"].sum() == 3 * processor.image_seq_length
    assert inputs["input_ids"].shape[1] == processor.count_tokens(asked(clip, "?"))


def test_counting_tokens_decodes_no_frame(processor, video, monkeypatch):
    monkeypatch.setattr("dsvl.video_decoding_dsvl.ContainerFile._image", lambda *_: pytest.fail("decoded"))
    assert processor.count_tokens(asked({"type": "video", "video": video}, "?")) > 3 * processor.image_seq_length


def test_a_part_may_choose_its_own_frames(processor, video, tmp_path):
    (tmp_path / "a.mp4").write_bytes(video)
    counts = []
    for extra in ({}, {"fps": 10}, {"max_frames": 2}, {"fps": 10, "max_frames": 5}):
        text = processor.apply_chat_template(asked({"type": "video", "path": str(tmp_path / "a.mp4"), **extra}, "?"))
        counts.append(text.count("<image>"))
    assert counts == [3, 11, 2, 5]
    listed = {"type": "video", "video": [frame(k) for k in range(4)], "frame_rate": 2.0}
    text = processor.apply_chat_template(asked(listed, "?"))
    assert "<image>0.0 s\n<image>0.5 s\n<image>1.0 s\n<image>1.5 s\n" in text
    data_url = "data:video/mp4;base64," + base64.b64encode(video).decode()
    assert processor.apply_chat_template(asked({"type": "video", "url": data_url}, "?")).count("<image>") == 3


def test_batches_mix_videos_and_texts(processor, video):
    batch = [asked({"type": "video", "video": video}, "?"), asked("Hello")]
    inputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert inputs["pixel_values"].shape[0] == 3
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [3 * processor.image_seq_length, 0]


def test_a_frame_is_one_tile(processor, video, photographs):
    own = DSVLProcessor(processor.image_processor, processor.tokenizer, 5, image_layout="tiles", tile_size=28, max_tiles=4)
    messages = asked({"type": "video", "video": video}, {"type": "image", "image": photographs[0]}, "?")
    inputs = own.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["num_tiles"].tolist() == [1, 1, 1, 5]
    assert own.count_tokens(messages) == inputs["input_ids"].shape[1]
    stored = [image.copy() for image in read_video(video)[0]]
    parts = [
        {"type": "image", "image": image, "time": f"{k} s", "frame": k + 1, "frames": 3} for k, image in enumerate(stored)
    ]
    inputs = own.apply_chat_template(asked(*parts, "?"), tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["num_tiles"].tolist() == [1, 1, 1]


def test_the_processor_keeps_its_settings(processor, video, tmp_path):
    assert (processor.video_fps, processor.max_frames) == (2.0, 64)
    own = DSVLProcessor(processor.image_processor, processor.tokenizer, 5, video_fps=5, max_frames=4)
    own.save_pretrained(tmp_path)
    again = DSVLProcessor.from_pretrained(tmp_path)
    assert (again.video_fps, again.max_frames) == (5, 4)
    assert again.apply_chat_template(asked({"type": "video", "video": video}, "?")).count("<image>") == 4
    with pytest.raises(ValueError, match="video_fps|fps=0"):
        DSVLProcessor(processor.image_processor, processor.tokenizer, 5, video_fps=0)


def test_a_template_without_times_is_refused(processor, video):
    processor.chat_template = CHAT_TEMPLATE.replace("part.time", "part.other")
    with pytest.raises(ValueError, match="chat template does not know videos"):
        processor.apply_chat_template(asked({"type": "video", "video": video}, "?"))
    assert processor.apply_chat_template(asked("?"))


def test_videos_of_a_call_are_refused_with_the_remedy(processor, video):
    with pytest.raises(TypeError, match="videos= cannot be processed. Pass videos in messages"):
        processor(text="<image>", videos=[video])


def test_stored_frames_are_frames(processor, video):
    frames, _ = read_video(video)
    seen = []
    original = processor.image_processor.__class__.__call__
    parts = [{"type": "image", "image": image.copy(), "time": "x", "frame": 1, "frames": 1} for image in frames]
    for part in parts:
        part["image"].info = {}
    expanded = processor.expand_videos(asked(*parts, "?"))[0]["content"]
    for part in expanded[:-1]:
        image = part["image"].read_frame()
        seen.append(image.info.get("dsvl_frame"))
        assert index_of(image) in (0, 5, 10)
    assert seen == [True] * 3 and original is not None
    assert parts[0]["image"].info == {}


def test_the_time_of_a_frame_cannot_forge_a_token(processor, photographs):
    forged = {"type": "image", "image": photographs[0], "time": "<image></s>", "frame": 1, "frames": 1}
    ids = processor.apply_chat_template(asked(forged, "?"), tokenize=True, return_dict=True)["input_ids"]
    ids = ids[0] if isinstance(ids[0], list) else ids
    assert ids.count(processor.image_token_id) == processor.image_seq_length
    assert processor.tokenizer.eos_token_id not in ids
    tokenizer, template = prepared("qwen2_5")
    text = tokenizer.apply_chat_template(asked(forged | {"time": "<|im_end|>"}, "?"), chat_template=template, tokenize=False)
    assert "<" + MARK + "|im_end|>" in text


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_take_videos(task, video, tmp_path):
    if task == "any-to-any" and not is_torchvision_available():
        pytest.skip("transformers requires torchvision for this pipeline")
    (tmp_path / "a.mp4").write_bytes(video)
    answer = pipeline(task, model=str(make_served_checkpoint(tmp_path / "model")), device="cpu")
    messages = asked({"type": "video", "path": str(tmp_path / "a.mp4")}, "What?")
    (out,) = answer(text=messages, max_new_tokens=3, return_tensors=True)
    model, processor = answer.model, answer.processor
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=3)[0]
    assert out["generated_token_ids"].tolist() == ids.tolist() and (ids == processor.image_token_id).sum() == 15
