"""Fine-tuning under the HF `Trainer`, from one process to ZeRO-3."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from .adapters import lora_config, merge_adapters
    from .checkpoints import CompleteCheckpoints, last_complete_checkpoint
    from .collator import ConversationCollator
    from .evaluation import exact_match
    from .frozen_errors import measure_errors
    from .frozen_precision import freeze_in_8_bits
    from .trainer import DSVLTrainer, parameter_groups

__all__ = [
    "CompleteCheckpoints",
    "ConversationCollator",
    "DSVLTrainer",
    "exact_match",
    "freeze_in_8_bits",
    "last_complete_checkpoint",
    "lora_config",
    "measure_errors",
    "merge_adapters",
    "parameter_groups",
]
__getattr__ = lazy_attributes(
    __name__,
    {
        "lora_config": "adapters",
        "merge_adapters": "adapters",
        "CompleteCheckpoints": "checkpoints",
        "last_complete_checkpoint": "checkpoints",
        "ConversationCollator": "collator",
        "exact_match": "evaluation",
        "measure_errors": "frozen_errors",
        "freeze_in_8_bits": "frozen_precision",
        "DSVLTrainer": "trainer",
        "parameter_groups": "trainer",
    },
)
