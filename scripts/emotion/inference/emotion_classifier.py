"""Classifies texts with a model folder or a repository of the Hub, in any of its formats.

ONNX and OpenVINO files need neither torch nor transformers. Few texts are classified one batch after the other, with
all threads, and of many each thread computes a batch of its own. The batches depend on the texts alone.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from emotion.data.metrics import probabilities
from emotion.inference.model_folder import (
    HOW_TO_GET,
    SHARED_FILES,
    WEIGHT_FILES,
    find_formats,
    is_multi_label,
    names_to_serve,
)
from emotion.inference.runtimes import TorchClassifier, batches_by_tokens, open_artifact
from emotion.utils.errors import UserError, check_repo_id, check_revision
from emotion.utils.files import SUMS_FILE, check_sums, read_sums, recommended_model
from emotion.utils.machine import choose_threads

# The formats to look for if none is given, the fastest for one text first. A repository's `model.safetensors` is
# downloaded as "pytorch", whichever of the three formats with this file its config.json names.
PREFERRED = ("onnx", "openvino", "pytorch")
LONG_TEXTS = ("truncate", "mean")  # what becomes of a text that is longer than the model takes
FEW = 32  # texts in one call; opening the model a second time would take longer than it saves
Workers = tuple[Any, ThreadPoolExecutor | None]  # a runtime, and the threads that call it
CHUNK = 2048  # texts that are tokenized together; two chunks are in memory at once, however many texts there are

# A forked process has a copy of all memory and none of the other threads: a runtime that was opened before the fork
# waits for threads that are not there, at its next call and when it is destroyed. It is opened again instead.
forks = 0  # number of forks between the process that imported this module and this one
opening = threading.Lock()  # held while a runtime is opened again


def _after_fork() -> None:
    global forks, opening
    forks += 1
    opening = threading.Lock()  # the old one may be held by a thread that is not here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of a user who wants it: `tokenizers` would wait for its threads


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


class EmotionClassifier:
    """Classifies texts. A copy, a pickle and a forked process open the folder again; threads may share an instance.

    `EmotionClassifier()` opens the recommended model, `from_pretrained` another folder or a repository of the Hub;
    ``open_runtime`` replaces `open_artifact`, with the same arguments. A call is `classify` of a text or of several.
    With ``long_texts`` "mean" a text that is longer than the model takes is divided into windows of the model's
    length, and its scores are the mean of theirs; otherwise it is truncated.

    Attributes:
        labels (`list[str]`): the names of the classes, in the order of the logits.
        format (`str`): the format that is open.
        multi_label (`bool`): whether a text may have several labels; then each has a sigmoid score of its own.

    Example:

    ```python
    >>> from emotion import EmotionClassifier
    >>> classifier = EmotionClassifier()
    >>> classifier("i miss my old home")
    {'label': 'sadness', 'score': 0.99}
    ```
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        format: str | None = None,
        threads: int | None = None,
        open_runtime=open_artifact,
        long_texts: str = "truncate",
    ):
        if long_texts not in LONG_TEXTS:
            raise UserError(f"long_texts {long_texts!r:.40}: it takes {' or '.join(LONG_TEXTS)}")
        self.long_texts = long_texts
        self._folder = recommended_model() if folder is None else Path(folder)
        self.format = format or choose_format(self._folder, verify=True)
        self._threads, self._open_runtime = choose_threads(threads), open_runtime
        self._open()
        self.multi_label = is_multi_label(self._folder)
        self._folder = self._folder.absolute()  # to open it again, whatever the working folder is then

    def _open(self) -> None:
        """Opens the runtime for this process."""
        # OpenMP, with which PyTorch computes, keeps its threads by the caller: in a fork a new thread gets new ones.
        caller = ThreadPoolExecutor(max_workers=1) if forks else None
        open_runtime = partial(self._open_runtime, self._folder, self.format, threads=self._threads)
        self._runtime = caller.submit(open_runtime).result() if caller else open_runtime()
        self.labels = self._runtime.labels
        # One call at a time is computed by the caller's own thread. PyTorch gives each thread that calls it a team of
        # threads, and with more of these than processors all wait asleep: a text then takes twice as long.
        self._one_by_one: Workers = (self._runtime, caller)
        self._side_by_side: Workers | None = None  # opened by the first call with many texts
        self._forks = forks  # last: until then another thread would wait for what is opened here

    def __reduce__(self):
        # For `pickle` and `copy`: a runtime cannot be copied, and its folder can be opened again.
        return type(self), (self._folder, self.format, self._threads, self._open_runtime, self.long_texts)

    @property
    def runtime(self):
        """The runtime of this process, one of the classes in runtimes.py."""
        if self._forks != forks:
            with opening:
                if self._forks != forks:
                    # The old runtime must not be destroyed, even when the interpreter ends.
                    old = (self._runtime, self._one_by_one, self._side_by_side)
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(old))
                    self._open()
        return self._runtime

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        format: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        revision: str | None = None,
        long_texts: str = "truncate",
    ) -> "EmotionClassifier":
        """Opens a model folder, or a repository of the Hub, of which it downloads one format.

        Args:
            model (`str` or `Path`, *optional*): a folder, or a repository id on the Hub: "owner/name"; defaults to the
                recommended model.
            format (`str`, *optional*): "onnx", "openvino", "pytorch", "bf16", "torchao", "nf4" or "adapter"; defaults
                to ONNX, else OpenVINO, else the first that the folder has.
            threads (`int`, *optional*): defaults to `OMP_NUM_THREADS`, at most all processors of this process.
            verify (`bool`, defaults to `True`): whether the files are compared with the folder's SHA256SUMS, if any.
            revision (`str`, *optional*): branch, tag or commit of the repository; defaults to "main".
            long_texts (`str`, defaults to "truncate"): "truncate" or "mean".

        Raises:
            UserError: if there is neither folder nor repository, it does not have the format, or a file is damaged.
        """
        threads = choose_threads(threads)
        folder = recommended_model() if model is None else find_model(str(model), format, verify, revision)
        format = format or choose_format(folder, verify)
        return cls(folder, format, threads, partial(open_artifact, verify=verify), long_texts)

    @property
    def texts_cut(self) -> int:
        """The number of texts so far that were longer than the model takes, and truncated or divided."""
        return self.runtime.encode.texts_cut

    def __call__(self, texts: str | Iterable[str], top_k: int | None = 1, threshold: float | None = None):
        """As `classify`; for a single string its answer alone."""
        answers = self.classify([texts] if isinstance(texts, str) else texts, top_k, threshold)
        return answers[0] if isinstance(texts, str) else answers

    def classify(self, texts: Iterable[str], top_k: int | None = 1, threshold: float | None = None) -> list:
        """Returns the most probable labels of each text.

        Args:
            texts (`Iterable[str]`): the texts.
            top_k (`int`, *optional*, defaults to 1): the number of labels per text; `None` for all.
            threshold (`float`, *optional*): for a model that gives a text several labels, 0.5 for instance: the labels
                with this score or more, in place of ``top_k``.

        Returns:
            `list`: for each text, in order, a dictionary ``{"label": str, "score": float}``, or for another ``top_k``
            than 1 and with a ``threshold`` a list of them, most probable first. A score is the softmax probability of
            the label, or its sigmoid where a text may have several labels.

        Raises:
            TypeError: if ``texts`` is a single string.
            UserError: if one of the texts is no string, ``top_k`` is below 1, the logits are not finite, or the model
                gives a text one label and there is a ``threshold``.
        """
        return list(self.classify_stream(texts, top_k, threshold))

    def classify_stream(self, texts: Iterable[str], top_k: int | None = 1, threshold: float | None = None) -> Iterator:
        """Yields the results of `classify`, with the same arguments and errors, one by one and in flat memory.

        It reads up to `2 * CHUNK` texts ahead of the result. Pass the lines of a live stream to `classify` as they
        come.
        """
        check_is_batch(texts)
        if top_k is not None and (not isinstance(top_k, Integral) or top_k is True or top_k < 1):
            raise UserError(f"top_k {top_k!r:.40}: it takes a number, 1 or more, or None for all labels")
        if threshold is not None and not (self.multi_label and isinstance(threshold, Real) and 0 <= threshold <= 1):
            several = "several labels" if self.multi_label else "one label, and has no threshold"
            raise UserError(f"threshold {threshold!r:.40}: it takes 0 to 1; {self._folder} gives a text {several}")
        return self._label_all(texts, top_k, threshold)

    def _label_all(self, texts: Iterable[str], top_k: int | None, threshold: float | None) -> Iterator:
        for logits in self._logits_in_chunks(texts):
            scores = self.probabilities(logits)
            if threshold is None:
                yield from to_labels(scores, self.labels, top_k)
            else:
                for answers in to_labels(scores, self.labels, None):
                    yield [one for one in answers if one["score"] >= threshold]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns the scores of `classify` for logits, float64 of shape `(texts, labels)`."""
        return probabilities(logits, self.multi_label)

    def logits(self, texts: Iterable[str], progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Returns the logits, float32 of shape `(texts, labels)` in the order of the texts; raises as `classify` does.

        ``progress`` is called with the number of texts of each finished batch.
        """
        check_is_batch(texts)
        empty = np.empty((0, len(self.labels)), dtype=np.float32)  # the logits of no texts
        return np.concatenate([empty, *self._logits_in_chunks(texts, progress)])

    def _logits_in_chunks(self, texts: Iterable[str], progress=None) -> Iterator[np.ndarray]:
        """Yields float32 `(texts, labels)` for one chunk of texts after the other."""
        texts, position, runtime = iter(texts), 0, self.runtime
        started: deque[tuple[list[tuple[np.ndarray, Future]], list[int]]] = deque()
        workers: Workers | None = None
        try:
            while chunk := list(islice(texts, CHUNK)):
                check_texts(chunk, position)
                position += len(chunk)
                # The first chunk decides: a short one is all there is.
                workers = workers or (self._one_by_one if len(chunk) <= FEW else self._open_side_by_side())
                # While other threads compute the chunk before, this one tokenizes the next.
                if self.long_texts == "mean" and hasattr(runtime.encode, "windows"):  # a prompt is never cut
                    parts = runtime.encode.windows(chunk)
                else:
                    parts = [[token_ids] for token_ids in runtime.encode(chunk)]
                batches = start_batches(*workers, list(chain.from_iterable(parts)), progress)
                started.append((batches, [len(windows) for windows in parts]))
                if len(started) > 1:
                    yield self._collect(*started.popleft())
            while started:
                yield self._collect(*started.popleft())
        finally:  # after an error, or when the caller wants no more: the process would end only after all batches
            for batches, _ in started:
                for _, future in batches:
                    future.cancel()

    def _collect(self, started: list[tuple[np.ndarray, Future]], windows: list[int]) -> np.ndarray:
        """Waits for batches of `start_batches`; returns float32 `(texts, labels)`, in the order of the texts.

        ``windows`` counts those of each text.
        """
        logits = np.empty((sum(len(rows) for rows, _ in started), len(self.labels)), dtype=np.float32)
        for rows, future in started:
            logits[rows] = future.result()
        # `argmax` would return a label for a row with a NaN, and JSON has no such number.
        if not np.isfinite(logits).all():
            raise UserError(
                f"{self._folder} ({self.format}) gives logits that are not finite: its weights are damaged"
            )
        if len(windows) == len(logits):  # one for each text
            return logits
        ends = np.cumsum(windows)
        for end, count in zip(ends, windows, strict=True):
            if count > 1:
                scores = self.probabilities(logits[end - count : end])
                logits[end - 1] = mean_logits(scores, self.multi_label)
        return logits[ends - 1]

    def _open_side_by_side(self) -> Workers:
        """A runtime for many texts, opened once more since its threads are set for good, and the pool to call it."""
        with opening:  # two threads may ask at once
            if self._side_by_side is None:
                self._side_by_side = self._one_by_one
                # PyTorch sets its threads for the whole process, and runs one call at a time.
                if self._threads > 1 and not isinstance(self._runtime, TorchClassifier):
                    runtime = self._open_runtime(self._folder, self.format, threads=self._threads, calls=self._threads)
                    self._side_by_side = (runtime, ThreadPoolExecutor(max_workers=self._threads))
            return self._side_by_side


