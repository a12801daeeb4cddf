"""Publishes a folder on the Hub: a model with its card and its scores, or the demo page as a static Space.

A model is uploaded only if its files are those that run_evaluation.py scored. One commit has every format, the
records, and the card with its picture, rendered from the records. Nothing else in the folder is uploaded. If the
repository has the same files already, there is no second commit.

    python scripts/run_publish.py weights/ptq --repo_id user/bert-emotion-ptq --dry_run
    python scripts/run_publish.py weights/ptq --repo_id user/bert-emotion-ptq --private
    python scripts/run_publish.py weights/qat-int4 --repo_id user/bert-emotion-qat-int4 --endpoint_handler
    python scripts/run_publish.py docs/demo --repo_id user/emotions --model_id user/bert-emotion-qat-int4
"""

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from emotion.utils.arguments import flag, parse_args
from emotion.utils.base_model import RECIPE_FILE, read_recipe_of
from emotion.utils.command import run
from emotion.utils.errors import TOKEN, UserError, check_repo_id, visible
from emotion.utils.files import (
    RECOMMENDED,
    ROOT,
    SUMS_FILE,
    check_sums,
    format_sums,
    has_files,
    read_sums,
    sha256,
    without_path,
)
from emotion.utils.machine import code_url

PAGE, WORKER = "index.html", "worker.js"  # a folder with the first is a Space
# What --endpoint_handler adds: the service installs the second before it calls the first
HANDLER = {"handler.py": ROOT / "scripts" / "emotion" / "hub" / "handler.py"}
HANDLER["requirements.txt"] = b"numpy>=1.26\nonnxruntime>=1.18.1\ntokenizers>=0.22\n"
SCORES = "results/metrics/"  # folder of the records in a model's repository
# What may be there beside the scored files: an adapter (not PEFT's own card, nor somebody's notes), a license
OPTIONAL_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "LICENSE")
PAGE_MODEL = "MODEL_ID"  # the placeholder in the page for the beginning of its repositories' names


# What reads records and draws is imported by the functions that need it: --help and a wrong flag wait for none of it.


@dataclass
class PublishArguments:
    """Which folder is published to which repository."""

    artifact: str = flag(help="The folder to publish.")
    repo_id: str = flag(help="Repository: user/name.")
    private: bool = flag(False, "Create a private repository.")
    dry_run: bool = flag(False, "List the files and the card; upload nothing.")
    skip_checksum: bool = flag(False, "Upload files that differ from SHA256SUMS.")
    # The page loads the other variants from repositories with the same naming.
    model_id: str | None = flag(None, f"For the demo page: a variant's repository, as user/name-{RECOMMENDED}.")
    results_dir: str = flag(str(ROOT / "results"), "Folder with the records.")
    endpoint_handler: bool = flag(False, "Add handler.py for Inference Endpoints, which answers from the ONNX file.")


def main(argv=None) -> None:
    """Lists the files, and uploads them unless it is a dry run."""
    (args,) = parse_args((PublishArguments,), positional="artifact", argv=argv)
    check_repo_id(args.repo_id)
    if args.model_id is not None:
        check_repo_id(args.model_id)
    folder = Path(args.artifact)
    is_page = (folder / PAGE).is_file()
    if is_page:
        if not args.model_id:  # no default: somebody else may own that name
            raise UserError(f"name a repository that the page loads with --model_id user/name-{RECOMMENDED}")
        files = collect_page(folder, args.model_id)
    else:
        if not args.skip_checksum:
            check_sums(folder)
        added = HANDLER if args.endpoint_handler else {}
        files = collect_artifact(folder, Path(args.results_dir), args.repo_id, not args.skip_checksum, added)
    refuse_tokens(files)
    list_files(files, folder)
    if args.dry_run:  # needs no token and no network
        print(f"\n{files['README.md'].decode()}\ndry run: nothing was sent to {args.repo_id}")
        return
    repo_type, marker = ("space", PAGE) if is_page else ("model", SCORES)
    message = f"Publish {folder.resolve().name}"
    from emotion.hub.upload import upload

    print(f"published: {upload(files, args.repo_id, repo_type, args.private, message, marker)}")


def refuse_tokens(files: dict[str, Path | bytes]) -> None:
    """Raises `UserError` if a file contains this user's token, or what looks like another one."""
    from huggingface_hub import get_token

    own = get_token()
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        if re.search(TOKEN.encode(), content) or (own and own.encode() in content):
            raise UserError(f"{name} holds a token of the Hub; take it out, and get a new token")


