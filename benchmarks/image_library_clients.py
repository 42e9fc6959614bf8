"""The clients of image_library.py: each asks one question after the other about the same images.

Standard input: {"port", "model", "clients", "requests", "images", "answer_tokens"}. Standard output: the seconds from the
first request to the last answer, after one that is not timed, and the answers in the order of the requests.
"""

import base64
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from threading import local
from typing import Any

import numpy as np
from PIL import Image

QUESTIONS = ("What is in image {}?", "How many dogs are in image {}?", "Describe image {} in a few words.")


def photograph(seed: int) -> bytes:
    """A JPEG file of 640 x 480 pixels, of about 40 kB."""
    grid = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(grid).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    task = json.load(sys.stdin)
    urls = [f"data:image/jpeg;base64,{base64.b64encode(photograph(seed)).decode()}" for seed in range(task["images"])]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]

    def body(number: int) -> bytes:
        text = QUESTIONS[number % len(QUESTIONS)].format(1 + number % len(images))
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        return json.dumps({"model": task["model"], "messages": messages, "max_tokens": task["answer_tokens"]}).encode()

    bodies = [body(number) for number in range(len(QUESTIONS) * len(images))]
    mine: Any = local()

    def ask(number: int) -> str:
        if not hasattr(mine, "connection"):
            mine.connection = HTTPConnection("127.0.0.1", task["port"])
        mine.connection.request(
            "POST", "/v1/chat/completions", bodies[number % len(bodies)], {"Content-Type": "application/json"}
        )
        answer = json.loads(mine.connection.getresponse().read())
        return answer["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(task["clients"]) as pool:
        ask(0)
        started = time.perf_counter()
        answers = list(pool.map(ask, range(task["requests"])))
        seconds = time.perf_counter() - started
    json.dump({"seconds": seconds, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
