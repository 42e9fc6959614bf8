"""The perplexity of a text under a causal language model, or under a DSVL model without images."""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling_dsvl import LOGITS_AT_ONCE, scale_logits
from ..processing_dsvl import IMAGE_TOKEN, PAD_TOKEN
from ..utils.text import check_complete_characters

MAX_WINDOW = 2048  # tokens; the default for a longer context
ALIGNMENT = 64  # bytes; of memory that PyTorch allocates on a CPU
CHECKED_ROWS = 4  # tokens whose logits are compared with those of the model's own forward


@dataclass(frozen=True)
class TextScore:
    """The score of a text.

    Attributes:
        tokens: number of predicted tokens.
        nats: sum of their negative natural log probabilities.
        digest: hash of every token's log probability in float32; two models with the same digest are equal to the bit.
    """

    tokens: int
    nats: float
    digest: str

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        """The exponential of the nats per token; None beyond the range of a float."""
        return math.exp(self.mean) if self.mean < math.log(sys.float_info.max) else None


def read_documents(path: str | Path) -> list[str]:
    """Read the documents of a text file.

    Args:
        path: a `.jsonl` or `.ndjson` file with a document in each line, `{"text": "..."}`, or a `.json` file with an array
            of them; any other file is one document.

    Raises:
        FileNotFoundError: if it is not a file.
        ValueError: naming file and line, for a file that is empty, not UTF-8, or not of this form.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; pass a plain text file, or JSON lines.")
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); pass a plain text file, or JSON lines.") from error
    documents, suffix = [content], Path(path).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        lines = enumerate(content.split("\n"), start=1)
        records = ((line, f"{path}, line {number}") for number, line in lines if line.strip())
        documents = [_text_of(_parse(line, location), location) for line, location in records]
    elif suffix == ".json":
        array = _parse(content, str(path))
        if not isinstance(array, list):
            raise ValueError(f'{path} is not a JSON array; expected [{{"text": "..."}}, ...], or name a plain text .txt.')
        documents = [_text_of(value, f"{path}, record {number}") for number, value in enumerate(array, start=1)]
    if not any(documents):
        raise ValueError(f"{path} holds no text; pass a file with at least one document.")
    return documents


def _parse(content: str, location: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        expected = 'lines {"text": "..."} in .jsonl, or an array of them in .json'
        raise ValueError(f"{location} is not JSON ({error}); expected {expected}.") from error


def _text_of(value: Any, location: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f'{location} has no string "text"; expected {{"text": "..."}}.')
    check_complete_characters(value["text"], location)
    return value["text"]


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """The ids of a document: BOS if the tokenizer starts texts with it, and the text, in which special tokens are text."""
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids[:1] else []
    return bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def language_vocabulary(tokenizer: Any, rows: int) -> torch.Tensor:
    """Which rows of the head are tokens of the language model: (rows up to its last token,), bool.

    Rows without a token (padding of the table) are not, nor are the tokens that composing adds: `<image>`, and the padding
    token behind it.

    Args:
        tokenizer: the language model's own, or that of a DSVL checkpoint.
        rows: number of rows of the language model's head.
    """
    vocabulary = tokenizer.get_vocab()
    image = vocabulary.get(IMAGE_TOKEN)
    added = set() if image is None else {image}
    if image is not None and vocabulary.get(PAD_TOKEN) == image + 1:
        added.add(image + 1)
    own = sorted(index for index in set(vocabulary.values()) - added if index < rows)
    known = torch.zeros(own[-1] + 1, dtype=torch.bool)
    known[own] = True
    return known


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Overlapping windows over a document: (start, first predicted token, end) of each.

    Args:
        length: tokens of the document.
        size: tokens of a window, 2 or more.
        stride: tokens between the starts of two windows, from 1 to `size - 1`.
    """
    start, first = 0, 1
    while first < length:
        end = min(start + size, length)
        yield start, first, end
        start, first = start + stride, end


