"""Chat formats of language models: their templates (`chat_templates/`) with small tokenizers of the same special tokens."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dsvl.processing_dsvl import CHAT_TEMPLATE

TEMPLATES = Path(__file__).with_name("chat_templates")
TEXT = [
    "What is in the image? It is a small red circle above a blue square.",
    "Think, then answer: yes or no.\n\n  Yes.  \n",
]


@dataclass(frozen=True)
class ChatFormat:
    """A language model's chat format.

    Attributes:
        file: name of the template in `chat_templates/`.
        bos, eos: the tokenizer's.
        special: further special tokens.
        end: what ends an answer.
        metaspace: whether the tokenizer is of SentencePiece's kind, with a normalizer; else of bytes.
        system: whether system messages are taken.
    """

    file: str
    bos: str | None
    eos: str
    special: tuple[str, ...]
    end: str
    metaspace: bool = False
    system: bool = True

    @property
    def template(self) -> str:
        if self.file == "visualchat":
            return CHAT_TEMPLATE
        return (TEMPLATES / f"{self.file}.jinja").read_text(encoding="utf-8")

    def tokenizer(self) -> Any:
        """A new tokenizer with the format's template."""
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_trained(self.metaspace)),
            bos_token=self.bos,
            eos_token=self.eos,
            additional_special_tokens=list(self.special),
        )
        tokenizer.chat_template = self.template
        return tokenizer


@cache
def _trained(metaspace: bool) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if metaspace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        # Every character has a token, as those beyond the alphabet are bytes.
        alphabet = [chr(code) for code in range(32, 127)] + ["▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    bytes_ = [f"<0x{code:02X}>" for code in range(256)] if metaspace else []
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=bytes_, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    if metaspace:  # the bytes are ordinary tokens of the model
        import json

        saved = json.loads(tokenizer.to_str())
        saved["added_tokens"] = []
        return json.dumps(saved)
    return tokenizer.to_str()


CHATML = ("<|im_start|>", "<|im_end|>")
FORMATS = {
    "chatml": ChatFormat("chatml", None, "<|im_end|>", CHATML, "<|im_end|>"),
    "zephyr": ChatFormat("zephyr", "<s>", "</s>", (), "</s>", metaspace=True),
    "llama3": ChatFormat(
        "llama3", "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"
    ),
    "phi3": ChatFormat(
        "phi3", "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>", metaspace=True
    ),
    "gemma": ChatFormat(
        "gemma", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", metaspace=True, system=False
    ),
    "mistral": ChatFormat(
        "mistral",
        "<s>",
        "</s>",
        (
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "</s>",
        metaspace=True,
    ),
    "qwen2_5": ChatFormat("qwen2_5", None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "<|im_end|>"),
    "qwen3": ChatFormat("qwen3", None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "<|im_end|>"),
    "marked": ChatFormat("marked", None, "<|im_end|>", CHATML, "<|im_end|>"),
    "visualchat": ChatFormat("visualchat", "<s>", "</s>", (), "</s>", metaspace=True),
}
