"""A generator of bad inputs, drawn by a seed, and what the commands answer to them.

``python -m tests.bad_inputs --seed 1 --count 1000`` prints every answer that is not as it should be.
"""
