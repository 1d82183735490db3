"""RETRO as Hugging Face models: language models that read neighbours of their own text.

(Borgeaud et al. 2022.)
"""
