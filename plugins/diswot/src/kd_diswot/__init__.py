"""DisWOT: the architecture of a student, searched without training, then distilled."""
