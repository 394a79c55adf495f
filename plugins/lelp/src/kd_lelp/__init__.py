"""Linear projections of teacher embeddings, for distillation with few classes."""
