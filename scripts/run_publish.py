"""Publishes a folder on the Hub: an artifact with its card and its scores, or the demo page as a static Space.

An artifact goes up only if its files are those that run_evaluation.py scored. One commit holds every format, the
records, and the card with its picture, which are made from the records now. Nothing else in the folder is sent. If the
repository already holds the same files, there is no second commit.

    python scripts/run_publish.py weights/ptq --repo_id user/bert-emotion-ptq --dry_run
    python scripts/run_publish.py weights/ptq --repo_id user/bert-emotion-ptq --private
    python scripts/run_publish.py docs/demo --repo_id user/emotions --model_id user/bert-emotion-qat-int4
"""

import hashlib
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import get_token

from emotion.evaluation.record import read_records
from emotion.evaluation.schema import Record
from emotion.hub.comparison import read_benchmarks, read_means
from emotion.hub.confusion_matrix import plot_confusion_matrix
from emotion.hub.model_card import order, render_card
from emotion.hub.upload import upload
from emotion.inference.model_folder import find_formats
from emotion.inference.released import LICENSE_FILE, RECOMMENDED, RELEASED, SCORES_OF_OPENED
from emotion.utils.arguments import parse_args
from emotion.utils.checksums import SUMS_FILE, check_sums, format_sums, has_files
from emotion.utils.command import run
from emotion.utils.errors import UserError, check_repo_id
from emotion.utils.files import ROOT, sha256, without_path
from emotion.utils.machine import code_url
from emotion.utils.recipe import RECIPE_FILE, read_recipe_of

PAGE = "index.html"  # what makes a folder a Space
PAGE_FILES = (PAGE, "README.md")
SCORES = "results/metrics/"  # folder of the scores in an artifact's repository; every one has some
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")  # how the Hub's tokens look
PAGE_MODEL = "MODEL_ID"  # what stands in the page for what its repositories' names begin with: no repository's name


@dataclass
class PublishArguments:
    """Which folder goes to which repository."""

    artifact: str = field(metadata={"help": "The folder to publish; the one word that needs no flag."})
    repo_id: str = field(metadata={"help": "Where to: user/name."})
    private: bool = field(default=False, metadata={"help": "Create the repository for your eyes only."})
    dry_run: bool = field(default=False, metadata={"help": "List the files, their bytes and the card; send nothing."})
    skip_checksum: bool = field(
        default=False, metadata={"help": "Send files that differ from the folder's SHA256SUMS."}
    )
    model_id: str | None = field(
        default=None,
        metadata={
            "help": f"For the demo page: a variant's repository, such as user/bert-emotion-{RECOMMENDED}. The page "
            "loads the other variants from repositories that are named in the same way."
        },
    )
    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "Folder with the records of the artifact and the baseline."}
    )


def main(argv=None) -> None:
    """Lists the files, and sends them unless it is a dry run."""
    (arguments,) = parse_args((PublishArguments,), positional="artifact", argv=argv)
    check_repo_id(arguments.repo_id)  # both go into cards, and into the script of the page
    if arguments.model_id is not None:
        check_repo_id(arguments.model_id)
    folder = Path(arguments.artifact)
    is_page = (folder / PAGE).is_file()  # no artifact has one
    if is_page:
        if not arguments.model_id:  # a name that somebody else may own must not stand there by default
            raise UserError(f"name a repository that the page loads with --model_id user/name-{RECOMMENDED}")
        files = collect_page(folder, arguments.model_id)
    else:
        if not arguments.skip_checksum:
            check_sums(folder)
        files = collect_artifact(folder, Path(arguments.results_dir), arguments.repo_id)
    refuse_tokens(files)
    list_files(files, folder)
    if arguments.dry_run:  # needs no token and no network
        print(f"\n{files['README.md'].decode()}\ndry run: nothing was sent to {arguments.repo_id}")
        return
    repo_type = "space" if is_page else "model"
    message = f"Publish {folder.resolve().name}"
    marker = PAGE if is_page else SCORES
    print(f"published: {upload(files, arguments.repo_id, repo_type, arguments.private, message, marker)}")


def refuse_tokens(files: dict[str, Path | bytes]) -> None:
    """Raises `UserError` for a file that holds the token of this user, or what looks like another's."""
    own = get_token()
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        if TOKEN.search(content) or (own and own.encode() in content):
            raise UserError(f"{name} holds a token of the Hub; take it out, and get a new token")


