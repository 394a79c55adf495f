"""The conformance suite of every installed plugin: a new one is covered by being there."""

from kdcore import PluginManager
from kdcore.testing import conformance

for distribution in sorted({info.distribution for info in PluginManager().plugins()}):
    suite = conformance(distribution)
    globals()[suite.__name__] = suite
