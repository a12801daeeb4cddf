"""What the Hub answers: every wait for it has an end, and an error becomes one line.

`huggingface_hub` trusts the other side: most of its requests have no timeout, it follows redirects, pages and resumed
downloads without end, and takes the name of a file in its cache from a header. A proxy, a broken server or one that
lies gets none of that here.
"""

import contextlib
import json
import math
import re
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import httpx
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_session, hf_raise_for_status, parse_ratelimit_headers

TIMEOUT_S = 60  # for each step of a request that huggingface_hub sets none for
SLOWEST, GRACE_S = 1000, 30  # bytes a second that a body must come with on average, after so many seconds
# Of one attempt. Publishing all formats takes about 50 requests, and the same address is asked once a file.
MOST_REQUESTS, MOST_OF_ONE_URL = 500, 50
LARGEST_ANSWER = 100_000_000  # bytes, of what is no file of an announced length; answers are read into memory
LONGEST_REASON = 300  # characters of a message


class OddAnswerError(Exception):
    """What came is no answer of the Hub; no class that huggingface_hub would catch, and ask for more of the same."""


@contextlib.contextmanager
def watched_requests():
    """While the block runs, the requests of huggingface_hub have timeouts and bounds, and odd answers are refused."""
    hooks = get_session().event_hooks  # of the client that is there, which may be one of the caller's own making
    watch = Watch()
    hooks["request"].append(watch.before)
    hooks["response"].append(watch.after)
    # Xet sends large files through a client of its own, which is silent for minutes where the Hub fails. Every
    # repository takes and gives them by plain HTTP too.
    xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = xet
        hooks["request"].remove(watch.before)
        hooks["response"].remove(watch.after)


class Watch:
    """The requests of one attempt."""

    def __init__(self):
        self._asked = Counter()
        self._unanswered = Counter()

    def before(self, request: httpx.Request) -> None:
        """Bounds a request. Raises `OddAnswerError` where asking once more would go on without end."""
        url = str(request.url)
        self._asked[url] += 1
        if self._asked.total() > MOST_REQUESTS or self._asked[url] > MOST_OF_ONE_URL:
            raise OddAnswerError(f"{odd_answer()}: it leads in circles at {request.url.path}")
        # huggingface_hub asks five times more, and waits longer each time; `try_again` does so and says it. The second
        # time is granted: where nothing listens, the library finds that out by it.
        key = (threading.get_ident(), request.method, url)
        if self._unanswered[key] == 2:
            raise OddAnswerError(f"the Hub gave no answer to {request.method} {request.url.path}")
        self._unanswered[key] += 1
        # The library sets 10 s for headers, then 60.
        most_s = constants.HF_HUB_ETAG_TIMEOUT if request.method == "HEAD" else math.inf
        timeouts = request.extensions["timeout"]
        request.extensions["timeout"] = {step: min(time_s or TIMEOUT_S, most_s) for step, time_s in timeouts.items()}

    def after(self, response: httpx.Response) -> None:
        """Looks at an answer's headers; see `check_answer`."""
        request = response.request
        del self._unanswered[threading.get_ident(), request.method, str(request.url)]
        check_answer(response)


def check_answer(response: httpx.Response) -> None:
    """Refuses an answer that huggingface_hub would stumble over; called when the headers are there, not the body.

    Raises:
        FileMetadataError: for headers that cannot be true; huggingface_hub then takes the file from its cache.
        HfHubHTTPError: if the Hub asks for a pause: huggingface_hub would not heed it, or wait in silence.
    """
    if response.is_redirect and not response.has_redirect_location:
        raise FileMetadataError(f"status {response.status_code} leads nowhere")
    if asked_wait(response):
        hf_raise_for_status(response)
    if response.request.method == "HEAD":
        check_names(response)
    response.stream = BoundedBody(response)


def check_names(response: httpx.Response) -> None:
    """Raises `FileMetadataError` if a header by which the cache names a folder or a file cannot be what it should."""
    asked = re.search(r"/resolve/([0-9a-f]{40})/", response.request.url.path)
    forms = {constants.HUGGINGFACE_HEADER_X_REPO_COMMIT: asked[1] if asked else "[0-9a-f]{40}"}
    # Of the last answer, after which the library asks no more: errors and redirections have ETags of their own.
    if response.is_success or response.headers.get("Location", "").startswith(("http", "//")):
        linked = constants.HUGGINGFACE_HEADER_X_LINKED_ETAG
        # A path would put the file wherever the other side likes.
        forms[linked if linked in response.headers else "ETag"] = r'(W/)?"?\w[\w.-]*"?'
    for name, form in forms.items():
        value = response.headers.get(name)
        if value is not None and not re.fullmatch(form, value):  # huggingface_hub itself asks for those that it needs
            raise FileMetadataError(f"{name} cannot be '{value}'")