def list_files(files: dict[str, Path | bytes], folder: Path) -> None:
    """Prints each file with its bytes, and the names of those in the folder that are not sent."""
    total = 0
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>12,}  {name}")
        total += size
    left_out = []  # said, so that nobody looks for a file that this program never sends
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            left_out.append(name)
    print(f"{total:>12,}  bytes in {len(files)} files; left out: {', '.join(sorted(left_out)) or 'nothing'}")


def collect_artifact(folder: Path, results: Path, repo_id: str) -> dict[str, Path | bytes]:
    """The files of an artifact's repository: its name there -> a file that exists, or the content itself.

    Raises:
        UserError: if a format was not scored as it is now, or a file is missing.
    """
    made_by, records = read_recipe_of(folder), read_records(results)
    variant = made_by.get("variant", folder.resolve().name)
    # What a clone holds may be opened in another form than it was scored in with the rest; that record stands apart.
    opened = results / SCORES_OF_OPENED
    apart = read_records(opened) if opened.is_dir() else []
    scored = find_scored(folder, order(records + apart, variant))
    files = {}
    for record in scored:
        for name in record.sha256:  # formats share the configuration and the tokenizer: the same names again
            files[name] = folder / name
        name = f"{record.name}.json"
        files[SCORES + name] = (opened if record in apart else results) / "metrics" / name
    for path in sorted((folder / "adapter").glob("adapter_*")):
        if path.name in ADAPTER_FILES:  # neither PEFT's own card, which is a form to fill in, nor somebody's notes
            files[f"adapter/{path.name}"] = path
    if (folder / LICENSE_FILE).is_file():
        files[LICENSE_FILE] = folder / LICENSE_FILE
    if made_by:
        # The recipe tells the folders that it read; others need not know where this user keeps them.
        files[RECIPE_FILE] = yaml.safe_dump(without_path(made_by), sort_keys=False, allow_unicode=True).encode()
    # The card shows FP32 beside the variant and links to the others. Its own forms are those that are sent.
    others = [record for record in records if record.variant != variant]
    runs, seeds = read_benchmarks(results, records), read_means(results)
    card = render_card(scored + others, variant, repo_id, runs=runs, seeds=seeds, code=code_url())
    files["README.md"] = card.encode()
    shown = scored[0]  # the first of them is the one that the card shows
    files[f"results/confusion_matrices/{shown.name}.png"] = draw_picture(shown)
    for path in files.values():
        if isinstance(path, Path) and not path.is_file():
            raise UserError(f"no file {path}; measure {folder} again with run_evaluation.py")
    files[SUMS_FILE] = sum_up(files)
    return files


def sum_up(files: dict[str, Path | bytes]) -> bytes:
    """The repository's SHA256SUMS: the recipe and the card differ from the folder's, and the records are added."""
    sums = {}
    for name, content in files.items():
        sums[name] = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    return format_sums(sums).encode()


def draw_picture(record: Record) -> bytes:
    """The confusion matrix that the card shows, as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matrix.png"
        plot_confusion_matrix(record, path)
        return path.read_bytes()


def find_scored(folder: Path, records: list[Record]) -> list[Record]:
    """Those of the records, in their order, that are of the very files in the folder.

    Raises:
        UserError: if a format has no such record: naming the command that measures it.
    """
    # Records from before checksums were kept say nothing of the files that are here now.
    scored = [record for record in records if record.sha256 and has_files(folder, record.sha256)]
    for format, weights in find_formats(folder).items():
        name = weights.relative_to(folder).as_posix()
        if not any(name in record.sha256 for record in scored):
            raise UserError(
                f"{weights} was not scored as it is now; run "
                f"python scripts/run_evaluation.py {folder} --format {format}"
            )
    return scored


def collect_page(folder: Path, model_id: str) -> dict[str, bytes]:
    """The files of the demo page, with the repositories that it will load: ``model_id`` and its siblings.

    Raises:
        UserError: if ``model_id`` is not named after a variant, or a file does not have the gap for the name.
    """
    named = re.fullmatch(rf"(.+/.+)-({'|'.join(RELEASED)})", model_id)
    if not named:  # the page would look for the siblings under names that nobody gave
        raise UserError(f"--model_id {model_id}: its name must end with a variant's, as in user/name-{RECOMMENDED}")
    files = {}
    for name in PAGE_FILES:
        text = (folder / name).read_text(encoding="utf-8")
        if PAGE_MODEL not in text:  # a page that was edited: it would go on loading the repository that it names
            raise UserError(f"{folder / name} does not name {PAGE_MODEL}, which --model_id replaces")
        files[name] = text.replace(PAGE_MODEL, named[1]).encode()
    return files


if __name__ == "__main__":
    run(main)
