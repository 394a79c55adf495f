"""Class-incremental segmentation with background adaptation and residual modelling."""
