"""A small CLIP vision tower and a small LLaMA with a tokenizer, with random weights."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..utils.shape_images import IMAGE_SIZE
from .conversations import vocabulary_texts

HEADINGS = {  # what a chat format writes around a text
    "visualchat": "### Image 1:\n(image 1)\n### Question:\n{}\n\n### Answer:\n",
    "chatml": "system\nuser\nImage 1:\n(image 1)\n{}\nassistant\n",
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Headings and "(image N)" are single words, so that few tokens separate an image from the text about it.
WORD = r"### \w+(:\n)?|\(image \d+\)|\w+ (?=\(image)| ?\w+|[^\w\s]+\n*|\s+"


def save_tower(
    directory: Path, image_size: int = IMAGE_SIZE, patch_size: int = 16, width: int = 64, layers: int = 2
) -> None:
    """Save a CLIP vision tower with random weights, and its image processor.

    Args:
        directory: the output directory.
        image_size (*optional*, defaults to 32): in pixels.
        patch_size (*optional*, defaults to 16): in pixels.
        width (*optional*, defaults to 64): hidden size; each attention head has 32 channels.
        layers (*optional*, defaults to 2): number of layers.
    """
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=image_size,
        patch_size=patch_size,
    )
    CLIPVisionModel(config).save_pretrained(directory)
    side = {"height": image_size, "width": image_size}
    # The white background becomes 0, so that empty patches differ in their position only.
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size=side, image_mean=[1.0] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(directory)


def save_language_model(directory: Path, width: int = 128, layers: int = 3, chat_format: str = "visualchat") -> None:
    """Save a LLaMA with random weights, and a tokenizer trained on the demo's conversations.

    Args:
        directory: the output directory.
        width (*optional*, defaults to 128): hidden size; each attention head has 32 channels.
        layers (*optional*, defaults to 3): number of layers.
        chat_format (*optional*, defaults to "visualchat"): "chatml" gives the tokenizer a chat template of its own.
    """
    tokenizer = train_tokenizer([HEADINGS[chat_format].format(text) for text in vocabulary_texts()])
    if chat_format == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
        tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=1024,
        # Conversations are short, and neighbouring images must be distinguished, so positions rotate fast.
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.08,  # with the usual 0.02, attention would be almost uniform at this width
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts. It can encode any other text as well.

    Args:
        texts: the training data.
        vocab_size (*optional*, defaults to 512): at most, the 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",  # for batched generation
        clean_up_tokenization_spaces=False,
    )
