"""Fine-tuning under the HF `Trainer`, from one process to ZeRO-3."""

from .adapters import lora_config, merge_adapters
from .checkpoints import CompleteCheckpoints, last_complete_checkpoint
from .collator import ConversationCollator
from .evaluation import exact_match
from .trainer import DSVLTrainer, parameter_groups

__all__ = [
    "CompleteCheckpoints",
    "ConversationCollator",
    "DSVLTrainer",
    "exact_match",
    "last_complete_checkpoint",
    "lora_config",
    "merge_adapters",
    "parameter_groups",
]
