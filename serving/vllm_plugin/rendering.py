"""How vLLM turns conversations and texts into tokens: as `DSVLProcessor` does.

vLLM renders a chat template itself, by the tokenizer. Its tokenizer is one whose `apply_chat_template` is the processor's,
so that a special token that a user types stays text.
"""

import copy
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.tokenizers.hf import CachedHfTokenizer, get_cached_tokenizer

from ...image_reading_dsvl import image_size
from ...processing_dsvl import IMAGE_TOKEN, DSVLProcessor, mark_special_tokens
from .padded_heads import ELSEWHERE

# What `DSVLProcessor` protects by itself, and what is a name rather than text.
PROTECTED_KEYS = ("role", "content")
# Arguments of `apply_chat_template` that are not variables of a template.
OPTIONS = ("return_tensors", "return_dict", "return_assistant_tokens_mask", "padding", "truncation", "max_length")


class DSVLTokenizer(CachedHfTokenizer):
    """Loads the tokenizer of a checkpoint."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: Any,
        *args: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The arguments are vLLM's; no code of the checkpoint is run."""
        processor = DSVLProcessor.from_pretrained(path_or_repo_id, revision=revision, cache_dir=download_dir)
        processor.tokenizer.truncation_side = kwargs.get("truncation_side", processor.tokenizer.truncation_side)
        return get_cached_tokenizer(protect_tokenizer(processor.tokenizer, processor))


def protect_tokenizer(tokenizer: Any, processor: DSVLProcessor) -> Any:
    """A tokenizer that renders conversations as the processor does, and adds no second BOS token."""

    class ProtectedTokenizer(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(
            self,
            conversation: Any,
            tools: Any = None,
            chat_template: str | None = None,
            add_generation_prompt: bool = False,
            continue_final_message: bool = False,
            tokenize: bool = True,
            **kwargs: Any,
        ) -> Any:
            for name in OPTIONS:
                kwargs.pop(name, None)
            text = processor.apply_chat_template(
                [protect_message(message, tokenizer) for message in conversation],
                chat_template=chat_template,
                tools=protect(tools, tokenizer),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **protect(kwargs, tokenizer),
            )
            return self(text, add_special_tokens=False)["input_ids"] if tokenize else text

        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(text, *args, **_one_bos(self, text, kwargs))

        def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super().encode(text, *args, **_one_bos(self, text, kwargs))

        def __reduce__(self) -> Any:
            return protect_tokenizer, (tokenizer, processor)

    ProtectedTokenizer.__name__ = f"Protected{type(tokenizer).__name__}"
    protected = copy.copy(tokenizer)
    protected.__class__ = ProtectedTokenizer
    return protected


def _one_bos(tokenizer: Any, text: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments by which a text that begins with BOS gets no second one, as in `DSVLProcessor`."""
    bos = tokenizer.bos_token
    if bos and isinstance(text, str) and text.startswith(bos):
        return kwargs | {"add_special_tokens": False}
    return kwargs


def protect_message(message: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A message whose other texts than its content, such as calls of tools, forge no special token either."""
    return {key: value if key in PROTECTED_KEYS else protect(value, tokenizer) for key, value in message.items()}


def protect(value: Any, tokenizer: Any) -> Any:
    """Texts in any lists and dictionaries, keys included, see `mark_special_tokens`."""
    if isinstance(value, str):
        return mark_special_tokens(value, tokenizer)
    if isinstance(value, dict):
        return {protect(key, tokenizer): protect(one, tokenizer) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [protect(one, tokenizer) for one in value]
    return value


class DSVLRenderer(HfRenderer):
    """vLLM's renderer of chat templates, which gives images the texts of their tiles."""

    def render_messages(self, messages: Any, params: Any) -> Any:
        _check_parts(messages)
        return super().render_messages(messages, _as_parts(params))

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        _check_parts(messages)
        return await super().render_messages_async(messages, _as_parts(params))

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        images = _images(prompt)
        # An engine that takes no images has no processor.
        layout = self.get_mm_processor().info.get_hf_processor().layout if images else None
        if layout is not None and layout.name == "tiles":
            pieces = prompt["prompt"].split(IMAGE_TOKEN)
            if any(image is None for image in images):
                raise VLLMValidationError(
                    "An image is given by its UUID alone, but with image_layout='tiles' the texts of its tiles follow its "
                    "size; pass the image."
                )
            if len(pieces) == len(images) + 1:  # otherwise it is refused later
                sizes = [image_size(getattr(image, "media", image)) for image in images]
                texts = [layout.text(IMAGE_TOKEN, *layout.grid(height, width)) for width, height in sizes]
                whole = pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))
                prompt = prompt | {"prompt": whole}
        return super()._tokenize_prompt(prompt, params)

    def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        self._check_images(prompt)
        return super()._process_tokens(prompt, skip_mm_cache=skip_mm_cache)

    async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        self._check_images(prompt)
        return await super()._process_tokens_async(prompt, skip_mm_cache=skip_mm_cache)

    def _check_images(self, prompt: Any) -> None:
        """A prompt without images is not processed by processing.py.

        Raises:
            VLLMValidationError: if it names one.
        """
        found = prompt["prompt_token_ids"].count(self.model_config.hf_config.image_token_id)
        if found and not prompt.get("multi_modal_data"):
            raise VLLMValidationError(
                f"The prompt names {found} images ({IMAGE_TOKEN}), but 0 were given; pass as many images as it names, or "
                "send the text as a chat message, in which it stays text."
            )


def _check_parts(messages: Any) -> None:
    """
    Raises:
        VLLMValidationError: for a message with a video or a sound.
    """
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            kind = str(part.get("type")) if isinstance(part, dict) else "text"
            if "video" in kind or "audio" in kind:
                raise VLLMValidationError(
                    f"A message holds a part of type {kind!r}; a DSVL checkpoint under vLLM takes text and images (of "
                    f"a video, its frames). {ELSEWHERE}"
                )


def _as_parts(params: Any) -> Any:
    """Images stand in messages as parts: their names in a text would be protected like any other."""
    return replace(params, chat_template_content_format="openai")


def _images(prompt: Any) -> list[Any]:
    images = (prompt.get("multi_modal_data") or {}).get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4 else [images]


__all__ = ["DSVLRenderer", "DSVLTokenizer", "protect", "protect_message", "protect_tokenizer"]
