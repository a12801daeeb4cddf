"""Requests to the Hub: each wait has an end, what may pass is tried again, and an error becomes one line.

`huggingface_hub` retries, resumes and compares lengths. Left to this module: most requests to its API have no timeout,
it waits as long as a server asks and follows redirects without end, and it names files in its cache after headers.
No HTTP library is imported: version 1 builds on `httpx`, version 2 on `httpx2`, and their clients are alike.
"""

import contextlib
import math
import re
import sys
import threading
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from emotion.common.errors import LONGEST_REASON, UserError, mask_token

from huggingface_hub import constants
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, parse_ratelimit_headers

WAITS_S = (1, 3, 9)  # seconds before the second, third and last attempt
LONGEST_WAIT_S = 120  # between two attempts, whatever the Hub asks for
TIMEOUT_S = 60  # for each step of a request that huggingface_hub sets none for
PATIENCE_S = 20  # for which a request that has failed is repeated
LOWEST_RATE, GRACE_S = 1000, 30  # bytes a second that a body must come with on average, after so many seconds
LARGEST_ANSWER = 100_000_000  # bytes, of what is no file of an announced length; answers are read into memory


class UselessAnswerError(Exception):
    """The Hub gives no answer of use; no class that huggingface_hub would catch, to ask for more of the same."""


def endpoint_answers() -> bool:
    """Whether the Hub may be asked and answers; a refusal is an answer."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # HF_HUB_OFFLINE, or any error of the HTTP library
        return False
    return True


def ask_hub(attempt, repo_id: str):
    """Calls ``attempt``, which asks the Hub for a repository; calls it again while that can help.

    Returns:
        The result of ``attempt``.

    Raises:
        UserError: for an error that will stay, at once; for one that may pass, after the last attempt.
    """
    requests, waits_s = Requests(), iter(WAITS_S)
    while True:
        try:
            with requests.bounded():
                return attempt()
        except UserError:  # in the user's words already
            raise
        except Exception as error:
            passing, reason, asked_s = summarize(error, repo_id)
            if reason is None:  # not the Hub's: an error of this program, whose traceback is needed
                raise
            wait_s = next(waits_s, None) if passing and not requests.exhausted else None
            if wait_s is None:
                raise UserError(reason) from error
        wait_s = max(wait_s, min(asked_s, LONGEST_WAIT_S))
        asks = f", though it asks for {asked_s:.0f} s" if asked_s > LONGEST_WAIT_S else ""
        requests.report(f"{reason}; trying again in {wait_s:.0f} s{asks}")
        time.sleep(wait_s)


class Requests:
    """Bounds the requests of one call of `ask_hub`.

    Attributes:
        exhausted: whether a request failed for `PATIENCE_S`.
    """

    def __init__(self):
        self.exhausted = False
        self._reported = False
        self._detail = ""  # of the last failure
        self._failing = {}  # request that has no useful answer yet -> when it was first repeated

    @contextlib.contextmanager
    def bounded(self):
        """While the block runs, the client of huggingface_hub calls the methods below."""
        hooks = get_session().event_hooks
        self._failing.clear()
        hooks["request"].append(self._before)
        hooks["response"].append(self._after)
        # Xet sends large files through a client of its own, which is silent for minutes where the Hub fails. Every
        # repository takes and gives them by plain HTTP too.
        xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = xet
            hooks["request"].remove(self._before)
            hooks["response"].remove(self._after)

    def report(self, line: str) -> None:
        """Tells the user that a request is repeated."""
        self._reported = True
        print(line, file=sys.stderr)

    def _before(self, request) -> None:
        """Sets timeouts, and ends the repetition of a request by huggingface_hub or by a redirect."""
        key, now = _key(request), time.monotonic()
        if key in self._failing:
            self._failing[key] = first = min(now, self._failing[key])
            reason = f"the Hub gives no useful answer to {request.method} {request.url.path}{self._detail}"
            if now - first > PATIENCE_S:
                self.exhausted = True
                raise UselessAnswerError(reason)
            if not self._reported:
                self.report(mask_token(f"{reason}; trying again"))
        self._failing.setdefault(key, math.inf)
        most_s = constants.HF_HUB_ETAG_TIMEOUT if request.method == "HEAD" else math.inf
        timeouts = request.extensions["timeout"]
        request.extensions["timeout"] = {step: min(time_s or TIMEOUT_S, most_s) for step, time_s in timeouts.items()}

    def _after(self, response) -> None:
        """Looks at an answer's headers, before its body is read.

        Raises:
            FileMetadataError: for headers that cannot be true; huggingface_hub then takes the file from its cache.
            HfHubHTTPError: if the Hub asks for a pause, which huggingface_hub would not heed, or take in silence.
        """
        pause_s = requested_pause(response)
        if is_final(response) or pause_s:
            self._failing.pop(_key(response.request), None)
        else:
            self._detail = f" (status {response.status_code})"
        if pause_s:
            hf_raise_for_status(response)
        if response.request.method == "HEAD":
            check_cache_headers(response)
        response.iter_raw = bound_body(response)


def _key(request) -> tuple:
    return threading.get_ident(), request.method, str(request.url)


def is_final(response) -> bool:
    """Whether huggingface_hub takes what an answer's headers say, and asks no more."""
    return response.is_success or response.headers.get("Location", "").startswith(("http", "//"))


