"""Graphs and graph neural networks of PyTorch Geometric, for node classification."""
