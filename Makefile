# Every command starts from Python ≥ 3.10, pip and make; what it needs goes into .venv and .vocab, which git ignores.

PYTHON ?= python3
BIN := .venv/bin
QUICKSTART := 蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是

.PHONY: run test slow kernels vocab lint bench parity ports eval readme walkthrough

# Completes the model card's quickstart prompt with the tiny checkpoint of weights/.
run: .venv/installed
	@echo "The prompt, in Chinese: Mongolia's capital is Ulaanbaatar / Iceland's capital is Reykjavik / Ethiopia's capital is"
	@echo
	@printf '$(QUICKSTART)\n\n'
	@echo "The right answer is 亚的斯亚贝巴, Addis Ababa. The model continues:"
	@echo
	@printf '$(QUICKSTART)' | $(BIN)/python -m qwen_ref.generate

# In CI the lines that run are counted, in percent; the two modules behind `make eval`'s extra run only where it is.
COVERAGE = $(if $(CI),--cov --cov-report=term --cov-fail-under=$(if $(wildcard .venv/eval),95,93))

# A process a core: a test uses one thread.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The vocabulary may be out of reach without network: then the tests that need it say so and are skipped.
test: .venv/installed
	-$(BIN)/python examples/make/fetch_vocabulary.py
	$(PYTEST) -m "not slow" $(COVERAGE)

# What takes a quarter of a minute and more on a processor without AVX-512.
slow: .venv/installed
	$(PYTEST) -m slow

# The tests of numbers with torch's kernels for AVX2 and with its oldest ones, whatever the processor has.
# Those of memory have no numbers of their own.
OLDER = $(if $(filter x86_64,$(shell uname -m)),avx2) default
kernels: .venv/installed
	for older in $(OLDER); do \
		ATEN_CPU_CAPABILITY=$$older ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
			$(PYTEST) -m "kernels and not slow and not alone" -k "not memory" || exit 1; \
	done

vocab: .venv/installed
	$(BIN)/python examples/make/fetch_vocabulary.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What Qwen computes, step by step: one page with all figures, build/walkthrough.html.
walkthrough: .venv/installed
	$(BIN)/python examples/learn/render_walkthrough.py

# The figures of the pages: half an hour, on a machine that does nothing else.
bench: .venv/transformers .venv/llama vocab
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --fast --against plain llama.cpp --repeats 3 --tokens 12
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --fast --against hf hf:float32 --repeats 3
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --layers 12 --against plain:float32 --lengths 512 --tokens 2
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --quantize int8 --against llama.cpp --repeats 3 --tokens 12
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --quantize int4 --against llama.cpp --repeats 3 --tokens 12
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --fast --lengths 16 4000 --repeats 2
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --layers 12 --gptq 4 --fast --dtype bfloat16 --against plain --repeats 2
	$(BIN)/python -m qwen_ref.bench --synthetic 1.8b --layers 12 --gptq 8 --fast --dtype bfloat16 --against plain --repeats 2
	$(BIN)/python examples/measure/fast_accuracy.py
	$(BIN)/python examples/measure/gptq_accuracy.py
	$(BIN)/python examples/measure/bench_tokenizer.py

# The commands of all pages as they stand there, with the tiny checkpoint in place of the published ones.
readme: .venv/eval vocab
	$(BIN)/python tests/run_pages.py

# Holds transformers' Qwen2, which was not written here, to the parity kit.
parity: .venv/transformers
	$(BIN)/python examples/ports/parity_transformers.py
	$(BIN)/python -m pytest tests/parity/test_parity_transformers.py

# Records the engines that are installed, diagnoses the recordings, prints a table. RECORDINGS=DIR keeps the bundles.
ports: .venv/transformers .venv/llama .venv/engines
	$(BIN)/python examples/ports/all_ports.py $(if $(RECORDINGS),--recordings $(RECORDINGS))

.venv/engines: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[engines]'
	touch $@

.venv/transformers: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[transformers]'
	touch $@

# Compiles llama.cpp for this processor: ten minutes on two cores. GCC 12.2 takes the stores of AMX's tile
# configuration for dead and drops them; without -fno-dse llama.cpp then crashes in q8_0 and q4_0. clang does not
# know the flag. pip's cache may have a build without it.
NO_DSE = $(shell $(CXX) -fno-dse -E -x c++ /dev/null > /dev/null 2>&1 && echo -fno-dse)
.venv/llama: .venv/installed
	CXXFLAGS="$(CXXFLAGS) $(NO_DSE)" $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-cache-dir --no-binary llama-cpp-python --editable '.[llama]'
	touch $@

# The standard evaluation harness, on questions that the tiny checkpoint can answer.
eval: .venv/eval
	$(BIN)/python -m qwen_ref.evaluate --tasks examples/measure/tasks --num-fewshot 5
	$(BIN)/python -m pytest tests/evaluate/test_evaluate.py

.venv/eval: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
	touch $@

# torch first, by its pin: a range could pull a build of several GB.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Bad folders, command lines, bundles and prompts for so many seconds: no more than errors of one line may come of them.
SECONDS ?= 60
.PHONY: fuzz
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))
