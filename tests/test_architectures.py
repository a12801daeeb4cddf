"""Models of other architectures, with random weights: the outcome of each is the one that the documentation names."""

import re

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import run_ptq
from conftest import COLORS, OF_DISTILBERT, ROOT, SIZES, build_rows, build_tokenizer, ptq_flags
from emotion import EmotionClassifier
from emotion.inference.model_folder import find_formats
from emotion.utils.errors import UserError

WITH_POSITIONS = SIZES | {"max_position_embeddings": 42}
WITH_FACTORS = WITH_POSITIONS | {"embedding_size": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
XLNET = {"d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 128, "initializer_range": 0.2}
FUNNEL = {"d_model": 64, "block_sizes": [1, 1], "n_head": 2, "d_head": 32, "d_inner": 128, "num_decoder_layers": 0}
ARCHITECTURES = {
    "BERT": ("bert", WITH_POSITIONS),
    "DistilBERT": ("distilbert", OF_DISTILBERT),
    "RoBERTa": ("roberta", WITH_POSITIONS),
    "XLM-R": ("xlm-roberta", WITH_POSITIONS),
    "CamemBERT": ("camembert", WITH_POSITIONS),
    "MPNet": ("mpnet", WITH_POSITIONS),
    "ELECTRA": ("electra", WITH_FACTORS),
    "ALBERT": ("albert", WITH_FACTORS),
    "DeBERTa-v2": ("deberta-v2", WITH_POSITIONS | DEBERTA | {"position_biased_input": False, "type_vocab_size": 0}),
    "ModernBERT": ("modernbert", WITH_POSITIONS | {"local_attention": 8}),
    "MobileBERT": ("mobilebert", WITH_FACTORS | {"intra_bottleneck_size": 32}),
    "XLNet": ("xlnet", XLNET),
    "Funnel": ("funnel", FUNNEL | {"initializer_std": 0.2}),
    "GPT-2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 42, "initializer_range": 0.2}),
}
# Their errors grow with random weights: MobileBERT has no norms, and Funnel pools its tokens.
GAPS = {"MobileBERT": 0.3, "Funnel": 0.3}
WITHOUT_TYPES = {"distilbert", "roberta", "xlm-roberta", "camembert", "mpnet", "modernbert", "gpt2"}


def build_classifier(folder, kind: str, sizes: dict, **changes):
    """A classifier of three colors with random weights, as Transformers saves it."""
    like_xlnet = kind == "xlnet"
    tokenizer = build_tokenizer(
        "$A:0 [SEP]:0 [CLS]:2" if like_xlnet else "[CLS] $A [SEP]",
        model_max_length=40,
        model_input_names=["input_ids", "attention_mask"] + ["token_type_ids"] * (kind not in WITHOUT_TYPES),
        padding_side="left" if like_xlnet else "right",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    labels = dict(enumerate(COLORS))
    # A row more, for the token [MASK], which the tokenizers of Transformers add
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + 1, id2label=labels, **ids, **sizes, **changes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def documented() -> dict[str, list[str]]:
    """Architecture -> its outcomes with ONNX Runtime and with Transformers, from the documentation's table."""
    page = (ROOT / "docs" / "quantization.md").read_text()
    section = page.partition("## Architectures\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: outcomes for name, *outcomes in rows[2:]}


def transformers_logits(folder, texts: list[str]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def test_the_table_names_every_architecture():
    assert list(documented()) == list(ARCHITECTURES)


@pytest.mark.processes
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_comes_out_as_documented(name, colors, tmp_path, capsys):
    kind, sizes = ARCHITECTURES[name]
    folder, out = tmp_path / "float", tmp_path / "ptq"
    build_classifier(folder, kind, sizes)
    flags = ptq_flags(folder, out, dataset_name=colors, num_calibration_samples=20, max_f1_drop=100)
    outcomes, texts = [], build_rows(30)["text"] + [" ".join(build_rows(30)["text"])]
    try:
        run_ptq.main([*flags, "--formats", "torchao", "onnx"])
    except UserError as error:
        outcomes = [f"refused: {error}"] * 2
    else:
        left_out = re.search("left out: onnx; (.*)", capsys.readouterr().out)
        if left_out:
            outcomes = [f"refused: {left_out[1]}"]
        else:
            graph = onnx.load(out / "onnx" / "model_quantized.onnx").graph
            fused = {node.op_type for node in graph.node} & {"QAttention", "MultiHeadAttention"}
            outcomes = ["fused graph" if fused else "plain graph"]
        outcomes.append("INT8")
        expected = transformers_logits(folder, texts)
        for format in find_formats(out):
            found = EmotionClassifier.from_pretrained(out, format).logits(texts)
            assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() >= 1 - GAPS.get(name, 0.1), format
            assert np.abs(found - expected).mean() < GAPS.get(name, 0.1) * expected.std(), format
    for outcome, documentation in zip(outcomes, documented()[name], strict=True):
        kind, _, reason = documentation.split(" (")[0].partition(": ")
        assert outcome.startswith(kind) and reason in outcome, outcomes
