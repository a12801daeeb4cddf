"""The report: a Typst source that reads the records and pictures itself, set as a PDF."""

from pathlib import Path

from emotion.common.errors import UserError

SOURCE, REPORT = Path("docs") / "report.typ", Path("docs") / "report.pdf"


def compile_report(root: Path) -> bytes | None:
    """The PDF, the same bytes from the same records; None where its source does not stand below ``root``."""
    if not (root / SOURCE).is_file():
        return None
    import typst

    # Typst cannot ask whether a file is there, and not every picture or run is.
    paths = [path for part in ("docs", "results") for path in (root / part).rglob("*.*")]
    files = {"files": ",".join(sorted(path.relative_to(root).as_posix() for path in paths))}
    try:
        return typst.compile(root / SOURCE, root=root, ignore_system_fonts=True, sys_inputs=files)
    except typst.TypstError as error:
        raise UserError(f"{SOURCE}: {error.message or error}; what it reads comes from the results") from error
