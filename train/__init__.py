"""Experts in the making: continual pre-training (`python -m train.cpt`), fine-tuning on pairs (`python -m train.sft`).

Hand-written loops over `minillama` models and `corpora` text. Nothing here knows how a model decodes.
"""
