"""Conversations as documents of lm-evaluation-harness; `conversations.yaml` says how to run them."""

from typing import Any

from datasets import Dataset

from dsvl.data import complete_messages, load_conversations
from dsvl.data.conversations import images_of
from dsvl.image_reading_dsvl import read_image

_read: list[Any] = []  # the data set: a document of the harness is written into its logs, so it holds no images


def load(data: str, **metadata: Any) -> dict[str, Dataset]:
    """The documents: of each conversation the first question, its images marked by <image>, and the answer to it."""
    _read[:] = [load_conversations(data)]
    documents = []
    for place in range(len(_read[0])):
        question, answer = _first_round(place)
        content = question["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if any("<image>" in text for text in texts):
            raise ValueError(f"Conversation {place} of {data} has <image> in a text, which the harness takes for an image.")
        asked = "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)
        reply = answer["content"] if isinstance(answer["content"], str) else answer["content"][0]["text"]
        documents.append({"place": place, "question": asked, "answer": reply})
    return {"test": Dataset.from_list(documents)}


def images(document: dict[str, Any]) -> list[Any]:
    """The images of a document's question."""
    return [read_image(source) for source in images_of(_first_round(document["place"])[:1])]


def _first_round(place: int) -> list[dict[str, Any]]:
    messages = complete_messages(_read[0][place])
    return [message for message in messages if message["role"] != "system"][:2]
