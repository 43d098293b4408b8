"""`vllm-dsv4-indexer accuracy`: what the indexer finds in long contexts."""
