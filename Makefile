# make demo    from a fresh clone to a trained, quantized, talking model (4 to 7 minutes on 2 cores)
# make test    the tests        make test-long    the long ones        make bench   timings        make lint   style
# Each makes .venv and builds the kernels when they are missing; nothing done is done again.

PYTHON ?= python3
BIN := .venv/bin
ifeq ($(origin CXX),default)  # make's own default is no choice of the user's
CXX := c++
endif

.PHONY: demo test test-long test-published bench gpu lint kernels clean
.DELETE_ON_ERROR:

.venv/requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "owlet needs Python 3.11 or later; name one: make PYTHON=python3.12"; exit 2; }
	@if [ "$$(uname)" = Linux ] && ! [ -e /dev/nvidia0 ] && ! env | grep -q '^PIP_' && ! $(PYTHON) -m pip config list | grep -q .; \
	then echo "note: no GPU here, but pip's torch for Linux is the CUDA build, 4.9 GB installed; the CPU build takes 1.4 GB:" && \
	    echo "      stop, set PIP_EXTRA_INDEX_URL as PyTorch's install page says for CPUs, and make again"; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/requirements-dev: .venv/requirements requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

kernels: build/kernels

build/kernels: .venv/requirements setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@mkdir -p build
	@if command -v $(firstword $(CXX)) > /dev/null; then \
	    echo "building the int8 kernels ..." && \
	    CXX="$(CXX)" $(BIN)/python setup.py build_ext > build/log 2>&1 && touch $@ || { tail -n 40 build/log; exit 1; }; \
	else \
	    echo "note: no C++ compiler ($(CXX)), so no int8 kernels; torch.ao takes their place"; \
	fi

demo: build/kernels data/shakespeare/meta.json out/demo/.trained out/demo-int8/comparison.json
	@echo; echo "== the model speaks"
	$(BIN)/python sample.py --checkpoint out/demo --prompt "ROMEO:" --max-new-tokens 300
	@echo; echo "== and in int8"
	$(BIN)/python sample.py --checkpoint out/demo-int8 --prompt "ROMEO:" --max-new-tokens 300

data/shakespeare/meta.json: | .venv/requirements
	@echo "== the book becomes tokens"
	$(BIN)/python data/prepare.py

# As many each time, so that the loss is the same each time.
THREADS := $(shell getconf _NPROCESSORS_ONLN | sed 's/^[2-9]$$\|^[0-9][0-9].*/2/')

out/demo/.trained: | data/shakespeare/meta.json .venv/requirements
	@echo; echo "== a model is trained"
	$(BIN)/python train.py tiny --data data/shakespeare --out out/demo --threads $(THREADS) $$(test -e out/demo/train_state.safetensors && echo --resume)
	@touch $@

out/demo-int8/comparison.json: out/demo/.trained | build/kernels
	@echo; echo "== it shrinks to int8"
	$(BIN)/python quantize.py --checkpoint out/demo

test: .venv/requirements-dev build/kernels
	$(BIN)/python -m pytest

# random kills, sanitizers, compilers for other machines, more of what restarts and of the emulated GPU
test-long: .venv/requirements-dev build/kernels
	$(BIN)/python -m pytest -m long --kills 5

# with a published model, which is fetched first (93 MB)
test-published: .venv/requirements-dev build/kernels
	$(BIN)/python sample.py --checkpoint smollm2 --max-new-tokens 20
	$(BIN)/python -m pytest -m long tests/test_published.py

# Threads stay on their cores; the tables printed hold more than pytest-benchmark's own, which quiet leaves out.
bench: build/kernels
	OMP_PROC_BIND=true $(BIN)/python -m pytest --benchmark-quiet tests/bench/bench_kernels.py tests/bench/bench_inference.py

# all that needs a GPU; DRY=1 tries the run itself without one
gpu: .venv/requirements-dev
	$(BIN)/python tests/bench/gpu.py $(if $(DRY),--dry)

lint: .venv/requirements-dev
	$(BIN)/ruff check
	@if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint; fi

# build products only: never a model, never a book
clean:
	rm -rf .venv build *.so
