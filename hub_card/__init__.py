"""The model card of a checkpoint."""

from .card import TrainingFacts, at_repository, render_card

__all__ = ["TrainingFacts", "at_repository", "render_card"]
