"""Methods of PEFT's that change the sequence are refused by name; those that adapt weights work."""

import peft
import pytest
import torch
from conftest import IMAGE_ID, batch, tiny_model

PROMPT_LEARNING = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, token_dim=32, num_layers=2, num_attention_heads=4),
    "p-tuning": peft.PromptEncoderConfig(
        num_virtual_tokens=4, token_dim=32, num_layers=2, num_attention_heads=4, encoder_hidden_size=16
    ),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, token_dim=16, num_layers=2, num_attention_heads=2),
}


@pytest.mark.parametrize("method", PROMPT_LEARNING)
def test_virtual_tokens_are_refused_by_name(method):
    config = PROMPT_LEARNING[method]
    config.task_type = peft.TaskType.CAUSAL_LM
    model = peft.get_peft_model(tiny_model(), config)
    inputs = batch("ttItIt", "ttt")
    with pytest.raises(ValueError, match=f"PEFT's .*{method}.* use LoRA"):
        model(**inputs)
    with pytest.raises(ValueError, match=f"{type(config).__name__} cannot generate .*use LoRA"):
        model.generate(**inputs, max_new_tokens=2)


def test_lora_trains_and_generates():
    torch.manual_seed(0)
    base, inputs = tiny_model(), batch("ttItIt", "ttt")
    expected = base.generate(**inputs, max_new_tokens=3, do_sample=False)
    config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(base, config)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).equal(expected)  # a fresh adapter changes nothing
    labels = torch.where(inputs["input_ids"] == IMAGE_ID, -100, inputs["input_ids"])
    model.train()(**inputs, labels=labels).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name and "language_model" in name]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)
