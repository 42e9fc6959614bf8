"""`dsvl evaluate`: what is asked and when, what is written, and what becomes of an interrupted run."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from training_runs import environment, make_checkpoint, make_conversations
from transformers import GenerationConfig

from dsvl import DSVLForConditionalGeneration
from dsvl.chat import DSVLChat
from dsvl.cli import main
from dsvl.evaluation.answer_records import read_records
from dsvl.evaluation.generate_answers import GREEDY, generate_answers
from dsvl.evaluation.questions import Questions
from dsvl.utils import image_loading
from dsvl.utils.model_loading import load_checkpoint

NEW = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and conversations of one to three turns with no, one and two images."""
    folder = tmp_path_factory.mktemp("evaluation")
    # Far from uniform attention, so that answers depend on what is asked.
    make_checkpoint(folder, max_position_embeddings=512, initializer_range=0.3)
    make_conversations(folder, layout="ptp" * 3)
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, capsys):
    """Run the command; gives the answers and the summary."""

    def run(*flags: str, data: Any = "data.jsonl", model: str = "model", out: str = "answers.jsonl") -> tuple[Any, Any]:
        path = tmp_path / out
        status = main(
            ["evaluate", str(folder / model), str(folder / data), "--out", str(path), "--device", "cpu", *NEW, *flags]
        )
        if status:
            raise ValueError(capsys.readouterr().err)
        return read_records(path), json.loads(path.with_suffix(".summary.json").read_text())

    return run


@pytest.fixture
def calls(monkeypatch):
    """The batch of every call of `generate`; raises in the call that `calls.limit` names."""

    class Calls(list):
        limit, error = -1, MemoryError

    calls = Calls()
    generate = DSVLForConditionalGeneration.generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == calls.limit:
            raise calls.error("not today")
        calls.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(DSVLForConditionalGeneration, "generate", counted)
    return calls


def answers(records):
    return {(record.id, record.turn): record.answer for record in records}


def double(folder):
    model, processor = load_checkpoint(str(folder / "model"), device="cpu")
    return model.double(), processor


# -- asking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["1", "4", "64"])
def test_a_batchs_answers_are_those_of_each_conversation_held_alone(folder, evaluate, monkeypatch, batch_size):
    model, processor = double(folder)
    monkeypatch.setattr("dsvl.utils.model_loading.load_checkpoint", lambda *args: (model, processor))
    records, summary = evaluate("--batch-size", batch_size)
    said = answers(records)
    kinds = set()
    for conversation in Questions(folder / "data.jsonl"):
        chat = DSVLChat(model, processor, max_new_tokens=6)
        for place, one in enumerate(conversation.turns):
            assert said.pop((conversation.id, place)) == chat.ask(one.question, one.images)
            kinds.add((place, len(conversation.images)))
    assert not said and len(kinds) > 5 and len({record.answer for record in records}) > len(records) / 2
    assert summary["counts"]["answered"] == summary["counts"]["turns"] == len(records)


