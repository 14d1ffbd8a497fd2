"""`python eval/dial.py …` is `dit-moe dial …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["dial", *sys.argv[1:]]))
