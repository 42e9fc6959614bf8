"""A process with many clients of a server: each asks `rounds` times, and every third one disconnects during the answer.

Standard input: {"port", "model", "clients", "rounds", "long", "asked": [messages], "expected": [texts]}. Standard output:
the number of answers and of disconnects, and every wrong answer or error.
"""

import json
import socket
import sys
import threading
import time
from typing import Any

from model_server import post
from openai import OpenAI


class Clients:
    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.lock = threading.Lock()
        self.answered = self.disconnected = 0
        self.wrong: list[list[str]] = []

    def run(self) -> dict[str, Any]:
        threads = [threading.Thread(target=self._one, args=(number,)) for number in range(self.task["clients"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"answered": self.answered, "disconnected": self.disconnected, "wrong": self.wrong}

    def _one(self, number: int) -> None:
        base_url = f"http://127.0.0.1:{self.task['port']}/v1"
        with OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120) as client:
            for count in range(number + 1, number + 1 + self.task["rounds"]):
                which = count % len(self.task["asked"])
                request = {"model": self.task["model"], "messages": self.task["asked"][which]}
                if number % 3 == 0:
                    self._disconnect(client, request, stream=count % 2 == 0)
                    continue
                try:
                    answer = self._stay(client, request, stream=count % 2 == 0)
                except Exception as error:  # errors are reported as wrong answers
                    answer = repr(error)
                with self.lock:
                    self.answered += 1
                    if answer != self.task["expected"][which]:
                        self.wrong.append([answer, self.task["expected"][which]])

    def _stay(self, client: OpenAI, request: dict[str, Any], stream: bool) -> str:
        if not stream:
            return client.chat.completions.create(**request, max_tokens=8).choices[0].message.content or ""
        chunks = client.chat.completions.create(**request, max_tokens=8, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def _disconnect(self, client: OpenAI, request: dict[str, Any], stream: bool) -> None:
        if stream:
            chunks = client.chat.completions.create(**request, max_tokens=self.task["long"], stream=True)
            next(iter(chunks))
            chunks.close()
        else:
            body = json.dumps(request | {"max_tokens": self.task["long"]}).encode()
            with socket.create_connection(("127.0.0.1", self.task["port"])) as connection:
                connection.sendall(post(body))
                time.sleep(0.2)
        with self.lock:
            self.disconnected += 1


if __name__ == "__main__":
    json.dump(Clients(json.load(sys.stdin)).run(), sys.stdout)
