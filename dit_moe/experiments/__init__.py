"""What a config file holds, and the run folder it makes."""
