"""Studies: several variants of an experiment with several seeds, trained, scored alike and put side by side."""
