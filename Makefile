PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# One thread for tests, two for the rest: results repeat, and small models do not gain from more.
THREADS ?= 2
export OMP_NUM_THREADS = $(THREADS)
export MKL_NUM_THREADS = $(THREADS)

.PHONY: demo example-safe test lint bench experts bullet clean

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo

example-safe: $(INSTALLED)
	$(BIN)/python -m benchmarks.example_safe

test: THREADS = 1
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.rollouts

# Reinforcement learning that makes demonstrations (benchmarks/dynamics_data.py), with packages that .venv has no use for.
experts:
	$(PYTHON) -m venv .venv-experts
	.venv-experts/bin/pip install -c constraints.txt 'gymnasium[mujoco]' 'sbx-rl>=0.28'

# Bullet-Safety-Gym, which wants other versions of what .venv has: benchmarks.psec_safe has its cars simulated there. Needs Python 3.11 or later and,
# where pip finds no wheel of pybullet, a C++ compiler, Python's headers and some minutes. Prints how close skillbank.tasks.ball comes to it.
bullet: .venv-bullet/.installed
	.venv-bullet/bin/python -W ignore -m benchmarks.bullet.ball

clean:
	rm -rf .venv .venv-experts .venv-bullet build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv-bullet/.installed: benchmarks/bullet/requirements.txt
	$(PYTHON) -m venv .venv-bullet
	.venv-bullet/bin/pip install -r benchmarks/bullet/requirements.txt
	touch $@
