"""Measurements of speed and memory, one script each: ``python -m benchmarks.moe_layer``.

Started so, a script runs with the settings of the commands, which count from the first import of torch on.
"""

from dit_moe.cli.process import prepare_process

prepare_process()
