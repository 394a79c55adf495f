"""Hugging Face and local data sets, with column mapping and transforms."""
