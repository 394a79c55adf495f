"""The command line of kd."""
