"""Classic distillation losses: soft targets, hints, attention, decoupled logits, correlation."""
