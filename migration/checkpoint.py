"""Converting checkpoints of DeepSpeed-VisualChat."""

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AddedToken, AutoConfig, AutoTokenizer, GenerationConfig

from ..composition import save_checkpoint
from ..composition.chat_template import VISUALCHAT, prepare_chat_template
from ..composition.towers import count_prefix_tokens, load_image_processor, load_tower, processed_size, tower_config
from ..configuration_dsvl import DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import CHAT_TEMPLATE, IMAGE_TOKEN, DSVLProcessor
from ..projectors_dsvl import sincos_position_table
from ..utils.atomic_files import check_new_directory
from .compare_shapes import compare_shapes
from .lora import is_fused, save_adapters, set_weights
from .read_weights import read_tensors, weight_files
from .state_dict_names import Translated, projector_type, tower_type, translate

logger = logging.getLogger(__name__)

# Tokens that the original adds to the language model's tokenizer, in this order; the last if there is no padding token.
PADDING = "<PAD>"
ADDED_TOKENS = ("### Image:", IMAGE_TOKEN, PADDING)
ORIGIN = (  # for the card
    "The weights were trained with [DeepSpeed-VisualChat](https://arxiv.org/abs/2309.14327) and converted by "
    "`dsvl migrate checkpoint`."
)
BASELINE = "baseline"  # the original's name of the linear projector


@dataclass
class MigrationReport:
    """What happened to each tensor of a converted checkpoint.

    Attributes:
        directory: the new checkpoint.
        taken: original name -> new names.
        unused: original name -> why it is not needed.
        filled: new name of a missing position table -> its source.
        adapters: the number of layers with LoRA weights, and what happened to them.
        notes: further properties of the new checkpoint.
    """

    directory: Path
    taken: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    adapters: str = "none"
    notes: list[str] = field(default_factory=list)

    @property
    def passed_over(self) -> dict[str, str]:
        """The name of `unused` until version 0.2."""
        warnings.warn("MigrationReport.passed_over is called unused.", DeprecationWarning, stacklevel=2)
        return self.unused

    def lines(self) -> list[str]:
        """The report as text, with one line for the same tensor of all layers."""
        kinds: dict[str, int] = {}
        for theirs, ours in self.taken.items():
            line = f"{_layers_as_one(theirs)} -> {', '.join(map(_layers_as_one, ours))}"
            kinds[line] = kinds.get(line, 0) + 1
        dropped: dict[str, int] = {}
        for theirs, why in self.unused.items():
            line = f"{_layers_as_one(theirs)}: {why}"
            dropped[line] = dropped.get(line, 0) + 1
        return [
            f"{self.directory}: {len(self.taken)} tensors converted, {len(self.unused)} unused, "
            f"{len(self.filled)} filled in; LoRA: {self.adapters}",
            *(f"  converted {count:4} x {line}" for line, count in kinds.items()),
            *(f"  unused    {count:4} x {line}" for line, count in dropped.items()),
            *(f"  filled in    1 x {ours}: {source}" for ours, source in self.filled.items()),
            *(f"  {note}" for note in self.notes),
        ]


def _layers_as_one(name: str) -> str:
    return re.sub(r"\.(layers|resblocks)\.\d+\.", r".\1.N.", name)


