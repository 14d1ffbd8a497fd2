"""`python eval/table.py …` is `dit-moe table …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", *sys.argv[1:]]))
