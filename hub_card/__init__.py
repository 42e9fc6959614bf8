"""The model card of a checkpoint."""

from .card import TrainingFacts, at_repository, render_card
from .sections import with_section

__all__ = ["TrainingFacts", "at_repository", "render_card", "with_section"]
