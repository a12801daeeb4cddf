"""Classification with a language model: the class name with the highest log-likelihood as the answer to the prompt.

The logit of a class is the sum of the log-probabilities of its name's tokens and of the token that ends the answer,
which keeps a name from being the beginning of another. Softmax over the logits gives the probability of each class,
given that the answer is one of them.
"""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from emotion.inference.model_folder import open_model, read_config
from emotion.utils.errors import UserError, one_line


def open_adapted(folder: Path, adapter: Path) -> PeftModel:
    """Opens a language model with an adapter on the CPU; raises `UserError` if a file is damaged or does not fit."""
    base, report = open_model("AutoModelForCausalLM", folder, dtype="auto", device_map="cpu")
    if report["missing_keys"]:
        raise UserError(f"{folder}: no weights for {', '.join(sorted(report['missing_keys'])[:3])}; make it again")
    with one_line(f"{adapter} cannot be opened"):
        return PeftModel.from_pretrained(base, str(adapter)).eval()


def has_chat_template(folder: Path | str) -> bool:
    """Whether the tokenizer of a folder or Hub id has a chat template."""
    return bool(_open_tokenizer(folder).chat_template)


def _open_tokenizer(folder: Path | str):
    """The tokenizer of a folder or Hub id; raises `UserError` if it cannot be loaded."""
    with one_line(f"{folder}: no tokenizer can be loaded from it"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class PromptEncoder:
    """Encodes prompts: the instruction, by default that of config.json, and a text in the model's chat template."""

    texts_cut = 0  # as of `TextEncoder`: a prompt without its end would ask for no answer, so none is truncated

    def __init__(self, folder: Path, instruction: str | None = None):
        self._tokenizer = _open_tokenizer(folder)
        self._instruction = instruction or read_config(folder).get("instruction")
        if not self._instruction or not self._tokenizer.chat_template:
            raise UserError(f"{folder} names no instruction or no chat template; make it with run_llama_factory.py")

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of the prompt of each text."""
        return self._encode([self._render(text) for text in texts])

    def answer(self, label: str, whole: bool = False) -> list[int]:
        """Returns the token ids of a label as the answer, up to EOS, or ``whole``, as the template ends it."""
        # Any text will do, since what precedes the answer is removed. Tokenized by itself, as in the training.
        prompt, both = self._render(""), self._render("", label)
        if not both.startswith(prompt):  # templates of models that think first rewrite what precedes an answer
            raise UserError(f"the chat template does not write an answer behind the prompt {prompt[-40:]!r}")
        answer = both.removeprefix(prompt)
        (ids,) = self._encode([answer])
        end = self._tokenizer.eos_token_id
        if end not in ids:
            raise UserError(f"the chat template does not end an answer with {self._tokenizer.eos_token}: {answer!r}")
        return ids if whole else ids[: ids.index(end) + 1]

    def _render(self, text: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": f"{self._instruction}\n{text}"}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written them out


class AnswerTree:
    """All answers side by side after one prompt (tree attention): a token attends to the prompt and to its own answer.

    So one forward pass computes the prompt once for all classes. ``answers`` are token ids with EOS.
    """

    def __init__(self, answers: list[list[int]]):
        inputs: list[int] = []  # of the tokens after the prompt; an answer's last one predicts nothing
        owners, steps = [], []
        positions, targets, classes = [], [], []  # of the predictions
        for number, answer in enumerate(answers):
            for step, token in enumerate(answer):
                # Position 0 is the last token of the prompt, which predicts the first token of every answer.
                positions.append(len(inputs) if step else 0)
                targets.append(token)
                classes.append(number)
                if step + 1 < len(answer):
                    inputs.append(token)
                    owners.append(number)
                    steps.append(step)
        self._inputs, self._owners, self._steps = map(torch.tensor, (inputs, owners, steps))
        self._positions, self._targets, self._classes = map(torch.tensor, (positions, targets, classes))
        self._count = len(answers)

    def log_likelihoods(self, model, prompts: list[list[int]]) -> np.ndarray:
        """The log-likelihood of each answer to each prompt, of token ids: float32 (prompts, answers)."""
        ids, positions, attends = self._arrange(prompts)
        dtype = model.get_input_embeddings().weight.dtype
        # An additive mask, since not all attention implementations take a boolean one.
        mask = torch.zeros(attends.shape, dtype=dtype).masked_fill(~attends, torch.finfo(dtype).min)[:, None]
        with torch.inference_mode():
            # Only the last token of the prompt and those after it predict: a vocabulary is large.
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=1 + len(self._inputs),
                use_cache=False,
            )
            logits = output.logits.float()
            tokens = logits[:, self._positions, self._targets] - logits.logsumexp(dim=-1)[:, self._positions]
            sums = torch.zeros(len(prompts), self._count).index_add(1, self._classes, tokens)
        return sums.numpy()

    def _arrange(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and positions, int64 (prompts, width), and the attention mask, bool (prompts, width, width)."""
        longest = max(map(len, prompts))
        width = longest + len(self._inputs)
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        positions, filled = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt)  # padded on the left, so that the answers begin at the same index
            ids[row, start:longest] = torch.tensor(prompt)
            positions[row, start:longest] = torch.arange(len(prompt))
            positions[row, longest:] = len(prompt) + self._steps
            filled[row, start:] = True
        ids[:, longest:] = self._inputs
        owners = torch.cat([torch.full((longest,), -1), self._owners])  # -1: the prompt, to which all attend
        tree = ((owners == -1) | (owners[:, None] == owners)).tril()
        # Padding attends to itself, since softmax over nothing is NaN.
        return ids, positions, tree & filled[:, None] | torch.eye(width, dtype=torch.bool)
