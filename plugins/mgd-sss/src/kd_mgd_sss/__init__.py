"""MGD-SSS: semi-supervised semantic segmentation, distilled from two teachers at three granularities."""
