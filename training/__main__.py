"""`python -m dsvl.training`, also under torchrun, deepspeed and accelerate launch: the same as `dsvl train`."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
