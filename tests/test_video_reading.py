"""`read_video`: real encoded files, made here, and what is refused."""

import base64
import functools
import io
import itertools
import os
import pickle
import sys
import threading
import time
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from videos import animation, encoded, frame, index_of

from dsvl.image_reading_dsvl import read_image
from dsvl.video_decoding_dsvl import VideoLimits, VideoSampling
from dsvl.video_reading_dsvl import Video, VideoError, expand_videos, read_video, sampled_frames, video_size

av = pytest.importorskip("av")


def refusal(source, **options) -> str:
    with pytest.raises(VideoError) as caught:
        read_video(source, **options)
    assert caught.value.words and caught.value.words in str(caught.value).replace("cannot be read: ", "cannot be decoded: ")
    return str(caught.value)


def shown(source, **options) -> tuple[list[int], list[float]]:
    frames, times = read_video(source, **options)
    assert all(one.mode == "RGB" and one.info == {"dsvl_frame": True} for one in frames)
    return [index_of(one) for one in frames], [round(seconds, 3) for seconds in times]


FORMATS = {
    "h264 in mp4": {},
    "h264 without b-frames": {"options": {"bf": "0"}},
    "h264 with a cover of sound": {"audio": 1.5},
    "fragmented mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264 in mkv": {"container": "matroska"},
    "h264 in mpegts": {"container": "mpegts"},
    "h264 in flv": {"container": "flv"},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "10-bit": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "vp9": {"codec": "libvpx-vp9", "container": "webm"},
    "av1": {"codec": "libsvtav1", "container": "mp4", "size": (64, 64)},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi"},
    "4:4:4": {"pix_fmt": "yuv444p"},
    "odd size": {"pix_fmt": "yuv444p", "size": (33, 17)},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_sampled_frame_is_the_one_that_is_shown_at_its_time(name):
    data = encoded(16, **FORMATS[name])
    assert shown(data, fps=10) == (list(range(16)), [index / 10 for index in range(16)])
    assert shown(data, fps=2) == ([0, 5, 10, 15], [0.0, 0.5, 1.0, 1.5])
    assert shown(data, fps=10, max_frames=2) == ([0, 15], [0.0, 1.5])
    assert shown(data, max_frames=1) == ([7], [0.7])
    duration, number = video_size(data)
    assert number == 4 and duration == pytest.approx(1.6, abs=0.11)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux has scheduling policies")
def test_making_a_video_leaves_the_process_as_it_was():
    encoded(16, **FORMATS["av1"])
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_timestamps_decide_where_the_rate_varies():
    stamps = [0, 0.04, 0.08, 0.12, 0.16, 2, 2.5, 6, 6.04, 8]
    for data in (encoded(stamps), encoded(stamps, "libvpx-vp9", "webm")):
        assert shown(data, fps=1) == ([0, 4, 5, 6, 7, 8, 9], [0, 0.16, 2, 2.5, 6, 6.04, 8])
        assert shown(data, fps=0.5) == ([0, 5, 6, 7, 9], [0, 2, 2.5, 6, 8])


def test_sampled_frames_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = np.cumsum(rng.uniform(0.01, 1.5, rng.integers(1, 40)))
        fps, most = rng.uniform(0.1, 12), int(rng.integers(1, 30))
        number = min(most, round((starts[-1] - starts[0]) * fps) + 1)
        moments = [starts[0] + k * (starts[-1] - starts[0]) / (number - 1) for k in range(number)] if number > 1 else []
        moments = moments or [(starts[0] + starts[-1]) / 2]
        expected = []
        for moment in moments:
            last = max(index for index, start in enumerate(starts) if start <= moment + 1e-6)
            expected += [last] if last not in expected else []
        found = sampled_frames(starts, fps, most)
        assert found == expected
        assert number == 1 or (found[0] == 0 and found[-1] == len(starts) - 1)


@pytest.mark.parametrize("degrees,mirrored", [*itertools.product((0, 90, 180, 270), (False, True))])
def test_rotated_videos_are_upright(degrees, mirrored):
    data = encoded(3, rotation=(degrees, mirrored))
    frames, _ = read_video(data)
    stored = Image.fromarray(frame(0))
    expected = stored.rotate(degrees, expand=True)
    expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else expected
    assert frames[0].size == expected.size
    difference = np.abs(np.asarray(frames[0].resize((8, 8)), float) - np.asarray(expected.resize((8, 8)), float))
    assert difference.mean() < 12


def test_pixels_that_are_not_square_are_stretched():
    assert read_video(encoded(2, aspect=Fraction(4, 3)))[0][0].size == (85, 48)
    assert read_video(encoded(2, aspect=Fraction(1, 2)))[0][0].size == (64, 96)


def test_transparent_pixels_become_white():
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as output:
        stream = output.add_stream("qtrle", rate=5)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "argb"
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[:8] = (0, 200, 0, 255)
        for _ in range(2):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        output.mux(stream.encode())
    (image, _), _ = read_video(file.getvalue(), fps=5)
    assert image.getpixel((3, 3)) == (0, 200, 0) and image.getpixel((3, 12)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_have_the_times_of_their_delays(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # they need no PyAV
    data = animation(kind, [500, 100, 400, 2000, 1000])
    assert shown(data, fps=2)[1] == [0, 0.5, 1.0, 3.0] or shown(data, fps=2)[1] == [0, 0.5, 0.6, 1.0, 3.0]
    frames, times = read_video(data, fps=10)
    assert [round(seconds, 2) for seconds in times] == [0, 0.5, 0.6, 1.0, 3.0]
    assert [index_of(image) for image in frames] == [0, 1, 2, 3, 4] and frames[0].size == (32, 24)
    assert video_size(data, fps=10) == (pytest.approx(4.0), 5)
    assert shown(animation(kind, [0, 0, 0]), fps=10)[1] == [0, 0.1, 0.2]  # as browsers show them
    for part in (len(data) // 2, len(data) - 4):
        assert "cut or broken" in refusal(data[:part])


def test_given_frames_need_a_rate():
    frames = [Image.fromarray(frame(index)) for index in range(20)]
    assert shown(frames, frame_rate=10, fps=2) == ([0, 4, 9, 14, 19], [0, 0.4, 0.9, 1.4, 1.9])
    assert shown(np.stack([frame(index) for index in range(20)]), frame_rate=10, fps=2)[0] == [0, 4, 9, 14, 19]
    assert frames[0].info == {}
    assert "frame_rate=None" in refusal(frames)
    assert "frame 1 cannot be read" in refusal([frames[0], b"x" * 50], frame_rate=1)
    assert "no frame" in refusal([], frame_rate=1)
    assert "its own timestamps" in refusal(encoded(2), frame_rate=1)


def test_every_form_of_a_file_is_read(tmp_path):
    data = encoded(6)
    (tmp_path / "a.mp4").write_bytes(data)
    text = base64.b64encode(data).decode()
    with open(tmp_path / "a.mp4", "rb") as file:
        sources = [tmp_path / "a.mp4", str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4", data, bytearray(data), file]
        sources += [io.BytesIO(data), {"bytes": data, "path": None}, f"data:video/mp4;base64,{text}", text]
        for source in sources:
            assert shown(source, fps=10)[0] == [0, 1, 2, 3, 4, 5]
        assert not file.closed
    assert "is not a file, an address or base64 of video data" in refusal(str(tmp_path / "b.mp4"))
    assert "does not exist" in refusal(tmp_path / "b.mp4")
    assert "binary mode" in refusal(io.StringIO("x"))
    assert "of type int" in refusal(3)


def test_addresses_are_fetched_within_the_limit(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encoded(6))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.mp4"
        assert shown(url, fps=10)[0] == [0, 1, 2, 3, 4, 5]
        assert "larger than 100 bytes" in refusal(url, limits=VideoLimits(fetched_bytes=100))
        assert "was not fetched" in refusal(url + "x")
        assert "fetching is not allowed" in refusal(url, allow_urls=False)
        server.shutdown()


def test_a_file_that_cannot_seek_is_refused():
    read, write = os.pipe()
    os.close(write)
    with open(read, "rb") as file:
        assert "cannot seek" in refusal(file)


def test_frames_are_shrunk_as_an_image_processor_would_resize_them():
    (first, *_), _ = read_video(encoded(2, size=(128, 96)), shortest_edge=24)
    assert first.size == (32, 24)
    (first, *_), _ = read_video(encoded(2, size=(64, 48), rotation=(90, False)), shortest_edge=24)
    assert first.size == (24, 32)
    (first, *_), _ = read_video(encoded(2), shortest_edge=100)
    assert first.size == (64, 48)  # never enlarged


OPEN_GOPS = {"options": {"x264-params": "open-gop=1:bframes=3:keyint=6:min-keyint=6:scenecut=0"}}


@pytest.mark.parametrize("options", [{}, {"codec": "libvpx-vp9", "container": "webm"}, {"options": {"bf": "3"}}, OPEN_GOPS])
def test_seeking_gives_the_frames_of_decoding_everything(options, monkeypatch):
    data = encoded(23, gop=4, **options)
    for fps, most in ((10, 64), (1, 64), (2, 3), (1, 1)):
        frames, times = read_video(data, fps=fps, max_frames=most)
        with monkeypatch.context() as patch:
            patch.setattr("dsvl.video_decoding_dsvl.SEEKABLE", ("none",))
            others, other_times = read_video(data, fps=fps, max_frames=most)
        assert times == other_times
        assert all(np.array_equal(one, other) for one, other in zip(frames, others, strict=True))


def test_seeking_decodes_only_what_is_needed(monkeypatch):
    data, decoded = encoded(200, gop=5, size=(32, 32)), []
    monkeypatch.setattr("dsvl.video_decoding_dsvl._Position.check", lambda at, seconds: decoded.append(seconds))
    read_video(data, max_frames=2)
    assert len(decoded) < 30


@pytest.mark.parametrize("name", ["mp4", "matroska", "webm", "avi"])
def test_truncated_files_are_refused_with_the_time(name):
    faststart = {"movflags": "faststart"} if name == "mp4" else {}
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(name, "libx264")
    data = encoded(40, codec, name, size=(160, 128), container_options=faststart)
    message = refusal(data[: len(data) // (8 if name == "avi" else 2)], fps=10)  # the index of an AVI is half of it
    assert "cut or broken" in message and any(f"{tenth / 10:.1f} s" in message for tenth in range(1, 40)), message


def test_what_is_not_a_video_is_refused():
    assert "its file is empty" in refusal(b"")
    assert "cannot be decoded" in refusal(b"no video at all" * 100)
    moov_at_the_end = encoded(20)
    assert "cannot be decoded" in refusal(moov_at_the_end[: len(moov_at_the_end) // 2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000)
        for start in range(0, 48000, 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.rate, sound.pts = 48000, start
            output.mux(stream.encode(sound))
        output.mux(stream.encode())
    assert "no video stream (audio)" in refusal(file.getvalue())


def test_what_an_edit_list_cuts_off_is_not_shown():
    data = encoded(20)  # as phones store a trimmed video: the frames stay in the file
    where = data.index(b"elst") + 12
    assert data[where : where + 4] == (2000).to_bytes(4, "big")
    trimmed = data[:where] + (1000).to_bytes(4, "big") + data[where + 4 :]
    assert shown(trimmed, fps=10) == (list(range(10)), [index / 10 for index in range(10)])


def test_broken_frames_are_refused_with_the_time():
    data = bytearray(encoded(40, size=(160, 128), gop=40))
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    message = refusal(bytes(data), fps=10)
    assert " s " in message and "cut or broken" in message


def test_playlists_and_image_files_are_not_opened(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(encoded(3))
    for text in (f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n", f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n"):
        for source in (text.encode(), tmp_path / "list.m3u8"):
            (tmp_path / "list.m3u8").write_text(text)
            assert "cannot be decoded" in refusal(source)
    file = io.BytesIO()
    Image.fromarray(frame(0)).save(file, "JPEG")
    assert "cannot be decoded" in refusal(file.getvalue())


def test_single_frames_and_the_smallest_size():
    assert shown(encoded(1)) == ([0], [0.0])
    assert shown(animation("GIF", [100])) == ([0], [0.0])
    one = encoded(2, "mpeg4", "avi", size=(1, 1), pix_fmt="yuv420p")
    assert read_video(one, fps=10)[0][0].size == (1, 1)


def test_limits_are_kept():
    data = encoded(30)
    for limits, words in (
        (VideoLimits(seconds=1), "it lasts 3 s"),
        (VideoLimits(bytes=100), "at most 100 are taken"),
        (VideoLimits(frames=20), "more than 20 frames"),
        (VideoLimits(pixels=64 * 47), "64 x 48 pixels"),
        (VideoLimits(kept_pixels=64 * 48 * 4), "pass fewer frames"),
        (VideoLimits(decode_seconds=0), "longer than 0 s"),
    ):
        assert words in refusal(data, limits=limits)
    assert "lasts 3 s" in refusal(animation("GIF", [1000] * 3), limits=VideoLimits(seconds=2))
    assert "more than 2 frames" in refusal(animation("WEBP", [1000] * 3), limits=VideoLimits(frames=2))


def test_a_huge_claimed_length_is_refused_without_reading_on():
    data = encoded(10, container="matroska")
    where = data.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes
    for seconds, words in ((3600.0, "ends at 1.0 s, before the 3600.0 s"), (1e9, "it lasts 1,000,000,000 s")):
        claimed = data[:where] + np.array(seconds * 1000, ">f8").tobytes() + data[where + 8 :]
        started = time.process_time()
        assert words in refusal(claimed)
        assert time.process_time() - started < 2


def test_frames_are_decoded_when_they_are_read_and_once(monkeypatch):
    video = Video(encoded(20))
    opened = []
    monkeypatch.setattr(type(video._reader), "_image", lambda *_: opened.append(1) or Image.new("RGB", (4, 4)))
    sources = video.frame_sources()
    assert len(sources) == 5 and not opened and "frame at 0.40 s of the video" in repr(sources[1])
    again = pickle.loads(pickle.dumps(sources))
    for source in sources + sources:
        assert read_image(source).info["dsvl_frame"]
    assert len(opened) == 5
    assert read_image(again[0]) and len(opened) == 10  # another process decodes again


def test_videos_in_messages_become_frames_with_their_times():
    parts = [{"type": "text", "text": "a"}, {"type": "video", "video": encoded(20), "fps": 1.0}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    system, user = expand_videos(messages)
    assert system == messages[0] and messages[1]["content"] == parts
    assert user["content"][0] == parts[0]
    times = [(part["type"], part["time"], part["frame"], part["frames"]) for part in user["content"][1:]]
    assert times == [("image", "0.0 s", 1, 3), ("image", "0.9 s", 2, 3), ("image", "1.9 s", 3, 3)]
    assert [index_of(read_image(part["image"])) for part in user["content"][1:]] == [0, 9, 19]
    close = expand_videos([{"role": "user", "content": [{"type": "video", "video": encoded(5, rate=50), "fps": 50}]}])
    assert [part["time"] for part in close[0]["content"]] == ["0.00 s", "0.02 s", "0.04 s", "0.06 s", "0.08 s"]
    for wrong in ({}, {"video": b"", "path": "x"}, {"video": b"", "speed": 2}):
        with pytest.raises(ValueError, match="expected one of video, path, url, base64"):
            expand_videos([{"role": "user", "content": [{"type": "video", **wrong}]}])


def test_sampling_is_checked():
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"fps": True}, {"max_frames": 0}, {"max_frames": 1.5}):
        with pytest.raises(ValueError, match="pass a"):
            VideoSampling(**wrong)


def test_without_pyav_a_video_names_the_extra(monkeypatch):
    data = encoded(2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"dsvl\[video\]"):
        read_video(data)


def test_memory_follows_the_frames_that_are_kept():
    import tracemalloc

    data = encoded(60, size=(640, 480))
    tracemalloc.start()
    frames, _ = read_video(data, fps=10, shortest_edge=24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(frames) == 60 and peak < 10 * 640 * 480 * 3
