"""Symbolic knowledge distillation: knowledge as text, from a general model through a critic into a small one."""