def mean_logits(scores: np.ndarray, multi_label: bool) -> np.ndarray:
    """The logits that give the mean of scores, float `(windows, labels)`, with `probabilities`."""
    mean = scores.mean(axis=0).clip(1e-30, 1 - 1e-16)
    return np.log(mean) - (np.log1p(-mean) if multi_label else 0)


def start_batches(
    runtime,
    pool: ThreadPoolExecutor | None,
    token_ids: list[list[int]],
    progress: Callable[[int], object] | None = None,
) -> list[tuple[np.ndarray, Future]]:
    """Starts all batches; returns the indices of each batch's windows, and the future of its logits."""
    started = []
    for rows in batches_by_tokens(token_ids):
        batch = [token_ids[row] for row in rows]
        if pool:
            future = pool.submit(runtime.logits, batch)
        else:
            future = Future()
            future.set_result(runtime.logits(batch))
        if progress:
            future.add_done_callback(partial(_report, progress, len(rows)))
        started.append((rows, future))
    return started


def _report(progress: Callable[[int], object], texts: int, _: Future) -> None:
    progress(texts)


def to_labels(probabilities: np.ndarray, labels: list[str], top_k: int | None) -> Iterator:
    """Yields the result of `EmotionClassifier.classify` for each row of probabilities, float `(texts, labels)`."""
    # Stable: of equal scores the first label wins, as with `argmax` in the evaluation.
    order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    scores = np.take_along_axis(probabilities, order, axis=-1)
    for row in zip(order.tolist(), scores.tolist(), strict=True):
        answers = [{"label": labels[index], "score": score} for index, score in zip(*row, strict=True)]
        yield answers[0] if top_k == 1 else answers


