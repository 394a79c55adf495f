"""LinguGKD: what a language model makes of a node and its neighbourhood, distilled hop by hop into a graph network."""
