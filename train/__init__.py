"""Continual pre-training (`python -m train.cpt`) and fine-tuning on sentence pairs (`python -m train.sft`).

Hand-written loops over `minillama` models and `corpora` text, which know nothing of decoding.
"""
