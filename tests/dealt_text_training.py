"""`dsvl.training` with image parallelism that deals out texts of any length to the processes.

torchrun tests/dealt_text_training.py FLAGS ...
"""

import runpy

from dsvl.acceleration.parallel import split_batch

if __name__ == "__main__":
    split_batch.LONG_TEXT = 1
    runpy.run_module("dsvl.training", run_name="__main__")
