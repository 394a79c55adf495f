"""HierarchicalPrune: position-aware pruning and distillation of diffusion transformers."""
