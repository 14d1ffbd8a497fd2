"""`python eval/routing.py …` is `dit-moe routing …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["routing", *sys.argv[1:]]))
