"""DISCOVR: video encoders without labels, by distilled image supervision and online clusters."""
