"""The console command for launchers that start modules, as torchrun does with ``-m dit_moe.cli``."""

import sys

from dit_moe.cli import main

sys.exit(main())
