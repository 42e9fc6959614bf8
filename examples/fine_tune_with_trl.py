"""Fine-tune a DSVL model with TRL's SFTTrainer, with LoRA or without.

    python fine_tune_with_trl.py --model my-model --data conversations.jsonl --output my-tuned-model

Batches are made by TRL's collator, so the data have TRL's format: a column `images` in reading order ([] without images),
and a part {"type": "image"} at the position of each image:

    {"images": ["one.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cup of coffee."}]}

Relative paths of images are relative to the working directory. With --lora-rank the output contains adapters;
`dsvl.training.merge_adapters(model, output)` merges them into the model.
"""

import argparse

import torch
from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="directory or Hub name of a DSVL checkpoint")
parser.add_argument("--data", required=True, help="a JSON lines file of conversations")
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
adapters = None
if args.lora_rank > 0:
    from dsvl.training import lora_config

    # Projector and embeddings are trained in full beside the adapters, as a new projector needs large changes.
    adapters = lora_config(model, args.lora_rank, train=("projector", "embeddings"))
else:
    model.set_trainable(projector=True, embeddings=True)  # the rest is frozen

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
    train_dataset=load_dataset("json", data_files=args.data, split="train").cast_column("images", List(Image())),
    processing_class=processor,
    peft_config=adapters,
)
trainer.train()
trainer.save_model()
trainer.save_state()  # the logged losses, in trainer_state.json
