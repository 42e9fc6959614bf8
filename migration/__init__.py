"""From DeepSpeed-VisualChat's files to DSVL."""

from .state_dict import convert_state_dict

__all__ = ["convert_state_dict"]
