"""The compared forms of attention.

`"causal"` and `"mmca"` are those of the package, with its kernels. The others are computed here with dense masks: their
quality counts, their step times do not compare with kernels. None of them needs a change of the package: a model composed
with `multimodal_attention="causal"` runs transformers' attention interface, and a `Form` is registered there.

Let T(i) and I(i) be the text and the image keys up to query i, O(i) the tokens of the image of query i.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from attention_quality.scenes import heading
from dsvl.positions_dsvl import image_starts

Sets = list[torch.Tensor]  # boolean (batch, queries, keys) each: the keys of a softmax

# What an image's keys and values depend on. With the first two they can be reused exactly.
IMAGE_ALONE, AND_NUMBER, EVERYTHING = "the image alone", "the image and its number", "all before it"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch as forms see them.

    Attributes:
        is_image: (batch, tokens).
        image: (batch, tokens), which image of its row a token belongs to, -1 for text.
    """

    is_image: torch.Tensor
    image: torch.Tensor

    @classmethod
    def of(cls, is_image: torch.Tensor, tokens_per_image: int) -> "Tokens":
        """Of rows in which each image has `tokens_per_image` tokens."""
        image = torch.div(is_image.cumsum(-1) - 1, tokens_per_image, rounding_mode="floor")
        return cls(is_image, image.masked_fill(~is_image, -1))

    @property
    def past(self) -> torch.Tensor:
        """Keys up to the query: (1, queries, keys)."""
        tokens = self.is_image.shape[1]
        return torch.ones(1, tokens, tokens, dtype=torch.bool, device=self.is_image.device).tril()

    @property
    def own(self) -> torch.Tensor:
        """The query's own key: (1, queries, keys)."""
        return torch.eye(self.is_image.shape[1], dtype=torch.bool, device=self.is_image.device)[None]

    @property
    def own_image(self) -> torch.Tensor:
        """The keys of the query's image, later ones too: (batch, queries, keys)."""
        return (self.image[:, :, None] == self.image[:, None]) & self.is_image[:, :, None]

    @property
    def block(self) -> torch.Tensor:
        """The image of the token's block, -1 for other text: (batch, tokens). A block is an image and the token before it,
        its heading, which the chat template writes and which holds the image's number."""
        following = nn.functional.pad(self.image[:, 1:], (0, 1), value=-1)
        return torch.where(self.is_image, self.image, following)

    @property
    def own_block(self) -> torch.Tensor:
        """The keys of the query's block, later ones too: (batch, queries, keys)."""
        return (self.block[:, :, None] == self.block[:, None]) & self.from_block

    @property
    def from_block(self) -> torch.Tensor:
        """(batch, queries, 1)"""
        return self.block[:, :, None] >= 0

    @property
    def from_image(self) -> torch.Tensor:
        """(batch, queries, 1)"""
        return self.is_image[:, :, None]

    @property
    def to_image(self) -> torch.Tensor:
        """(batch, 1, keys)"""
        return self.is_image[:, None]


# Each returns the sets of keys over which separate softmaxes run; their results are added, and an empty set adds 0.


def causal(tokens: Tokens) -> Sets:
    return [tokens.past]


def bidirectional(tokens: Tokens) -> Sets:
    return [tokens.past | tokens.own_image]


def mmca(tokens: Tokens) -> Sets:
    text = tokens.past & ~tokens.to_image & ~tokens.from_image
    image = torch.where(tokens.from_image, tokens.own, tokens.past & tokens.to_image)
    return [text, image]


def mmca_own_image(tokens: Tokens) -> Sets:
    text = tokens.past & ~tokens.to_image & ~tokens.from_image
    image = torch.where(tokens.from_image, tokens.own_image, tokens.past & tokens.to_image)
    return [text, image]


def alpha(tokens: Tokens) -> Sets:
    return [torch.where(tokens.from_image, tokens.own, tokens.past)]


def alpha_own_image(tokens: Tokens) -> Sets:
    return [torch.where(tokens.from_image, tokens.own_image, tokens.past)]


def block(tokens: Tokens) -> Sets:
    return [torch.where(tokens.from_block, tokens.past & tokens.own_block, tokens.past)]


def block_number(tokens: Tokens) -> Sets:
    number = tokens.own_block & ~tokens.to_image
    return [torch.where(tokens.from_block, tokens.own | number, tokens.past)]


