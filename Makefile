PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INTEROP_BIN := .venv-interop/bin
INTEROP_READY := .venv-interop/.ready
ORT_OPENVINO_BIN := .venv-ort-openvino/bin
ORT_OPENVINO_READY := .venv-ort-openvino/.ready
GENAI_BIN := .venv-genai/bin
GENAI_READY := .venv-genai/.ready
SDCPP_BIN := .venv-sdcpp/bin
SDCPP_READY := .venv-sdcpp/.ready

.PHONY: demo test test-all test-interop test-interop-sdcpp lint bench bench-attention bench-engine bench-full-size bench-memory bench-precisions bench-shapes bench-statistics families gpu shapes clean

demo: $(READY)  ## Export the embedded model for each backend, generate, compare.
	$(BIN)/bakeoff demo -o demo

test: $(READY)  ## The tests that a change should pass: about ten minutes on 2 cores.
	$(BIN)/python -P -m pytest -n auto --dist loadfile --max-worker-restart 0

test-all: $(READY)  ## All tests but those that need other environments.
	$(BIN)/python -P -m pytest -n auto --dist loadfile --max-worker-restart 0 -m 'not interop'

test-interop: $(READY) $(INTEROP_READY) $(GENAI_READY) $(ORT_OPENVINO_READY)  ## Open our artifacts with Optimum, OpenVINO GenAI and ONNX Runtime's OpenVINO provider.
	INTEROP_PYTHON=$(INTEROP_BIN)/python GENAI_PYTHON=$(GENAI_BIN)/python ORT_OPENVINO_PYTHON=$(ORT_OPENVINO_BIN)/python $(BIN)/python -P -m pytest -m interop

test-interop-sdcpp: $(READY) $(SDCPP_READY)  ## Compare with stable-diffusion.cpp at SD 1.5's sizes (compiles it, ten minutes; 5 GB of disk).
	SDCPP_PYTHON=$(SDCPP_BIN)/python $(BIN)/python -P -m pytest -m interop -k stable_diffusion_cpp

lint: $(READY)  ## ruff, and mypy on the package as it is installed.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck build/lib build/bdist.*
	$(BIN)/pip install -q --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p bakeoff

bench: $(READY)  ## Micro-benchmarks of parts, exports and artifacts, one after another: for developing, no claim rests on them.
	$(BIN)/python -P -m pytest -p benchmark tests/benchmarks -o python_files='bench_*.py' --benchmark-only \
		--benchmark-columns=min,median,iqr,rounds --benchmark-storage=file://build/benchmarks

bench-engine: $(READY)  ## What the engine costs over a loop written by hand (twenty minutes and 4 GB of disk; leave the machine alone).
	$(BIN)/python -P docs/benchmarks/engine_overhead.py docs/benchmarks/engine_overhead.json

bench-full-size: $(READY)  ## Memory, disk and time of full-size exports, predicted and measured (60 GB of disk, two hours).
	$(BIN)/python -P docs/benchmarks/full_size.py docs/benchmarks/full_size.json

bench-memory: $(READY)  ## Anonymous memory of opened full-size parts, by backend (25 GB of disk, half an hour).
	$(BIN)/python -P docs/benchmarks/running_memory.py docs/benchmarks/running_memory.json

bench-attention: $(READY)  ## Attention slicing and token merging in torch: seconds, memory, distance (4 GB of disk, ten minutes).
	$(BIN)/python -P docs/benchmarks/torch_attention.py docs/benchmarks/torch_attention.json

bench-precisions: $(READY)  ## Seconds, memory and distance of every recipe on a UNet of SD 1.5's size (25 GB of disk, some hours; NNCF_PYTHON=…/python for NNCF's).
	$(BIN)/python docs/benchmarks/unet_precisions.py docs/benchmarks/unet_precisions.json $(if $(NNCF_PYTHON),--nncf-python $(NNCF_PYTHON))

families: $(READY)  ## The table of docs/families.md: every pipeline with every backend.
	rm -f build/families.json && mkdir -p build
	RECORD=build/families.json $(BIN)/python -P -m pytest -m '' -k "diffusers_picture" tests/test_families.py
	cp build/families.json docs/families.json
	$(BIN)/python -P docs/benchmarks/families.py docs/families.json docs/families.md

bench-shapes: $(READY)  ## How often the embedded model draws what its prompt says, over steps and guidance.
	$(BIN)/python -P docs/benchmarks/shapes_accuracy.py docs/benchmarks/shapes_accuracy.json

bench-statistics: $(READY)  ## How often the bench's verdicts are right, over simulated experiments of known truth.
	$(BIN)/python -P docs/benchmarks/planted_truth.py docs/benchmarks/planted_truth.json

gpu: $(READY)  ## On a machine with an NVIDIA GPU: everything that it can show, in ten minutes; again, what is missing.
	$(BIN)/python -P docs/benchmarks/gpu.py build/gpu/record.json

shapes: $(READY)  ## Train the embedded model again, from nothing but the scene generator (an hour and a half on 2 cores).
	$(BIN)/python -P -m bakeoff.models.training build/shapes

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(INTEROP_READY): tests/interop/optimum-constraints.txt
	$(PYTHON) -m venv .venv-interop
	$(INTEROP_BIN)/pip install -q --disable-pip-version-check -c $< torch
	$(INTEROP_BIN)/pip install -q --disable-pip-version-check -c $< diffusers transformers optimum optimum-onnx optimum-intel openvino onnxruntime accelerate
	touch $@

$(GENAI_READY): tests/interop/genai-constraints.txt
	$(PYTHON) -m venv .venv-genai
	$(GENAI_BIN)/pip install -q --disable-pip-version-check -c $< openvino-genai openvino-tokenizers openvino transformers numpy
	touch $@

$(ORT_OPENVINO_READY): $(READY)
	$(PYTHON) -m venv .venv-ort-openvino
	$(ORT_OPENVINO_BIN)/python -c "import site; print('import site; site.addsitedir(\"$(abspath $(VENV))/lib/python%d.%d/site-packages\")' % __import__('sys').version_info[:2])" \
		> $$($(ORT_OPENVINO_BIN)/python -c "import site; print(site.getsitepackages()[0])")/others.pth
	$(ORT_OPENVINO_BIN)/pip install -q --disable-pip-version-check --no-deps onnxruntime-openvino
	touch $@

$(SDCPP_READY): tests/interop/sdcpp-constraints.txt
	$(PYTHON) -m venv .venv-sdcpp
	$(SDCPP_BIN)/pip install -q --disable-pip-version-check -c $< stable-diffusion-cpp-python numpy
	touch $@

clean:
	rm -rf $(VENV) .venv-interop .venv-genai .venv-ort-openvino .venv-sdcpp build demo
