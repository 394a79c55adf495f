"""Collaborative learning of a CNN and a vision transformer for semantic segmentation."""
