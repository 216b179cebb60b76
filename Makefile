# make run: set everything up and serve on http://localhost:3000.   make test: set everything up, check and test.
# make test-long: the tests that take longer, the reliability cases in their long form among them.
# make bench: the benchmarks, in less than 45 minutes; writes docs/performance.md.   make bench-quick: fewer repetitions.
# make clients: the packages of the clients, in dist.
# make newest: the tests on the newest versions of all dependencies.
PYTHON ?= python3
BIN := .venv/bin
NPM := npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts
NEWEST := .venv-newest
CLIENT := src/api/web/static/vendor/socket.io.min.js

.PHONY: run test test-long clients bench bench-quick newest check style types arrows documents collection docs clean

# Two checks at a time. Bytecode is kept, so that the second run is fast.
MAKEFLAGS += --jobs=2
unexport PYTHONDONTWRITEBYTECODE

# Whatever keys are in the environment: no paid provider is used unless these variables name it, there or in .env.
local_unless_set = $(if $(shell grep -Es '^[[:space:]]*(export[[:space:]]+)?$(1)[[:space:]]*=[[:space:]]*["'"'"']?[[:alnum:]_]' .env),,local)
run: export STAGECAST_EDITOR ?= $(call local_unless_set,STAGECAST_EDITOR)
run: export STAGECAST_FACE_SWAP ?= $(call local_unless_set,STAGECAST_FACE_SWAP)
run: .venv/installed $(CLIENT)
	@exec $(BIN)/stagecast serve

test: check
	$(BIN)/pytest

test-long: check
	$(BIN)/pytest -m long --numprocesses 1

# What npm and pip install: see docs/javascript.md and docs/python.md.
clients: .venv/installed node_modules/installed-dev
	@mkdir -p dist
	cd clients/javascript && npm pack --silent --pack-destination ../../dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist clients/python

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks --write

bench-quick: .venv/installed-dev
	$(BIN)/python -m benchmarks --quick

# The names of all dependencies, without their version bounds.
define REQUIREMENTS
import re, tomllib
with open("pyproject.toml", "rb") as file:
    tables = tomllib.load(file)
for requirement in tables["project"]["dependencies"] + tables["dependency-groups"]["dev"]:
    print(re.match(r"[\w.-]+(\[.*\])?", requirement)[0])
endef
export REQUIREMENTS

# Known vulnerabilities of the installed versions. Without a network this is not known, and the tests go on.
define AUDIT
import subprocess, sys
done = subprocess.run([sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"],
                      capture_output=True, text=True)
unknown = done.stdout.count("could not be audited")
offline = any(each in done.stderr for each in ("ConnectionError", "Max retries", "ServiceError", "timed out"))
if unknown or offline:
    what = f"{unknown} packages were" if unknown else "the packages were"
    print(f"pip-audit does not reach the vulnerability service: {what} NOT checked", file=sys.stderr)
else:
    print(done.stdout, done.stderr)
sys.exit(0 if offline else done.returncode)
endef
export AUDIT

# Whatever versions constraints.txt and pyproject.toml name. Prints which versions differ from constraints.txt.
newest: $(CLIENT) node_modules/installed-dev
	$(PYTHON) -m venv --clear --upgrade-deps $(NEWEST)
	$(NEWEST)/bin/python -c "$$REQUIREMENTS" | xargs $(NEWEST)/bin/pip install --quiet --disable-pip-version-check
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(NEWEST)/bin/pip freeze --exclude-editable | diff constraints.txt - || true
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(NEWEST)/bin/python -c "$$AUDIT"
	$(NEWEST)/bin/mypy
	$(NEWEST)/bin/pytest

check: types style arrows documents collection

style types arrows documents collection: .venv/installed-dev $(CLIENT) node_modules/installed-dev

style:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types:
	$(BIN)/mypy

arrows:
	$(BIN)/lint-imports --no-cache --show-timings > .venv/lint-imports.log || (cat .venv/lint-imports.log; exit 1)

documents:
	$(BIN)/python docs/generate.py --check

# Every test can be imported. It is compiled once here, instead of by each worker.
collection:
	$(BIN)/pytest --collect-only --quiet --numprocesses 0 > .venv/collection.log || (cat .venv/collection.log; exit 1)

docs: .venv/installed-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv $(NEWEST) .benchmarks node_modules var $(dir $(CLIENT))

.venv/bin/python:
	$(PYTHON) -m venv --upgrade-deps .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev
	@touch $@

# What the tests of the clients need in addition. Without npm they are skipped, and say so.
node_modules/installed-dev: package.json $(CLIENT)
	@mkdir -p $(dir $@) && if command -v npm > /dev/null; then $(NPM); fi && touch $@

# The official JavaScript client and the viewer of /docs come from npm where that is installed. Where it is not, the page
# takes the client from its CDN, and /docs is a plain list.
$(CLIENT): package.json
	@if command -v npm > /dev/null; then \
		$(NPM) --omit=dev && mkdir -p $(dir $@) && cp node_modules/socket.io-client/dist/socket.io.min.js \
		node_modules/swagger-ui-dist/swagger-ui-bundle.js node_modules/swagger-ui-dist/swagger-ui.css $(dir $@); fi; \
	test -f $@ || echo "socket.io-client is not here (no npm?): the page takes it from its CDN"
