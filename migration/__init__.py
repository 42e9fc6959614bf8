"""From DeepSpeed-VisualChat's files, and Qwen-VL's, to DSVL."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from .checkpoint import MigrationReport, migrate_checkpoint
    from .qwen_tower import migrate_qwen_tower

__all__ = ["MigrationReport", "migrate_checkpoint", "migrate_qwen_tower"]
__getattr__ = lazy_attributes(
    __name__,
    {
        "MigrationReport": "checkpoint",
        "migrate_checkpoint": "checkpoint",
        "migrate_qwen_tower": "qwen_tower",
    },
)