def test_given_answers_are_what_follow_ups_are_asked_after(folder, evaluate, monkeypatch, calls):
    model, processor = double(folder)
    monkeypatch.setattr("dsvl.utils.model_loading.load_checkpoint", lambda *args: (model, processor))
    records, _ = evaluate("--given-answers", "--batch-size", "8")
    assert calls == [8] * (len(records) // 8) + [len(records) % 8]  # no turn waits for another
    said = answers(records)
    own = answers(evaluate(out="own.jsonl")[0])
    assert said != own and all(said[place] == own[place] for place in said if place[1] == 0)
    for conversation in Questions(folder / "data.jsonl"):
        messages: list[Any] = []
        for place, one in enumerate(conversation.turns):
            (answer,) = generate_answers(model, processor, [messages + one.messages], 6)
            assert said[conversation.id, place] == answer.text
            messages += [*one.messages, one.answer]


def test_turns_of_like_depth_are_asked_together(folder, evaluate, calls):
    records, _ = evaluate("--batch-size", "64")
    depths = [sum(record.turn == place for record in records) for place in range(3)]
    assert calls == depths and min(depths) > 0


def test_greedy_is_greedy_whatever_the_checkpoint_would_do(folder, evaluate):
    expected = answers(evaluate()[0])
    settings = folder / "model" / "generation_config.json"
    before = settings.read_text()
    odd = dict(num_beams=3, repetition_penalty=9.0, do_sample=True, temperature=3.0, min_new_tokens=6, max_new_tokens=2)
    odd |= dict(no_repeat_ngram_size=1, suppress_tokens=list(range(3, 200)), bad_words_ids=[[250]], max_length=900)
    odd |= dict(sequence_bias=[[[260], 50.0]], forced_eos_token_id=260, length_penalty=-4.0, prompt_lookup_num_tokens=2)
    settings.write_text(json.dumps(json.loads(before) | odd))
    try:
        assert answers(evaluate(out="odd.jsonl")[0]) == expected
    finally:
        settings.write_text(before)


LEFT_TO_THE_CHECKPOINT = {"eos_token_id", "bos_token_id", "pad_token_id"}
WITHOUT_EFFECT_HERE = {  # set by `ask`; of speed; of what else is returned; of encoder-decoders, assistants and files
    *("max_length", "max_new_tokens", "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "continuous_batching_config",
        "use_mtp",
    ),
    *("encoder_no_repeat_ngram_size", "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "speculation_type"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "transformers_version"),
}


def test_nothing_that_generate_knows_was_forgotten():
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names - set(GREEDY) == (LEFT_TO_THE_CHECKPOINT | WITHOUT_EFFECT_HERE) & names


def test_options_of_generation_count(evaluate):
    greedy = answers(evaluate()[0])
    for number, flags in enumerate((["--num-beams", "3"], ["--repetition-penalty", "9"], ["--temperature", "2"])):
        records, summary = evaluate(*flags, out=f"{number}.jsonl")
        assert answers(records) != greedy
        assert str(summary["options"][flags[0][2:].replace("-", "_")]).startswith(flags[1])
    assert answers(evaluate("--temperature", "0", out="zero.jsonl")[0]) == greedy


def test_what_is_sampled_depends_on_the_seed(evaluate):
    sampled = [answers(evaluate("--temperature", "2", "--seed", seed, out=f"{n}")[0]) for n, seed in enumerate("001")]
    assert sampled[0] == sampled[1] != sampled[2]


# -- what is written ------------------------------------------------------------------------------------------------------


def test_answers_are_scored_and_come_in_the_datas_order(folder, evaluate, tmp_path, capsys):
    first = {answer.id: answer.answer for answer in evaluate()[0] if answer.turn == 0}
    samples = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for number, sample in enumerate(samples):
        sample["id"] = f"c{number}"
        sample["messages"] = sample["messages"][: 2 if number < 6 else 1]  # the last ones are questions without answers
        if number < 3:
            sample["messages"][1]["content"] = first[str(number)]
        if number < 4:
            sample["messages"][1]["references"] = [sample["messages"][1]["content"], "x", "y", "z"]
    (folder / "named.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    capsys.readouterr()
    records, summary = evaluate(data="named.jsonl", out="named/answers.jsonl")
    assert [record.id for record in records] == [f"c{number}" for number in range(9)]
    assert [record.scores.get("exact_match") for record in records] == [1, 1, 1, 0, 0, 0, None, None, None]
    assert [record.scores.get("vqa_accuracy") for record in records[:5]] == [pytest.approx(0.25)] * 3 + [0, None]
    assert summary["scores"]["exact_match"] == 0.5 and summary["scores"]["vqa_accuracy"] == pytest.approx(3 * 0.25 / 4)
    assert summary["counts"] | {"answered": 9, "turns": 9, "conversations": 9} == summary["counts"]
    assert summary["model"] == str(folder / "model") and summary["data"] == str(folder / "named.jsonl")
    assert summary["options"] == {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 6,
        "given_answers": False,
        "dtype": "float32",
        "quantization": None,
        "attn_implementation": "sdpa",
    }
    assert records[0].images == [str(folder / "images/0_0.png")] and records[1].images == []
    out = capsys.readouterr().out
    assert "9 of 9 questions in 9 conversations" in out and "exact_match   0.500  (6 questions)" in out and "tokens/s" in out
    table = datasets.load_dataset("json", data_files=str(tmp_path / "named/answers.jsonl"), split="train")
    assert table["answer"] == [record.answer for record in records]


def test_a_table_and_a_page_are_written_as_well(folder, evaluate, tmp_path):
    records, _ = evaluate("--csv", str(tmp_path / "table.csv"), "--html", str(tmp_path / "page.html"))
    table = (tmp_path / "table.csv").read_text(encoding="utf-8-sig").splitlines()
    assert table[0].startswith("id,turn,model") and len(table) > len(records)
    page = (tmp_path / "page.html").read_text()
    assert "<title>model: answers to data.jsonl</title>" in page
    shown = re.findall(r'<h2 dir="auto">(.*?)</h2>', page)
    assert shown == list(dict.fromkeys(record.id for record in records))
    assert "data.jsonl" in page and page.count("data:image/jpeg") == sum(len(record.images) for record in records)


def test_images_without_a_file_get_one(folder, evaluate, tmp_path):
    image = Image.radial_gradient("L").convert("RGB").resize((9, 7))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": [datasets.Image()],
        }
    )
    table = datasets.Dataset.from_dict({"messages": [messages] * 2, "images": [[image]] * 2}, features=features)
    table.to_parquet(folder / "embedded.parquet")
    records, _ = evaluate(data="embedded.parquet")
    (path,) = records[0].images
    assert records[1].images == [path] and Path(path).parent == tmp_path / "answers.images"
    assert Image.open(path).tobytes() == image.tobytes()


# -- images -------------------------------------------------------------------------------------------------------------


def test_a_broken_image_costs_its_own_conversation_alone(folder, evaluate, capsys):
    samples = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "broken.png").write_bytes((folder / "images/0_0.png").read_bytes()[:200])
    (folder / "text.png").write_text("no image")
    user = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
    wrong = {}
    for number, name in ((1, "broken.png"), (3, "text.png"), (4, "nowhere.png")):
        last = {"role": "user", "content": [{"type": "image", "path": name}, *user["content"]]}
        samples[number]["messages"].append(last)
        wrong[str(number)] = name
    (folder / "some_broken.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    whole = answers(evaluate()[0])
    capsys.readouterr()
    for number, flags in enumerate(([], ["--given-answers"], ["--batch-size", "2"])):
        with pytest.raises(ValueError, match=r"some_broken\.jsonl, line [245]: The image .* Or skip such conversations"):
            evaluate(*flags, data="some_broken.jsonl", out=f"{number}.jsonl")
        flags = [*flags, "--on-bad-sample", "skip"]
        records, summary = evaluate(*flags, data="some_broken.jsonl", out=f"{number}.jsonl")
        assert {record.id for record in records} == {str(n) for n in range(9)} - set(wrong)
        assert summary["counts"]["conversations_skipped"] == 3
        assert all(wrong[name] in reason for name, reason in summary["skipped"].items()) and set(summary["skipped"]) == set(
            wrong
        )
        out, err = capsys.readouterr()
        assert "3 of 9 conversations skipped for images that" in out
        if "--given-answers" not in flags:
            assert answers(records) == {place: answer for place, answer in whole.items() if place[0] not in wrong}


def test_addresses_are_fetched_if_that_is_asked_for(folder, evaluate, monkeypatch):
    address = "https://example.org/cup.png"
    fetched = []

    def fetch(url: str, max_bytes: int) -> bytes:
        fetched.append(url)
        return (folder / "images/0_0.png").read_bytes()

    monkeypatch.setattr(image_loading, "fetch_url", fetch)
    (folder / "address.json").write_text(json.dumps({"cup": [["What?", address], ["And?"]]}))
    with pytest.raises(
        ValueError, match=f"conversation 'cup' has an image or a video with the URL {address}; pass --allow-urls"
    ):
        evaluate(data="address.json")
    assert not fetched
    records, _ = evaluate("--allow-urls", data="address.json")
    assert fetched == [address] and [record.images for record in records] == [[address], []]


def test_turns_without_room_in_the_context_are_not_asked(folder, evaluate, capsys):
    long = "red cup " * 200
    (folder / "long.json").write_text(json.dumps({"long": [["What?"], [long], ["And?"]], "short": [["What?"], ["And?"]]}))
    records, summary = evaluate(data="long.json")
    assert [(record.id, record.turn) for record in records] == [("long", 0), ("short", 0), ("short", 1)]
    assert summary["counts"]["turns_too_long"] == 2 and summary["counts"]["turns"] == 5
    assert "2 of 5 questions skipped: they exceed the context length" in capsys.readouterr().out


def test_nothing_answered_is_a_failure(folder, evaluate, monkeypatch):
    (folder / "nowhere.json").write_text(json.dumps({"cup": [["What?", "./eval/cup.png"]]}))
    monkeypatch.chdir(folder)
    with pytest.raises(
        ValueError, match="Skipped: .*nowhere.json, 'cup': The image .*/eval/cup.png does not exist"
    ) as failure:
        evaluate("--on-bad-sample", "skip", data="nowhere.json")
    assert "no question of" in str(failure.value) and "Traceback" not in str(failure.value)


def test_given_answers_must_be_there(folder, evaluate):
    (folder / "two.json").write_text(json.dumps({"cup": [["What?"], ["And?"]]}))
    with pytest.raises(ValueError, match="turn 0 of conversation 'cup' has no answer"):
        evaluate("--given-answers", data="two.json")


# -- going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--given-answers"], ["--temperature", "2"]], ids=["own", "given", "sampled"])
def test_an_interrupted_run_goes_on_where_it_was(evaluate, calls, tmp_path, flags, capsys):
    flags = ["--batch-size", "2", *flags]
    evaluate(*flags, out="whole.jsonl")
    total = list(calls)
    for limit in (0, 3, len(total) - 1):
        calls.clear()
        calls.limit = limit
        with pytest.raises(MemoryError):
            evaluate(*flags, out=f"{limit}.jsonl")
        calls.limit = -1
        evaluate(*flags, out=f"{limit}.jsonl")
        assert calls == total
        for suffix in (".jsonl", ".summary.json"):
            assert (tmp_path / f"{limit}{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    calls.clear()
    evaluate(*flags, out="whole.jsonl")
    assert calls == []


def test_half_a_line_at_the_end_is_asked_again(evaluate, calls, tmp_path, caplog):
    evaluate()
    whole = (tmp_path / "answers.jsonl").read_bytes()
    assert sum(calls) == len(whole.splitlines())
    for cut in (1, 30):
        calls.clear()
        (tmp_path / "answers.jsonl").write_bytes(whole[:-cut])
        evaluate()
        assert calls == [1] and (tmp_path / "answers.jsonl").read_bytes() == whole
        assert "ends in an incomplete line" in caplog.text


KILLED = """
import os, signal, sys
from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main

generate, calls = DSVLForConditionalGeneration.generate, []

def counted(self, *args, **kwargs):
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return generate(self, *args, **kwargs)

DSVLForConditionalGeneration.generate = counted
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(folder, evaluate, calls, tmp_path):
    evaluate("--batch-size", "2", out="whole.jsonl")
    total = list(calls)
    out = str(tmp_path / "killed.jsonl")
    flags = [str(folder / "model"), str(folder / "data.jsonl"), "--out", out, "--device", "cpu", *NEW, "--batch-size", "2"]
    ended = subprocess.run([sys.executable, "-c", KILLED, "evaluate", *flags], env=environment(), capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    calls.clear()
    evaluate("--batch-size", "2", out="killed.jsonl")
    assert calls == total[3:]
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_to_something_else_are_not_gone_on_from(folder, evaluate, tmp_path):
    evaluate()
    before = (tmp_path / "answers.jsonl").read_bytes()
    data = (folder / "data.jsonl").read_text()
    (folder / "other.jsonl").write_text(data.replace("red", "pink"))
    model, processor = load_checkpoint(str(folder / "model"), device="cpu")
    with torch.no_grad():
        model.lm_head.weight[7, 7] += 1
    model.save_pretrained(folder / "other")
    processor.save_pretrained(folder / "other")
    for options, message in [
        (dict(data="other.jsonl"), r"of another data \(.*data.jsonl, not .*other.jsonl\); pass another --out, or delete it"),
        (dict(model="other"), r"of another model \(.*model, not .*other\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(**options)
    for flags, message in [
        (["--max-new-tokens", "7"], r"another max_new_tokens \(6, not 7\)"),
        (["--given-answers", "--num-beams", "2"], r"given_answers \(False, not True\), num_beams \(1, not 2\)"),
        (["--dtype", "bfloat16"], r"another dtype \('float32', not 'bfloat16'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(*flags)
    (tmp_path / "answers.summary.json").unlink()
    with pytest.raises(ValueError, match="does not say of which run"):
        evaluate()
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_who_stops_a_run_is_told_how_to_go_on(evaluate, calls):
    calls.limit, calls.error = 2, KeyboardInterrupt
    with pytest.raises(ValueError, match="answers.jsonl holds 6 answers; run the same command to resume"):
        evaluate("--batch-size", "3")
    calls.error = torch.OutOfMemoryError
    with pytest.raises(ValueError, match="out of memory .not today.; .* a --batch-size below 3 to resume from 6 answers"):
        evaluate("--batch-size", "3")


def test_another_batch_size_may_go_on(evaluate, calls):
    calls.limit = 1
    with pytest.raises(MemoryError):
        evaluate("--batch-size", "9")
    calls.limit = -1
    records, _ = evaluate("--batch-size", "2")
    assert sum(calls) == len(records)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; pass 1 or more"),
        (["--num-beams", "0"], "--num-beams is 0"),
        (["--max-new-tokens", "512"], "the context length is 512"),
    ],
)
def test_wrong_options_are_named(evaluate, flags, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--csv q.jsonl", "--csv q.jsonl is a file that this command reads, and would be overwritten; pass another path."),
        ("--html ./q.jsonl", "--html ./q.jsonl is a file that this command reads"),
        ("--out q.jsonl", "--out q.jsonl is a file that this command reads"),
        ("--out x --html x", "--out and --html are the same file, x; pass different paths."),
        ("--out x.jsonl --csv x.summary.json", "the summary of --out and --csv are the same file"),
    ],
)
def test_an_output_is_neither_an_input_nor_another_output(folder, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsvl.utils.model_loading.load_checkpoint", lambda *args: pytest.fail("a model was loaded"))
    data = (folder / "data.jsonl").read_text()
    Path("q.jsonl").write_text(data)
    assert main(["evaluate", str(folder / "model"), "q.jsonl", *flags.split()]) == 1
    assert message in capsys.readouterr().err
    assert Path("q.jsonl").read_text() == data and [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_the_default_output_is_not_the_data(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("answers.jsonl").write_text("kept")
    assert main(["evaluate", str(folder / "model"), "answers.jsonl"]) == 1
    assert "--out answers.jsonl is a file that this command reads" in capsys.readouterr().err