def check_is_batch(texts) -> None:
    """Raises `TypeError` for a string, a mapping or a table, whose characters, keys or columns are no texts."""
    if isinstance(texts, str | bytes):
        raise TypeError("texts must be a list of strings, not a single one; write [text], or classifier(text)")
    if isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise TypeError(f"texts must be a list of strings, not a {type(texts).__name__}; pass its column of texts")
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a list of strings, not a {type(texts).__name__}")


def check_texts(texts: list, position: int) -> None:
    """Raises `UserError` for the first item that is no valid string; ``position`` is the index of the first item."""
    for number, text in enumerate(texts, start=position):
        # None and NaN mark missing texts in tables; a pair of texts would be taken for one text of two parts.
        if not isinstance(text, str):
            raise UserError(f"text {number} (counted from 0) is {text!r:.40}, no string; leave it out or convert it")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, cut by another program
            where = f"text {number} (counted from 0)"
            raise UserError(f"{where} has half a character at {error.start}; replace it") from error


def choose_format(folder: Path, verify: bool) -> str:
    """The first of `PREFERRED` that the folder has, else its first format; raises `UserError` for one that is lost."""
    formats = find_formats(folder)
    sums = (read_sums(folder) if verify else None) or {}
    for format in PREFERRED:
        if format in formats:
            return format
        if lost := [name for name in WEIGHT_FILES[format] if name in sums and not (folder / name).exists()]:
            others = f"ask for one of its formats: {', '.join(formats)}"
            raise UserError(f"{folder} has no {lost[0]}, which {SUMS_FILE} names; download it again, or {others}")
    return next(iter(formats))


