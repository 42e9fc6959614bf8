"""The parts of the demo's model, made from nothing: a small CLIP tower, and a small LLaMA with a tokenizer."""

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

from .drawing import IMAGE_SIZE, words

HEADINGS = "### Image 1:\n(image 1)\n### Question:\n{}\n\n### Answer:\n"

# A heading and an image's name are one word each, so that few tokens lie between an image and what is said about it.
WORD = r"### \w+(:\n)?|\(image \d+\)|\w+ (?=\(image)| ?\w+|[^\w\s]+\n*|\s+"


def save_tower(
    directory: Path, image_size: int = IMAGE_SIZE, patch_size: int = 16, width: int = 64, layers: int = 2
) -> None:
    """Save a CLIP vision tower with random weights, and its image processor.

    Args:
        directory: where.
        image_size, patch_size: in pixels.
        width, layers: of the tower; it has a head for every 32 channels.
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
    # White, the background, becomes 0: an empty patch says nothing but where it is.
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size=side, image_mean=[1.0] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(directory)


def save_language_model(directory: Path, width: int = 128, layers: int = 3) -> None:
    """Save a LLaMA with random weights, and a tokenizer that has learnt the words of the demo's conversations.

    Args:
        directory: where.
        width, layers: of the decoder; it has a head for every 32 channels.
    """
    tokenizer = train_tokenizer([HEADINGS.format(text) for text in words()])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=1024,
        # Conversations are short, and the nearest image has to be told from the one before it: fast rotations.
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.08,  # 0.02 is meant for wide models; at this width attention starts out almost uniform
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it knows every word of `texts`, and can spell any other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
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
        padding_side="left",  # generation continues at the right
        clean_up_tokenization_spaces=False,
    )
