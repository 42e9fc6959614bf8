"""`dsvl evaluate --text`: the perplexity against a plain loop, equality to the bit, drift, and what is refused."""

import json
import math
import re

import pytest
import torch
import transformers
from conftest import REFERENCE, save_tiny_llama, tiny_model
from huggingface_hub import ModelCard
from training_runs import make_checkpoint, make_conversations
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsvl
from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.evaluation.text_perplexity import encode_document, language_vocabulary, read_documents, score_text, windows
from dsvl.hub_card import with_section
from dsvl.processing_dsvl import extend_tokenizer
from dsvl.publishing.directory_checks import read_contents

TEXT = "The red circle is beside a cup, and two dogs see it. <image> </s> Is one of three squares green?\n" * 4
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=128,
    pad_token_id=None,
)
# Families that treat the head's output in their own way, tied and untied heads, tables with and without padding.
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, vocab_size=400),
    "llama, tied": lambda: transformers.LlamaConfig(**SIZES, vocab_size=400, tie_word_embeddings=True),
    "llama, padded": lambda: transformers.LlamaConfig(**SIZES, vocab_size=448),
    "llama, padded and tied": lambda: transformers.LlamaConfig(**SIZES, vocab_size=416, tie_word_embeddings=True),
    "gemma2 (soft caps)": lambda: transformers.Gemma2Config(
        **SIZES, vocab_size=400, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0, sliding_window=16
    ),
    "granite (scaled)": lambda: transformers.GraniteConfig(**SIZES, vocab_size=400, logits_scaling=4.0),
    "cohere (scaled)": lambda: transformers.CohereConfig(**SIZES, vocab_size=400, logit_scale=0.25),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, vocab_size=400, head_dim=8),
}


def save_language(folder, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE / "tokenizer").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tower, a LLaMA, a composed checkpoint, conversations, and a text."""
    folder = tmp_path_factory.mktemp("text")
    make_checkpoint(folder, initializer_range=0.3, max_position_embeddings=256)
    make_conversations(folder, layout="ptppt")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command; gives the result and what was printed."""

    def run(checkpoint, text, *flags):
        argv = ["evaluate", checkpoint, "--text", text, "--out", tmp_path / "text.json", "--device", "cpu", *flags]
        status = main(list(map(str, argv)))
        printed = capsys.readouterr()
        if status:
            raise ValueError(printed.err)
        return json.loads((tmp_path / "text.json").read_text()), printed.out

    return run


def plain_nats(model, tokenizer, documents, size, stride):
    """The definition, token by token: each in the first window that holds it, by the model's own logits."""
    own = sorted(set(tokenizer.get_vocab().values()))
    nats, tokens = 0.0, 0
    for ids in documents:
        for index in range(1, len(ids)):
            start = 0
            while start + size <= index:
                start += stride
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:index]])).logits[0, -1]
            nats -= logits[own].double().log_softmax(-1)[own.index(ids[index])].item()
            tokens += 1
    return nats, tokens


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_a_plain_loop_and_composing_changes_no_bit(folder, tmp_path, family, evaluate):
    save_language(tmp_path / "language", FAMILIES[family]())
    model, processor = dsvl.compose(folder / "tower", tmp_path / "language")
    assert model.config.text_config.vocab_size % 64 == 0
    dsvl.save_checkpoint(model, processor, tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXT.split(". ")))
    flags = ["--language", tmp_path / "language", "--window", 12, "--stride", 5]
    result, _ = evaluate(tmp_path / "model", tmp_path / "text.jsonl", *flags)

    original = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "language")
    documents = [
        [tokenizer.bos_token_id, *tokenizer(one, add_special_tokens=False, split_special_tokens=True).input_ids]
        for one in TEXT.split(". ")
    ]
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    nats, tokens = plain_nats(original, tokenizer, documents, 12, 5)
    assert result["tokens"] == tokens and result["documents"] == len(documents) == 5
    assert result["vocabulary"] == 400
    assert result["models"]["language"]["nats"] == pytest.approx(nats, rel=1e-5)
    assert result["models"]["language"]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    for name in ("composed", "model"):
        assert result["models"][name]["equal_to_the_bit"] and result["models"][name]["drift_nats_per_token"] == 0