@torch.no_grad()
def score_text(
    model: Any, documents: Sequence[Sequence[int]], vocabulary: torch.Tensor, size: int, stride: int, label: str = ""
) -> TextScore:
    """The perplexity of documents by overlapping windows.

    A document is read in windows of `size` tokens, whose starts are `stride` tokens apart. Each token but the first of a
    document is predicted once, in the first window that holds it, from all tokens before it in this window: from at least
    `size - stride` tokens, beyond the first window. The probability is the softmax over `vocabulary` alone, in float32.
    Documents do not see each other. This is the definition of transformers' guide "Perplexity of fixed-length models", in
    which the number of predicted tokens weighs each window exactly.

    The memory is that of one window, and of logits for `LOGITS_AT_ONCE` elements.

    Args:
        model: a causal language model, or a `DSVLForConditionalGeneration`, in evaluation mode.
        documents: the ids of each document.
        vocabulary: which rows of the head are tokens, see `language_vocabulary`, (rows,), bool.
        size, stride: see `windows`.
        label: *optional*, name of the model for the progress bar.

    Raises:
        ValueError: for a token that is not in the vocabulary, if there is nothing to predict, or if the model computes its
            logits in a way that is not known.
    """
    _align_weights(model)
    config = getattr(model.config, "text_config", model.config)
    weight = model.get_output_embeddings().weight[: len(vocabulary)]
    excluded = (~vocabulary).nonzero()[:, 0].to(weight.device)
    at_once = max(LOGITS_AT_ONCE // len(vocabulary), 1)
    digest, nats, tokens = hashlib.sha256(), 0.0, 0
    total = sum(max(len(ids) - 1, 0) for ids in documents)
    if total == 0:
        raise ValueError("No document has two tokens, so there is nothing to predict; pass more text.")
    with tqdm(total=total, desc=label, unit="token", disable=None) as bar:
        for ids in documents:
            _check_ids(ids, vocabulary)
            for start, first, end in windows(len(ids), size, stride):
                window = torch.tensor([ids[start:end]], device=model.get_input_embeddings().weight.device)
                hidden = model.base_model(input_ids=window, use_cache=False).last_hidden_state[0].to(weight.device)
                if tokens == 0:
                    _check_logits(model, window, scale_logits(hidden[-CHECKED_ROWS:] @ weight.T, config), vocabulary)
                targets = window[0, first - start :].to(weight.device)
                for rows, ids_of_rows in zip(
                    hidden[first - start - 1 : -1].split(at_once), targets.split(at_once), strict=True
                ):
                    logits = scale_logits(torch.nn.functional.linear(rows, weight), config).float()
                    logits[:, excluded] = -math.inf
                    lost = logits.logsumexp(-1) - logits.gather(-1, ids_of_rows[:, None])[:, 0]
                    digest.update(lost.cpu().numpy().tobytes())
                    nats += lost.double().sum().item()
                tokens += end - first
                bar.update(end - first)
    if not math.isfinite(nats):
        raise ValueError(
            f"The log probabilities of {label or type(model).__name__} are not finite in {model.dtype}; check its weights, "
            "or pass --dtype float32."
        )
    return TextScore(tokens, nats, digest.hexdigest())


def _align_weights(model: torch.nn.Module) -> None:
    """Copy weights on a CPU that do not start at a multiple of `ALIGNMENT`, as in a mapped file: matrix products of the same
    numbers would differ in their last bits."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _check_ids(ids: Sequence[int], vocabulary: torch.Tensor) -> None:
    unknown = next((one for one in ids if one >= len(vocabulary) or not vocabulary[one]), None)
    if unknown is not None:
        raise ValueError(
            f"The text has the token {unknown}, which is not in the language model's vocabulary; pass the tokenizer of the "
            "language model."
        )


def _check_logits(model: Any, window: torch.Tensor, logits: torch.Tensor, vocabulary: torch.Tensor) -> None:
    """Compare logits of a window's last tokens, (tokens, rows), with those of the model's own forward."""
    own = model(input_ids=window, use_cache=False, logits_to_keep=CHECKED_ROWS).logits[0, :, : len(vocabulary)]
    apart = (own.float() - logits.float().to(own.device)).abs().max().item()
    if apart >= 0.05 * max(own.float().abs().max().item(), 1.0):
        raise ValueError(
            f"The logits of {type(model).__name__} differ by {apart:.3g} from what its head computes: it scales them in a "
            "way that DSVL does not know; please report this model."
        )
