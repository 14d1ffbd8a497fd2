"""`python eval/fid.py …` is `dit-moe eval …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
