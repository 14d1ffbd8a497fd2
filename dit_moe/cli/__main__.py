"""``python -m dit_moe.cli``: the console command, where it is not on the PATH."""

import sys

from dit_moe.cli import main

sys.exit(main())
