"""The parts of a model that can learn, by the names that commands use."""

PARTS = {  # the names of `--train` -> the arguments of `DSVLForConditionalGeneration.set_trainable`
    "projector": "projector",
    "embeddings": "embeddings",
    "vision": "vision_tower",
    "language": "language_model",
    "head": "lm_head",
}
