"""The sub-commands of ``dit-moe``, each `add_arguments(parser)` and `run(args)`; the scripts call the same two."""