class BoundedBody(httpx.SyncByteStream):
    """The body of an answer, which ends with an error where it comes too slowly or without end."""

    def __init__(self, response: httpx.Response):
        self._stream = response.stream
        is_file = response.request.method == "GET" and "/api/" not in response.request.url.path
        # httpx itself holds a body to the length that was announced.
        self._largest = None if is_file and "Content-Length" in response.headers else LARGEST_ANSWER

    def __iter__(self):
        start, size = time.monotonic(), 0
        for chunk in self._stream:
            size += len(chunk)
            if self._largest and size > self._largest:
                raise OddAnswerError(f"{odd_answer()}: an answer is larger than {self._largest:,} bytes")
            if time.monotonic() - start > GRACE_S + size / SLOWEST:
                raise OddAnswerError(f"the Hub sends fewer than {SLOWEST:,} bytes a second")
            yield chunk

    def close(self):
        self._stream.close()


def asked_wait(response: httpx.Response) -> float:
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


def explain(error: BaseException, repo_id: str) -> tuple[bool, str | None, float]:
    """What an error of huggingface_hub means.

    Returns:
        Whether it may pass by itself; its meaning in one line, None for an error of this program; the seconds that the
        Hub asks to wait.
    """
    # The library wraps errors in errors: the first of the chain with a meaning of its own counts.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for one in chain:
        # The second where the library failed to read a refusal's body.
        if isinstance(one, HfHubHTTPError | httpx.HTTPStatusError) and one.response is not None:
            passing, reason = explain_status(one, repo_id)
            return passing, one_line(reason), asked_wait(one.response)
        passing, reason = explain_one(one, repo_id)
        if reason:
            return passing, one_line(reason), 0
    if isinstance(error, LocalEntryNotFoundError):
        return False, f"{repo_id} is not in the cache, and the Hub cannot be reached", 0
    if is_of_library(error):
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return True, one_line(f"{odd_answer()} ({detail})"), 0
    return False, None, 0


def explain_one(error: BaseException, repo_id: str) -> tuple[bool, str | None]:
    """Whether an error without a status may pass, and its meaning; None if it has none of its own."""
    if isinstance(error, HFValidationError):
        return False, f"'{repo_id}' is no name for a repository"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            False,
            f"{repo_id} is not whole in the cache, and HF_HUB_OFFLINE keeps this program from the Hub",
        )
    if isinstance(error, httpx.ConnectError):
        url = error.request.url  # of the Hub, or of where it has sent us
        return False, f"the Hub ({url.scheme}://{url.netloc.decode()}) cannot be reached"
    if "client has been closed" in str(error):  # after a failed connection huggingface_hub goes on with it
        return False, f"the Hub ({constants.ENDPOINT}) cannot be reached"
    if isinstance(error, httpx.RequestError):
        return True, f"the connection to the Hub broke ({type(error).__name__})"
    if isinstance(error, OddAnswerError):
        return True, str(error)
    if isinstance(error, FileMetadataError):
        return True, f"{odd_answer()}: {error}"
    if isinstance(error, json.JSONDecodeError):  # a proxy's page, for instance
        return True, f"{odd_answer()}: it is no JSON"
    # huggingface_hub has no classes for these.
    if isinstance(error, ValueError) and "metadata" in str(error):
        return False, f"the Hub refuses the card: {error}"
    if isinstance(error, ValueError) and "LFS batch API returned errors" in str(error):
        return False, f"the Hub takes no large file of {repo_id}: {str(error).partition(':')[2]}"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return True, f"a file of {repo_id} came in another length than the Hub had announced"
    if isinstance(error, OSError) and error.errno:
        place = f"downloads go to {constants.HF_HUB_CACHE}, and HF_HOME names another place"
        return False, f"{error.filename or 'the disk'}: {error.strerror}; {place}"
    return False, None


def explain_status(error: HfHubHTTPError | httpx.HTTPStatusError, repo_id: str) -> tuple[bool, str]:
    """Whether a refusal of the Hub may pass by itself, and its meaning."""
    status, said = error.response.status_code, getattr(error, "server_message", None)
    told = f" ({said})" if said else ""
    if status in {413, 507}:  # too large, or no space left: a quota
        return False, f"the Hub takes no more for {repo_id} (status {status}){told}; free some space there"
    if status in {408, 429} or status >= 500:  # too slow, too many requests, or a failure on the Hub's side
        return True, f"the Hub is busy or failing (status {status})"
    # 401 stands for a missing repository too: the Hub does not tell a stranger which private ones there are.
    reasons = {
        401: f"the Hub does not know this token, or {repo_id} is not there; run `hf auth login` again",
        403: f"this token may not do that with {repo_id}{told}; take one that may",
        404: f"no repository {repo_id} on the Hub, or no file of that name in it",
    }
    return False, reasons.get(status, f"the Hub refused (status {status}): {said or error}")


def odd_answer() -> str:
    return f"what answers at {constants.ENDPOINT} does not speak as the Hub does"


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
    token = get_token()
    if token:  # a server may send back what it was sent
        text = text.replace(token, "(the token)")
    text = "".join(letter if letter.isprintable() else " " for letter in text[: 10 * LONGEST_REASON])
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."
