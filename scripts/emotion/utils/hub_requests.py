"""Requests to the Hub: every wait is bounded, transient errors are retried, and an error becomes one line.

`huggingface_hub` retries, resumes, compares lengths and falls back to its cache. Hooks of its HTTP client add what
1.21 and 2.4 lack: timeouts of API requests, bounds on bodies and on the waits that a server asks for, checks of the
headers after which it names files in its cache; and a bound on redirects, which 1.21 lacks.
"""

import contextlib
import os
import re
import ssl
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status, parse_ratelimit_headers

from emotion.utils.errors import UserError, check_repo_id, mask_token, printable, raised_by

WAITS_S = (1, 3, 9)  # seconds before the second, third and last attempt
MAX_WAIT_S = 120  # between two attempts, whatever the Hub asks for
TIMEOUT_S = 60  # for each step of a request for which huggingface_hub sets none
MAX_TRIES = 5  # of one request in an attempt: 15 s of a Hub that answers 500
MIN_RATE, GRACE_S = 1000, 30  # bytes a second that a body must have on average, after so many seconds
# Errors of the HTTP library where there is no network, by name: which library it is changes with huggingface_hub
UNREACHED = ("ConnectError", "ConnectTimeout")
MAX_ANSWER = 100_000_000  # bytes, of what is no file of an announced length; answers are read into memory


class UselessAnswerError(Exception):
    """What huggingface_hub would retry or read without end; no class that it would catch."""


def endpoint_answers() -> bool:
    """Whether the Hub may be asked and answers; a refusal is an answer."""
    try:
        return check_endpoint()
    except UserError:
        return False


def check_endpoint() -> bool:
    """Whether the Hub answers; False only if HF_HUB_OFFLINE is set or there is no network, `UserError` otherwise."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # any of the HTTP library
        # A certificate that is not valid was shown by someone.
        shown = any(isinstance(cause, ssl.SSLError) for cause in causes(error))
        if "HF_ENDPOINT" not in os.environ and type(error).__name__ in UNREACHED and not shown:
            return False
        reason = printable(f"no useful answer of {constants.ENDPOINT} ({type(error).__name__}: {error})")
        hint = "correct HF_ENDPOINT or the network's settings, or set HF_HUB_OFFLINE=1 to use what this machine has"
        raise UserError(f"{reason}; {hint}") from error
    return True


def ask_hub(attempt, repo_id: str):
    """Returns ``attempt()``, which sends requests about a repository; retries transient errors, raises `UserError`."""
    requests, waits_s = Requests(), iter(WAITS_S)
    while True:
        try:
            with requests.bounded():
                return attempt()
        except UserError:
            raise
        except Exception as error:
            transient, message, asked_s = classify_error(error, repo_id)
            if message is None:  # a bug, whose traceback is needed
                raise
            least_s = next(waits_s, None) if transient and not requests.exhausted else None
            if least_s is None:
                raise UserError(message) from error
        wait_s = max(least_s, min(asked_s, MAX_WAIT_S))
        asks = f", though it asks for {asked_s:.0f} s" if asked_s > MAX_WAIT_S else ""
        requests.report(f"{message}; trying again in {wait_s:.0f} s{asks}")
        time.sleep(wait_s)


def download_model(repo_id: str, revision: str | None = None) -> Path:
    """Downloads all that Transformers may read of a repository, float weights in any form; raises as `ask_hub`."""
    patterns = [f"*.{ending}" for ending in ("json", "txt", "model", "safetensors", "yaml")] + ["pytorch_model*.bin"]
    offline = not endpoint_answers()
    download = partial(
        snapshot_download, repo_id, revision=revision, allow_patterns=patterns, local_files_only=offline
    )
    return Path(ask_hub(download, repo_id))


class Requests:
    """Bounds the requests of one call of `ask_hub`."""

    def __init__(self):
        self.exhausted = False  # whether huggingface_hub has sent a request `MAX_TRIES` times
        self._reported = False
        self._status = "none"  # of the last answer
        self._tries = Counter()  # request -> how often it was sent without a useful answer

    @contextlib.contextmanager
    def bounded(self):
        """While the block runs, the HTTP client of huggingface_hub calls the methods below."""
        hooks = get_session().event_hooks
        self._tries.clear()
        hooks["request"].append(self._before)
        hooks["response"].append(self._after)
        try:
            yield
        finally:
            hooks["request"].remove(self._before)
            hooks["response"].remove(self._after)

    def report(self, line: str) -> None:
        """Prints that a request is retried."""
        self._reported = True
        print(line, file=sys.stderr)

    def _before(self, request) -> None:
        """Sets timeouts; raises `UselessAnswerError` at the last try."""
        tries = self._tries[_key(request)]
        self._tries[_key(request)] += 1
        where = f"{request.method} {request.url.host}{request.url.path}, last status {self._status}"
        self.exhausted |= tries >= MAX_TRIES
        if self.exhausted:
            raise UselessAnswerError(f"{where}, {MAX_TRIES} times")
        if tries and not self._reported:
            self.report(mask_token(f"no useful answer of the Hub to {where}; trying again"))
        most_s = constants.HF_HUB_ETAG_TIMEOUT if request.method == "HEAD" else TIMEOUT_S
        timeouts = request.extensions["timeout"]
        request.extensions["timeout"] = {step: min(time_s or most_s, most_s) for step, time_s in timeouts.items()}

    def _after(self, response) -> None:
        """Checks an answer's headers, before its body is read."""
        self._status = response.status_code
        if requested_pause(response):  # which huggingface_hub would not heed, or take in silence
            hf_raise_for_status(response)
        # Of what huggingface_hub takes as the last answer: errors and relative redirects have ETags of their own.
        if response.is_success or response.headers.get("Location", "").startswith(("http", "//")):
            del self._tries[_key(response.request)]
            if response.request.method == "HEAD":
                check_cache_headers(response)
        response.iter_raw = bound_body(response)


