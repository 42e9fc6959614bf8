"""Train a DSVL model on preferences with TRL's DPOTrainer, with LoRA or without.

    python dpo_with_trl.py --model my-model --data preferences.jsonl --output my-preferred-model

A line of the data is a prompt with a better and a worse answer; paths of images are relative to the file:

    {"prompt": [{"role": "user", "content": [{"type": "image", "path": "one.jpg"}, {"type": "text", "text": "What?"}]}],
     "chosen": [{"role": "assistant", "content": "A cup."}], "rejected": [{"role": "assistant", "content": "A dog."}]}

With --lora-rank the output contains adapters, which `dsvl merge` merges into the model.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from dsvl.data import trl_dataset
from dsvl.hub_card import render_card
from dsvl.training import lora_config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="directory or Hub name of a DSVL checkpoint")
parser.add_argument("--data", required=True, help="a file of preferences")
parser.add_argument("--output", required=True, help="directory for the trained model or the adapters")
parser.add_argument("--max-steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=8, help="pairs per step and process")
parser.add_argument("--learning-rate", type=float, default=5e-6)
parser.add_argument("--beta", type=float, default=0.1, help="how strongly the model is held to the original one")
parser.add_argument("--lora-rank", type=int, default=0, help="rank of adapters on the decoder; 0 for none")
parser.add_argument("--logging-steps", type=int, default=10)
args = parser.parse_args()
model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
model.set_trainable(projector=True, embeddings=False, language_model=True)  # with adapters, lora_config decides
trainer = DPOTrainer(
    model=model,  # the reference is loaded from the same checkpoint, or is the model without its adapters
    args=DPOConfig(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        beta=args.beta,
        max_length=None,  # TRL's default of 1024 may cut an image, which is refused
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=args.logging_steps,
        save_strategy="no",
    ),
    train_dataset=trl_dataset(args.data, kind="preference"),
    processing_class=AutoProcessor.from_pretrained(args.model, trust_remote_code=True),
    peft_config=lora_config(model, args.lora_rank, train=("projector",)) if args.lora_rank else None,
)
trainer.train()
trainer.save_model()
trainer.save_state()
if not args.lora_rank and trainer.is_world_process_zero():
    card = render_card(model.config, [args.model], origin="Trained on preferences with TRL's `DPOTrainer`.")
    Path(args.output, "README.md").write_text(card, encoding="utf-8")
