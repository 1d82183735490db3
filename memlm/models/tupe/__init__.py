"""TUPE encoders and their baselines as Hugging Face models (Ke et al. 2021)."""
