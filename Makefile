# make demo    adapt a small pre-trained ViT to Fashion-MNIST by several methods and compare them, about three minutes
# make test    run the tests
# make check   the memory goals on small models, in bytes
# make lint    ruff, and mypy on the built wheel
# make wheel   build the wheel and use it outside the checkout
#
# Everything needed is installed first: into .venv, or into the environment you are in if that has torch.
# TORCH says what pip installs where there is no torch yet, for example TORCH="torch==2.14.1 torchvision==0.29.1".

PYTHON ?= python3
TORCH ?= torch torchvision
OUT ?= runs/demo

HAS_TORCH := $(shell python -c "import importlib.util as u; print(u.find_spec('torch') is not None)" 2>/dev/null)
ifeq ($(HAS_TORCH),True)
PY := python
# One stamp per environment, so that changing to another one installs there too.
STAMPS := .make/$(shell python -c "import hashlib, sys; print(hashlib.sha1(sys.prefix.encode()).hexdigest()[:12])")
else
PY := $(CURDIR)/.venv/bin/python
STAMPS := .make/venv
endif

.PHONY: demo test check lint wheel clean

# One thread and bfloat16: for a model this small that is several times quicker than two threads in single precision.
demo: $(STAMPS)/timm,train
	OMP_NUM_THREADS=1 $(PY) -m visionpeft.cli classify --precision bf16 --out $(OUT)

# Single-threaded processes side by side are quicker than one process on all cores.
test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

check: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(PY) scripts/benchmark.py --check

lint: $(STAMPS)/dev build/wheel
	$(PY) -m ruff check .
	cd build/wheel && $(PY) -m mypy -p visionpeft --config-file $(CURDIR)/pyproject.toml

wheel: build/wheel
	cd build/wheel && PYTHONPATH=. $(PY) $(CURDIR)/.ci/smoke.py

build/wheel: $(STAMPS)/dev FORCE
	rm -rf build dist
	$(PY) -m build --wheel
	$(PY) -m pip install --quiet --no-deps --target $@ dist/*.whl

$(STAMPS)/%: pyproject.toml $(STAMPS)/torch
	$(PY) -m pip install --editable ".[$*]"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch:
ifneq ($(HAS_TORCH),True)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install $(TORCH)
endif
	@mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf .venv .make build dist *.egg-info

.PHONY: FORCE
FORCE:
