"""An evaluation: all rounds of all conversations, in batches, from where it was interrupted."""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.sample_errors import NAMED, BadSample, one_sample
from ..utils.image_loading import open_image
from .answer_file import AnswerFile
from .answer_records import Record
from .generate_answers import ask
from .metrics import score
from .questions import Conversation, Questions

logger = logging.getLogger(__name__)

Item = tuple[int, Sequence[int]]  # a conversation's place in the data, and which of its rounds are asked one after the other


class Evaluation:
    """Ask a model what a data set asks.

    Conversations go through their rounds together, batches of like length, the longest first. One with an image that cannot
    be opened is an error, or is skipped, as the questions have it (`on_bad_sample`); rounds for which the context has no
    room are left out, and what follows them.

    Args:
        model: a `DSVLForConditionalGeneration`, in evaluation mode.
        processor: its `DSVLProcessor`.
        questions: the data.
        batch_size: rounds at a time.
        max_new_tokens: of an answer.
        given_answers: ask each round after the data's answers to the earlier ones, not the model's own.
        allow_urls: whether images are fetched from addresses.
        seed: of sampling.
        options: what `generate()` takes, in the place of `asking.GREEDY`'s.

    Attributes:
        skipped: conversation -> why it was left out.
        too_long: rounds that were not asked for want of context.
        tokens, seconds: what `run` generated, and how long the model took.

    Raises:
        ValueError: if there are addresses that may not be fetched; or if rounds are to be asked after given answers, and one
            that has another round after it has none.
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
        self.room = model.config.text_config.max_position_embeddings - max_new_tokens
        self.skipped: dict[str, str] = {}
        self.too_long = self.tokens = self._told = 0
        self.seconds = 0.0
        for outline in questions.outlines:
            if outline.address is not None and not allow_urls:
                raise ValueError(
                    f"{questions.source}: conversation {outline.id!r} has the address of an image, {outline.address:.200}; "
                    "pass --allow-urls to fetch such images."
                )
            if given_answers and not all(outline.answered[:-1]):
                raise ValueError(
                    f"{questions.source}: round {outline.answered.index(False)} of conversation {outline.id!r} has no "
                    "answer to go on from; leave out --given-answers, so that the model's own are taken."
                )

    def run(self, file: AnswerFile) -> dict[str, Any]:
        """Ask what the file has no answer to, write answers as they come, and return the summary (also written)."""
        rounds = sum(len(outline.letters) for outline in self.questions.outlines)
        with logging_redirect_tqdm(), tqdm(total=rounds, initial=len(file.answers), unit="round", disable=None) as bar:
            for group in self._groups():
                for asked in self._ask(group, file):
                    bar.update(asked)
        file.finish(outline.id for outline in self.questions.outlines)
        counts = {
            "conversations": len(self.questions),
            "rounds": rounds,
            "answered": len(file.answers),
            "conversations_skipped": len(self.skipped),
            "rounds_too_long": self.too_long,
            "conversations_left_out": self.questions.left_out,
        }
        return file.write_summary(counts, self.skipped)

    def _groups(self) -> Iterator[list[Item]]:
        """What is asked together: the same in every run, so that one that was interrupted goes on with the same batches."""
        per_image = self.processor.image_seq_length
        sizes = []  # about how many tokens each round takes, all before it included
        for outline in self.questions.outlines:
            own = [n // 4 + m * per_image for n, m in zip(outline.letters, outline.images, strict=True)]
            sizes.append(list(accumulate(own)))
        items: list[Item]
        if self.given_answers:  # no round waits for another
            items = [(index, [place]) for index, own in enumerate(sizes) for place in range(len(own))]
            items.sort(key=lambda item: -sizes[item[0]][item[1][0]])
        else:  # those with as many rounds together, or later batches would not be full
            items = [(index, range(len(own))) for index, own in enumerate(sizes)]
            items.sort(key=lambda item: (-len(item[1]), -sizes[item[0]][-1]))
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]

    def _ask(self, group: list[Item], file: AnswerFile) -> Iterator[int]:
        """Ask the rounds of a group; after each batch, how many were answered."""
        ids = {index: self.questions.outlines[index].id for index, _ in group}
        waiting = [item for item in group if any((ids[item[0]], place) not in file for place in item[1])]
        opened = {index: self._open(index, file) for index, _ in waiting}
        for depth in range(max((len(places) for _, places in waiting), default=0)):
            batch = []
            for index, places in waiting:
                found = opened[index]
                if found is None or depth >= len(places) or (ids[index], places[depth]) in file:
                    continue
                conversation, images, names = found
                place = places[depth]
                prompt = self._prompt(conversation, images, place, file)
                length = self.processor.count_tokens(prompt, add_generation_prompt=True)
                if length > self.room:
                    self._leave_out_rounds(conversation.id, place, len(places) - depth, length)
                    opened[index] = None
                    continue
                batch.append((conversation, place, prompt, names[place]))
            if batch:
                file.add(self._answers(batch, file.header["model"]))
                yield len(batch)

    def _answers(self, batch: list[tuple[Conversation, int, Any, list[str]]], model: str) -> list[Record]:
        if self.options.get("do_sample"):
            # Of the questions, not of what was asked before: a run that was interrupted draws what a whole one draws.
            text = repr([self.seed, [(conversation.id, place) for conversation, place, _, _ in batch]])
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
        started = time.perf_counter()
        prompts = [prompt for _, _, prompt, _ in batch]
        answers = ask(self.model, self.processor, prompts, self.max_new_tokens, **self.options)
        self.seconds += time.perf_counter() - started
        self.tokens += sum(answer.tokens for answer in answers)
        records = []
        for (conversation, place, _, images), answer in zip(batch, answers, strict=True):
            asked = conversation.rounds[place]
            records.append(
                Record(
                    id=conversation.id,
                    round=place,
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
        self, conversation: Conversation, images: list[list[Any]], place: int, file: AnswerFile
    ) -> list[dict[str, Any]]:
        """The messages up to the question of a round, with its earlier answers."""
        messages = list(conversation.system)
        for number, one in enumerate(conversation.rounds[: place + 1]):
            following = iter(images[number])
            messages += [_with_images(message, following) for message in one.messages]
            if number < place and self.given_answers:
                assert one.answer is not None  # the constructor has seen to it
                messages.append(one.answer)
            elif number < place:
                messages.append({"role": "assistant", "content": file.answers[conversation.id, number].answer})
        return messages

    def _open(self, index: int, file: AnswerFile) -> tuple[Conversation, list[list[Any]], list[list[str]]] | None:
        """A conversation with the images of each round, and their names; None if one cannot be opened."""
        name = self.questions.outlines[index].id
        if name in self.skipped:
            return None
        found = None
        with self.questions.bad.again(self.questions.location(index)):
            conversation = self.questions[index]
            try:
                with one_sample():
                    images = [[open_image(one, self.allow_urls) for one in asked.images] for asked in conversation.rounds]
            except BadSample as error:
                self.skipped[name] = error.reason
                raise
            found = conversation, images
        if found is None:
            return None
        conversation, images = found
        names = [
            [source if isinstance(source, str) else file.keep_image(source) for source in one.images]
            for one in conversation.rounds
        ]
        return conversation, images, names

    def _leave_out_rounds(self, name: str, place: int, count: int, length: int) -> None:
        self.too_long += count
        self._told += 1
        if self._told <= NAMED:
            logger.warning(
                "Conversation %s is not asked from round %d on: it takes %d tokens, and the context leaves room for %d.",
                name,
                place,
                length,
                self.room,
            )


def _with_images(message: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [{"type": "image", "image": next(images)} if p["type"] == "image" else p for p in message["content"]]
    return {"role": "user", "content": parts}
