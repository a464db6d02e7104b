# FlashAttention from scratch. `make` alone lists what there is; everything runs through `python -m fa_reference`.
#
# Without PYTHON, the first command makes .venv (tools/setup.sh); later ones find its stamp and lose no time.
# With PYTHON=python3 that interpreter is used as it is: no .venv is made and nothing is installed.

.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

ifeq ($(PYTHON),)
export COURSE_PYTHON := .venv/bin/python
READY := .venv/ready
else
export COURSE_PYTHON := $(PYTHON)
READY := python-given
endif
export PYTHON CHAPTER IMPL SOLUTION JSON ONLY FUNCTION CHECK RESET YES ARGS
# Child processes and notebooks import the course's package from here, wherever they run.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# Values go through the shell's environment, not through make's text, so that paths with spaces arrive whole.
COURSE := @exec "$$COURSE_PYTHON" -m fa_reference

ifeq ($(CHAPTER),)
$(foreach goal,check hint watch reset,$(if $(filter $(goal),$(MAKECMDGOALS)),$(error say which chapter: make $(goal) CHAPTER=1)))
endif

.PHONY: help
help: ## list these targets
	@echo 'FlashAttention from scratch. Start with: make check CHAPTER=1'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'With PYTHON=python3 any of them uses that Python as it is and installs nothing.'
	@echo 'Exit status: make turns every failure into 2; 0 ok, 1 failed, 2 wrong call come from .venv/bin/python -m fa_reference check 1'

.PHONY: check hint progress watch reset lab
check: $(READY) ## grade a chapter: CHAPTER=1 [IMPL=folder | SOLUTION=1] [JSON=file] [ONLY=words of a check's name, or a file]
	$(COURSE) check "$$CHAPTER" $${IMPL:+--impl "$$IMPL"} $${SOLUTION:+--solution} $${JSON:+--json "$$JSON"} $${ONLY:+--only "$$ONLY"}

hint: $(READY) ## the next hint for a chapter: CHAPTER=1 [FUNCTION=name] [RESET=1 starts them again]
	$(COURSE) hint "$$CHAPTER" $${FUNCTION:+--function "$$FUNCTION"} $${RESET:+--reset}

progress: $(READY) ## where you stand in all chapters
	$(COURSE) progress

watch: $(READY) ## grade a chapter again whenever you save: CHAPTER=1 [IMPL=folder]
	$(COURSE) watch "$$CHAPTER" $${IMPL:+--impl "$$IMPL"}

reset: $(READY) ## put a chapter's stubs back, keeping a backup of your files: CHAPTER=1 [YES=1 does not ask]
	$(COURSE) reset "$$CHAPTER" $${YES:+--yes}

lab: $(READY) ## open the lessons in JupyterLab [CHAPTER=1] [ARGS="--no-browser --port 8890"]
	$(COURSE) lab $${CHAPTER:+--chapter "$$CHAPTER"} $(ARGS)

# Tests run side by side where pytest-xdist is there; a file's stay together, as they share what they compile.
SIDE_BY_SIDE = $(shell "$(COURSE_PYTHON)" -c 'import xdist' 2>/dev/null && echo '-n auto --maxprocesses 8 --dist loadfile')

.PHONY: bench test doctor
bench: $(READY) ## race all versions [IMPL=folder adds yours] [ARGS="--help" lists the options]
	$(COURSE) bench $${IMPL:+--impl "$$IMPL"} $(ARGS)

test: $(READY) ## test the course itself (not your answers) [ARGS="-k readme"]
	@exec "$$COURSE_PYTHON" -m pytest $(SIDE_BY_SIDE) $(ARGS)

doctor: $(READY) ## what this machine has, and which chapters can be graded on it
	$(COURSE) doctor

.PHONY: mutants lessons stubs lint setup clean-env
mutants: $(READY) ## for contributors: all wrong and correct answers against all checks [CHAPTER=1] [ARGS="--help"]
	@exec "$$COURSE_PYTHON" -m fa_reference.grading.kill_matrix $${CHAPTER:+--chapter "$$CHAPTER"} $(ARGS)

lessons: $(READY) ## for contributors: execute the lessons and write the notebooks [CHAPTER=1] [CHECK=1 only compares]
	$(COURSE) lessons $${CHAPTER:+--chapter "$$CHAPTER"} $${CHECK:+--check}

stubs: $(READY) ## for contributors: cut the learner's files from the solutions [CHECK=1 only compares]
	$(COURSE) stubs $${CHECK:+--check}

lint: $(READY) ## for contributors: ruff check and ruff format --check
	@"$$COURSE_PYTHON" -m ruff check . && "$$COURSE_PYTHON" -m ruff format --check .

setup: $(READY) ## only make the environment
	@echo "Ready: $$COURSE_PYTHON"

clean-env: ## remove .venv; the next command makes a new one
	@test ! -e .venv || test -f .venv/setup.log || { echo 'This .venv was not made by the course: left alone.' >&2; exit 1; }
	@rm -rf .venv

.venv/ready: pyproject.toml constraints/common.txt constraints/cpu.txt constraints/cuda.txt
	@sh tools/setup.sh

# A stamp whose interpreter is gone (a removed Python) is worth nothing.
ifeq ($(READY),.venv/ready)
ifneq ($(shell test -x .venv/bin/python && echo yes),yes)
.PHONY: .venv/ready
endif
endif

.PHONY: python-given
python-given:
	@sh tools/setup.sh --given
