"""Exporting a checkpoint directory."""

import shutil
from pathlib import Path

from transformers import AutoProcessor

from ..configuration_dsvl import DSVLConfig
from ..hub_card import render_card
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..utils.atomic_files import atomic_directory, check_new_directory
from ..utils.local_paths import check_exists
from .card import linked_images, llava_card
from .limits import check_exportable
from .llava import published_names, to_llava


def export_llava(checkpoint: str | Path, directory: str | Path, *, max_shard_size: str = "5GB") -> Path:
    """Export a checkpoint to a directory that opens as transformers' own `LlavaForConditionalGeneration`.

    The exported model computes the same and needs no remote code. Its directory holds weights in the checkpoint's dtype,
    configuration, generation config, `LlavaProcessor` with the chat template, and the model card. Saving is atomic.

    Args:
        checkpoint: directory or Hub name of a DSVL checkpoint with `multimodal_attention="causal"` and
            `projector_type="mlp"`.
        directory: the new directory; it must not exist, or be empty.
        max_shard_size: maximum size of a safetensors file.

    Returns:
        The absolute path of the directory.

    Raises:
        FileExistsError: if the directory is not empty.
        FileNotFoundError: for a checkpoint that does not exist.
        ValueError: for a model that LLaVA cannot express, with every reason and its alternative.
    """
    check_new_directory(directory)
    source = Path(check_exists(str(checkpoint))).expanduser()
    if (source / "adapter_config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds adapters without the model; merge them first: dsvl merge --model CHECKPOINT --adapters "
            f"{checkpoint} --out DIR."
        )
    check_exportable(DSVLConfig.from_pretrained(checkpoint))  # which raises ValueError for other models
    model = DSVLForConditionalGeneration.from_pretrained(checkpoint)
    llava, processor = to_llava(model, AutoProcessor.from_pretrained(checkpoint))
    readme = source / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else render_card(model.config, [str(checkpoint)])
    with atomic_directory(directory) as partial:
        llava.save_pretrained(partial, state_dict=published_names(llava), max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(llava_card(card), encoding="utf-8")
        for image in linked_images(card):
            if (source / image).is_file():
                (partial / image).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / image, partial / image)
    return Path(directory).absolute()
