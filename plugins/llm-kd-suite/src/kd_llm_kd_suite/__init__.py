"""Knowledge distillation of large language models, as a suite: elicit, then distil (arXiv 2402.13116)."""
