"""Distillation through adaptive and cooperative attention masks (ACAM-KD)."""