@pytest.mark.parametrize(("length", "size", "stride"), [(1, 4, 2), (2, 4, 2), (7, 4, 1), (20, 8, 3), (16, 8, 7), (9, 2, 1)])
def test_windows_predict_every_token_once_with_as_much_context_as_promised(length, size, stride):
    predicted = []
    for start, first, end in windows(length, size, stride):
        assert 0 <= start < first < end <= min(start + size, length)
        assert start == 0 or first - start >= size - stride
        predicted += range(first, end)
    assert predicted == list(range(1, length))


def test_logits_are_computed_in_parts(monkeypatch):
    model = tiny_model(dtype=torch.float32)
    vocabulary = torch.ones(90, dtype=torch.bool)
    documents = [list(range(3, 60)), [5, 6, 7]]
    whole = score_text(model, documents, vocabulary, 32, 16)
    monkeypatch.setattr("dsvl.evaluation.text_perplexity.LOGITS_AT_ONCE", 3 * 90)
    shapes = []
    linear = torch.nn.functional.linear

    def recorded(rows, weight, *rest):
        if len(weight) == 90:
            shapes.append(len(rows))
        return linear(rows, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    parts = score_text(model, documents, vocabulary, 32, 16)
    assert max(shapes) == 3 and sum(shapes) == parts.tokens == whole.tokens == 58
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)


def test_a_changed_token_changes_the_digest_even_at_the_same_sum():
    """Equality is of every token's log probability, not of their sum."""
    model = tiny_model(dtype=torch.float32)
    vocabulary = torch.ones(90, dtype=torch.bool)
    one, two = ([[5, 6, 7], [8, 9]], [[8, 9], [5, 6, 7]])
    one, two = (score_text(model, documents, vocabulary, 8, 4) for documents in (one, two))
    assert one.nats == pytest.approx(two.nats, rel=1e-12) and one.digest != two.digest


def test_added_rows_are_not_in_the_vocabulary(tokenizer):
    before = language_vocabulary(tokenizer, 448)
    extend_tokenizer(tokenizer)
    assert len(tokenizer) > 400
    after = language_vocabulary(tokenizer, 448)
    assert after.equal(before) and int(after.sum()) == 400


def test_special_tokens_in_the_text_are_text(tokenizer):
    extend_tokenizer(tokenizer)
    ids = encode_document(tokenizer, "a <image> b </s>")
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id} & set(ids)


def test_logits_that_are_not_understood_are_refused():
    class Shifted(DSVLForConditionalGeneration):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model = tiny_model(dtype=torch.float32)
    model.__class__ = Shifted
    with pytest.raises(ValueError, match="logits of Shifted differ by .* please report this model"):
        score_text(model, [[5, 6, 7]], torch.ones(90, dtype=torch.bool), 8, 4)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model(dtype=torch.float32)
    model.get_input_embeddings().weight.data[6] = math.nan
    with pytest.raises(ValueError, match="log probabilities of mine are not finite in torch.float32; check its weights"):
        score_text(model, [[5, 6, 7]], torch.ones(90, dtype=torch.bool), 8, 4, "mine")


# -- trained models ----------------------------------------------------------------------------------------------------


