"""From DeepSpeed-VisualChat's files, and Qwen-VL's, to DSVL."""

from .checkpoint import MigrationReport, migrate_checkpoint
from .qwen_tower import migrate_qwen_tower

__all__ = ["MigrationReport", "migrate_checkpoint", "migrate_qwen_tower"]
