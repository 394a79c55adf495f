"""Segmentation networks of segmentation_models_pytorch, and pictures of what segmenters predict."""
