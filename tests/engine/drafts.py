"""A drafter for vLLM's speculative decoding that drafts what it has seen follow, and is wrong now
and then."""

WRONG = 5  # one position in so many


class FromMemory:
    """The first time that a prompt is answered there is no draft; the second time most are
    accepted."""

    def __init__(self, vllm_config, *_, **__):
        self.count = vllm_config.speculative_config.num_speculative_tokens
        self.next_token = {}  # by the tokens before it

    def load_model(self, model) -> None:
        """Needs none."""

    def propose(
        self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None
    ) -> list[list[int]]:
        """sampled_token_ids: by request, the tokens of this step, which end its row of
        token_ids_cpu; none if it is still being prefilled."""
        rows = zip(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, strict=False)
        return [
            self._draft(tokens[:length].tolist(), len(sampled)) for sampled, length, tokens in rows
        ]

    def _draft(self, tokens: list[int], sampled: int) -> list[int]:
        for end in range(len(tokens) - sampled, len(tokens)):
            self.next_token.setdefault(tuple(tokens[:end]), tokens[end])
        drafts = []
        while (
            sampled
            and len(drafts) < self.count
            and (token := self.next_token.get((*tokens, *drafts))) is not None
        ):
            drafts.append(token)
        return [token + (not (len(tokens) + i) % WRONG) for i, token in enumerate(drafts)]
