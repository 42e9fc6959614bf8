"""How large everything is: what there is to see, the parts, their training and the runs."""

from dataclasses import dataclass

from attention_quality.scenes import World


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        world: what there is to see.
        patch_size, tower_width, tower_layers: of the tower.
        width, layers, head_dim: of the language model; its MLPs are 2.7 times as wide.
        language_steps, language_tokens, language_learning_rate: of its training; tokens of a batch.
        tower_steps, tower_images, tower_learning_rate: of the tower's training; images of a batch.
        enough: accuracy that the language model must reach in text in each of `IMAGE_KINDS`, or runs are refused.
        batch: conversations of a step.
        images: of a training conversation, a choice of these.
        questions: of a training conversation.
        least_steps: optimizer steps of a run; more if it takes more to see each conversation once.
        asked_images: of a held-out item, but for distractors.
        items: held-out items of each task.
        distractors: numbers of images of the task of that name.
        distractor_items: of each of these numbers.
        curve: how often a run is measured, its end included.
        curve_items: of each task at these times.
        documents: held-out documents for the perplexity.
    """

    world: World = World()
    patch_size: int = 8
    tower_width: int = 192
    tower_layers: int = 4
    width: int = 640
    layers: int = 12
    head_dim: int = 64
    language_steps: int = 1600
    language_tokens: int = 32768
    language_learning_rate: float = 2e-3
    tower_steps: int = 1500
    tower_images: int = 256
    tower_learning_rate: float = 1e-3
    enough: float = 0.9
    batch: int = 32
    images: tuple[int, ...] = (1, 3, 4, 5, 6, 7)
    questions: int = 5
    least_steps: int = 512
    asked_images: int = 5
    items: int = 512
    distractors: tuple[int, ...] = (4, 8, 16, 32, 64)
    distractor_items: int = 128
    curve: int = 6
    curve_items: int = 96
    documents: int = 256

    @property
    def tokens_per_image(self) -> int:
        return (self.world.image_size // self.patch_size) ** 2


SIZES_OF_EXPERIMENT = {
    "full": Size(),
    # Minutes on a CPU: it shows that everything runs, not which arm is better.
    "tiny": Size(
        world=World(colours=3, shapes=3, grid=2, cell=16, most_things=3, most_images=8),
        tower_width=64,
        tower_layers=2,
        width=64,
        layers=4,
        head_dim=32,
        language_steps=150,
        language_tokens=1024,
        language_learning_rate=3e-3,
        tower_steps=100,
        tower_images=32,
        enough=0.0,
        batch=8,
        images=(1, 2, 3),
        questions=4,
        least_steps=12,
        asked_images=3,
        items=16,
        distractors=(4, 8),
        distractor_items=8,
        curve=2,
        curve_items=8,
        documents=16,
    ),
}
