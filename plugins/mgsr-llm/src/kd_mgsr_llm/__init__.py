"""Sequences, tokens and spans revised while a language model is distilled."""
