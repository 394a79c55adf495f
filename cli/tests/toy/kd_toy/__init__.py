"""A plugin for the tests of the command line: a separable task, linear models, one method."""
