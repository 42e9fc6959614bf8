"""The DSVL processor: images and conversations to model inputs."""

import warnings
from importlib import import_module
from typing import Any

import torch
from tokenizers.normalizers import Replace, Sequence
from transformers import AddedToken, ProcessorMixin

from .image_layouts_dsvl import DECIDED, FRAME, ImageLayout, mean_colour
from .image_reading_dsvl import fit_thin_image, image_size, pillow_filter, read_image, tower_size
from .transformers_dsvl import MultiModalData, ProcessingKwargs, Unpack
from .video_reading_dsvl import (
    IMAGE_SOURCES,
    MAX_FRAMES,
    VIDEO_FPS,
    VideoSampling,
    expand_videos,
    has_times,
    mark_frames,
)

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"

# DeepSpeed-VisualChat's prompt format. The images of a turn stand before its question, numbered across the conversation;
# an image in the middle of a sentence leaves its name there. `number_after` repeats the number behind each image: under
# MMCA an image's tokens cannot see the number before them. A video's frames stand under its number,
# each before its time.
CHAT_TEMPLATE = """\
{%- set system = "You are a helpful language and vision assistant. You are able to understand the visual content that \
the user provides, and assist the user with a variety of tasks using natural language." -%}
{%- set state = namespace(images=0, videos=0, with_image=false, text="", system=system) -%}
{%- macro read(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == "text" -%}{{- part.text -}}
      {%- else -%}{{- raise_exception("Only a user's message can hold a part of type " ~ part.type) -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0].role == "system" -%}
  {%- set state.system = read(messages[0].content) -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{{- state.system + "\\n\\n" -}}
{%- for message in messages -%}
  {%- if message.role == "user" -%}
    {%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
    {%- set state.text = "" -%}
    {%- set state.with_image = false -%}
    {%- for part in parts -%}
      {%- if part.type == "image" and part.time -%}
        {%- set state.with_image = true -%}
        {%- if part.frame == 1 -%}
          {%- set state.videos = state.videos + 1 -%}
          {{- "### Video " ~ state.videos ~ ":\\n" -}}
        {%- endif -%}
        {{- "<image>" ~ part.time ~ "\\n" -}}
        {%- if part.frame == part.frames -%}
          {%- if number_after -%}{{- "(video " ~ state.videos ~ ")\\n" -}}{%- endif -%}
          {%- if state.text and parts[loop.index:] | selectattr("type", "equalto", "text") | list -%}
            {%- set state.text = state.text ~ "Video " ~ state.videos -%}
          {%- endif -%}
        {%- endif -%}
      {%- elif part.type == "image" -%}
        {%- set state.images = state.images + 1 -%}
        {%- set state.with_image = true -%}
        {{- "### Image " ~ state.images ~ ":\\n<image>\\n" -}}
        {%- if number_after -%}{{- "(image " ~ state.images ~ ")\\n" -}}{%- endif -%}
        {%- if state.text and parts[loop.index:] | selectattr("type", "equalto", "text") | list -%}
          {%- set state.text = state.text ~ "Image " ~ state.images -%}
        {%- endif -%}
      {%- elif part.type == "text" -%}
        {%- set state.text = state.text ~ part.text -%}
      {%- else -%}
        {{- raise_exception("A message can hold parts of type text and image, not " ~ part.type) -}}
      {%- endif -%}
    {%- endfor -%}
    {{- ("\\n" if state.with_image else "") ~ "### Question:\\n" ~ state.text ~ "\\n\\n" -}}
  {%- elif message.role == "assistant" -%}
    {{- "### Answer:\\n" -}}
    {%- generation -%}{{- read(message.content) ~ eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- raise_exception("Roles are user and assistant, after at most one system message; got " ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "### Answer:\\n" -}}{%- endif -%}
"""

# Inserted into special tokens that a user typed, so that the tokenizer does not recognize them; its normalizer removes the
# mark, and the model reads the user's characters. A noncharacter, which Unicode reserves for use inside a program.
MARK = "\ufdd0"


