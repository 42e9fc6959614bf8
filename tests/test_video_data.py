"""Videos in data sets: every record format, training, feature cache, packing, `dsvl data show`, TRL."""

import json
import tarfile

import pytest
from videos import animation, encoded, index_of

from dsvl.data import complete_messages, load_conversations
from dsvl.data.messages import check_conversation, image_source
from dsvl.image_reading_dsvl import read_image
from dsvl.utils.video_loading import with_frames

pytest.importorskip("av")
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encoded(11, size=(56, 40)))
    (tmp_path / "b.gif").write_bytes(animation("GIF", [500, 500, 500]))
    return tmp_path


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def kinds(sample):
    """The parts of the first message: texts, and types with the name of the file."""
    parts = complete_messages(sample)[0]["content"]
    return [p["text"] if p["type"] == "text" else (p["type"], str(image_source(p)).rsplit("/")[-1]) for p in parts]


def asked(*parts, **keys):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]} | keys


VIDEO, TEXT = {"type": "video"}, {"type": "text", "text": "What?"}
TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Yes."}]
PLAIN = [{"role": "user", "content": "<video>What?"}, ANSWER]
RECORDS = {
    "path": asked({"type": "video", "path": "a.mp4"}, TEXT),
    "video": asked({"type": "video", "video": "a.mp4"}, TEXT),
    "file url": asked({"type": "video", "url": "file://ROOT/a.mp4"}, TEXT),
    "video_url": asked({"type": "video_url", "video_url": {"url": "file://ROOT/a.mp4"}}, TEXT),
    "videos": asked(VIDEO, TEXT, videos=["a.mp4"]),
    "one video": {"messages": [{"role": "user", "content": "What?"}, ANSWER], "video": "a.mp4"},
    "marks": {"messages": PLAIN, "videos": ["a.mp4"]},
    "ShareGPT": {"conversations": TURNS, "videos": ["a.mp4"]},
    "LLaVA": {"conversations": TURNS, "video": "a.mp4"},
    "LLaVA-Video": {"conversations": [TURNS[0] | {"value": "<image>\nWhat?"}, TURNS[1]], "video": "a.mp4"},
    "without mark": {"conversations": [TURNS[0] | {"value": "What?"}, TURNS[1]], "videos": ["a.mp4"]},
    "question": {"video": "a.mp4", "question": "What?", "answer": "Yes."},
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_gives_the_same_conversation(name, folder):
    record = json.loads(json.dumps(RECORDS[name]).replace("ROOT", str(folder)))
    data = load_conversations(write(folder / "data.jsonl", record))
    assert kinds(data[0]) == [("video", "a.mp4"), "What?"]
    assert data.images(0) == 1


def test_images_and_videos_are_placed_at_their_marks(folder, photographs):
    photographs[0].save(folder / "i.png")
    turns = [{"from": "human", "value": "In <image> and <video>?"}, TURNS[1]]
    both = {"videos": ["b.gif"], "images": ["i.png"]}
    plain = [{"role": "user", "content": "In <image> and <video>?"}, ANSWER]
    data = load_conversations(write(folder / "data.jsonl", {"messages": plain, **both}))
    assert kinds(data[0]) == ["In ", ("image", "i.png"), " and ", ("video", "b.gif"), "?"]
    data = load_conversations(write(folder / "data.jsonl", {"conversations": turns, **both}))
    assert kinds(data[0]) == ["In ", ("image", "i.png"), " and ", ("video", "b.gif"), "?"]
    without = {"conversations": [turns[0] | {"value": "What is <video>?"}, turns[1]], "images": []}
    assert kinds(load_conversations(write(folder / "data.jsonl", without))[0]) == ["What is <video>?"]


def test_folders_captions_and_shards_hold_videos(folder):
    write(folder / "metadata.jsonl", {"file_name": "a.mp4", "text": "A bar."})
    assert kinds(load_conversations(folder)[0]) == [("video", "a.mp4"), "Describe this video."]
    with tarfile.open(folder / "shard.tar", "w") as shard:
        (folder / "1.txt").write_text("A bar.")
        shard.add(folder / "a.mp4", "1.mp4")
        shard.add(folder / "1.txt", "1.txt")
    sample = load_conversations(folder / "shard.tar")[0]
    part = complete_messages(sample)[0]["content"][0]
    assert part["type"] == "video" and image_source(part) == (folder / "a.mp4").read_bytes()


def test_settings_and_lists_of_frames_are_kept(folder, photographs):
    photographs[0].save(folder / "i.png")
    own = {"type": "video", "path": "a.mp4", "fps": 10, "max_frames": 2}
    listed = {"type": "video", "video": ["i.png", "i.png"], "frame_rate": 1}
    sample = load_conversations(write(folder / "data.jsonl", asked(own, listed, TEXT)))[0]
    first, second = complete_messages(sample)[0]["content"][:2]
    assert (first["fps"], first["max_frames"], second["frame_rate"]) == (10, 2, 1)
    frames = with_frames(complete_messages(sample))[0]["content"]
    assert [part.get("time") for part in frames] == ["0.0 s", "1.0 s", "0.0 s", "1.0 s", None]


WRONG = {
    "missing": (asked({"type": "video", "path": "no.mp4"}), "the video .*no.mp4 does not exist"),
    "too few": (asked(VIDEO), "1 video parts without a source, but there are 0 videos"),
    "two sources": (asked({"type": "video", "path": "a.mp4", "url": "x"}), "a video of message 0 has path and url"),
    "unknown key": (asked({"type": "video", "path": "a.mp4", "speed": 2}), "has the key speed"),
    "fps": (asked({"type": "video", "path": "a.mp4", "fps": -1}), "fps=-1 is not a rate"),
    "in an answer": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [VIDEO]}], "videos": ["a.mp4"]},
        "message 1 .assistant. has a part",
    ),
    "frame": (asked({"type": "image", "path": "a.mp4", "time": "1 s"}), "expected a time such as"),
    "url": (asked({"type": "video", "url": "https://example.org/a.mp4"}), "the video https.* is a URL; pass --allow-urls"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name, folder):
    record, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        load_conversations(write(folder / "data.jsonl", record), allow_urls=False)


def test_stored_frames_are_data(folder, photographs):
    photographs[0].save(folder / "i.png")
    frame = {"type": "image", "path": str(folder / "i.png"), "time": "0.5 s", "frame": 1, "frames": 1}
    assert check_conversation(asked(frame, TEXT)) == (1, False)
    (part,) = with_frames(complete_messages(asked(frame)))[0]["content"]
    assert part["time"] == "0.5 s" and read_image(part["image"]).info["dsvl_frame"]


def test_urls_are_fetched_only_when_allowed(folder, monkeypatch):
    messages = [{"role": "user", "content": [{"type": "video", "url": "https://example.org/a.mp4"}]}]
    with pytest.raises(ValueError, match="fetching is not allowed"):
        with_frames(messages)
    data = (folder / "a.mp4").read_bytes()
    monkeypatch.setattr("dsvl.utils.image_loading.fetch_url", lambda url, most, seconds: data)
    frames = with_frames(messages, allow_urls=True)[0]["content"]
    assert [index_of(read_image(part["image"])) for part in frames] == [0, 5, 10]
