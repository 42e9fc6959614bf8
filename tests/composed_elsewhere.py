"""Compose a checkpoint and answer from it, in an environment with another transformers; prints JSON.

python composed_elsewhere.py TOWER LANGUAGE_MODEL OUTPUT
"""

import json
import sys

import plain_answer
import torch

import dsvl

if __name__ == "__main__":
    tower, language, output = sys.argv[1:]
    torch.manual_seed(0)
    dsvl.save_checkpoint(*dsvl.compose(tower, language), output)
    print(json.dumps(plain_answer.answer(output)))
