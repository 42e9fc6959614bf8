"""DSVLChat: every answer is that of the whole conversation run afresh, and costs what is new."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_tower_config
from PIL import Image

from dsvl import DSVLConfig, DSVLForConditionalGeneration
from dsvl.chat import DSVLChat

PER_PICTURE, NEW = 5, 8


def make_model(processor: Any, family: str = "llama", attention: str = "mmca", **text: Any) -> DSVLForConditionalGeneration:
    config = FAMILIES[family]()
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 4096} | text
    for name, value in text.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    whole = DSVLConfig(tiny_tower_config(), config, multimodal_attention=attention, image_token_id=processor.image_token_id)
    model = DSVLForConditionalGeneration(whole).to(torch.float64).eval()
    model.generation_config.eos_token_id = None  # random models may say it at once
    return model


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def afresh(model: Any, processor: Any, messages: list[dict[str, Any]], new_tokens: int = NEW) -> list[int]:
    """The ids of the answer to a conversation of which nothing is cached."""
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


class Meter:
    """What really went through the parts of a model."""

    def __init__(self, model: Any) -> None:
        self.pictures: list[int] = []
        self.tokens: list[int] = []
        body = model.model
        body.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: self.pictures.append(len(args[0])), with_kwargs=True
        )
        body.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.tokens.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )

    def read(self) -> tuple[int, int]:
        """Pictures that were encoded and tokens that were prefilled since it was read last."""
        counts = sum(self.pictures), self.tokens[0]
        self.pictures.clear()
        self.tokens.clear()
        return counts


ROUNDS = [("What is it?", [0, 1]), ("And why?", []), ("Compare them.", [2]), ("So?", []), ("The last.", [3])]


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_round_answers_as_if_afresh_and_costs_what_is_new(processor, family, cache, attention):
    model = make_model(processor, family, attention)
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False, cache_implementation=cache)
    meter, before = Meter(model), 0
    for text, numbers in ROUNDS:
        answer = chat.ask(text, [picture(number) for number in numbers])
        encoded, prefilled = meter.read()
        cost = chat.last_round
        assert encoded == cost.encoded_pictures == len(numbers)
        assert prefilled == cost.prompt_tokens - cost.reused_tokens
        # all that the earlier prompt held is reused; of the answer, what reads as it was said
        assert cost.reused_tokens >= before
        before = cost.prompt_tokens
        assert cost.answer_ids == afresh(model, processor, chat.messages[:-1])
        assert answer == chat.messages[-1]["content"] == processor.tokenizer.decode(cost.answer_ids)
        meter.read()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * len(ROUNDS)