def find_model(
    name: str, format: str | None, verify: bool = True, revision: str | None = None, optional: tuple[str, ...] = ()
) -> Path:
    """The folder of that name, or the downloaded files of the repository of that name; arguments as of `fetch`.

    ``format`` is the one to download; if None, the first of `PREFERRED` that the repository has.
    """
    # A name that cannot be "owner/name" was meant as a folder, even if there is none: `find_formats` says so.
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        check_revision(name, revision)
        return Path(name)
    if format not in {None, *WEIGHT_FILES}:
        raise UserError(f"no format '{format}'; take one of {', '.join(WEIGHT_FILES)}")
    try:
        return fetch(name, [format] if format else [*PREFERRED], verify, optional, revision)
    except UserError as error:
        raise UserError(f"no folder {name}; {error}; {HOW_TO_GET}") from error


def fetch(
    repo_id: str, formats: list[str], verify: bool = True, optional: tuple[str, ...] = (), revision: str | None = None
) -> Path:
    """Downloads the files that one format of a repository needs, or finds them in the cache; returns their folder.

    Of the ``formats`` it takes the first that the repository has, and the ``optional`` files that it has. Raises
    `UserError` if there is none, a file differs from its checksum (with ``verify``), or the Hub refuses or fails.
    """
    from emotion.utils.hub_requests import ask_hub, endpoint_answers  # a local folder needs no huggingface_hub

    check_repo_id(repo_id)
    offline = not endpoint_answers()  # then the cache alone is read
    download = partial(_download, repo_id, revision, formats, (SUMS_FILE, *optional), offline)
    folder, names = ask_hub(download, repo_id)
    if verify:
        try:
            check_sums(folder, names)
        except UserError as error:  # the cache would give the same file again
            raise UserError(f"{error}. To fetch it anew, first run `hf cache rm model/{repo_id}`") from error
    return folder


def _download(
    repo_id: str, revision: str | None, formats: list[str], optional: tuple[str, ...], offline: bool
) -> tuple[Path, list[str]]:
    """One attempt of `fetch`; returns the folder and the names of the files that the format needs."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    download = partial(hf_hub_download, repo_id, local_files_only=offline)
    # Offline, nobody knows whether the repository lacks a file that the cache lacks.
    absent = EntryNotFoundError if offline else RemoteEntryNotFoundError
    folder = Path(download(SHARED_FILES[0], revision=revision)).parent
    # The cache names its folders by commit. All files come from this one, whatever is pushed meanwhile.
    download = partial(download, revision=folder.name)
    for name in SHARED_FILES[1:]:
        download(name)
    for name in optional:
        with suppress(absent):  # most repositories have none
            download(name)
    for format in formats:
        for weights in WEIGHT_FILES[format]:
            # Tried one after the other: a list of files exists on the Hub only, not in the cache.
            try:
                download(weights)
            except absent:
                continue
            names = names_to_serve(folder, folder / weights, format)
            for name in names:
                download(name)
            return folder, names
    if offline:
        raise LocalEntryNotFoundError(f"no file for {' or '.join(formats)}")
    raise UserError(f"{repo_id} has no file for {' or '.join(formats)}")
