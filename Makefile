# Set-up, demo and tests. `make` alone lists the targets; requirements/install.sh does the set-up.

BIN = .venv/bin

# Everything that the targets leave behind. `make clean` removes it and .gitignore names it.
MADE = .venv .cache .pytest_cache build deepseek-v4 serve_and_chat.log vllm_dsv4_indexer/*.so

# As in an activated environment, with all caches inside the checkout, reporting and fetching nothing.
RUN = exec env PATH="$(CURDIR)/$(BIN):$$PATH" XDG_CACHE_HOME="$(CURDIR)/.cache" XDG_CONFIG_HOME="$(CURDIR)/.cache" \
	VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

.PHONY: help venv demo serve test accuracy lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

venv: .venv/package.done ## set up .venv: CPU torch, vLLM, this package with its native op

demo: deepseek-v4 ## serve the demo checkpoint with our backend, talk to it, stop
	@$(RUN) python examples/serve_and_chat.py deepseek-v4

# By default vLLM wants 92% of the machine's memory free at the start; a stated KV cache size does without.
serve: deepseek-v4 ## serve the demo checkpoint until Ctrl-C (ARGS="--port 8001")
	@$(RUN) vllm serve deepseek-v4 --attention-backend dsv4_indexer --max-model-len 8192 --kv-cache-memory-bytes 1G $(ARGS)

test: venv .venv/old-vllm.done ## run the tests (ARGS="tests/setup -k lock")
	@$(RUN) pytest --durations=15 $(or $(ARGS),tests)

accuracy: venv ## find needles by length and depth, then with faults planted (4 minutes; ARGS="--lengths 65280")
	@$(RUN) vllm-dsv4-indexer make-checkpoint build/needle --task needle
	@$(RUN) vllm-dsv4-indexer accuracy build/needle $(ARGS)
	@$(RUN) python tests/accuracy/run_faults.py build/needle build/accuracy/faults.json

lock: ## resolve requirements/cpu.in again into requirements/cpu.lock (PYTHON=python3.11)
	@sh requirements/install.sh lock

clean: ## undo everything that the targets made
	rm -rf $(MADE)
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamps are written last, and lie in .venv: an interrupted set-up is never taken for a finished one.
.venv/dependencies.done: requirements/cpu.lock requirements/install.sh
	@sh requirements/install.sh dependencies
	@touch $@

# The directories in csrc/ count too: they change when a file comes or goes.
.venv/package.done: .venv/dependencies.done pyproject.toml $(shell find csrc)
	@sh requirements/install.sh package
	@touch $@

# The plugin is also tested against the vLLM that vllm-ascend pins: beside the environment, not in it.
.venv/old-vllm.done: .venv/dependencies.done
	@sh requirements/install.sh old-vllm
	@touch $@

# `| venv`: a newer package does not make an old checkpoint stale.
deepseek-v4: | venv
	@$(RUN) vllm-dsv4-indexer make-checkpoint $@
