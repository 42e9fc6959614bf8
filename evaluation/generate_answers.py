"""Generating answers to a batch of prompts, for `dsvl evaluate` and for the evaluation during training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..composition.chat_template import check_template_takes

# Models are compared with the same generation options, so all options that a checkpoint's generation_config.json may set
# (beams, penalties, sampling, ...) are overridden. Only the tokens that end an answer are the checkpoint's.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "top_h": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "return_dict_in_generate": False,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "low_memory": None,
}


class GeneratedAnswer(NamedTuple):
    """The text of an answer, and its number of tokens without special tokens."""

    text: str
    tokens: int


@torch.no_grad()
def generate_answers(
    model: Any, processor: Any, prompts: Sequence[list[dict[str, Any]]], max_new_tokens: int, **options: Any
) -> list[GeneratedAnswer]:
    """Answer the last question of each of several conversations in one batch, padded on the left.

    Args:
        model: a `DSVLForConditionalGeneration`, or PEFT's wrapper around it, in evaluation mode.
        processor: its `DSVLProcessor`.
        prompts: the messages of each conversation, ending with a user's; images as in `DSVLProcessor.apply_chat_template`.
        max_new_tokens: maximum length of an answer.
        options: arguments of `generate()`, which override `GREEDY`.

    Returns:
        One answer for each prompt. It does not depend on the other prompts of the batch.
    """
    for messages in prompts:
        check_template_takes(messages, processor.chat_template)
    inputs = processor.apply_chat_template(
        list(prompts),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    device = next(model.parameters()).device
    ids = model.generate(
        **{key: tensor.to(device) for key, tensor in inputs.items()},
        **(GREEDY | {"max_new_tokens": max_new_tokens, "use_cache": True} | options),
    )
    generated = ids[:, inputs["input_ids"].shape[1] :].tolist()
    tokenizer = processor.tokenizer
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    return [
        GeneratedAnswer(text, sum(token not in special for token in row)) for text, row in zip(texts, generated, strict=True)
    ]
