"""For plugin authors: the conformance suite and the golden-vector command (`python -m kdcore.testing.golden`)."""

from kdcore.testing.conformance import conformance, effect

__all__ = ["conformance", "effect"]
