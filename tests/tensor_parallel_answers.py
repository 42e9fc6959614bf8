"""Compares a model that two processes hold by `tp_plan="auto"` with the whole model; started by torchrun with its folder,
and "cuda" to do so on GPUs.

Every process writes what it finds to `RANK.json` in the folder.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import dsvl
from dsvl.image_library import ImageLibrary
from dsvl.training.distributed import destroy_process_groups

folder = Path(sys.argv[1])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if sys.argv[2:] == ["cuda"] else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
whole = dsvl.DSVLForConditionalGeneration.from_pretrained(folder / "model").to(device).eval()
split = dsvl.DSVLForConditionalGeneration.from_pretrained(folder / "model", tp_plan="auto").eval()

generator = torch.Generator().manual_seed(0)
image = [whole.config.image_token_id] * whole.config.image_seq_length
words = torch.randint(5, 200, (2, 12), generator=generator).tolist()
ids = torch.tensor([row[:3] + image + row[3:6] + image + row[6:] for row in words]).to(device)
pixels = torch.randn(4, 3, 28, 28, generator=generator).to(device)
prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
how = {"max_new_tokens": 6, "do_sample": False}


def answers(model, **options):
    return model.generate(**prompt, **how, **options)


expected = answers(whole, pixel_values=pixels)
with torch.no_grad():
    logits = [model(**prompt, pixel_values=pixels).logits for model in (whole, split)]
caches = [model.encode_images(pixels) for model in (whole, split)]
fingerprints: list = [None] * dist.get_world_size()
dist.all_gather_object(fingerprints, caches[1].fingerprint)
same = {
    "dynamic": answers(split, pixel_values=pixels).equal(expected),
    "static": answers(split, pixel_values=pixels, cache_implementation="static").equal(expected),
    "image cache": answers(split, image_cache=caches[1]).equal(expected),
    "8 bits": answers(split, image_cache=caches[1].quantize()).equal(answers(whole, image_cache=caches[0].quantize())),
    "beams": answers(split, image_cache=caches[1], num_beams=2).equal(answers(whole, pixel_values=pixels, num_beams=2)),
}
split.image_library = ImageLibrary(split, 2**24)
same["library"] = all(answers(split, pixel_values=pixels).equal(expected) for _ in range(2))
weight = split.model.language_model.layers[0].self_attn.q_proj.weight
found = {
    "own share of a weight": weight.to_local().numel() / weight.numel(),
    "own share of the image cache": caches[1].keys.numel() / caches[0].keys.numel(),
    "logits": (logits[0] - logits[1]).abs().max().item(),
    "same": same,
    "library": split.image_library.statistics(),
    "fingerprints": len({*fingerprints, caches[0].fingerprint}),
}
(folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
dist.barrier()
destroy_process_groups()
