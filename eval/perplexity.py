"""`python eval/perplexity.py …` is `dit-moe perplexity …`."""

import sys

from dit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["perplexity", *sys.argv[1:]]))
