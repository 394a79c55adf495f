"""Label-assisted distillation: a light teacher that sees noised labels beside the image."""
