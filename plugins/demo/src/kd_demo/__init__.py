"""Embedded data sets and small models, and the quickstart."""
