"""One training step at CLIP ViT-L/14 + LLaMA-7B size with random weights, bf16: DSVL beside transformers' Llava.

Projector and embeddings learn, tower and decoder are frozen, as DeepSpeed-VisualChat trains. No optimizer step: forward and
backward are what differs.

    python benchmarks/training_step.py [--tokens 4096] [--batch 2] [--pictures 8] [--layers 32] [--out step.json]
"""

import argparse
import gc

import torch
from measure import in_turns, report, write
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dsvl import DSVLConfig, DSVLForConditionalGeneration

IMAGE_ID = 32000


def configs(layers: int) -> tuple[CLIPVisionConfig, LlamaConfig]:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=224
    )
    return vision, LlamaConfig(vocab_size=32064, num_hidden_layers=layers)


def build(cls, config):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = cls(config).train()
    torch.set_default_dtype(torch.float32)
    return model


def dsvl(attention: str, backend: str, layers: int):
    vision, text = configs(layers)
    config = DSVLConfig(vision, text, multimodal_attention=attention, image_token_id=IMAGE_ID)
    model = build(DSVLForConditionalGeneration, config).set_trainable()
    model.set_attn_implementation({"text_config": backend})
    return model


def llava(layers: int):
    vision, text = configs(layers)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = build(LlavaForConditionalGeneration, config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    return model


def inputs(batch: int, tokens: int, pictures: int) -> dict[str, torch.Tensor]:
    """Pictures spread evenly; the last quarter of the text between two pictures is an answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, IMAGE_ID, (batch, tokens), generator=generator)
    labels = torch.full_like(ids, -100)
    for number in range(pictures):
        start, end = 1 + number * (tokens // pictures), (number + 1) * (tokens // pictures)
        ids[:, start : start + 257] = IMAGE_ID
        answer = (end - start - 257) // 4
        labels[:, end - answer : end] = ids[:, end - answer : end]
    pixels = torch.randn(batch * pictures, 3, 224, 224, generator=generator, dtype=torch.float32)
    made = {"input_ids": ids, "labels": labels, "pixel_values": pixels.to(torch.bfloat16)}
    return {key: tensor.cuda() for key, tensor in made.items()}


def step(model, batch: dict[str, torch.Tensor]):
    """Forward and backward of one batch."""

    def run():
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def attending(model, batch: dict[str, torch.Tensor], attention: str, backend: str):
    """The same model under another attention: the weights are the same, and two 7B models are enough for one GPU."""
    run = step(model, batch)

    def switched():
        model.config.multimodal_attention = attention
        if model.config.text_config._attn_implementation != backend:
            model.set_attn_implementation({"text_config": backend})
        run()

    return switched


def compare(options: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, float]]:
    batch = inputs(options.batch, options.tokens, options.pictures)
    ours, theirs = dsvl("mmca", "sdpa", options.layers), llava(options.layers)
    if checkpointing:
        for model in (ours, theirs):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    alternatives = {
        "Llava, sdpa": step(theirs, batch),
        "DSVL causal, sdpa": attending(ours, batch, "causal", "sdpa"),
        "DSVL mmca, sdpa": attending(ours, batch, "mmca", "sdpa"),
        "DSVL mmca, flex_attention": attending(ours, batch, "mmca", "flex_attention"),
    }
    table = in_turns(alternatives, rounds=options.rounds, warm_up=3)
    title = f"{options.batch} x {options.tokens} tokens, {options.pictures} pictures a sample"
    title += ", gradient checkpointing" if checkpointing else ""
    weights = torch.cuda.memory_allocated() / 2**30
    report(f"{title} (peak: above the {weights:.1f} GiB of both models' weights)", table, base="Llava, sdpa")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32, help="of the decoder; fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = {}
    for checkpointing in (False, True):
        results["checkpointing" if checkpointing else "plain"] = compare(options, checkpointing)
        gc.collect()
        torch.cuda.empty_cache()
    write(options.out, results)


if __name__ == "__main__":
    main()
