"""Distillation from a multimodal and a cross-modal teacher, specialised by masks and routed per instance."""
