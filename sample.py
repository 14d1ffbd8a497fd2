"""`python sample.py …` is `dit-moe sample …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
