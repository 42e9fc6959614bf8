"""The model card that travels with a checkpoint."""

from .card import TrainingFacts, at_repository, render_card

__all__ = ["TrainingFacts", "at_repository", "render_card"]
