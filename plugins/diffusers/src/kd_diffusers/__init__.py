"""Denoisers of diffusers as teachers and students."""
