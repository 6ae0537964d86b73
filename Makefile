# Every command a person types. Anything longer than a few lines lives in stack/, which has tests.
.DEFAULT_GOAL := help
SHELL := /bin/sh
STALK := .venv/bin/python -m stack
# Side by side; tests/support/pytest_plugins/scheduling.py says how many at a time, and which stay together. Whatever
# the shell says, byte code is kept: each of them would compile all tests anew.
PYTEST := PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder
# Lists that `make lint` and nobody else needs.
SHELL_SCRIPTS := .ci/run .ci/newcomer .ci/ruined .ci/bare-machine .ci/docker-engine stack/bootstrap docker/base/build \
	docker/certificates docker/healthcheck docker/install-debian-packages docker/redis/start docker/redis/repair \
	docker/redis/healthcheck
DOCKERFILES := .ci/bare.Dockerfile docker/Dockerfile docker/base/python.Dockerfile docker/base/redis.Dockerfile

# As they were typed: a $ or a quote in a task's arguments is an argument, not a word of make.
override TASK := $(value TASK)
override ARGS := $(value ARGS)
override KWARGS := $(value KWARGS)
override NAME := $(value NAME)
override ID := $(value ID)
export TASK ARGS KWARGS NAME ID

##@ The stack
.PHONY: up
up: .venv/ready ## Build and start everything, wait until it works; again after a change of code or .env
	@$(STALK) up

.PHONY: local
local: export STALK_RUNTIME = local
local: up ## The same as processes of this host, without Docker

.PHONY: call
call: .venv/ready ## Run a task: TASK=services.tasks.arithmetic.add ARGS='[4, 3]' [KWARGS='{}'] [WAIT=30]
	@$(STALK) call -- "$$TASK" --args "$${ARGS:-[]}" --kwargs "$${KWARGS:-{\}}" --wait "$(or $(WAIT),30)"

.PHONY: scale
scale: .venv/ready ## Run WORKERS=4 workers, now and after the next `make up`
	@$(STALK) scale -- "$(WORKERS)"

.PHONY: status
status: .venv/ready ## Containers or processes, nodes, queues and beat on one screen [JSON=1]
	@$(STALK) status $(if $(JSON),--json)

.PHONY: schedule
schedule: .venv/ready ## What beat sends, from code and from run time, and when next [JSON=1]
	@$(STALK) services schedule $(if $(JSON),--json)

.PHONY: logs
logs: .venv/ready ## Follow the logs [SERVICE=worker]
	@$(STALK) logs $(SERVICE)

.PHONY: shell
shell: .venv/ready ## Python inside a worker, with the app and all tasks imported
	@$(STALK) shell

##@ Dead letters
.PHONY: dead-letters
dead-letters: .venv/ready ## Tasks that will not run, newest last [ALL=1] [JSON=1], or all there is of one [ID=7]
	@$(STALK) services dead-letters $(if $(ALL),--all) $(if $(JSON),--json) -- "$$ID"

.PHONY: replay
replay: .venv/ready ## Put dead letters back into their queues: ID=7, ID=7,9 or ALL=1
	@$(STALK) services replay $(if $(ALL),--all) -- "$$ID"

.PHONY: purge-dead-letters
purge-dead-letters: .venv/ready ## Delete all dead letters; asks first [YES=1]
	@$(STALK) services purge-dead-letters $(if $(YES),--yes)

.PHONY: to-plain
to-plain: .venv/ready ## Before stock Celery workers take over: put back what only Stalk's understand
	@$(STALK) services to-plain

##@ Stopping
.PHONY: stop
stop: .venv/ready ## Stop everything; running tasks finish first, queued ones stay
	@$(STALK) stop

.PHONY: down
down: .venv/ready ## Stop, and remove what runs; data is kept
	@$(STALK) down

.PHONY: clean
clean: .venv/ready ## Remove what runs and all data; asks first [YES=1]
	@$(STALK) clean $(if $(YES),--yes)

##@ Building
.PHONY: base-images
base-images: ## Build the base images from Debian's packages, for a host that reaches no registry
	@docker/base/build

.PHONY: lock
lock: .venv/ready ## Pin the packages of requirements/own.txt and pyproject.toml, with hashes
	@$(STALK) lock

##@ Developing
.PHONY: new-task
new-task: .venv/ready ## Write a small, tested task module to start from: NAME=invoices
	@$(STALK) new-task -- "$$NAME"

.PHONY: dev
dev: .venv/ready ## make up with the source of this checkout; then a change of it restarts the nodes
	@$(STALK) dev

.PHONY: test
test: .venv/ready ## All tests but the slow ones; containers only where Docker answers [ARGS='-k beat']
	@$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: .venv/ready ## The rest: stock Celery beside Stalk, long forms, every Redis that can be had [ARGS='-k beat']
	@$(PYTEST) -m slow --redis each $(ARGS)

.PHONY: chaos
chaos: .venv/ready ## Every fault against every pool, for an hour; writes docs/chaos.md [ARGS='--fault poison']
	@.venv/bin/python -m tests.chaos $(ARGS)

.PHONY: chaos-stock
chaos-stock: .venv/ready ## The same against stock Celery, kept for docs/chaos.md until its version changes [ARGS=…]
	@.venv/bin/python -m tests.chaos --subject stock $(ARGS)

.PHONY: lint
lint: .venv/ready ## ruff, mypy, hadolint, shellcheck, yamllint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/hadolint $(DOCKERFILES)
	.venv/bin/shellcheck $(SHELL_SCRIPTS)
	.venv/bin/yamllint --strict .

.PHONY: format
format: .venv/ready ## Let ruff format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: docs
docs: .venv/ready ## Write the tables of docs/configuration.md, and .env.example, from config/
	.venv/bin/python -m config reference > docs/configuration.new
	mv docs/configuration.new docs/configuration.md
	.venv/bin/python -m config example > .env.example

.PHONY: pictures
pictures: .venv/ready ## Take the README's pictures of Flower from the running stack, with Chromium
	@.venv/bin/python -m docs.pictures

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: requirements/dev.lock requirements/own.lock requirements/uv.lock stack/bootstrap
	@stack/bootstrap