def extend_tokenizer(tokenizer: Any) -> Any:
    """Give a tokenizer what DSVL needs, in place: `<image>`, a padding token, and special tokens that text cannot forge.

    Returns:
        The tokenizer; unchanged if it had all of it.

    Raises:
        ValueError: for a tokenizer without the `tokenizers` backend, which alone has the position of each token in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not backed by the `tokenizers` library, so the assistant's tokens cannot "
            "be told from the user's; load its fast version (use_fast=True)."
        )
    special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
    if IMAGE_TOKEN not in special:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, special=True, normalized=False)]},
            replace_extra_special_tokens=False,
        )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    # A token that is matched after normalization would be found again once the mark is removed.
    late = [AddedToken(text, special=True, normalized=False) for text, token in special.items() if token.normalized]
    if late:
        tokenizer.add_tokens(late, special_tokens=True)
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None or backend.normalizer.normalize_str(MARK) != backend.normalizer.normalize_str(""):
        drop_mark = Replace(MARK, "")
        backend.normalizer = Sequence([drop_mark] + ([backend.normalizer] if backend.normalizer else []))
    return tokenizer


class DSVLProcessor(ProcessorMixin):
    """Images and conversations to model inputs, and generated ids back to text.

    Args:
        image_processor: the vision tower's (`CLIPImageProcessor`); with torchvision or without.
        tokenizer: the language model's, backed by `tokenizers`. Extended in place (`extend_tokenizer`).
        image_seq_length: how many image tokens one tile takes (`DSVLConfig.image_seq_length`); of a native image, the most.
        number_after: repeat an image's number behind it in the prompt (see `CHAT_TEMPLATE`); None is the template's own
            default.
        chat_template: a Jinja template, or several by name; DeepSpeed-VisualChat's format by default.
        image_layout, max_tiles, max_image_tokens: see `DSVLConfig`; `DSVLConfig.processor_arguments` has all that the
            processor of a model needs.
        tile_size: side of a tile, in pixels; with `image_layout="native"` of the square that becomes one token.
        fixed_length: whether every tile takes `image_seq_length` tokens; False for native images whose number of tokens
            follows their size.
        video_fps: how many frames of a second of video are read, *optional*, defaults to 2.0.
        max_frames: how many frames of a video are read at most, *optional*, defaults to 64.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 257,
        number_after: bool | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_layout: str = "crop",
        tile_size: int | None = None,
        max_tiles: int = 12,
        max_image_tokens: int = 256,
        fixed_length: bool = True,
        video_fps: float = VIDEO_FPS,
        max_frames: int = MAX_FRAMES,
        **kwargs: Any,
    ) -> None:
        self.video_fps, self.max_frames = video_fps, max_frames
        VideoSampling(video_fps, max_frames)  # checks them
        self.image_seq_length = image_seq_length
        self.number_after = number_after
        self.image_layout, self.tile_size, self.max_tiles = image_layout, tile_size, max_tiles
        self.max_image_tokens, self.fixed_length = max_image_tokens, fixed_length
        if image_layout != "crop" and not tile_size:
            raise ValueError(f"image_layout={image_layout!r} needs tile_size; pass DSVLConfig.processor_arguments.")
        self.image_token = IMAGE_TOKEN
        extend_tokenizer(tokenizer)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        image_features: Any = None,
        image_sizes: Any = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> Any:
        """Texts and their images to model inputs; see `ProcessorMixin.__call__`. The modality of each token is returned too.

        Args:
            images: what `read_image` takes: one, a flat list, or a list for each text.
            text: one or several. Those that begin with the tokenizer's BOS token, as rendered conversations do, get no
                second one.
            image_features: instead of `images`, what the model's tower gave for each
                (`get_image_features(...).last_hidden_state`), of shape (tower tokens, tower width), or (tiles, tower tokens,
                tower width) with `image_layout="tiles"`, in lists as images are or stacked. The output then holds them as
                `image_features` instead of `pixel_values`.
            image_sizes: (height, width) of the images of `image_features`, in a flat list; needed where their number of
                tiles or tokens follows it (`image_layout` "tiles" and "native").
            kwargs: of the tokenizer and of the image processor, flat or as `text_kwargs` and `images_kwargs`. transformers
                warns of others, which its pipelines pass.

        Raises:
            TypeError: for videos and audio.
            ValueError: if images and texts do not go together, or an image cannot be read.
        """
        for name in ("videos", "audio"):  # which transformers drops silently if no part takes them
            if kwargs.pop(name, None) is not None:  # type: ignore[misc]
                remedy = " Pass videos in messages, to apply_chat_template." if name == "videos" else ""
                raise TypeError(f"DSVLProcessor takes images and text; {name}= cannot be processed.{remedy}")
        if image_features is not None:
            if images is not None:
                raise ValueError("Pass images or image_features, not both: they are the same images.")
            dimensions = 3 if self.image_layout == "tiles" else 2
            images = _Features(_by_sample(image_features, stacked=dimensions + 1), image_sizes, dimensions)
        kwargs.setdefault("return_mm_token_type_ids", self.return_mm_token_type_ids)
        texts, bos = [text] if isinstance(text, str) else text or [], self.tokenizer.bos_token
        if texts and bos and all(isinstance(one, str) and one.startswith(bos) for one in texts):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images, text, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, "mm_token_type_ids", *self.image_processor.model_input_names]
        return names + ["num_tiles"] * (self.image_layout == "tiles")

    @property
    def layout(self) -> ImageLayout | None:
        """What images become; None if the image processor alone decides it."""
        if self.image_layout == "crop" or self.tile_size is None:
            return None
        return ImageLayout(self.image_layout, self.tile_size, self.max_tiles, self.max_image_tokens)

    @property
    def follows_size(self) -> bool:
        """Whether the number of tokens of an image follows its size."""
        return self.image_layout == "tiles" or not self.fixed_length

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render a conversation, or a batch of them, and turn it into model inputs if `tokenize=True`.

        Args:
            conversation: messages `{"role", "content"}`; content is a text, or a list of parts
                `{"type": "text", "text"}`, `{"type": "image", "image" | "path" | "url" | "base64"}` and `{"type": "video",
                "video" | "path" | "url" | "base64"}` in reading order; or `{"type": "image", "image_features",
                "image_size"}`, see `__call__`. A video becomes images with their times, see `expand_videos`.
            kwargs: see `ProcessorMixin.apply_chat_template`.

        A special token in the text of a message is plain text: it never becomes an image or the end of an answer.
        """
        if isinstance(conversation, dict) and "messages" in conversation:
            conversation = conversation["messages"]
        conversation = self.expand_videos(conversation)
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default") or chat_template or ""
        if has_times(conversation) and "part.time" not in template:
            raise ValueError(
                "This checkpoint's chat template does not know videos: it does not write the time of a frame (part.time). "
                "Prepare it again with dsvl.prepare_chat_template, or pass the frames as images."
            )
        if "number_after" in template and self.number_after is not None:
            kwargs.setdefault("number_after", self.number_after)
        if "mark_answers" in template:
            kwargs.setdefault("mark_answers", bool(kwargs.get("return_assistant_tokens_mask")))
        if kwargs.get("tokenize"):
            features, sizes = _features_of(conversation)
            options: dict[str, Any] = {"add_special_tokens": False}  # as tokenizers do
            if features:
                options |= {"image_features": features, "image_sizes": sizes}
            kwargs["processor_kwargs"] = options | (kwargs.get("processor_kwargs") or {})
        return super().apply_chat_template(self._protect(conversation), chat_template=chat_template, **kwargs)

    @property
    def video_sampling(self) -> VideoSampling:
        """Which frames of a video are read, and how large: as the image processor resizes images."""
        edge, resample = tower_size(self.image_processor)
        if self.image_layout == "native":
            edge = int(self.max_image_tokens**0.5 * self.tile_size)
        return VideoSampling(self.video_fps, self.max_frames, edge, int(resample))

    def expand_videos(self, conversation: Any, **options: Any) -> Any:
        """Replace the videos of a conversation, or of a batch of them, by their frames, which are decoded later.

        Args:
            options: `fetch` and `limits` of `video_reading_dsvl.expand_videos`.
        """
        if isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple)):
            return [self.expand_videos(one, **options) for one in conversation]
        if not isinstance(conversation, (list, tuple)):
            return conversation
        return mark_frames(expand_videos(conversation, self.video_sampling, **options))

    def count_tokens(self, conversation: Any, add_generation_prompt: bool = False) -> int:
        """The number of tokens of a conversation, including those of its images. Images are not decoded; where their tokens
        follow their size, the header of their file is read."""
        ids, images = self.ids_of_tiles(conversation, add_generation_prompt)
        return len(ids) + sum(length - 1 for tiles in images for length in tiles)

    def ids_of_tiles(
        self, conversation: Any, add_generation_prompt: bool = False, **variables: Any
    ) -> tuple[list[int], list[list[int]]]:
        """The token ids of a conversation with one image token for each tile; and for each image, how many image tokens each
        of its tiles takes. Images are read as in `count_tokens`.

        Args:
            variables: of the chat template.
        """
        conversation = self.expand_videos(conversation)
        text = self.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
        )
        pieces = text.split(self.image_token)
        images = [self.tile_lengths()] * (len(pieces) - 1)
        layout = self.layout
        if layout is not None and self.follows_size and images:
            sizes = [self._size_of(part) for part in image_parts(conversation)]
            placeholders = [layout.text(self.image_token, *layout.grid(*size)) for size in sizes]
            text = pieces[0] + "".join(one + piece for one, piece in zip(placeholders, pieces[1:], strict=True))
            images = [self.tile_lengths(*size) for size in sizes]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"], images

    def tile_lengths(self, height: int = 1, width: int = 1, is_frame: bool = False) -> list[int]:
        """The number of image tokens of each tile of an image.

        Args:
            height, width: of the image, in pixels.
            is_frame: whether it is a frame of a video.
        """
        return self._tile_lengths(*((1, 1) if self.layout is None else self.layout.grid(height, width, is_frame)))

    def _size_of(self, part: dict[str, Any]) -> tuple[int, int, bool]:
        """(height, width, whether it is a frame of a video) of an image of a conversation. A frame is decoded only if its
        size matters."""
        is_frame = bool(part.get("time"))
        height, width = (1, 1) if is_frame and self.image_layout != "native" else _part_size(part)
        return height, width, is_frame

    def _tile_lengths(self, rows: int, columns: int) -> list[int]:
        """As `tile_lengths`, of an image of this grid."""
        if self.image_layout == "native":
            return [self.image_seq_length if self.fixed_length else rows * columns]
        return [self.image_seq_length] * (1 if self.layout is None else self.layout.num_tiles(rows, columns))

    def _protect(self, part: Any) -> Any:
        """Mark the special tokens in the texts of a conversation, see `MARK`."""
        if isinstance(part, (list, tuple)):
            return [self._protect(element) for element in _join_texts(part)]
        if not isinstance(part, dict):
            return part
        marked = dict(part)
        for key in ("content", "text", "time"):
            if isinstance(part.get(key), str):
                marked[key] = mark_special_tokens(part[key], self.tokenizer)
            elif key in part:
                marked[key] = self._protect(part[key])
        return marked

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Load the images and compare their number with the placeholders of each sample, before these are expanded."""
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        if images is not None:
            samples = images.samples if isinstance(images, _Features) else _by_sample(images)
            if text is not None:
                self._check_counts(samples, text)
            if isinstance(images, _Features):
                _, *others = super().prepare_inputs_layout(text=text, **kwargs)
                return images, *others
            images = _read_images(sum(samples, []), **kwargs) or None
        elif text is not None:
            self._check_counts([], text)
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _check_counts(self, samples: list[list], text: list[str]) -> None:
        placeholders = [sample.count(self.image_token) for sample in text]
        images = [len(sample) for sample in samples]
        if len(samples) != len(text):  # a flat list of images for a batch: only the total is known
            images, named = [sum(images)], [sum(placeholders)]
        else:
            named = placeholders
        if images != named:
            raise ValueError(
                f"The texts name {placeholders} images ({self.image_token}), but {images} were given; pass the images "
                "of each text as a list of their own, in reading order, as many as it names."
            )

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """As the base class does, which does not know images that are given as features."""
        if not isinstance(images, _Features):
            super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple:
        """Model inputs of the images, and what takes the place of each in the text."""
        if isinstance(images, _Features):
            return self._place_features(images)
        kwargs.pop("input_data_format", None)  # of what they were before they were read
        layout = self.layout
        if layout is None:
            fitted = [fit_thin_image(image, self.image_processor, **kwargs) for image in images]
            return super()._process_images(fitted, **kwargs)
        if decided := [name for name in DECIDED if kwargs.get(name) is not None]:
            raise ValueError(
                f"{', '.join(decided)} cannot be chosen in a call: image_layout={self.image_layout!r} decides the size of "
                "images; omit it."
            )
        colour = mean_colour(self.image_processor)
        chosen = kwargs.get("resample")
        resample = pillow_filter(getattr(self.image_processor, "resample", None) if chosen is None else chosen)
        tiles = [layout.tiles(image, colour, resample) for image in images]
        grids = [layout.grid(image.height, image.width, bool(image.info.get(FRAME))) for image in images]
        options: dict[str, Any] = {name: False for name in ("do_resize", "do_center_crop", "do_pad")}
        options = {name: value for name, value in options.items() if getattr(self.image_processor, name, None)}
        if self.image_layout == "native":
            options["max_num_patches"] = self.max_image_tokens * self._patches_per_token**2
        processed = self.image_processor(sum(tiles, []), **(kwargs | options))
        if self.image_layout == "tiles":
            processed["num_tiles"] = list(map(len, tiles))
        return processed, [self._image_text(grid) for grid in grids]

    def _place_features(self, images: "_Features") -> tuple:
        """As `_process_images`, for images that are given as features."""
        inputs: dict[str, Any] = {"image_features": list(images)}
        if self.layout is None or self.image_layout == "pad":
            return inputs, [self._image_text((1, 1))] * len(images)
        if images.sizes is None:
            raise ValueError(
                f"image_features without image_sizes: with image_layout={self.image_layout!r} the tokens of an image follow "
                "its size; pass image_sizes=[(height, width), ...]."
            )
        grids = []
        for features, (height, width) in zip(images, images.sizes, strict=True):
            whole = self.image_layout == "tiles" and len(features) == 1  # a small image, or a frame of a video
            grids.append((1, 1) if whole else self.layout.grid(height, width))
        if self.image_layout == "tiles":
            inputs = {"image_features": [tile for one in images for tile in one], "num_tiles": [len(one) for one in images]}
            expected = [len(self._tile_lengths(*grid)) for grid in grids]
            if inputs["num_tiles"] != expected:
                raise ValueError(
                    f"image_features hold {inputs['num_tiles']} tiles, but images of these sizes have {expected}; pass "
                    "those that this processor's model computed, and their image_sizes."
                )
        else:
            side = self._patches_per_token
            shapes = [(rows * side, columns * side) for rows, columns in grids]
            patches = [one[: rows * columns] for one, (rows, columns) in zip(images, shapes, strict=True)]
            padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(one) for one in patches], batch_first=True)
            inputs = {"image_features": list(padded), "spatial_shapes": shapes}
        return inputs, [self._image_text(grid) for grid in grids]

    @property
    def _patches_per_token(self) -> int:
        """Side of the square of patches that becomes a token of a native image."""
        return self.tile_size // self.image_processor.patch_size

    def _image_text(self, grid: tuple[int, int]) -> str:
        """What takes the place of an image in the text."""
        tile = self.image_token * self._tile_lengths(*grid)[0]
        return tile if self.layout is None else self.layout.text(tile, *grid)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self._image_text((1, 1))  # of "crop" alone: `_process_images` does it for the others

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Truncation must not cut an image."""
        expected = [sample.count(self.image_token) for sample in text]
        rows = text_inputs["input_ids"]
        rows = rows if isinstance(rows, list) else rows.tolist()
        kept = [row.count(self.image_token_id) for row in rows]
        if kept != expected:
            raise ValueError(
                f"Truncation left {kept} of {expected} image tokens ({self.image_seq_length} a tile), which cuts an "
                "image; raise max_length, drop whole turns, or pass truncation=False."
            )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish; the arguments are those of `PushToHubMixin.push_to_hub`.

        Where the package dsvl is installed, its code is published too.
        """
        try:
            push_part = import_module("dsvl.publishing.push").push_part
        except ModuleNotFoundError:
            return super().push_to_hub(repo_id, **kwargs)
        return push_part(self, repo_id, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """Tokens of images of these sizes (height, width), the texts between tiles included; and their tiles."""
        if image_sizes is None:
            return MultiModalData()
        grids = [(1, 1) if self.layout is None else self.layout.grid(*size) for size in image_sizes]
        texts = {
            grid: len(self.tokenizer(self._image_text(grid), add_special_tokens=False)["input_ids"]) for grid in set(grids)
        }
        return MultiModalData(
            num_image_tokens=[texts[grid] for grid in grids],
            num_image_patches=[len(self._tile_lengths(*grid)) for grid in grids],
        )


def mark_special_tokens(text: str, tokenizer: Any) -> str:
    """A user's text whose special tokens the tokenizer does not recognize, see `MARK`."""
    text = text.replace(MARK, "")
    for token in (added.content for added in tokenizer.added_tokens_decoder.values() if added.special):
        marked = token[0] + MARK + token[1:]
        text = text.replace(token, marked).replace(token, marked)  # it may overlap with itself
    return text


def _join_texts(parts: Any) -> list:
    """Parts of a message with texts that follow each other as one: a special token may stand in two of them."""
    joined: list[Any] = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if is_text and joined and isinstance(joined[-1], dict) and joined[-1].get("type") == "text":
            joined[-1] = joined[-1] | {"text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _read_images(images: list, images_kwargs: dict | None = None, **kwargs: Any) -> list:
    """Read images with the options of a call, which are flat or in `images_kwargs`.

    Raises:
        ValueError: as `read_image` does; and for floats with do_rescale=False, as the processed image has 8 bits.
    """
    options = kwargs | (images_kwargs or {})
    if options.get("do_rescale") is False and any("float" in str(getattr(image, "dtype", "")) for image in images):
        raise ValueError("Floats become 8-bit images, 0..1 and 0..255 alike; leave do_rescale=False out, or pass integers.")
    return [read_image(image, input_data_format=options.get("input_data_format")) for image in images]


def image_parts(conversation: Any) -> list[dict[str, Any]]:
    """The images of a conversation, in reading order: its parts of type "image"."""
    contents = [message["content"] for message in conversation if isinstance(message.get("content"), (list, tuple))]
    return [part for content in contents for part in content if part.get("type") == "image"]


def _part_size(part: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of an image of a conversation."""
    if part.get("image_size") is not None:
        height, width = part["image_size"]
    else:
        source = next((part[key] for key in IMAGE_SOURCES if part.get(key) is not None), None)
        width, height = image_size(source)
    return height, width


def _features_of(conversation: Any) -> tuple[list[list], list[Any] | None]:
    """What the images of a conversation, or of each of a batch, hold as `image_features`, empty if none does; and their
    sizes, if all are known.

    Raises:
        ValueError: if only some of the images have them.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return [], None
    parts = list(map(image_parts, conversation if isinstance(conversation[0], (list, tuple)) else [conversation]))
    features = [[part["image_features"] for part in one if part.get("image_features") is not None] for one in parts]
    known, all_of_them = len(sum(features, [])), len(sum(parts, []))
    if known and known < all_of_them:
        raise ValueError(
            f"{known} of {all_of_them} images are given as features; pass all images of a batch as features, or none."
        )
    sizes = [part.get("image_size") for part in sum(parts, [])]
    return features if known else [], None if None in sizes else sizes


class _Features(list):
    """The tower's features of images, (tower tokens, tower width) or (tiles, tower tokens, tower width) each, passed in the
    place of images."""

    def __init__(self, samples: list[list], sizes: Any, dimensions: int) -> None:
        super().__init__(sum(samples, []))
        self.samples, self.sizes = samples, sizes
        shapes = {tuple(getattr(one, "shape", ())) for one in self}
        # The first dimension of tiles and native images is their number of tiles or patches.
        of_one = {shape[1:] if dimensions == 3 or sizes is not None else shape for shape in shapes}
        if any(len(shape) != dimensions for shape in shapes) or len(of_one) > 1:
            expected = "(tower tokens, tower width)" if dimensions == 2 else "(tiles, tower tokens, tower width)"
            raise ValueError(
                f"image_features have the shapes {sorted(shapes)}; expected {expected} for each image, the same for all, in "
                "a list or stacked."
            )
        if sizes is not None and len(sizes) != len(self):
            raise ValueError(f"{len(sizes)} image_sizes for {len(self)} image_features; pass one (height, width) for each.")


def _by_sample(images: Any, stacked: int = 4) -> list[list]:
    """Images as one list for each sample; a single image or a flat list belongs to one sample, None among lists is no image.

    Args:
        stacked: how many dimensions an array of several images has.
    """

    def is_several(element: Any) -> bool:
        return isinstance(element, (list, tuple)) or getattr(element, "ndim", 0) == stacked

    if isinstance(images, (list, tuple)):
        if any(map(is_several, images)):
            return [list(element) if is_several(element) else [] if element is None else [element] for element in images]
        return [list(images)]
    return [list(images)] if getattr(images, "ndim", 0) == stacked else [[images]]


def decode_picture(source: Any, **kwargs: Any) -> Any:
    """Deprecated name of `read_image`."""
    warnings.warn("decode_picture is deprecated; use read_image.", DeprecationWarning, stacklevel=2)
    return read_image(source, **kwargs)


__all__ = ["DSVLProcessor"]
