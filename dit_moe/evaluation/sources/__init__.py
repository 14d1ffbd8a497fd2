"""What can be evaluated, by the word that names it."""
