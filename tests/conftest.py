"""Fixtures: a tiny encoder, a tiny dataset and what the commands make of them; no test reaches the network."""

# ruff: noqa: E402 (the environment is set before the libraries are imported)
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Neither the user's caches nor their contents
os.environ["HF_HOME"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="emotion-tests-")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import importlib.util
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, DistilBertConfig, MPNetConfig, PreTrainedTokenizerFast, RobertaConfig

import qlora_study
import run_baseline
import run_evaluation
import run_ptq
import run_qat
import run_qlora
import train_seeds as seeds
from emotion.data.dataset import DEFAULT_DATASET, load_task
from emotion.evaluation.inspection import describe_scheme
from emotion.inference.model_folder import weights_of
from emotion.inference.runtimes import open_artifact, predict
from emotion.utils import hub_requests
from emotion.utils.base_model import EMBEDDED_MODEL
from hub_server import WRITE, running_hub

ROOT = Path(__file__).resolve().parent.parent
run_evaluation.has_bf16 = lambda use_cpu: True  # tiny models are scored in bfloat16 on every processor
HAS_OPTIMUM = importlib.util.find_spec("optimum") is not None
NEEDS_OPTIMUM = pytest.mark.skipif(not HAS_OPTIMUM, reason="optimum-intel needs an older Transformers")
# How many times as many seeds the random tests take: 1 in `make test`
FUZZ = int(os.environ.get("EMOTION_FUZZ", "1"))
COLORS = {"warm": ["red", "orange", "yellow"], "cold": ["blue", "green", "violet"], "none": ["black", "white", "gray"]}
FILLERS = ["a", "the", "i", "see", "sky", "house", "today", "now", "very", "and"]
WORDS = FILLERS + sum(COLORS.values(), [])
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES["initializer_range"] = 0.2
OF_DISTILBERT = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2, "initializer_range": 0.2}
ENCODERS = {
    "bert": (BertConfig, {**SIZES, "max_position_embeddings": 40}),
    "distilbert": (DistilBertConfig, {**OF_DISTILBERT, "max_position_embeddings": 40}),
    "roberta": (RobertaConfig, {**SIZES, "max_position_embeddings": 42, "type_vocab_size": 1}),
    "mpnet": (MPNetConfig, {**SIZES, "max_position_embeddings": 42}),
}
THREADS = torch.get_num_threads()


def seeds_for(few: int) -> range:
    """The seeds of a test that draws its faults: a few in the suite, many in `make fuzz`."""
    return range(few * FUZZ)


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_protocol(item):
    """Gives a test more time where more processes wait for a core than there are: it would be slow, and no more."""
    marker = item.get_closest_marker("timeout")
    limit_s = marker.args[0] if marker else float(item.config.getini("timeout"))
    waiting = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    item.add_marker(pytest.mark.timeout(limit_s * max(1, waiting)), append=False)
    return (yield)


@pytest.fixture(autouse=True)
def as_many_threads_as_at_the_start():
    """Opening an artifact sets the number of threads, and with it the order of sums."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def build_encoder(folder: Path, kind: str = "bert") -> Path:
    """A randomly initialized encoder without a head, and a word-level tokenizer, as a model folder."""
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "bert" else [])
    tokenizer = build_tokenizer("[CLS] $A [SEP]", model_max_length=64, model_input_names=names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config_class, sizes = ENCODERS[kind]
    AutoModel.from_config(config_class(vocab_size=len(tokenizer), pad_token_id=1, **sizes)).save_pretrained(folder)
    return folder


def build_tokenizer(template: str, **options) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, whose special tokens stand as the template of `tokenizers` has them."""
    specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]  # the padding has id 1, as RoBERTa wants it
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        **options,
    )


