"""Fine-tune a DSVL model with transformers' own Trainer.

    python fine_tune_with_trainer.py --model my-model --data conversations.jsonl --output my-tuned-model

Each line of the data is a conversation; the model is trained on the assistant's messages:

    {"messages": [
        {"role": "user", "content": [{"type": "image", "path": "one.jpg"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cup of coffee."}]}

Relative paths of images refer to the folder of the file. Several processes: `torchrun --nproc-per-node=8 ...`.
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from dsvl.data import load_conversations
from dsvl.training import ConversationCollator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="directory or Hub name of a DSVL checkpoint")
parser.add_argument("--data", required=True, help="a JSON lines file of conversations")
parser.add_argument("--output", required=True, help="directory for the trained model")
parser.add_argument("--max-steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=8, help="conversations per step and process")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--max-length", type=int, help="maximum tokens; longer conversations lose their last turns")
parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
parser.add_argument("--logging-steps", type=int, default=10)
args = parser.parse_args()

# float32 weights, as small updates would be rounded away in 16 bits.
model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
# Without this line everything is trained. Frozen parts need no memory for gradients and optimizer states.
model.set_trainable(projector=True, embeddings=True, vision_tower=False, language_model=False, lm_head=False)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1: a fraction of all steps
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),  # without it, processes on CPUs would not communicate
        logging_steps=args.logging_steps,
        save_strategy="no",  # "steps" for checkpoints to resume from
        remove_unused_columns=False,  # the collator reads the column `messages`
    ),
    train_dataset=load_conversations(args.data),
    data_collator=ConversationCollator(processor, max_length=args.max_length),
    processing_class=processor,  # saved with the model
)
trainer.train()
trainer.save_model()  # weights, code and processor, for from_pretrained(output)
trainer.save_state()  # the logged losses, in trainer_state.json