def migrate_checkpoint(
    checkpoint: str | Path,
    vision: str | Path,
    language: str | Path,
    out: str | Path,
    *,
    mmca: bool = True,
    projector: str | None = None,
    keep_adapter: bool = False,
    lora: str = "auto",
    dtype: torch.dtype | str = "auto",
    max_shard_size: str = "5GB",
) -> MigrationReport:
    """Convert a checkpoint that DeepSpeed-VisualChat's training wrote. The new checkpoint computes the same outputs.

    Generated tokens are embedded by the trained embedding table; the original uses a frozen copy for them. Images are passed
    in reading order and placed in reverse order, as in the original (`DSVLConfig.reversed_images`).

    Args:
        checkpoint: directory of an epoch (its tokenizer is used if it has one), or its pytorch_model.bin, of any ZeRO stage.
        vision: name or directory of the CLIP model it was trained from, or the directory of `dsvl migrate qwen-tower`.
        language: name or directory of the LLaMA model it was trained from.
        out: a new directory. Saving is atomic.
        mmca: whether it was trained with `--enable_mmca_attention`, which its files do not record.
        projector: *optional*, the original's `--vis_proj`; an error if the file has another.
        keep_adapter: save LoRA weights as a PEFT adapter in `out`/adapters instead of merging them.
        lora: whether the weights include the LoRA weights already: "fused", "unfused", or "auto" to compare them with the
            weights of `vision` and `language`.
        dtype: of the new checkpoint; "auto" is the widest dtype in the file.
        max_shard_size: maximum size of a safetensors file.

    Returns:
        What happened to each tensor.

    Raises:
        FileNotFoundError: if a file does not exist.
        FileExistsError: if `out` is not empty.
        PermissionError: if `out` cannot be written.
        ValueError: if the file is damaged, would run code, or does not match the models.
    """
    check_new_directory(out)
    original = dict(read_tensors(weight_files(checkpoint)))
    config = _config(original, str(checkpoint), str(vision), language, mmca, projector)
    translated = translate(original, tied=bool(AutoConfig.from_pretrained(language).tie_word_embeddings))
    image_processor = load_image_processor(vision)
    config.image_size = processed_size(image_processor)
    tokenizer = _tokenizer(Path(checkpoint), language, config)
    with torch.device("meta"):
        model = DSVLForConditionalGeneration(config)
    count_prefix_tokens(model.model.vision_tower, config.image_size)  # raises for images of an unsupported size
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def size_source(ours: str) -> str:
        flags = [f"--vision {vision}"] * ("language_model" not in ours) + [f"--language {language}"] * ("vision" not in ours)
        return " and ".join(flags)

    compare_shapes(translated, expected, str(checkpoint), size_source)
    report = MigrationReport(Path(out).absolute(), translated.taken, translated.unused)
    report.filled = _fill_in(translated, config, vision)
    if translated.lora:
        fused = is_fused(translated, _untrained(vision, language)) if lora == "auto" else lora == "fused"
        set_weights(translated, fused, keep_adapter)
        kept = "kept in adapters/" if keep_adapter else "merged"
        report.adapters = f"{len(translated.lora)} layers, {'fused' if fused else 'not fused'} in the file, {kept}"
    if dtype == "auto":
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in translated.tensors.values()))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model.load_state_dict({n: t.to(dtype) for n, t in translated.tensors.items()}, strict=True, assign=True)
    model.config.dtype = dtype
    model.generation_config = _generation_config(language, tokenizer)
    tokenizer.chat_template = prepare_chat_template(CHAT_TEMPLATE, tokenizer, name=VISUALCHAT)
    processor = DSVLProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template, **config.processor_arguments
    )

    def write_adapters(directory: Path) -> None:
        if keep_adapter and translated.lora:
            save_adapters(translated.lora, directory / "adapters", base_model="")

    save_checkpoint(
        model,
        processor,
        out,
        base_models=[str(vision), str(language)],
        origin=ORIGIN,
        max_shard_size=max_shard_size,
        write_more=write_adapters,
    )
    report.notes = [
        f"multimodal_attention: {config.multimodal_attention!r}; projector_type: {config.projector_type!r}; dtype: {dtype}",
        "reversed_images: true (pass images in reading order; they are placed in reverse order, as in the original)",
        f"tokens: {IMAGE_TOKEN} is {config.image_token_id}, padding {tokenizer.pad_token} is {tokenizer.pad_token_id}",
    ]
    return report