def build_rows(count: int) -> dict:
    """Texts whose class is the kind of colour that they name, and nothing else tells it."""
    draw = random.Random(count)
    texts, classes = [], []
    for index in range(count):
        before, after = (draw.choices(FILLERS, k=draw.randint(0, 3)) for _ in range(2))
        texts.append(" ".join([*before, draw.choice(COLORS[list(COLORS)[index % 3]]), *after]))
        classes.append(index % 3)
    return {"text": texts, "label": classes}


def save_dataset(folder: Path, splits: dict, features=None) -> Path:
    """A dataset folder of parquet files, as `load_dataset` reads them; ``splits`` maps names to columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def color_features() -> datasets.Features:
    return datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(COLORS))})


@pytest.fixture(scope="session", autouse=True)
def remove_the_cache():
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """A function from a name and a function that fills a folder to that folder, filled once for all processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processes of one run have folders side by side
        root = root.parent / "shared"

    def build(name: str, fill) -> Path:
        folder, done = root / name, root / f"{name.replace('/', '-')}.done"
        root.mkdir(exist_ok=True)
        with FileLock(root / f"{name.replace('/', '-')}.lock"):  # the second process waits for the first
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # the first may have failed
                fill(folder)
                done.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def colors(build_once) -> Path:
    splits = {"train": build_rows(480), "validation": build_rows(60), "test": build_rows(90)}
    return build_once("data/colors", lambda folder: save_dataset(folder, splits, color_features()))


@pytest.fixture(scope="session")
def encoder(build_once) -> Path:
    return build_once("encoder/tiny-bert", build_encoder)


def as_flags(**values) -> list[str]:
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


FAST = {"per_device_train_batch_size": 16, "bf16": False, "disable_tqdm": True}


def train_flags(encoder: Path, dataset: Path, output: Path, **changes) -> list[str]:
    places = {"model_name_or_path": encoder, "dataset_name": dataset, "output_dir": output}
    return as_flags(**(places | FAST | {"learning_rate": 5e-3, "num_train_epochs": 6} | changes))


@pytest.fixture(scope="session")
def artifact(encoder, colors, build_once) -> Path:
    return build_once("weights/baseline", lambda folder: run_baseline.main(train_flags(encoder, colors, folder)))


@pytest.fixture(scope="session")
def encoder_of(build_once):
    return lambda kind: build_once(f"encoder/{kind}", lambda folder: build_encoder(folder, kind))


@pytest.fixture(scope="session")
def baseline_of(encoder_of, colors, build_once):
    """A function from a kind of encoder to a baseline that was trained from it, briefly."""

    def train(kind: str) -> Path:
        def fill(folder: Path) -> None:
            run_baseline.main(train_flags(encoder_of(kind), colors, folder, num_train_epochs=4))

        return build_once(f"{kind}/baseline", fill)

    return train


@pytest.fixture(scope="session")
def quantized(artifact, build_once) -> Path:
    return build_once("weights/ptq", lambda folder: run_ptq.main(ptq_flags(artifact, folder)))


def qlora_flags(encoder: Path, dataset: Path, output: Path, **changes) -> list[str]:
    return train_flags(encoder, dataset, output, **{"num_train_epochs": 8, "lora_dropout": 0.0, **changes})


@pytest.fixture(scope="session")
def adapted(encoder, colors, build_once) -> Path:
    """A tiny base in 4 bits with a trained adapter, in all its forms."""
    return build_once("qlora/qlora", lambda folder: run_qlora.main(qlora_flags(encoder, colors, folder)))


def qat_flags(artifact, out, **changes) -> list[str]:
    values = FAST | {"learning_rate": 1e-3, "num_train_epochs": 2} | changes
    return ptq_flags(artifact, out, **values)


def ptq_flags(artifact, out, **changes) -> list[str]:
    values = {"model_name_or_path": artifact, "output_dir": out, "num_calibration_samples": 60}
    return as_flags(**(values | changes))


@pytest.fixture(scope="session")
def trained(artifact, build_once) -> Path:
    """The tiny baseline, trained for 8 bits and for 2."""

    def fill(folder: Path) -> None:
        for bits in (8, 2):
            run_qat.main(qat_flags(artifact, folder / str(bits), bits=bits))

    return build_once("qat", fill)