def list_files(files: dict[str, Path | bytes], folder: Path) -> None:
    """Prints each file with its bytes, and the names of the files in the folder that are not uploaded."""
    total = 0
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>12,}  {name}")
        total += size
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    left_out = ", ".join(sorted(present - files.keys())) or "nothing"
    print(f"{total:>12,}  bytes in {len(files)} files; left out: {visible(left_out)}")


def collect_artifact(
    folder: Path, results: Path, repo_id: str, verify: bool = True, added: dict | None = None
) -> dict[str, Path | bytes]:
    """Collects the files of a model's repository, all as they were scored: name there -> a file, or its content.

    With ``verify``, of a folder with SHA256SUMS only the files that it names; the files in ``added`` come as they are.
    """
    from emotion.evaluation.record import read_records
    from emotion.hub.comparison import read_benchmarks, read_means
    from emotion.hub.model_card import order, render_card
    from emotion.inference.model_folder import SCORES_OF_OPENED

    recipe, records = read_recipe_of(folder), read_records(results)
    variant = recipe.get("variant", folder.resolve().name)
    # The released baseline is opened in another format than it was scored in; that record is in a folder of its own.
    opened = results / SCORES_OF_OPENED
    apart = read_records(opened) if opened.is_dir() else []
    scored = find_scored(folder, order(records + apart, variant))
    files = {}
    for record in scored:
        files |= {name: folder / name for name in record.sha256}
        place = (opened if record in apart else results) / "metrics"
        files[f"{SCORES}{record.name}.json"] = place / f"{record.name}.json"
    sums = read_sums(folder) if verify else None
    present = [name for name in OPTIONAL_FILES if (folder / name).is_file() and (sums is None or name in sums)]
    files |= {name: folder / name for name in present}
    check_sums(folder, [name for name in files if files[name] == folder / name], verify)  # no link leads elsewhere
    if recipe:  # without the local paths of the folders that it read
        files[RECIPE_FILE] = yaml.safe_dump(without_path(recipe), sort_keys=False, allow_unicode=True).encode()
    # The card compares with FP32 and links to the other variants. Its own formats are those that are uploaded.
    shown = scored + [record for record in records if record.variant != variant]
    runs, seeds = read_benchmarks(results, records), read_means(results)
    files["README.md"] = render_card(shown, variant, repo_id, runs=runs, seeds=seeds, code=code_url()).encode()
    files[f"results/confusion_matrices/{scored[0].name}.png"] = draw_matrix(scored[0])
    if added and not any(record.format == "onnx" for record in scored):
        raise UserError(f"--endpoint_handler: {folder} has no onnx/ for it to answer from; make it with run_ptq.py")
    files |= added or {}
    files[SUMS_FILE] = sum_files(files, folder)
    return files


def draw_matrix(record) -> bytes:
    """The picture of a record's confusion matrix, as PNG."""
    from emotion.hub.render import plot_confusion_matrix

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matrix.png"
        plot_confusion_matrix(record, path)
        return path.read_bytes()


def sum_files(files: dict[str, Path | bytes], folder: Path) -> bytes:
    """The content of SHA256SUMS for these files; raises `UserError` if one is missing."""
    sums = {}
    for name, content in files.items():
        if isinstance(content, Path) and not content.is_file():
            raise UserError(f"no file {content}; measure {folder} again with run_evaluation.py")
        sums[name] = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    return format_sums(sums).encode()


def find_scored(folder: Path, records: list) -> list:
    """Returns the records of the files as they are now; raises `UserError` for a format without one."""
    from emotion.inference.model_folder import find_formats

    scored = [record for record in records if record.sha256 and has_files(folder, record.sha256)]
    for format, weights in find_formats(folder).items():
        name = weights.relative_to(folder).as_posix()
        if not any(name in record.sha256 for record in scored):
            command = f"python scripts/run_evaluation.py {folder} --format {format}"
            raise UserError(f"{weights} was not scored as it is now; run {command}")
    return scored


def collect_page(folder: Path, model_id: str) -> dict[str, bytes]:
    """Returns the files of the demo page, which loads ``model_id`` and the repositories of the other variants."""
    from emotion.inference.model_folder import RELEASED

    named = re.fullmatch(rf"(.+/.+)-({'|'.join(RELEASED)})", model_id)
    if not named:  # the names of the other repositories would be unknown
        raise UserError(f"--model_id {model_id}: its name must end with a variant's, as in user/name-{RECOMMENDED}")
    files = {WORKER: (folder / WORKER).read_bytes()}
    for name in (PAGE, "README.md"):
        text = (folder / name).read_text(encoding="utf-8")
        if PAGE_MODEL not in text:
            raise UserError(f"{folder / name} does not name {PAGE_MODEL}, which --model_id replaces")
        files[name] = text.replace(PAGE_MODEL, named[1]).encode()
    return files


if __name__ == "__main__":
    run(main)