def block_bidirectional(tokens: Tokens) -> Sets:
    from_heading = tokens.from_block & ~tokens.from_image
    return [torch.where(from_heading, tokens.own, torch.where(tokens.from_image, tokens.own_block, tokens.past))]


def mmca_sees_text(tokens: Tokens) -> Sets:
    text = tokens.past & ~tokens.to_image
    image = torch.where(tokens.from_image, tokens.own, tokens.past & tokens.to_image)
    return [text, image]


@dataclass(frozen=True)
class Arm:
    """A form of attention.

    Attributes:
        about: what a text query and an image query attend to.
        upper: the sets of the upper half of the layers.
        lower: those of the lower half.
        core: the `multimodal_attention` of the package that computes it; None for a `Form`.
        depends_on: what an image's keys and values depend on, besides the weights.
        varies: the arm that it varies; it takes that one's learning rate.
        has_title: whether an image's embeddings also hold its number (`Title`).
        is_numbered: whether they hold it by the package's `numbered_images`.
    """

    about: str
    upper: Callable[[Tokens], Sets]
    lower: Callable[[Tokens], Sets]
    core: str | None = None
    depends_on: str = EVERYTHING
    varies: str | None = None
    has_title: bool = False
    is_numbered: bool = False


def _arm(about: str, sets: Callable[[Tokens], Sets], **more: Any) -> Arm:
    return Arm(about, sets, sets, **more)


ARMS = {
    "causal": _arm("every query: one softmax over T(i) and I(i)", causal, core="causal"),
    "mmca": _arm(
        "text: softmax over T(i) + softmax over I(i); image: its own value", mmca, core="mmca", depends_on=IMAGE_ALONE
    ),
    "alpha": _arm(
        "text: one softmax over T(i) and I(i); image: its own value (D-Attn, arXiv 2502.01906)",
        alpha,
        depends_on=IMAGE_ALONE,
    ),
    "block": _arm("as causal; block: what is before it in its block", block, depends_on=AND_NUMBER),
    "block_number": _arm("as alpha; block: itself and its number", block_number, depends_on=AND_NUMBER),
    "mmca_title": _arm(
        "as mmca; image: its embeddings are added to a trained linear map of its number's",
        mmca,
        core="mmca",
        depends_on=AND_NUMBER,
        has_title=True,
    ),
    "mmca_numbered": _arm(
        "as mmca_title, by the package's numbered_images: numbers have embeddings of their own, at first their headings'",
        mmca,
        core="mmca",
        depends_on=AND_NUMBER,
        varies="mmca_title",
        is_numbered=True,
    ),
    "block_bidirectional": _arm(
        "as block; image: also the later tokens of its image", block_bidirectional, depends_on=AND_NUMBER, varies="block"
    ),
    "bidirectional": _arm("as causal; image: also the later tokens of its image", bidirectional, varies="causal"),
    "mmca_own_image": _arm(
        "as mmca; image: softmax over O(i), its whole image", mmca_own_image, depends_on=IMAGE_ALONE, varies="mmca"
    ),
    "mmca_upper": Arm("mmca in the upper half of the layers, causal in the lower", mmca, causal, varies="mmca"),
    "alpha_own_image": _arm("as alpha; image: softmax over O(i)", alpha_own_image, depends_on=IMAGE_ALONE, varies="alpha"),
    "mmca_sees_text": _arm(
        "as mmca; image: its own value + softmax over T(i), the direction of arXiv 2503.02597", mmca_sees_text, varies="mmca"
    ),
}
PRIMARY = ("causal", "mmca", "alpha")
# Forms in which an image knows its number. On a tie the first is preferred.
NUMBERED = ("block", "block_number", "mmca_title")
PACKAGE = "mmca_numbered"  # what became of the one that was chosen


