"""Generating answers to all turns of a data set, in batches, resuming an interrupted run."""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..chat.prompts import count_positions, read_prompt
from ..data.sample_errors import NAMED, BadSample, one_sample
from ..image_reading_dsvl import ImageError, image_size
from ..utils.image_loading import open_image
from ..utils.video_loading import fetch_video_source
from ..video_reading_dsvl import open_part
from .answer_file import AnswerFile
from .answer_records import AnswerRecord
from .generate_answers import generate_answers
from .metrics import score
from .questions import EvaluationConversation, Questions, source_of

logger = logging.getLogger(__name__)

Parts = list[dict[str, Any]]  # of a message: an image, or the frames of a video
Item = tuple[int, Sequence[int]]  # index of a conversation, and the indices of its turns to ask in sequence


class Evaluator:
    """Answer the questions of a data set with a model.

    A batch holds conversations of similar length, the longest first, and goes through their turns in parallel. An image that
    cannot be read raises, or its conversation is skipped, depending on `questions`' `on_bad_sample`. A turn that exceeds the
    context length is skipped with all later turns of its conversation.

    Args:
        model: a `DSVLForConditionalGeneration`, in evaluation mode.
        processor: its `DSVLProcessor`.
        questions: the data.
        batch_size: number of turns in a batch.
        max_new_tokens: maximum length of an answer.
        given_answers: whether the prompt of a turn contains the data's answers to earlier turns instead of the model's.
        allow_urls: whether images may be fetched from http(s) URLs.
        seed: of sampling.
        options: arguments of `generate()`, which override `generate_answers.GREEDY`.

    Attributes:
        skipped: conversation id -> why it was skipped.
        too_long: number of turns that were skipped because they exceed the context length.
        tokens, seconds: number of tokens that `run` generated, and the time for it.

    Raises:
        ValueError: for URLs without `allow_urls`, or for `given_answers` if a turn before the last has no answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        questions: Questions,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        given_answers: bool = False,
        allow_urls: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; pass at least 1.")
        self.model, self.processor, self.questions = model, processor, questions
        self.batch_size, self.max_new_tokens, self.options = batch_size, max_new_tokens, options
        self.given_answers, self.allow_urls, self.seed = given_answers, allow_urls, seed
        self.max_prompt_positions = model.config.text_config.max_position_embeddings - max_new_tokens
        self.skipped: dict[str, str] = {}
        self.too_long = self.tokens = self._warnings = 0
        self.seconds = 0.0
        for outline in questions.outlines:
            if outline.address is not None and not allow_urls:
                raise ValueError(
                    f"{questions.source}: conversation {outline.id!r} has an image or a video with the URL "
                    f"{outline.address:.200}; pass --allow-urls to fetch it."
                )
            if given_answers and not all(outline.answered[:-1]):
                raise ValueError(
                    f"{questions.source}: turn {outline.answered.index(False)} of conversation {outline.id!r} has no "
                    "answer; omit --given-answers, so that the model's own answers are used."
                )

    def run(self, file: AnswerFile) -> dict[str, Any]:
        """Answer the turns that the file does not hold yet, append the answers, and write and return the summary."""
        turns = sum(len(outline.letters) for outline in self.questions.outlines)
        with logging_redirect_tqdm(), tqdm(total=turns, initial=len(file.answers), unit="turn", disable=None) as bar:
            for group in self._groups():
                for asked in self._ask(group, file):
                    bar.update(asked)
        file.finish(outline.id for outline in self.questions.outlines)
        counts = {
            "conversations": len(self.questions),
            "turns": turns,
            "answered": len(file.answers),
            "conversations_skipped": len(self.skipped),
            "turns_too_long": self.too_long,
            "samples_skipped": self.questions.skipped,
        }
        return file.write_summary(counts, self.skipped)

    def _groups(self) -> Iterator[list[Item]]:
        """The items of each batch. They are the same in every run, so that a resumed run generates the same batches."""
        sizes = []  # estimated tokens of each turn's prompt
        for index, outline in enumerate(self.questions.outlines):
            own = [n // 4 + m for n, m in zip(outline.letters, self._image_tokens(index), strict=True)]
            sizes.append(list(accumulate(own)))
        items: list[Item]
        if self.given_answers:  # turns are independent of each other
            items = [(index, [turn]) for index, own in enumerate(sizes) for turn in range(len(own))]
            items.sort(key=lambda item: -sizes[item[0]][item[1][0]])
        else:  # conversations with the same number of turns together, so that later batches are full
            items = [(index, range(len(own))) for index, own in enumerate(sizes)]
            items.sort(key=lambda item: (-len(item[1]), -sizes[item[0]][-1]))
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]

    def _image_tokens(self, index: int) -> list[int]:
        """The image tokens of each turn of a conversation. If sizes decide, headers of files are read; images that are
        fetched later, or cannot be read, count as one tile. Videos count as the most frames that they can have."""
        processor, outline = self.processor, self.questions.outlines[index]
        frames = [count * processor.max_frames * processor.image_seq_length for count in outline.videos]
        if not processor.follows_size or not any(outline.images):
            return [m * processor.image_seq_length + n for m, n in zip(outline.images, frames, strict=True)]
        tokens = []
        for turn, own in zip(self.questions[index].turns, frames, strict=True):
            sizes = map(_size, turn.images)
            lengths = [processor.tile_lengths(*size) if size else [processor.image_seq_length] for size in sizes]
            tokens.append(own + sum(map(sum, lengths)))
        return tokens

    def _ask(self, group: list[Item], file: AnswerFile) -> Iterator[int]:
        """Answer the turns of a group; yields the number of answers of each batch."""
        ids = {index: self.questions.outlines[index].id for index, _ in group}
        waiting = [item for item in group if any((ids[item[0]], turn) not in file for turn in item[1])]
        opened = {index: self._open(index, file) for index, _ in waiting}
        for depth in range(max((len(turns) for _, turns in waiting), default=0)):
            batch = []
            for index, turns in waiting:
                found = opened[index]
                if found is None or depth >= len(turns) or (ids[index], turns[depth]) in file:
                    continue
                conversation, images, names = found
                turn = turns[depth]
                prompt = self._prompt(conversation, images, turn, file)
                length = count_positions(self.model.config, read_prompt(self.processor, prompt))
                if length > self.max_prompt_positions:
                    self._skip_turns(conversation.id, turn, len(turns) - depth, length)
                    opened[index] = None
                    continue
                batch.append((conversation, turn, prompt, names[turn]))
            if batch:
                file.add(self._answers(batch, file.header["model"]))
                yield len(batch)

    def _answers(self, batch: list[tuple[EvaluationConversation, int, Any, list[str]]], model: str) -> list[AnswerRecord]:
        if self.options.get("do_sample"):
            # The seed depends on this batch only, so that a resumed run samples what an uninterrupted one samples.
            text = repr([self.seed, [(conversation.id, turn) for conversation, turn, _, _ in batch]])
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
        started = time.perf_counter()
        prompts = [prompt for _, _, prompt, _ in batch]
        answers = generate_answers(self.model, self.processor, prompts, self.max_new_tokens, **self.options)
        self.seconds += time.perf_counter() - started
        self.tokens += sum(answer.tokens for answer in answers)
        records = []
        for (conversation, turn, _, images), answer in zip(batch, answers, strict=True):
            asked = conversation.turns[turn]
            records.append(
                AnswerRecord(
                    id=conversation.id,
                    turn=turn,
                    question=asked.question,
                    images=images,
                    answer=answer.text,
                    references=asked.references,
                    scores=score(answer.text, asked.references),
                    model=model,
                )
            )
        return records

    def _prompt(
        self, conversation: EvaluationConversation, images: list[list[Parts]], turn: int, file: AnswerFile
    ) -> list[dict[str, Any]]:
        """The messages up to the question of a turn, with its earlier answers."""
        messages = list(conversation.system)
        for number, one in enumerate(conversation.turns[: turn + 1]):
            following = iter(images[number])
            messages += [_with_images(message, following) for message in one.messages]
            if number < turn and self.given_answers:
                assert one.answer is not None  # the constructor checks it
                messages.append(one.answer)
            elif number < turn:
                messages.append({"role": "assistant", "content": file.answers[conversation.id, number].answer})
        return messages

    def _open(
        self, index: int, file: AnswerFile
    ) -> tuple[EvaluationConversation, list[list[Parts]], list[list[str]]] | None:
        """A conversation, the images of each turn, and their names; None if an image cannot be read."""
        name = self.questions.outlines[index].id
        if name in self.skipped:
            return None
        found = None
        with self.questions.bad.again(self.questions.location(index)):
            conversation = self.questions[index]
            try:
                with one_sample():
                    images = [[self._opened(part) for part in asked.media] for asked in conversation.turns]
            except BadSample as error:
                self.skipped[name] = error.reason
                raise
            found = conversation, images
        if found is None:
            return None
        conversation, images = found
        names = [[name for part in one.media for name in self._kept(source_of(part), file)] for one in conversation.turns]
        return conversation, images, names

    def _opened(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """An image, or the frames of a video, as parts of a message; all are decoded, so that broken ones are found."""
        if part["type"] == "image":
            return [part | {"image": open_image(part["image"], self.allow_urls)}]
        fetch = partial(fetch_video_source, allow_urls=self.allow_urls)
        frames = open_part(part, self.processor.video_sampling, fetch).parts()
        return [frame | {"image": frame["image"].read_frame()} for frame in frames]

    @staticmethod
    def _kept(source: Any, file: AnswerFile) -> list[str]:
        """The names of an image, of a video, or of the given frames of one."""
        if isinstance(source, list):
            return [name for one in source for name in Evaluator._kept(one, file)]
        return [source if isinstance(source, str) else file.keep_image(source)]

    def _skip_turns(self, name: str, turn: int, count: int, length: int) -> None:
        self.too_long += count
        self._warnings += 1
        if self._warnings <= NAMED:
            logger.warning(
                "Conversation %s is skipped from turn %d on: its prompt takes %d positions, and the context has %d for it.",
                name,
                turn,
                length,
                self.max_prompt_positions,
            )


def _size(source: str | bytes) -> tuple[int, int] | None:
    """(height, width) of an image; None if it is not there to be measured."""
    try:
        return image_size(source, allow_urls=False)[::-1]
    except ImageError:
        return None


def _with_images(message: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [one for p in message["content"] for one in ([p] if p["type"] == "text" else next(images))]
    return {"role": "user", "content": parts}
