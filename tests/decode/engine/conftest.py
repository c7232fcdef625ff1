"""Members of unequal shapes, for tests of the engine that need no models of their own."""

import pytest
from engine_requests import COMBINE
from tiny import tiny_model

from decode import Ensemble


@pytest.fixture(scope="session")
def models():
    """Members of unequal shapes, which see few tokens: then stop tokens are not rare."""
    return {
        "L": tiny_model(0, vocab_size=60, eos_token_id=(1, 3)),
        "S": tiny_model(1, vocab_size=60, num_hidden_layers=1),
        "A": tiny_model(2, vocab_size=60, hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
    }


@pytest.fixture(scope="session")
def ensemble(models):
    return Ensemble(models, COMBINE)
