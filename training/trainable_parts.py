"""The parts of a model that can be trained, by the names of `dsvl train --train`."""

# Name -> the argument of `DSVLForConditionalGeneration.set_trainable`.
PARTS = {
    "projector": "projector",
    "embeddings": "embeddings",
    "vision": "vision_tower",
    "language": "language_model",
    "head": "lm_head",
}
