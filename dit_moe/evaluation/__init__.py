"""Images against images: sources → features on disk → numbers → a report that says how each was made."""
