"""TransKD: distillation between hierarchical vision transformers for semantic segmentation."""
