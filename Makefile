# make run: the toy task · make test: every test · make check: the derivations · make bench,
# make ablation: the README's tables · make tldr: TL;DR on one CUDA GPU
.PHONY: run test check bench ablation tldr

run: .venv/ready
	.venv/bin/python brain.py --task toy

test: .venv/ready
	.venv/bin/python -m pytest test_brain.py

check: .venv/ready
	.venv/bin/python brain.py --check

bench: .venv/ready
	.venv/bin/python test_brain.py bench

ablation: .venv/ready
	.venv/bin/python test_brain.py ablation

tldr: .venv/ready
	.venv/bin/python brain.py --task tldr

.venv/ready: requirements.txt
	python3 -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt && touch $@
