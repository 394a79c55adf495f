"""timm models as teachers and students."""
