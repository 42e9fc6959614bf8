"""`dsvl.training` with image parallelism that deals out every text to the processes.

torchrun tests/dealt_text_training.py FLAGS ...
"""

import runpy

from dsvl.acceleration.parallel import split_batch

if __name__ == "__main__":
    split_batch.deals_text = lambda *counts: True
    runpy.run_module("dsvl.training", run_name="__main__")
