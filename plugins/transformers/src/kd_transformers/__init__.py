"""Hugging Face transformers models as teachers and students."""
