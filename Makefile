# Set-up, demo and tests. `make` alone lists the targets; requirements/install.sh does the set-up.

BIN = .venv/bin

# Everything that the targets leave behind. `make clean` removes it and .gitignore names it.
MADE = .venv .cache .hypothesis .pytest_cache .ruff_cache .mypy_cache build deepseek-v4 serve_and_chat.log ascend-report.txt vllm_dsv4_indexer/*.so

# As in an activated environment, with all caches inside the checkout, reporting and fetching nothing.
RUN = exec env PATH="$(CURDIR)/$(BIN):$$PATH" XDG_CACHE_HOME="$(CURDIR)/.cache" XDG_CONFIG_HOME="$(CURDIR)/.cache" \
	VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

# Debian has it with and without a version in its name.
AARCH64_CXX ?= $(or $(firstword $(wildcard /usr/bin/aarch64-linux-gnu-g++*)),aarch64-linux-gnu-g++)

.PHONY: help venv demo serve test check lint coverage docs accuracy sanitize mutants soak fuzz compat test-aarch64 wheel ascend-cost ascend-test long-context lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: .venv/package.done ## set up .venv: CPU torch, vLLM, this package with its native op

demo: deepseek-v4 ## serve the demo checkpoint with our backend, talk to it, stop
	@$(RUN) python examples/serve_and_chat.py deepseek-v4

# vLLM wants 92% of the machine's memory free at the start, unless the size of the KV cache is given.
serve: deepseek-v4 ## serve the demo checkpoint until Ctrl-C (ARGS="--port 8001")
	@$(RUN) vllm serve deepseek-v4 --attention-backend dsv4_indexer --max-model-len 8192 --kv-cache-memory-bytes 1G $(ARGS)

test: lint .venv/beside.done ## check the sources, then run the tests (ARGS="tests/setup -k lock")
	@$(RUN) pytest --durations=15 $(or $(ARGS),tests $(IN_TWO_PROCESSES))

check: lint ## check the sources, then run the op's tests (under three minutes)
	@$(RUN) pytest -q tests/op

# Engines start on one core. tests/conftest.py says which tests stay together.
IN_TWO_PROCESSES = -n 2 --dist loadgroup --no-loadscope-reorder

TOOLS = .venv/tools/bin
NATIVE = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.asc')

lint: venv .venv/tools.done ## check format, style, types, spelling and scripts, without running anything
	@$(TOOLS)/ruff format --quiet --check . || { echo "Format them: $(TOOLS)/ruff format ." >&2; exit 1; }
	@$(TOOLS)/ruff check --quiet .
	@$(TOOLS)/clang-format --dry-run -Werror $(NATIVE) || { echo "Format them: $(TOOLS)/clang-format -i FILE" >&2; exit 1; }
	@$(RUN) cmake -S tests/native -B build/tidy -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
	@$(TOOLS)/run-clang-tidy.py -quiet -p build/tidy -clang-tidy-binary $(TOOLS)/clang-tidy >build/tidy.log 2>&1 || \
		{ cat build/tidy.log >&2; exit 1; }
	@$(TOOLS)/mypy --python-executable $(BIN)/python
	@$(TOOLS)/shellcheck .ci/run $(shell find requirements tests -name '*.sh')
	@$(TOOLS)/codespell

coverage: venv .venv/beside.done .venv/tools.done ## run the tests, then show which lines of the package none of them has run
	@$(RUN) pytest -q --cov --cov-report=term-missing $(or $(ARGS),tests $(IN_TWO_PROCESSES))

docs: .venv/tools.done ## serve the documentation on port 8000, until Ctrl-C
	@$(RUN) $(TOOLS)/mkdocs serve

accuracy: venv ## find needles by length and depth, then with planted faults (3 minutes; ARGS="--lengths 65280")
	@$(RUN) vllm-dsv4-indexer make-checkpoint build/needle --task needle
	@$(RUN) vllm-dsv4-indexer accuracy needles build/needle $(ARGS)
	@$(RUN) python tests/accuracy/run_faults.py build/needle build/accuracy/faults.json

sanitize: venv ## run random calls of the native op under sanitizers (10 minutes; ARGS="--seconds 60")
	@$(RUN) python tests/native/sanitize.py $(ARGS)

mutants: venv ## plant small faults, each of which a test must catch (two hours; ARGS="csrc/cpu" or "engines")
	@$(RUN) python tests/mutants/run.py $(ARGS)

soak: deepseek-v4 ## serve random traffic, ill-treated, and check every answer (10 minutes; ARGS="--minutes 60")
	@$(RUN) python tests/engine/soak.py deepseek-v4 $(ARGS)

# The targets below want tools that the set-up does not install, and so are not in `make test`.

# To keep what it has found new: build/fuzz/fuzz -merge=1 tests/native/corpus build/fuzz/found
fuzz: ## feed the native op with what libFuzzer makes up, by clang (10 minutes; ARGS="-max_total_time=60")
	@command -v clang++ >/dev/null || { echo "No clang++ found. On Debian and Ubuntu: apt-get install clang" >&2; exit 1; }
	@$(MAKE) --no-print-directory venv
	@$(RUN) env CXX=clang++ cmake -S tests/native -B build/fuzz -DSANITIZE=address,undefined -DFUZZ=ON
	@$(RUN) cmake --build build/fuzz --target fuzz
	@mkdir -p build/fuzz/found
	build/fuzz/fuzz -artifact_prefix=build/fuzz/ -len_control=0 -max_len=600 $(or $(ARGS),-max_total_time=600) \
		build/fuzz/found tests/native/corpus

compat: venv .venv/beside.done ## try the newest vLLM and vllm-ascend, and say what does not fit first (10 minutes)
	@$(RUN) python tests/compat.py

test-aarch64: aarch64-tools venv ## build the native op for aarch64 and run it under emulation
	@$(MAKE) --no-print-directory build/aarch64/replay
	@$(RUN) pytest tests/native/aarch64.py

wheel: aarch64-tools venv .venv/tools.done ## build the sdist and wheels for x86-64 and aarch64, and check them
	@AARCH64_CXX="$(AARCH64_CXX)" sh requirements/wheel.sh

.PHONY: aarch64-tools build/aarch64/replay
aarch64-tools:
	@for tool in $(AARCH64_CXX) qemu-aarch64; do command -v $$tool >/dev/null || { echo \
		"No $$tool found. On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done

build/aarch64/replay:
	@$(RUN) cmake -S tests/native -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=$(AARCH64_CXX)
	@$(RUN) cmake --build build/aarch64 --target replay

ascend-cost: venv ## what the kernels for NPUs would cost, modelled from counts of their emulation
	@$(RUN) python tests/ascend_emulation/cost_model.py

ascend-test: ## on a machine with CANN and an NPU: test the op and an engine (PYTHON=..., MODEL=...)
	@PYTHON="$(or $(PYTHON),python3)" "$(or $(PYTHON),python3)" tests/npu/first_day.py

long-context: deepseek-v4 ## serve a prompt of 32K tokens and show the op's share of the time (ARGS="--tokens 65536")
	@$(RUN) python tests/accuracy/long_context.py deepseek-v4 $(ARGS)

lock: ## resolve requirements/cpu.in again into requirements/cpu.lock (PYTHON=python3.11)
	@sh requirements/install.sh lock

clean: ## undo everything that the targets made
	rm -rf $(MADE)
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamps are written last, inside .venv: an interrupted set-up never looks finished.
.venv/dependencies.done: requirements/cpu.lock requirements/install.sh
	@sh requirements/install.sh dependencies
	@touch $@

# Folders count too: they change when a file comes or goes, and an editable install lists the package's files.
.venv/package.done: .venv/dependencies.done pyproject.toml $(shell find csrc) \
		$(shell find vllm_dsv4_indexer -type d -not -name __pycache__)
	@sh requirements/install.sh package
	@touch $@

.venv/beside.done: .venv/dependencies.done requirements/beside.txt
	@sh requirements/install.sh beside
	@touch $@

.venv/tools.done: .venv/dependencies.done requirements/tools.txt
	@sh requirements/install.sh tools
	@touch $@

# `| venv`: a newer package does not make an old checkpoint stale.
deepseek-v4: | venv
	@$(RUN) vllm-dsv4-indexer make-checkpoint $@