def train(folder, output, *flags):
    argv = ["train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, "--max-steps", 2]
    argv += ["--per-device-train-batch-size", 2, "--learning-rate", "1e-2", "--report-to", "none", *flags]
    assert main(list(map(str, argv))) == 0


def test_a_trained_projector_changes_no_bit_and_trained_embeddings_drift(folder, tmp_path, monkeypatch, evaluate):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train(folder, tmp_path / "projector", "--train", "projector")
    train(folder, tmp_path / "embeddings")
    before, after = (
        DSVLForConditionalGeneration.from_pretrained(one).model.multi_modal_projector.state_dict()
        for one in (folder / "model", tmp_path / "projector")
    )
    assert any(not before[name].equal(after[name]) for name in before)  # it did learn
    flags = ["--language", folder / "llama", "--window", 64]
    result, printed = evaluate(tmp_path / "projector", folder / "text.txt", *flags)
    assert result["models"]["model"]["equal_to_the_bit"] and re.search(r"projector .* equal to the bit", printed)

    result, printed = evaluate(tmp_path / "embeddings", folder / "text.txt", *flags)
    drift = result["models"]["model"]["drift_nats_per_token"]
    assert not result["models"]["model"]["equal_to_the_bit"] and abs(drift) > 1e-3
    assert result["models"]["composed"]["equal_to_the_bit"]
    own = DSVLForConditionalGeneration.from_pretrained(tmp_path / "embeddings").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    nats, tokens = plain_nats(own, tokenizer, [encode_document(tokenizer, TEXT)], 64, 32)
    assert result["models"]["model"]["nats"] == pytest.approx(nats, rel=1e-5)
    language = result["models"]["language"]["nats_per_token"]
    assert drift == pytest.approx(nats / tokens - language, abs=1e-4)

    card = ModelCard.load(tmp_path / "embeddings" / "README.md").text
    assert f"| this model | {result['models']['model']['perplexity']:.4f} | {drift:+.3g} nats per token |" in card
    assert "| composed, before training |" in card and str(tmp_path) not in card and str(folder) not in card
    assert card.index("## Text ability") < card.index("## Licence") and "## Training" in card
    assert read_contents(tmp_path / "embeddings").faults == []
    evaluate(tmp_path / "embeddings", folder / "text.txt", *flags)  # the section is replaced
    assert ModelCard.load(tmp_path / "embeddings" / "README.md").text == card


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_models_are_compared_in_one_dtype(folder, dtype, evaluate):
    result, _ = evaluate(folder / "model", folder / "text.txt", "--language", folder / "llama", "--dtype", dtype)
    assert result["dtype"] == dtype and result["models"]["composed"]["equal_to_the_bit"]


@pytest.mark.parametrize(("attention", "equal"), [("causal", True), ("mmca_reference", False)])
def test_the_composed_model_attends_as_the_checkpoint_does(folder, tmp_path, attention, equal, evaluate):
    """The released code's attention is not the decoder's own on a text without images, and the result says so."""
    model, processor = dsvl.compose(folder / "tower", folder / "llama", multimodal_attention=attention)
    dsvl.save_checkpoint(model, processor, tmp_path / "model")
    result, _ = evaluate(tmp_path / "model", folder / "text.txt", "--language", folder / "llama", "--window", 64)
    composed, own = (result["models"][name] for name in ("composed", "model"))
    assert composed == own and composed["equal_to_the_bit"] == equal == (composed["drift_nats_per_token"] == 0)


def test_without_the_language_model_the_vocabulary_is_the_same_and_the_card_unchanged(folder, evaluate):
    card = (folder / "model" / "README.md").read_text()
    alone, printed = evaluate(folder / "model", folder / "text.txt")
    assert set(alone["models"]) == {"model"} and "pass --language NAME to compare" in printed
    assert (folder / "model" / "README.md").read_text() == card
    compared, _ = evaluate(folder / "model", folder / "text.txt", "--language", folder / "llama")
    assert compared["models"]["model"]["nats"] == alone["models"]["model"]["nats"]
    assert "## Text ability" in (folder / "model" / "README.md").read_text()


def test_a_section_replaces_its_former_text_alone():
    card = "# Model\n\n## Use\n\na\n\n## Licence\n\nb\n"
    once = with_section(card, "Text", "one")
    assert once == "# Model\n\n## Use\n\na\n\n## Text\n\none\n\n## Licence\n\nb\n"
    assert with_section(once, "Text", "two \\1") == once.replace("one", "two \\1")
    assert with_section("# Other\n", "Text", "one") == "# Other\n\n## Text\n\none\n"
    assert with_section(with_section("# Other\n", "Text", "one"), "Text", "two") == "# Other\n\n## Text\n\ntwo\n"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text; pass a file with at least one document."),
        ("a.jsonl", b"\n\n", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl holds no text"),
        ("a.txt", b"\xff\xfe", "a.txt is not text in UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text":\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', 'a.jsonl, line 3 has no string "text"'),
        ("a.jsonl", b'["a"]\n', 'a.jsonl, line 1 has no string "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'a.jsonl, line 1 has no string "text"'),
        ("A.JSONL", b'{"text": 3}\n', 'A.JSONL, line 1 has no string "text"'),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800"}',
            r"a.jsonl, line 2 holds half of a surrogate pair ('\ud800'); exp",
        ),
        ("a.json", b'[{"text": "a"}, {"text": "\\ud800"}]', "a.json, record 2 holds half of a surrogate pair"),
        ("a.json", b'[{"text": "a"}, {}]', 'a.json, record 2 has no string "text"'),
        ("a.json", b'{"text": "a"}', "a.json is not a JSON array; expected"),
        ("a.json", b"Plain.", "a.json is not JSON"),
        ("a.json", b"[]", "a.json holds no text"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_documents(tmp_path / name)


def test_a_plain_file_is_one_document_and_json_lines_are_one_each(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ntwo ü\n".encode())
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo ü\n"]
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo\u2028", "id": 3}\n\n{"text": "three"}\n', encoding="utf-8")
    assert read_documents(tmp_path / "a.jsonl") == ["one\ntwo\u2028", "three"]
    (tmp_path / "a.json").write_text('[{"text": "one"},\n{"text": "two"}]', encoding="utf-8")
    assert read_documents(tmp_path / "a.json") == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_documents(tmp_path)


def test_documents_without_a_prediction_are_counted(folder, tmp_path, evaluate):
    (tmp_path / "t.jsonl").write_text('{"text": ""}\n{"text": "The red circle."}\n{"text": ""}\n')
    result, printed = evaluate(folder / "model", tmp_path / "t.jsonl")
    assert result["documents_without_prediction"] == 2
    assert "2 of 3 documents skipped: less than two tokens, nothing to predict" in printed


def test_a_relative_directory_has_the_name_of_the_directory(folder, monkeypatch, evaluate):
    monkeypatch.chdir(folder / "model")
    _, printed = evaluate(".", folder / "text.txt")
    assert re.search(r"^model +\d", printed, re.M)


# -- what does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--window 1", "--window is 1; pass 2 to 256, the context length."),
        ("--window 257", "--window is 257; pass 2 to 256, the context length."),
        ("--window 8 --stride 8", "--stride is 8; pass 1 to 7, less than the window, as every token is predicted."),
        ("--stride 0", "--stride is 0; pass 1 to 255"),
        ("--batch-size 4 --html page.html", "--html, --batch-size without DATA has no effect; omit it."),
        ("--temperature 0.5", "--temperature without DATA has no effect"),
        ("--language {folder}/llama --quantization int8", "--quantization int8 with --language: models are compared"),
        ("--language {folder}/model", "model is a DSVL checkpoint; pass the language model that it was composed from."),
        (
            "--language {folder}/wide",
            "wide is not the language model of {folder}/model: it has hidden_size 32, not 64; pass",
        ),
        ("--language {folder}/other-tokens", "The token 'red' has the id "),
    ],
)
def test_contradictions_are_refused_before_they_cost_time(folder, flags, message, evaluate, monkeypatch):
    if "wide" in flags:
        save_tiny_llama(folder / "wide", hidden_size=32)
    if "other-tokens" in flags:
        save_tiny_llama(folder / "other-tokens", vocab_size=401)
        other = AutoTokenizer.from_pretrained(folder / "llama")
        other.add_tokens(["red"])
        other.save_pretrained(folder / "other-tokens")
    monkeypatch.setattr("dsvl.evaluation.text_command.score_text", lambda *args: pytest.fail("a model was scored"))
    with pytest.raises(ValueError, match=re.escape(message.format(folder=folder))):
        evaluate(folder / "model", folder / "text.txt", *flags.format(folder=folder).split())


def test_data_and_text_are_one_or_the_other(folder, capsys):
    model, data, text = (str(folder / name) for name in ("model", "data.jsonl", "text.txt"))
    assert main(["evaluate", model]) == 1 and "Pass either DATA" in capsys.readouterr().err
    assert main(["evaluate", model, data, "--text", text]) == 1 and "Pass either DATA" in capsys.readouterr().err
    assert main(["evaluate", model, data, "--stride", "4"]) == 1
    assert "--stride without --text has no effect; omit it." in capsys.readouterr().err


@pytest.mark.parametrize(("text", "flags"), [("text.txt", ["--out", "text.txt"]), ("text.json", [])])
def test_the_text_is_not_overwritten(folder, tmp_path, monkeypatch, capsys, text, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsvl.evaluation.text_command.load_checkpoint", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / text).write_text("kept")
    assert main(["evaluate", str(folder / "model"), "--text", text, *flags]) == 1
    assert f"--out {text} is a file that this command reads, and would be overwritten" in capsys.readouterr().err
    assert (tmp_path / text).read_text() == "kept"
