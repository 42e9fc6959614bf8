"""Conversations as documents of lm-evaluation-harness; `conversations.yaml` says how to run them."""

from typing import Any

from datasets import Dataset

from dsvl.data import complete_messages, load_conversations
from dsvl.data.messages import images_of
from dsvl.image_reading_dsvl import read_image

_data: list[Any] = []  # the data set; documents hold no images, because the harness logs them


def load(data: str, **metadata: Any) -> dict[str, Dataset]:
    """Make a document of the first turn of each conversation; <image> marks the images of the question."""
    _data[:] = [load_conversations(data)]
    documents = []
    for index in range(len(_data[0])):
        question, answer = _first_turn(index)
        content = question["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if any("<image>" in text for text in texts):
            raise ValueError(f"Conversation {index} of {data} has <image> in a text; the harness would insert an image.")
        asked = "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)
        reply = answer["content"] if isinstance(answer["content"], str) else answer["content"][0]["text"]
        documents.append({"index": index, "question": asked, "answer": reply})
    return {"test": Dataset.from_list(documents)}


def images(document: dict[str, Any]) -> list[Any]:
    """The images of a document's question."""
    return [read_image(source) for source in images_of(_first_turn(document["index"])[:1])]


def _first_turn(index: int) -> list[dict[str, Any]]:
    messages = complete_messages(_data[0][index])
    return [message for message in messages if message["role"] != "system"][:2]
