"""`python train.py …` is `dit-moe train …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
