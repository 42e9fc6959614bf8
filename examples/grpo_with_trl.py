"""Train a DSVL model by reinforcement learning with TRL's GRPOTrainer, with LoRA or without.

    python grpo_with_trl.py --model my-model --data conversations.jsonl --output my-reinforced-model

The data are conversations, as for `dsvl train`. The model answers their last questions, and its reward is 1 for an answer
that equals the one in the data (or one of its `references`), 0 for another. Replace `correct` by your own reward.
With --lora-rank the output contains adapters, which `dsvl merge` merges into the model.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from dsvl.data import trl_dataset
from dsvl.evaluation.metrics import exact_match
from dsvl.hub_card import render_card
from dsvl.training import lora_config


def correct(completions: list, references: list[list[str]], **columns: object) -> list[float]:
    answers = [completion[0]["content"] for completion in completions]
    return [exact_match(answer, accepted) for answer, accepted in zip(answers, references, strict=True)]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="directory or Hub name of a DSVL checkpoint")
parser.add_argument("--data", required=True, help="a file of conversations")
parser.add_argument("--output", required=True, help="directory for the trained model or the adapters")
parser.add_argument("--max-steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=64, help="answers per step and process, several for each question")
parser.add_argument("--num-generations", type=int, default=8, help="answers for a question")
parser.add_argument("--max-completion-length", type=int, default=128, help="maximum tokens of an answer")
parser.add_argument("--learning-rate", type=float, default=1e-5)
parser.add_argument("--lora-rank", type=int, default=0, help="rank of adapters on the decoder; 0 for none")
parser.add_argument("--logging-steps", type=int, default=10)
args = parser.parse_args()
processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
if processor.image_layout in ("tiles", "native"):
    parser.error(
        f"--model {args.model} has image_layout={processor.image_layout!r}, whose images TRL's GRPOTrainer does not split "
        "among its small batches; choose a model of the layout crop or pad, or tune on preferences (dpo_with_trl.py)."
    )
model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
model.set_trainable(projector=True, embeddings=False, language_model=True)  # with adapters, lora_config decides
options = {key: value for key, value in vars(args).items() if key in GRPOConfig.__dataclass_fields__}
options |= {"use_cpu": not torch.accelerator.is_available(), "save_strategy": "no"}
options["log_multimodal"] = False  # otherwise processes wait for each other forever when one has no image in its batch
trainer = GRPOTrainer(
    model=model,
    reward_funcs=correct,
    args=GRPOConfig(args.output, per_device_train_batch_size=args.batch_size, **options),
    train_dataset=trl_dataset(args.data, kind="prompt"),
    processing_class=processor,
    peft_config=lora_config(model, args.lora_rank, train=("projector",)) if args.lora_rank else None,
)
trainer.train()
trainer.save_model()
trainer.save_state()
if not args.lora_rank and trainer.is_world_process_zero():
    card = render_card(model.config, [args.model], origin="Trained by reinforcement learning with TRL's `GRPOTrainer`.")
    Path(args.output, "README.md").write_text(card, encoding="utf-8")