def check_cache_headers(response) -> None:
    """Raises `FileMetadataError` if a header by which the cache names a folder or a file cannot be what it should."""
    asked = re.search(r"/resolve/([0-9a-f]{40})/", response.request.url.path)
    forms = {constants.HUGGINGFACE_HEADER_X_REPO_COMMIT: asked[1] if asked else "[0-9a-f]{40}"}
    if is_final(response):  # errors and redirections have ETags of their own
        linked = constants.HUGGINGFACE_HEADER_X_LINKED_ETAG
        # A path would put the file wherever the other side likes.
        forms[linked if linked in response.headers else "ETag"] = r'(W/)?"?\w[\w.-]*"?'
    for name, form in forms.items():
        value = response.headers.get(name)
        if value is not None and not re.fullmatch(form, value):  # huggingface_hub itself asks for those that it needs
            raise FileMetadataError(f"{name} cannot be '{value}'")


def bound_body(response):
    """A replacement of ``response.iter_raw``, which raises where a body comes too slowly or without end."""
    read, start = response.iter_raw, time.monotonic()
    is_file = response.request.method == "GET" and "/api/" not in response.request.url.path
    # The client itself holds a body to the length that was announced.
    largest = math.inf if is_file and "Content-Length" in response.headers else LARGEST_ANSWER

    def iter_raw(chunk_size: int | None = None):
        size = 0
        for chunk in read(chunk_size):
            size += len(chunk)
            if size > largest:
                raise UselessAnswerError(f"an answer of the Hub is larger than {largest:,} bytes")
            if time.monotonic() - start > GRACE_S + size / LOWEST_RATE:
                raise UselessAnswerError(f"the Hub sends fewer than {LOWEST_RATE:,} bytes a second")
            yield chunk

    return iter_raw


def requested_pause(response) -> float:
    """The seconds that a refusal asks to wait, by Retry-After or the Hub's own header; 0 if it names none."""
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


def summarize(error: BaseException, repo_id: str) -> tuple[bool, str | None, float]:
    """What an error of a request to the Hub means.

    Returns:
        Whether it may pass by itself; its meaning in one line, None for an error of this program; the seconds that the
        Hub asks to wait.
    """
    # What the library could not get, or where it failed to read a refusal's body, is told by the cause.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for one in chain:
        if response := getattr(one, "response", None):
            return *summarize_status(one, response.status_code, repo_id), requested_pause(response)
    for one in chain:
        if isinstance(one, UselessAnswerError):
            return True, one_line(str(one)), 0
        if type(one).__module__.startswith("httpx"):
            name = f"{type(one).__name__} at {one.request.url.host}"
            return type(one).__name__ != "ConnectError", one_line(f"the connection to the Hub broke ({name})"), 0
    if isinstance(error, HFValidationError):
        return False, one_line(f"'{repo_id}' is no name for a repository"), 0
    if isinstance(error, LocalEntryNotFoundError) and not error.__cause__:  # the cache alone was asked
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        return False, f"{repo_id} is not whole in the cache, and {why}", 0
    if isinstance(error, OSError) and error.errno:
        place = f"downloads go to {constants.HF_HUB_CACHE}, and HF_HOME names another place"
        return False, one_line(f"{error.filename or 'the disk'}: {error.strerror}; {place}"), 0
    if is_of_library(error):
        root = chain[1] if isinstance(error, LocalEntryNotFoundError) else error
        reason = f"the answer of {constants.ENDPOINT} is of no use ({type(root).__name__}: {root})"
        return not isinstance(root, ValueError), one_line(reason), 0  # a card is refused, a body is no JSON
    return False, None, 0


def summarize_status(error: HfHubHTTPError, status: int, repo_id: str) -> tuple[bool, str]:
    """Whether a refusal of the Hub may pass by itself, and its meaning in one line."""
    message = getattr(error, "server_message", None)
    detail = f" ({message})" if message else ""
    if status in {413, 507}:  # too large, or no space left: a quota
        return False, one_line(f"the Hub takes no more for {repo_id} (status {status}){detail}; free some space there")
    if status in {408, 429} or status >= 500:  # too slow, too many requests, or a failure on the Hub's side
        return True, f"the Hub is busy or failing (status {status})"
    # 401 stands for a missing repository too: the Hub does not tell a stranger which private ones there are.
    reasons = {
        401: f"the Hub does not know this token, or {repo_id} is not there; run `hf auth login` again",
        403: f"this token may not do that with {repo_id}{detail}; take one that may",
        404: f"no repository {repo_id} on the Hub, or no file of that name in it",
    }
    return False, one_line(reasons.get(status, f"the Hub refused (status {status}): {message or error}"))


def is_of_library(error: BaseException) -> bool:
    """Whether an error comes out of huggingface_hub, which reads answers as if they had the right form."""
    frame = error.__traceback__
    while frame:
        if frame.tb_frame.f_globals.get("__name__", "").startswith("huggingface_hub"):
            return True
        frame = frame.tb_next
    return False


def one_line(text: str) -> str:
    """A text for the terminal: in one line of bounded length, without control characters, without the token."""
    text = mask_token(text)[: 10 * LONGEST_REASON]
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."
