"""What the tests of registration and of selection share."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A model that is not DeepSeek-V4; its configuration is all that is read of it."""
    directory = tmp_path_factory.mktemp("llama")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128)
    config |= dict(hidden_size=64, intermediate_size=64, max_position_embeddings=128)
    config |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
