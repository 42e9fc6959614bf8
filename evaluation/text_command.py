"""`dsvl evaluate DIR --text FILE`: the perplexity of a text, beside that of the original language model."""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..composition.compose import compose
from ..hub_card import with_section
from ..hub_card.base_models import is_repo_id
from ..utils.atomic_files import write_atomically
from ..utils.local_paths import check_outputs
from ..utils.model_loading import load_checkpoint
from .text_perplexity import (
    MAX_WINDOW,
    TextScore,
    encode_document,
    language_vocabulary,
    read_documents,
    score_text,
)

SECTION = "Text ability"  # of the model card
COMPARED = ("model_type", "hidden_size", "num_hidden_layers")  # what a checkpoint shares with its language model
EQUAL = "equal to the bit"


def evaluate_text(arguments: argparse.Namespace) -> None:
    """Run `dsvl evaluate --text`: score the text, print and write the result, and add it to the model card."""
    if arguments.language and (arguments.quantization or arguments.device == "auto"):
        flag = f"--quantization {arguments.quantization}" if arguments.quantization else "--device auto"
        raise ValueError(f"{flag} with --language: models are compared with the same weights on one device; omit {flag}.")
    out = Path(arguments.out or "text.json")
    check_outputs({"--out": out}, [arguments.text, arguments.model, arguments.language])
    texts = read_documents(arguments.text)
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    text_config = model.config.text_config
    size, stride = _window(arguments, text_config.max_position_embeddings)
    tokenizer = processor.tokenizer
    rows, source = text_config.vocab_size, tokenizer
    if arguments.language:
        rows = _check_language(arguments.language, arguments.model, text_config)
        source = AutoTokenizer.from_pretrained(arguments.language)
        _check_tokens(source, tokenizer, arguments)
    vocabulary = language_vocabulary(source, rows)
    documents = [encode_document(tokenizer, text) for text in texts]
    if arguments.language:
        _check_documents(documents, [encode_document(source, text) for text in texts], arguments)
    name = Path(arguments.model).resolve().name

    def score(one: Any, label: str) -> TextScore:
        return score_text(one, documents, vocabulary, size, stride, label)

    scores = {"model": score(model, name)}
    dtype, attention = model.dtype, text_config._attn_implementation
    if arguments.language:
        device, config, tower = model.device, model.config, model.model.vision_tower
        del model  # one model is in memory at a time
        _free()
        language = AutoModelForCausalLM.from_pretrained(arguments.language, dtype=dtype, attn_implementation=attention)
        language = language.to(device).eval()
        scores["language"] = score(language, "language model")
        composed, _ = compose(
            tower,
            language,
            tokenizer=source,
            image_processor=processor.image_processor,
            multimodal_attention=config.multimodal_attention,
            image_positions=config.image_positions,
            numbered_images=config.numbered_images,
        )
        scores["composed"] = score(composed, "composed")
    result = {
        "text": Path(arguments.text).name,
        "documents": len(documents),
        "documents_without_prediction": sum(len(ids) < 2 for ids in documents),
        "tokens": scores["model"].tokens,
        "vocabulary": int(vocabulary.sum()),
        "window": size,
        "stride": stride,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": arguments.quantization,
        "names": {"model": arguments.model} | ({"language": arguments.language} if arguments.language else {}),
        "models": {key: _facts(scores, key) for key in ("language", "composed", "model") if key in scores},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print("\n".join(report_lines(result)))
    print(out)
    if arguments.language:
        print(_add_to_card(arguments.model, result))


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    lines = [f"{result['text']}: {_conditions(result)}"]
    if few := result["documents_without_prediction"]:
        lines.append(f"  {few:,} of {result['documents']:,} documents skipped: less than two tokens, nothing to predict")
    rows = [["", "nats/token", "perplexity", ""]]
    for key, facts in result["models"].items():
        rows.append([_label(key, result), f"{facts['nats_per_token']:.6f}", _perplexity(facts), _drift(facts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        f"{name:<{widths[0]}}  {nats:>{widths[1]}}  {perplexity:>{widths[2]}}  {drift}".rstrip()
        for name, nats, perplexity, drift in rows
    ]
    if "language" not in result["models"]:
        lines.append("pass --language NAME to compare with the original language model")
    return lines


def card_section(result: dict[str, Any]) -> str:
    """The result as Markdown for the model card, without local paths."""
    lines = [
        f"Perplexity of `{result['text'].replace('`', '')}` without images: {_conditions(result)}.",
        "",
        "| model | perplexity | against the language model |",
        "|---|---|---|",
    ]
    language = result["names"].get("language", "")
    shown = f"`{language}`" if is_repo_id(language) and not Path(language).exists() else "the original language model"
    names = {"language": shown, "composed": "composed, before training", "model": "this model"}
    lines += [f"| {names[key]} | {_perplexity(facts)} | {_drift(facts)} |" for key, facts in result["models"].items()]
    return "\n".join(lines)


def _conditions(result: dict[str, Any]) -> str:
    documents = f"{result['documents']:,} document{'s' if result['documents'] != 1 else ''}"
    return (
        f"{result['tokens']:,} tokens in {documents}, windows of {result['window']:,} tokens with a stride of "
        f"{result['stride']:,}, {result['quantization'] or result['dtype']}, over the language model's "
        f"{result['vocabulary']:,} tokens"
    )


def _facts(scores: dict[str, TextScore], key: str) -> dict[str, Any]:
    one, original = scores[key], scores.get("language")
    facts: dict[str, Any] = {"nats": one.nats, "nats_per_token": one.mean, "perplexity": one.perplexity}
    if original is not None and key != "language":
        facts |= {"equal_to_the_bit": one.digest == original.digest, "drift_nats_per_token": one.mean - original.mean}
    return facts


def _drift(facts: dict[str, Any]) -> str:
    if "equal_to_the_bit" not in facts:
        return ""
    return EQUAL if facts["equal_to_the_bit"] else f"{facts['drift_nats_per_token']:+.3g} nats per token"


def _perplexity(facts: dict[str, Any]) -> str:
    return "too large for a float" if facts["perplexity"] is None else f"{facts['perplexity']:.4f}"


def _label(key: str, result: dict[str, Any]) -> str:
    if key == "composed":
        return "composed"
    return Path(result["names"][key]).resolve().name + (" (original)" if key == "language" else "")


def _window(arguments: argparse.Namespace, context: int) -> tuple[int, int]:
    """Checked size and stride."""
    size = min(MAX_WINDOW, context) if arguments.window is None else arguments.window
    if not 2 <= size <= context:
        raise ValueError(f"--window is {size}; pass 2 to {context:,}, the context length.")
    stride = max(size // 2, 1) if arguments.stride is None else arguments.stride
    if not 1 <= stride < size:
        raise ValueError(f"--stride is {stride}; pass 1 to {size - 1:,}, less than the window, as every token is predicted.")
    return size, stride


def _check_language(name: str, checkpoint: str, text_config: Any) -> int:
    """Check that a language model can be the original of a decoder; returns the rows of its head."""
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "dsvl":
        raise ValueError(f"--language {name} is a DSVL checkpoint; pass the language model that it was composed from.")
    config = config.get_text_config()
    other = [
        f"{field} {getattr(config, field, None)!r}, not {getattr(text_config, field)!r}"
        for field in COMPARED
        if getattr(config, field, None) != getattr(text_config, field)
    ]
    if other:
        raise ValueError(
            f"--language {name} is not the language model of {checkpoint}: it has {'; '.join(other)}; pass the one that the "
            "checkpoint was composed from."
        )
    return config.vocab_size


def _check_tokens(own: Any, extended: Any, arguments: argparse.Namespace) -> None:
    """Check that every token of the language model has the same id in the checkpoint."""
    theirs = extended.get_vocab()
    for token, index in own.get_vocab().items():
        if theirs.get(token) != index:
            raise ValueError(
                f"The token {token!r} has the id {index} in --language {arguments.language}, but {theirs.get(token)} in "
                f"{arguments.model}; pass the language model that the checkpoint was composed from."
            )


def _check_documents(documents: list[list[int]], originals: list[list[int]], arguments: argparse.Namespace) -> None:
    for number, (ids, original) in enumerate(zip(documents, originals, strict=True), start=1):
        if ids != original:
            raise ValueError(
                f"{arguments.text}, document {number}: the tokenizers of {arguments.model} and --language "
                f"{arguments.language} give different ids; pass the language model that the checkpoint was composed from."
            )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _add_to_card(name: str, result: dict[str, Any]) -> str:
    """Write the result into the checkpoint's card; returns what was done."""
    card = Path(name) / "README.md"
    if not card.is_file():
        reason = "it has no README.md" if Path(name).is_dir() else "it is not a local directory"
        return f"the model card of {name} is unchanged: {reason}"
    write_atomically(card, with_section(card.read_text(encoding="utf-8"), SECTION, card_section(result)))
    return f"{card}: section {SECTION!r}"
