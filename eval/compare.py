"""`python eval/compare.py …` is `dit-moe compare …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