class Form:
    """Computes an arm in a model that was composed with `multimodal_attention="causal"`.

    Padding must be on the right, where no query sees it, and there is no KV cache: the experiment trains, and measures by
    the most probable tokens.

    Args:
        arm: name of an arm.
        model: a `DSVLForConditionalGeneration`, whose decoder then runs the arm.
    """

    def __init__(self, arm: str, model: Any) -> None:
        self.arm, self.config = ARMS[arm], model.config
        if model.config.multimodal_attention != "causal":
            raise ValueError(
                f"A form is computed by a model of multimodal_attention='causal', not of "
                f"{model.config.multimodal_attention!r}; compose it with that."
            )
        self.upper: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.lower: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.first_upper = model.config.text_config.num_hidden_layers // 2
        name = f"attention_quality_{arm}_{id(self)}"
        # Compiled layers call it as it is: its masks change from batch to batch.
        AttentionInterface.register(name, torch.compiler.disable(self.attend))
        AttentionMaskInterface.register(name, _no_mask)
        model.model.register_forward_pre_hook(self.prepare, with_kwargs=True)
        model.model.language_model.set_attn_implementation(name)

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward call of the model: make the masks of its `input_ids`."""
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("attention_mask") is not None or kwargs.get("use_cache") is not False:
            raise ValueError("A form takes input_ids by keyword, without attention_mask and KV cache (use_cache=False).")
        tokens = Tokens.of(ids == self.config.image_token_id, self.config.image_seq_length)
        self.upper = [_masked(keys, len(ids)) for keys in self.arm.upper(tokens)]
        same = self.arm.lower is self.arm.upper
        self.lower = self.upper if same else [_masked(keys, len(ids)) for keys in self.arm.lower(tokens)]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """An attention function of transformers: (batch, heads, tokens, head_dim) to (batch, tokens, heads, head_dim)."""
        masks = self.upper if module.layer_idx >= self.first_upper else self.lower
        grouped = query.shape[1] != key.shape[1]
        outputs = []
        for mask, has_keys in masks:
            one = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
            outputs.append(torch.where(has_keys, one, 0))
        return sum(outputs[1:], start=outputs[0]).transpose(1, 2).contiguous(), None


class Title(nn.Module):
    """Adds a trained linear map of the embedding of an image's heading, its number, to the embeddings of its tokens.

    Args:
        model: a `DSVLForConditionalGeneration`, of which it becomes a part.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        embeddings = model.get_input_embeddings().weight
        self.config = model.config
        self.map = nn.Linear(embeddings.shape[1], embeddings.shape[1], bias=False).to(embeddings)
        nn.init.zeros_(self.map.weight)  # it begins as the model without it
        self.headings: tuple[torch.Tensor, torch.Tensor] | None = None
        model.model.register_forward_pre_hook(self.find_headings, with_kwargs=True)
        model.model.language_model.register_forward_pre_hook(self.add_headings, with_kwargs=True)
        model.model.title = self

    def find_headings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward call of the model: the id of the heading of each token's image."""
        ids = kwargs.get("input_ids")
        if ids is None:
            raise ValueError("Titles are read from input_ids, but the call has none; pass input_ids by keyword.")
        is_image = ids == self.config.image_token_id
        starts = image_starts(is_image, self.config.image_seq_length)
        index = torch.arange(ids.shape[1], device=ids.device)
        heading = torch.where(starts, index - 1, 0).cummax(-1).values
        self.headings = is_image, ids.gather(1, heading)

    def add_headings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before each forward call of the decoder."""
        assert self.headings is not None
        (is_image, headings), embeds = self.headings, kwargs["inputs_embeds"]
        titles = self.map(module.get_input_embeddings()(headings)).to(embeds.dtype)
        return args, kwargs | {"inputs_embeds": embeds + titles * is_image[..., None]}


def heading_ids(tokenizer: Any) -> list[int]:
    """The tokens of all headings, in their order."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word] for word in itertools.takewhile(vocabulary.__contains__, map(heading, itertools.count(1)))]


@torch.no_grad()
def name_numbers(model: Any, tokenizer: Any) -> None:
    """Let the package's embeddings of numbers begin as those of the headings, which are single words in this vocabulary as
    the package's own choice, the numbers, are in others."""
    numbers = model.model.multi_modal_projector.image_numbers.embeddings
    numbers.copy_(model.get_input_embeddings().weight[torch.tensor(heading_ids(tokenizer))])


def _masked(keys: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask (batch, 1, queries, keys), in which a query without keys sees all; and which have keys, with one key."""
    mask = keys.expand(batch, -1, -1)[:, None]
    has_keys = mask.any(-1, keepdim=True)
    return mask | ~has_keys, has_keys


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' masks are not used: `Form.prepare` makes them."""
