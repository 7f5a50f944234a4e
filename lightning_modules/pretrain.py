"""Pretrain: next-token prediction on running text."""

from lightning_modules.language_model import LanguageModel


class Pretrain(LanguageModel):
    """Causal language modelling; the base states all of it."""
