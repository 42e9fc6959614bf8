"""Fine-tune a DSVL model with TRL's SFTTrainer, with LoRA or without.

    python fine_tune_with_trl.py --model my-model --data conversations.jsonl --output my-tuned-model

The data are conversations, as for `dsvl train`. With --lora-rank the output contains adapters;
`dsvl merge --model my-model --adapters my-tuned-model --out my-merged-model` merges them into the model.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from dsvl.data import trl_dataset
from dsvl.hub_card import render_card
from dsvl.training import lora_config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="directory or Hub name of a DSVL checkpoint")
parser.add_argument("--data", required=True, help="a file of conversations")
parser.add_argument("--output", required=True, help="directory for the trained model or the adapters")
parser.add_argument("--max-steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=8, help="conversations per step and process")
parser.add_argument("--learning-rate", type=float, default=2e-4)
parser.add_argument("--lora-rank", type=int, default=0, help="rank of adapters on the decoder; 0 for none")
parser.add_argument("--logging-steps", type=int, default=10)
args = parser.parse_args()

# TRL computes in bf16 by autocast. float32 weights, as small updates would be rounded away in 16 bits.
model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
model.set_trainable(projector=True, embeddings=True)  # the rest is frozen; with adapters, lora_config decides

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        assistant_only_loss=True,  # by default TRL also trains on questions and image tokens
        max_length=None,  # TRL's default of 1024 has no space for four images of 257 tokens
        use_cpu=not torch.accelerator.is_available(),  # TRL's default of bf16 depends on it
        logging_steps=args.logging_steps,
        save_strategy="no",  # "steps" for checkpoints to resume from
    ),
    train_dataset=trl_dataset(args.data),
    processing_class=processor,
    peft_config=lora_config(model, args.lora_rank) if args.lora_rank else None,
)
trainer.train()
trainer.save_model()  # weights, code and processor; or the adapters
trainer.save_state()  # the logged losses, in trainer_state.json
if not args.lora_rank and trainer.is_world_process_zero():
    card = render_card(model.config, [args.model], origin="Fine-tuned with TRL's `SFTTrainer`.")
    Path(args.output, "README.md").write_text(card, encoding="utf-8")
