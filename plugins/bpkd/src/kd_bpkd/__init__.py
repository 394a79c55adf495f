"""Boundary privileged knowledge distillation for semantic segmentation."""
