"""Converting weights of DeepSpeed-VisualChat and Qwen-VL, and updating the code of older DSVL checkpoints."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from .checkpoint import MigrationReport, migrate_checkpoint
    from .checkpoint_code import CodeMigration, migrate_code
    from .qwen_tower import migrate_qwen_tower

__all__ = ["CodeMigration", "MigrationReport", "migrate_checkpoint", "migrate_code", "migrate_qwen_tower"]
__getattr__ = lazy_attributes(
    __name__,
    {
        "CodeMigration": "checkpoint_code",
        "MigrationReport": "checkpoint",
        "migrate_checkpoint": "checkpoint",
        "migrate_code": "checkpoint_code",
        "migrate_qwen_tower": "qwen_tower",
    },
)
