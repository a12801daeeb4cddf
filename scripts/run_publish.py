"""Publishes a folder on the Hub: an artifact with its card and its scores, or the demo page as a static Space.

An artifact goes up only if its files are those that run_evaluation.py scored, in one commit: every format, the card
(written from the records, see utils_card.py), the records and the pictures of the confusion matrices. Nothing else
that lies in the folder is sent. What is there already makes no second commit.

    python scripts/run_publish.py weights/ptq --repo_id user/bert-emotion-ptq --dry_run
    python scripts/run_publish.py weights/ptq --repo_id user/bert-emotion-ptq --private
    python scripts/run_publish.py docs/demo --repo_id user/emotions --model_id user/bert-emotion-ptq
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT, sha256, without_path
from emotion.common.flags import parse_flags
from emotion.common.recipe import RECIPE_FILE, read_recipe_of
from emotion.measure.record import read_records, record_name
from emotion.model.artifact import find_formats
from emotion.model.hub import upload
from emotion.report.cards import BASELINE, render_card

import yaml

PAGE = "index.html"  # what makes a folder a Space
PAGE_FILES = (PAGE, "README.md")
PAGE_MODEL = "user/bert-emotion-ptq"  # the repository that the page names until it is published


@dataclass
class PublishArguments:
    """What goes where."""

    artifact: str = field(metadata={"help": "The folder to publish; the one word that needs no flag."})
    repo_id: str = field(metadata={"help": "Where to: user/name."})
    private: bool = field(default=False, metadata={"help": "Create the repository for your eyes only."})
    dry_run: bool = field(default=False, metadata={"help": "List the files, their bytes and the card; send nothing."})
    model_id: str = field(default=PAGE_MODEL, metadata={"help": "For the demo page: the repository that it loads."})
    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "Folder with the records of the artifact and the baseline."}
    )


def main(argv=None) -> None:
    (arguments,) = parse_flags((PublishArguments,), positional="artifact", argv=argv)
    folder = Path(arguments.artifact)
    is_page = (folder / PAGE).is_file()
    if is_page:
        files = collect_page(folder, arguments.model_id)
    else:
        files = collect_artifact(folder, Path(arguments.results_dir), arguments.repo_id)
    sent = {folder / name for name in files}
    left_out = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p not in sent)
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in sorted(files.items())}
    for name, size in sizes.items():
        print(f"{size:>12,}  {name}")
    print(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files; left out: {', '.join(left_out) or 'nothing'}")
    if arguments.dry_run:
        print(f"\n{files['README.md'].decode()}\ndry run: nothing was sent to {arguments.repo_id}")
        return
    repo_type = "space" if is_page else "model"
    message = f"Publish {folder.resolve().name}"
    print(f"published: {upload(files, arguments.repo_id, repo_type, arguments.private, message)}")


def collect_artifact(folder: Path, results: Path, repo_id: str) -> dict[str, Path | bytes]:
    """The files of an artifact's repository: what was scored, what made it, the card and the scores."""
    made_by, records = read_recipe_of(folder), read_records(results)
    variant = made_by.get("variant", folder.resolve().name)
    scored = find_scored(folder, [record for record in records if record["variant"] == variant])
    others = [record for record in records if record["variant"] == BASELINE != variant]
    files = {name: folder / name for record in scored for name in record["sha256"]}
    files |= {f"adapter/{path.name}": path for path in sorted((folder / "adapter").glob("adapter_*"))}
    for name in map(record_name, scored):
        for path in (f"metrics/{name}.json", f"confusion_matrices/{name}.png"):
            files[f"results/{path}"] = results / path
    if made_by:
        files[RECIPE_FILE] = yaml.safe_dump(without_path(made_by), sort_keys=False, allow_unicode=True).encode()
    files["README.md"] = render_card(scored + others, variant, repo_id).encode()
    if missing := [str(path) for path in files.values() if isinstance(path, Path) and not path.is_file()]:
        raise UserError(f"no file {missing[0]}; measure {folder} again with run_evaluation.py")
    return files


def find_scored(folder: Path, records: list[dict]) -> list[dict]:
    """The records of the very files that lie in the folder; each format must have one."""
    scored = [
        record
        for record in records
        if "sha256" in record
        and all((folder / name).is_file() and sha256(folder / name) == was for name, was in record["sha256"].items())
    ]
    for format, weights in find_formats(folder).items():
        if not any(weights.relative_to(folder).as_posix() in record["sha256"] for record in scored):
            raise UserError(
                f"{weights} was not scored as it is now; run "
                f"python scripts/run_evaluation.py {folder} --format {format}"
            )
    return scored


def collect_page(folder: Path, model_id: str) -> dict[str, bytes]:
    """The files of the demo page, with the repository that it is to load."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in PAGE_FILES}
    for name, text in texts.items():
        if PAGE_MODEL not in text:
            raise UserError(f"{folder / name} does not name {PAGE_MODEL}, which --model_id replaces")
    return {name: text.replace(PAGE_MODEL, model_id).encode() for name, text in texts.items()}


if __name__ == "__main__":
    run(main)