def _config(
    original: dict[str, torch.Tensor], checkpoint: str, vision: str, language: str | Path, mmca: bool, projector: str | None
) -> DSVLConfig:
    tower, found = tower_config(AutoConfig.from_pretrained(vision), vision), tower_type(original)
    if tower.model_type != found:
        remedy = "the directory that dsvl migrate qwen-tower wrote" if found == "dsvl_qwen_vision" else "the CLIP model"
        raise ValueError(
            f"--vision {vision} is a tower of type {tower.model_type!r}, but {checkpoint} has one of type {found!r}; pass "
            f"{remedy} that it was trained from."
        )
    kind = projector_type(original)
    if projector is not None and {BASELINE: "linear"}.get(projector, projector) != kind:
        raise ValueError(f"--projector {projector}, but {checkpoint} has the projector {kind!r}; omit --projector.")
    text = AutoConfig.from_pretrained(language)
    if text.model_type != "llama":
        raise ValueError(
            f"--language {language} is of type {text.model_type!r}; DeepSpeed-VisualChat supports 'llama' only."
        )
    table = original.get("lang_embed.weight")
    if table is None:
        raise ValueError(f"{checkpoint} has no lang_embed.weight, so it is not a model of DeepSpeed-VisualChat.")
    if table.ndim != 2:
        raise ValueError(f"{checkpoint} has lang_embed.weight of shape {tuple(table.shape)}; expected (tokens, width).")
    text.vocab_size = table.shape[0]
    text.tie_word_embeddings = False  # the original trains the embeddings but not the head
    for part in (text, tower):
        if Path(part.name_or_path).exists():  # a local path, which must not be in a checkpoint
            part.name_or_path = ""
    return DSVLConfig(
        vision_config=tower,
        text_config=text,
        projector_type=kind,
        multimodal_attention="mmca_reference" if mmca else "causal",
        image_token_id=0,  # set when the tokenizer is loaded
        reversed_images=True,
    )


def _tokenizer(checkpoint: Path, language: str | Path, config: DSVLConfig) -> Any:
    """The checkpoint's tokenizer, or the language model's with the tokens that the original adds."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    saved = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder if saved else language)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokens = ADDED_TOKENS if tokenizer.pad_token is None else ADDED_TOKENS[:2]
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    # The original pads with the end-of-sequence token. transformers would then not train its embedding.
    if PADDING in tokenizer.get_vocab():
        tokenizer.pad_token = PADDING
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer of {folder if saved else language} has {len(tokenizer)} tokens, but the checkpoint's embeddings "
            f"have {rows} rows; pass the language model that it was trained from, or the folder with its tokenizer."
        )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = config.text_config
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = None if tokenizer.pad_token_id == text.eos_token_id else tokenizer.pad_token_id
    return tokenizer


def _generation_config(language: str | Path, tokenizer: Any) -> GenerationConfig:
    try:
        generation = GenerationConfig.from_pretrained(language)
    except OSError:
        generation = GenerationConfig()
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return generation


def _fill_in(translated: Translated, config: DSVLConfig, vision: str | Path) -> dict[str, str]:
    """Fill in position tables that are not in the file, as the original does when it loads such a file."""
    filled = {}
    for ours in translated.absent:
        if ours.startswith("model.vision_tower."):
            tower = load_tower(vision)
            translated.tensors[ours] = tower.state_dict()[ours.removeprefix("model.vision_tower.")]
            filled[ours] = f"from --vision {vision}"
        else:
            queries = config.image_seq_length
            translated.tensors[ours] = sincos_position_table(int(queries**0.5), config.text_config.hidden_size)
            filled[ours] = "sine-cosine positions, its initial value"
    return filled


def _untrained(vision: str | Path, language: str | Path) -> Callable[[str], torch.Tensor]:
    """A function from the name of a weight to its value before the training."""

    def weight(name: str) -> torch.Tensor:
        if name.startswith("model.vision_tower."):
            return load_tower(vision).state_dict()[name.removeprefix("model.vision_tower.")]
        theirs = name.replace("model.language_model.", "model.")
        folder = language
        if not Path(folder).exists():
            folder = snapshot_download(str(language), allow_patterns=["*.json", "*.safetensors"])
        for found, tensor in read_tensors(weight_files(folder, wanted=theirs)):
            if found == theirs:
                return tensor
        raise ValueError(
            f"--language {language} has no weight {theirs}; pass the model that the checkpoint was trained from."
        )

    return weight


__all__ = ["MigrationReport", "migrate_checkpoint"]
