# make run: the toy task · make test: every test · make check: the derivations · make bench,
# make compare: the README's tables · make tldr: TL;DR on one GPU
PYTHON ?= python3
.PHONY: run test check bench compare tldr

run: .venv/ready
	.venv/bin/python brain.py --task toy

test: .venv/ready
	.venv/bin/python -m pytest test_brain.py

check: .venv/ready
	.venv/bin/python brain.py --check

bench: .venv/ready
	.venv/bin/python test_brain.py bench

compare: .venv/ready
	.venv/bin/python test_brain.py compare

tldr: .venv/ready
	.venv/bin/python brain.py --task tldr

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt && touch $@