@pytest.fixture(scope="session")
def real(build_once) -> Path:
    """The embedded model after a short training on real rows."""
    flags = {"max_train_samples": 3200, "max_steps": 90, "learning_rate": 4e-4, "load_best_model_at_end": False}
    flags |= {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    flags = as_flags(model_name_or_path=EMBEDDED_MODEL, **flags)
    return build_once("real/baseline", lambda folder: run_baseline.main([*flags, "--output_dir", str(folder)]))


@pytest.fixture(scope="session")
def real_int8(real, build_once) -> Path:
    return build_once("real/ptq", lambda folder: run_ptq.main(ptq_flags(real, folder)))


@contextlib.contextmanager
def a_full_disk(limit: int):
    """No file can grow over ``limit`` bytes in the block."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture(scope="session")
def test_rows():
    return load_task(DEFAULT_DATASET).splits["test"]


def realigned(model):
    """The model with its float weights at fresh addresses: sums of floats depend on how memory is aligned."""
    for parameter in model.parameters():
        if not hasattr(parameter, "qdata"):
            parameter.data = parameter.data.clone()
    return model.eval()


def run_script(name: str, *args, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, **options)


@contextlib.contextmanager
def locked(folder: Path):
    """Another process writes to that folder while the block runs."""
    code = "import sys; from emotion.utils.files import output_lock\n"
    code += "with output_lock(sys.argv[1]): print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT / "scripts"}
    with subprocess.Popen([sys.executable, "-c", code, str(folder.absolute())], **pipes) as other:
        assert other.stdout.readline() == "\n"
        yield
        other.communicate("\n")


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands that seeds and sweeps start run as function calls: loading the libraries takes longer than the rest."""

    def call(name: str, *args, check: bool = False) -> None:
        importlib.import_module(name.removesuffix(".py")).main([str(argument) for argument in args])

    for module in (seeds, qlora_study):
        monkeypatch.setattr(module, "run_script", call)


@pytest.fixture(scope="session")
def shared_hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(shared_hub, monkeypatch, tmp_path):
    """The server, empty and in order; this process and those that it starts may write there."""
    for kept in (shared_hub.repositories, shared_hub.blobs, shared_hub.faults, shared_hub.requests):
        kept.clear()
    settings = {"HF_ENDPOINT": shared_hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "hub")}
    settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", shared_hub.url)
    template = shared_hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    loaded = {"HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "hub" / "hub")}
    for name, value in (loaded | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_requests, "WAITS_S", (0, 0, 0))
    return shared_hub


SHARED = {"SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_to_edit(artifact: Path, folder: Path) -> Path:
    """A copy of an artifact without its SHA256SUMS, so that what is edited in it is opened."""
    return shutil.copytree(artifact, folder, ignore=shutil.ignore_patterns("SHA256SUMS"))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, place: str, value) -> None:
    """Sets one field, named with slashes (`~` is one in a name); `...` as the value removes it."""
    whole = inner = read_json(path)
    *outer, last = (int(key) if key.isdigit() else key.replace("~", "/") for key in place.split("/"))
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


def logits_of(folder: Path, format: str, texts: list[str]):
    classifier = open_artifact(folder, format, threads=1)
    return predict(classifier, classifier.encode(texts), batch_size=100)


def scheme_of(folder: Path, format: str = "onnx") -> dict:
    """What a record says of how a model is quantized, counted in its files."""
    return describe_scheme(open_artifact(folder, format, threads=1), weights_of(folder, format), format)


def run_code(code: str, *args, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """A program in a process of its own, with `emotion` and the commands on its path."""
    options = {"capture_output": True, "text": True, "timeout": 200} | options
    environment = (os.environ if env is None else env) | {"PYTHONPATH": str(ROOT / "scripts")}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=environment, **options)