def _key(request) -> tuple:
    return threading.get_ident(), request.method, str(request.url)


def check_cache_headers(response) -> None:
    """Raises `FileMetadataError`, so that the cache is read, if a header would name a file outside of it."""
    commit = re.search(r"/resolve/([0-9a-f]{40})/", response.request.url.path)
    etag = r'(W/)?"?\w[\w.-]*"?'
    patterns = {"X-Repo-Commit": commit[1] if commit else "[0-9a-f]{40}", "X-Linked-ETag": etag, "ETag": etag}
    for name, pattern in patterns.items():
        value = response.headers.get(name)
        if value is not None and not re.fullmatch(pattern, value):  # huggingface_hub itself requires those it needs
            raise FileMetadataError(f"{name} cannot be '{value}'")


def bound_body(response):
    """A replacement of ``response.iter_raw``, which raises where a body comes too slowly or without end."""
    read, start = response.iter_raw, time.monotonic()
    # The client itself compares a body with the length that was announced.
    is_file = "/api/" not in response.request.url.path and "Content-Length" in response.headers

    def iter_raw(chunk_size: int | None = None):
        size = 0
        for chunk in read(chunk_size):
            size += len(chunk)
            if not is_file and size > MAX_ANSWER:
                raise UselessAnswerError(f"an answer is larger than {MAX_ANSWER:,} bytes")
            if time.monotonic() - start > GRACE_S + size / MIN_RATE:
                raise UselessAnswerError(f"fewer than {MIN_RATE:,} bytes a second")
            yield chunk

    return iter_raw


def requested_pause(response) -> float:
    """The seconds to wait by Retry-After or the Hub's own header, if the status is 429 or 503; else 0."""
    if response.status_code not in {429, 503}:
        return 0
    value = response.headers.get("Retry-After", "")
    try:
        if value.isdecimal():
            return float(value)
        return max(0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        limit = parse_ratelimit_headers(response.headers)
        return float(limit.reset_in_seconds) if limit else 0


def causes(error: BaseException) -> list[BaseException]:
    """The error, and those that caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def classify_error(error: BaseException, repo_id: str) -> tuple[bool, str | None, float]:
    """Whether an error is transient; its message in one line, None for a bug; the seconds to wait."""
    for link in causes(
        error
    ):  # the cause of others, where the library looked into its cache, or failed to read a refusal
        if response := getattr(link, "response", None):
            return *classify_status(link, response.status_code, repo_id), requested_pause(response)
    if isinstance(error, LocalEntryNotFoundError):
        if not error.__cause__:  # the cache alone was read
            why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
            return False, f"{repo_id} is not whole in the cache, and {why}", 0
        error = error.__cause__
    elif raised_by(error) == "emotion" and not isinstance(error, UselessAnswerError | FileMetadataError):
        return False, None, 0
    elif isinstance(error, OSError) and error.errno:
        hint = f"downloads go to {constants.HF_HUB_CACHE}, and HF_HOME names another place"
        return False, printable(f"{error.filename or 'the disk'}: {error.strerror}; {hint}"), 0
    name = type(error).__name__
    # Nothing listens there, or the library rejects its arguments.
    transient = name != "ConnectError" and not isinstance(error, ValueError)
    return transient, printable(f"no useful answer of {constants.ENDPOINT} for {repo_id} ({name}: {error})"), 0


def classify_status(error: BaseException, status: int, repo_id: str) -> tuple[bool, str]:
    """Whether a refusal of the Hub is transient, and its message in one line."""
    message = getattr(error, "server_message", None)
    detail = f" ({message})" if message else ""
    # 401 means a missing repository too: the Hub does not tell a stranger which private ones there are.
    messages = {
        401: f"the Hub does not know this token, or {repo_id} is not there; run `hf auth login` again",
        403: f"this token may not do that with {repo_id}{detail}; take one that may",
        404: f"no repository {repo_id} on the Hub, or no revision or file of that name in it",
        413: f"a file is too large for {repo_id} (status 413){detail}",
        507: f"{repo_id} has no space left (status 507){detail}; free some",
    }
    transient = status not in messages and (status in {408, 429} or status >= 500)
    if transient:
        return True, f"the Hub is busy or failing (status {status})"
    return False, printable(messages.get(status, f"the Hub refuses (status {status}){detail}"))


def check_can_publish(repo_id: str | None) -> None:
    """Raises `UserError` if a repository cannot be written: no name or an invalid one, or no token."""
    if not repo_id:
        raise UserError("name the repository with --hub_model_id user/name")
    check_repo_id(repo_id)
    if "/" not in repo_id:  # valid for the Hub, where some old models have no owner; none can be made
        raise UserError(f"'{repo_id}' names no owner; write user/{repo_id}")
    if not get_token():
        raise UserError("no token for the Hub; run `hf auth login`, or set HF_TOKEN")
